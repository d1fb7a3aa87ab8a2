"""The main job: was this product bought on a promotion? 1.2 million real purchases, tables of 1.96 million rows.

Read with colossalai.context.Config.from_file; upper-case names are hyper-parameters, `freq_cache` is the cache.
Learning rates and widths were chosen on weeks 37 to 44, with a model trained on weeks 1 to 36.
"""

DATA = "purchases"
DATA_OPTIONS = dict(last_train_week=44)

EMBEDDING_DIM = 16
BOTTOM_MLP = (64,)
TOP_MLP = (64,)
INIT_BOUND = 0.02

BATCH_SIZE = 2048
EPOCHS = 1
LEARNING_RATE = 0.005
EMBEDDING_LEARNING_RATE = 0.01
SEED = 1024
THREADS = 1  # the batches are small: a second thread gains little, and loses much on a shared machine

freq_cache = dict(cache_ratio=0.015, evict_strategy="dataset", optimizer="adagrad", sharding="column", window=0)
