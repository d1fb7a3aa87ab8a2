"""Synthetic clicks with the skew of Criteo's Kaggle set, its tables at a tenth of their rows (3.4 million).

`--synthetic tb40m` and so on choose another preset; SYNTHETIC_OPTIONS hold for any of them.
"""

SYNTHETIC = "kaggle"
SYNTHETIC_OPTIONS = dict(scale=0.1, num_train=2_000_000, num_test=200_000)

EMBEDDING_DIM = 16
BOTTOM_MLP = (64, 32)
TOP_MLP = (128, 64)
INIT_BOUND = 0.02

BATCH_SIZE = 4096
EPOCHS = 1
LEARNING_RATE = 0.005
EMBEDDING_LEARNING_RATE = 0.05
COUNT_BATCHES = 100  # the id counts come from this many training batches: a sample, as one would take of a long log
SEED = 1024
THREADS = 1

freq_cache = dict(cache_ratio=0.015, evict_strategy="dataset", optimizer="adagrad", sharding="column", window=0)
