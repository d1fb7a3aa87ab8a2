"""Train recommendation models whose embedding tables are far larger than the memory of the device, as if they fitted.

The hot rows of a table sit in a cache on the training device, all rows in a store; the result is that of the uncached
model. Public names: see `__all__`. Source: Fang et al. 2022 (arXiv:2208.05321).
"""

from . import checkpoint, optim
from .cache import CacheTooSmallError
from .config import FreqCacheConfig
from .embedding import FreqAwareEmbeddingBag, FreqAwareEmbeddingBagCollection
from .eviction import EvictionStrategy
from .frequency import IdFrequency
from .lookahead import Lookahead

__all__ = [
    "CacheTooSmallError",
    "EvictionStrategy",
    "FreqAwareEmbeddingBag",
    "FreqAwareEmbeddingBagCollection",
    "FreqCacheConfig",
    "IdFrequency",
    "Lookahead",
    "__version__",
    "checkpoint",
    "optim",
]

__version__ = "0.1.0"

# Public as well, but not of `import *`: they need colossalai, which is imported when one of them is asked for.
_INTEGRATION = ("ParallelFreqAwareEmbeddingBag", "ParallelFreqAwareEmbeddingBagCollection")


def __getattr__(name: str):
    if name in _INTEGRATION:
        from . import integration

        return getattr(integration, name)
    raise AttributeError(f"module 'colossal_freqcache' has no attribute {name!r}")
