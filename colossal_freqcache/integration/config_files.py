"""The `freq_cache` section of a Colossal-AI config file: a Python file, or JSON, YAML, TOML, or a dict.

freq_cache = dict(cache_ratio=0.015, evict_strategy="dataset", sharding="column", optimizer="adagrad")
"""

import difflib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from colossalai.context import Config

from ..config import FreqCacheConfig

__all__ = ["load_config", "read_config_file"]

SECTION = "freq_cache"


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
