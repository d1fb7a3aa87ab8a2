"""FreqCacheConfig: all settings of one cache, validated once. Knows nothing of tables, devices or policies' insides."""

import dataclasses
import difflib
import math
import numbers
from collections.abc import Mapping
from typing import Any

__all__ = ["DEFAULT_CACHE_RATIO", "SHARDINGS", "FreqCacheConfig"]

# The share of the rows that Fang et al. 2022 (arXiv:2208.05321) keep on the device.
DEFAULT_CACHE_RATIO = 0.015

# Without `max_cache_bytes` a cache on a CPU may grow to this many times its initial slots before it refuses a batch.
DEFAULT_GROWTH = 4

SHARDINGS = ("column", "row", "table")

# Batches whose ids are known ahead, and whose rows are admitted ahead, where a data loader is looked ahead in.
DEFAULT_WINDOW, DEFAULT_DEPTH = 64, 1


def _refuse(field: str, value: Any, allowed: str) -> None:
    raise ValueError(f"{field}={value!r} is not allowed: {allowed}")


def _is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


@dataclasses.dataclass(frozen=True)
class FreqCacheConfig:
    """The settings of one cache; the keywords of the bags, and of the `freq_cache` section of a config file.

    Args:
        cache_ratio: share of the table's rows that get a slot, in (0, 1]. 0.015 if no size is given.
        num_slots: slots, instead of a ratio; at least 1.
        max_cache_bytes: the ceiling to which the cache may grow, in bytes of whole rows (weight and optimizer state);
            the initial size too where neither ratio nor slots are given. Default: 4 times the initial slots on a CPU.
        warmup_ratio: share of the slots that is filled with the most frequent rows at the start, in [0, 1].
        evict_strategy: name of an eviction policy or an EvictionStrategy; None: "dataset" with counts, else
            "s3fifo"; a Lookahead makes it "lookahead", for good.
        optimizer: name of the row optimizer whose state columns are reserved from the start; None: when one is bound.
        store: "ram", or an object that implements `stores.RowStore`.
        kernels: "auto", "torch" or "cpu"; of a cache on a device: "auto", "cuda" (Triton) or "torch".
        rounding_seed: of the random bits by which updates of bfloat16 and float16 rows are rounded; at least 0.
        sharding: how tables are divided over ranks: "column", "row" or "table"; None: "column".
        window: batches of a boosted data loader whose ids are known ahead (see Lookahead); None: 64; 0: no lookahead.
        depth: of these, batches whose rows are admitted ahead of training; None: 1. At most `window`.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """

    cache_ratio: float | None = None
    num_slots: int | None = None
    max_cache_bytes: int | None = None
    warmup_ratio: float = 1.0
    evict_strategy: Any = None
    optimizer: str | None = None
    store: Any = "ram"
    kernels: str = "auto"
    rounding_seed: int = 0
    window: int | None = None
    depth: int | None = None
    sharding: str | None = None

    def __post_init__(self) -> None:
        if self.cache_ratio is not None:
            if self.num_slots is not None:
                raise ValueError(
                    f"cache_ratio={self.cache_ratio!r} and num_slots={self.num_slots!r} both give the size: "
                    f"give one of them"
                )
            if not _is_number(self.cache_ratio) or not 0 < self.cache_ratio <= 1:
                _refuse("cache_ratio", self.cache_ratio, "a share of the rows in (0, 1]")
        if self.num_slots is not None and (not _is_int(self.num_slots) or self.num_slots < 1):
            _refuse("num_slots", self.num_slots, "an int of at least 1")
        if self.max_cache_bytes is not None and (not _is_int(self.max_cache_bytes) or self.max_cache_bytes < 1):
            _refuse("max_cache_bytes", self.max_cache_bytes, "an int of bytes, at least one row's")
        if not _is_number(self.warmup_ratio) or not 0 <= self.warmup_ratio <= 1:
            _refuse("warmup_ratio", self.warmup_ratio, "a share of the slots in [0, 1]")
        if not _is_int(self.rounding_seed) or self.rounding_seed < 0:
            _refuse("rounding_seed", self.rounding_seed, "an int of at least 0")
        if self.sharding is not None and self.sharding not in SHARDINGS:
            _refuse("sharding", self.sharding, f"one of {', '.join(map(repr, SHARDINGS))}")
        for field in ("window", "depth"):
            value = getattr(self, field)
            if value is not None and (not _is_int(value) or value < 0):
                _refuse(field, value, "a number of batches, at least 0")
        window, depth = self.window_and_depth()
        if depth > window:
            _refuse("depth", depth, f"at most window={window}, the batches whose ids are known")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], where: str = "freq_cache") -> "FreqCacheConfig":
        """The settings of a config file's section.

        Raises:
            ValueError: it is no mapping, or has an unknown name (the known ones are listed); and as the constructor.
        """
        if not isinstance(settings, Mapping):
            raise ValueError(f"{where} is a {type(settings).__name__}: give a dict of settings")
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in settings if name not in known]
        if unknown:
            meant = difflib.get_close_matches(str(unknown[0]), known, 1)
            raise ValueError(
                f"{where}: unknown {', '.join(map(repr, unknown))}{f' (did you mean {meant[0]!r}?)' if meant else ''}; "
                f"known are {', '.join(known)}"
            )
        return cls(**settings)

    def window_and_depth(self) -> tuple[int, int]:
        """(batches known ahead, batches admitted ahead)."""
        window = DEFAULT_WINDOW if self.window is None else int(self.window)
        return window, min(DEFAULT_DEPTH, window) if self.depth is None else int(self.depth)

    def bag_keywords(self) -> dict[str, Any]:
        """The settings that a bag's constructor takes, those that are set."""
        elsewhere = ("window", "depth", "sharding")
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in named.items() if name not in elsewhere and value is not None}

    def size_in_slots(self, num_rows: int, row_bytes: int) -> tuple[int, int]:
        """(initial slots, ceiling in slots) for a table of `num_rows` rows of `row_bytes` bytes; both in 1..num_rows.

        `max_cache_bytes` caps the initial slots as well.

        Raises:
            ValueError: `max_cache_bytes` does not hold one row.
        """
        limit = None
        if self.max_cache_bytes is not None:
            limit = int(self.max_cache_bytes) // row_bytes
            if limit < 1:
                raise ValueError(
                    f"max_cache_bytes={self.max_cache_bytes} holds no row of {row_bytes} bytes: "
                    f"give at least {row_bytes}"
                )
        if self.num_slots is not None:
            wanted = int(self.num_slots)
        elif self.cache_ratio is None and limit is not None:
            wanted = limit
        else:
            wanted = max(1, int(num_rows * (DEFAULT_CACHE_RATIO if self.cache_ratio is None else self.cache_ratio)))
        wanted = min(wanted, num_rows)
        if limit is None:
            return wanted, min(num_rows, DEFAULT_GROWTH * wanted)
        ceiling = min(num_rows, limit)
        return min(wanted, ceiling), ceiling

    def check_slots_fit(self, num_rows: int, row_bytes: int) -> None:
        """Raises ValueError where `max_cache_bytes` does not hold the `num_slots` that were asked for by number."""
        if self.num_slots is not None and self.max_cache_bytes is not None:
            held = self.max_cache_bytes // row_bytes
            if held < min(self.num_slots, num_rows):
                raise ValueError(
                    f"num_slots={self.num_slots} rows of {row_bytes} bytes pass max_cache_bytes={self.max_cache_bytes},"
                    f" which holds {held}: lower the one, or raise the other to {self.num_slots * row_bytes}"
                )

    def advice(self, needed_slots: int, row_bytes: int) -> str:
        """What to change so that `needed_slots` rows of `row_bytes` bytes fit."""
        if self.max_cache_bytes is not None:
            return f"Raise max_cache_bytes to at least {needed_slots * row_bytes}"
        return f"Set num_slots to {needed_slots}, or the ceiling max_cache_bytes to at least {needed_slots * row_bytes}"
