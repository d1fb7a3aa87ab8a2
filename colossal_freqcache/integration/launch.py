"""From a config file to a launched process and a plugin: the `freq_cache` section of a Colossal-AI config.

# config.py, a Colossal-AI config file (or .json, .yaml, .toml, or a dict)
freq_cache = dict(cache_ratio=0.015, evict_strategy="dataset", sharding="column", optimizer="adagrad")
parallel = dict(plugin="freqcache")             # or dict(plugin="hybrid", tp_size=2, ...); may be left out
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from colossalai.accelerator import get_accelerator
from colossalai.booster.plugin.plugin_base import Plugin
from colossalai.context import Config

from ..config import FreqCacheConfig
from .config_files import load_config, read_config_file
from .plugin import FreqCachePlugin
from .policy import FreqCachePolicy

__all__ = ["build_plugin", "launch_from_torch"]

PLUGINS = ("freqcache", "hybrid")

# Plugins of Colossal-AI 0.5.0 that take no policy, or no host tensors.
REFUSED_PLUGINS = {
    "gemini": "it keeps parameters in chunks of its own",
    "low_level_zero": "it trains flat master copies, which no row rule sees",
    "torch_fsdp": "it flattens parameters",
    "torch_ddp": 'it copies every parameter to every rank; use plugin="freqcache", which is DDP for the dense part',
}


def build_plugin(
    config: str | Path | Mapping[str, Any] | FreqCacheConfig, ids: Callable[[Any], Any] | None = None, **options: Any
) -> Plugin:
    """The Booster plugin that a config asks for, after the launch.

    Args:
        config: as in `load_config`. Its section `parallel = dict(plugin=..., **keywords)` chooses: "freqcache"
            (FreqCachePlugin, the default) or "hybrid" (HybridParallelPlugin with a FreqCachePolicy).
        ids: what a batch asks of the tables, as in FreqCachePlugin.
        options: keywords of FreqCachePlugin or FreqCachePolicy (`counts`, `pattern`, `min_rows`).

    Raises:
        ValueError: another plugin, one that cannot hold cached tables, or one that does not run here.
    """
    settings = read_config_file(config) if isinstance(config, (str, Path)) else config
    cache_config = load_config(settings)
    parallel = {} if isinstance(settings, FreqCacheConfig) else settings.get("parallel") or {}
    if not isinstance(parallel, Mapping):
        raise ValueError(f"parallel={parallel!r} is not allowed: give a dict, as in dict(plugin='hybrid', tp_size=2)")
    parallel = dict(parallel)
    name = parallel.pop("plugin", "freqcache")
    if name == "freqcache":
        return FreqCachePlugin(cache_config, ids=ids, **options, **parallel)
    if name != "hybrid":
        why = f": {REFUSED_PLUGINS[name]}" if name in REFUSED_PLUGINS else ""
        raise ValueError(
            f"parallel: plugin={name!r} cannot hold cached tables{why}. Choose one of {', '.join(map(repr, PLUGINS))}"
        )
    for setting, allowed in (("precision", ("fp32",)), ("zero_stage", (0,)), ("pp_size", (1,))):
        if parallel.setdefault(setting, allowed[0]) not in allowed:
            raise ValueError(
                f"parallel: {setting}={parallel[setting]!r} is not allowed with cached tables: rows are trained in "
                f"float32, by rules that see them; use {allowed[0]!r}"
            )
    from colossalai.booster.plugin import HybridParallelPlugin

    if get_accelerator().name == "cpu" and parallel.get("enable_all_optimization"):
        raise ValueError("parallel: enable_all_optimization needs an accelerator; leave it out on a CPU")
    return HybridParallelPlugin(
        custom_policy=FreqCachePolicy(cache_config, **options), **{"tp_size": 1, "pp_size": 1, **parallel}
    )


def launch_from_torch(
    config: str | Path | Mapping[str, Any] | FreqCacheConfig | None = None, seed: int = 1024, verbose: bool = True
) -> Config:
    """Joins the process group that torchrun or `colossalai run` set up, as colossalai.launch_from_torch.

    Returns:
        the config, read (empty for a FreqCacheConfig). One without a valid `freq_cache` section is refused before the
        group is joined.

    Raises:
        ValueError: the config cannot be read or is not allowed. RuntimeError: not started by a launcher.
    """
    # Imported only after the process group exists, it makes gloo ranks abort at exit in about one launch of eight.
    import torch._dynamo  # noqa: F401

    settings = Config()
    if config is not None and not isinstance(config, FreqCacheConfig):
        settings = read_config_file(config) if isinstance(config, (str, Path)) else Config(dict(config))
        load_config(settings)
    import colossalai

    colossalai.launch_from_torch(seed=seed, verbose=verbose)
    return settings
