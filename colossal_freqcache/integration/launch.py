"""From a config file to a launched process and a plugin: the `freq_cache` section of a Colossal-AI config.

# config.py, a Colossal-AI config file (or .json, .yaml, .toml, or a dict)
freq_cache = dict(cache_ratio=0.015, evict_strategy="dataset", sharding="column", optimizer="adagrad")
parallel = dict(plugin="freqcache")             # or dict(plugin="hybrid", tp_size=2, ...); may be left out
"""

import difflib
import json
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from colossalai.accelerator import get_accelerator
from colossalai.booster.plugin.plugin_base import Plugin
from colossalai.context import Config

from ..config import FreqCacheConfig
from .plugin import FreqCachePlugin
from .policy import FreqCachePolicy

__all__ = ["build_plugin", "launch_from_torch", "load_config", "read_config_file"]

SECTION = "freq_cache"
PLUGINS = ("freqcache", "hybrid")

# Plugins of Colossal-AI 0.5.0 that take no policy, or no host tensors.
REFUSED_PLUGINS = {
    "gemini": "it keeps parameters in chunks of its own",
    "low_level_zero": "it trains flat master copies, which no row rule sees",
    "torch_fsdp": "it flattens parameters",
    "torch_ddp": 'it copies every parameter to every rank; use plugin="freqcache", which is DDP for the dense part',
}


def read_config_file(path: str | Path) -> Config:
    """The settings of a .py, .json, .yaml (.yml) or .toml file, as Colossal-AI's Config.

    Raises:
        ValueError: no such file, another kind of file, or not a mapping of names to settings.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"config {path}: no such file")
    kind = path.suffix.lower()
    if kind == ".py":
        return Config.from_file(str(path))
    try:
        if kind == ".json":
            settings = json.loads(path.read_text(encoding="utf-8"))
        elif kind == ".toml":
            settings = tomllib.loads(path.read_text(encoding="utf-8"))
        elif kind in (".yaml", ".yml"):
            try:
                import yaml
            except ImportError:
                raise ValueError(f"config {path}: reading YAML needs the package pyyaml") from None
            try:
                settings = yaml.safe_load(path.read_text(encoding="utf-8"))
            except yaml.YAMLError as error:
                raise ValueError(f"config {path}: not valid YAML: {error}") from None
        else:
            raise ValueError(f"config {path}: {kind or 'no suffix'} is not allowed: .py, .json, .yaml or .toml")
    except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"config {path}: not valid {kind[1:].upper()}: {error}") from None
    if not isinstance(settings, Mapping):
        raise ValueError(f"config {path}: holds a {type(settings).__name__}: give names and settings")
    return Config(dict(settings))


def load_config(config: str | Path | Mapping[str, Any] | FreqCacheConfig) -> FreqCacheConfig:
    """The FreqCacheConfig of a Colossal-AI config: a file's path, a Config or dict that has a `freq_cache` section.

    Raises:
        ValueError: the section is missing or misspelt, or a setting in it is unknown or not allowed.
    """
    if isinstance(config, FreqCacheConfig):
        return config
    where = f"config {config}" if isinstance(config, (str, Path)) else "config"
    settings = read_config_file(config) if isinstance(config, (str, Path)) else config
    if not isinstance(settings, Mapping):
        raise ValueError(f"config is a {type(settings).__name__}: give a path, a Config or a dict")
    if SECTION not in settings:
        meant = difflib.get_close_matches(SECTION, [str(name) for name in settings], 1)
        has = ", ".join(map(str, settings)) or "nothing"
        found = f"did you mean {meant[0]!r} to be it?" if meant else f"it has {has}"
        raise ValueError(f"{where} has no section {SECTION!r} ({found}): add {SECTION} = dict(cache_ratio=0.015)")
    return FreqCacheConfig.from_dict(settings[SECTION], f"{where}: {SECTION}")


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
    parallel = {} if isinstance(settings, FreqCacheConfig) else dict(settings.get("parallel") or {})
    cache_config = load_config(config if isinstance(config, FreqCacheConfig) else settings)
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
    config: str | Path | Mapping[str, Any] | None = None, seed: int = 1024, verbose: bool = True
) -> Config:
    """Joins the process group that torchrun or `colossalai run` set up, as colossalai.launch_from_torch.

    Returns:
        the config, read. A config without a valid `freq_cache` section is refused before the group is joined.

    Raises:
        ValueError: the config cannot be read or is not allowed. RuntimeError: not started by a launcher.
    """
    # Imported only after the process group exists, it makes gloo ranks abort at exit in about one launch of eight.
    import torch._dynamo  # noqa: F401

    settings = Config()
    if config is not None:
        settings = read_config_file(config) if isinstance(config, (str, Path)) else Config(dict(config))
        load_config(settings)
    import colossalai

    colossalai.launch_from_torch(seed=seed, verbose=verbose)
    return settings
