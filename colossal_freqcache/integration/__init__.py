"""The cache as a part of Colossal-AI: the only folder that imports colossalai.

A Colossal-AI config section turns caching on, a Booster plugin (or a shardformer policy) puts it into a model, its
hooks and launcher run it. Source of the interfaces: Colossal-AI 0.5.0.
"""

try:
    import colossalai  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"colossal_freqcache.integration needs colossalai, which cannot be imported ({error}): "
        f"pip install colossalai==0.5.0"
    ) from error

from .bags import ParallelFreqAwareEmbeddingBag, ParallelFreqAwareEmbeddingBagCollection
from .config_files import load_config, read_config_file
from .launch import build_plugin, launch_from_torch
from .op_hook import FreqCacheOpHook
from .plugin import FreqCachePlugin
from .policy import FreqCachePolicy

__all__ = [
    "FreqCacheOpHook",
    "FreqCachePlugin",
    "FreqCachePolicy",
    "ParallelFreqAwareEmbeddingBag",
    "ParallelFreqAwareEmbeddingBagCollection",
    "build_plugin",
    "launch_from_torch",
    "load_config",
    "read_config_file",
]
