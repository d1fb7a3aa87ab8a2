"""Train recommendation models whose embedding tables are far larger than the memory of the device, as if they fitted.

The hot rows of a table sit in a cache on the training device, all rows in a store; the result is that of the uncached
model. Public names: see `__all__`. Source: Fang et al. 2022 (arXiv:2208.05321).
"""

from . import optim
from .cache import CacheTooSmallError
from .config import FreqCacheConfig
from .embedding import FreqAwareEmbeddingBag, FreqAwareEmbeddingBagCollection
from .eviction import EvictionStrategy
from .frequency import IdFrequency

__all__ = [
    "CacheTooSmallError",
    "EvictionStrategy",
    "FreqAwareEmbeddingBag",
    "FreqAwareEmbeddingBagCollection",
    "FreqCacheConfig",
    "IdFrequency",
    "__version__",
    "optim",
]

__version__ = "0.1.0"

_PLANNED = {
    "ParallelFreqAwareEmbeddingBag": "sharding cached tables over several ranks, as a Colossal-AI parallel module",
    "Lookahead": "admitting the rows of the next batches ahead of training",
    "checkpoint": "streamed checkpoints of tables and optimizer state",
    "integration": "the Colossal-AI plugin, policy and hooks",
}


def __getattr__(name: str):
    if name in _PLANNED:
        raise NotImplementedError(f"colossal_freqcache.{name} is planned, not built yet: {_PLANNED[name]}")
    raise AttributeError(f"module 'colossal_freqcache' has no attribute {name!r}")
