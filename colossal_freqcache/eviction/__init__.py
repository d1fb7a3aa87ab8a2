"""Who leaves the cache: the eviction policies, each in a file of its own.

A policy keeps its own order over the slots and picks victims from it. It owns no map and moves no data: the cache
tells it what was admitted and touched, and changes the maps after it has chosen. Every decision is a function of the
calls alone (no clock, no randomness, no threads), and a call costs O(slots it is given) or O(victims + in-use slots
passed): never O(C), never O(R), not even once in a while (but where "lookahead" makes room for a longer window). A new
policy is a file here and a line in `_POLICIES`.

Shapes: C slots in the cache (`num_slots`), R rows of the table (`num_rows`), n slots of one call.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, NamedTuple, Protocol

import numpy as np

from .dataset import DatasetPolicy
from .lfu import LfuPolicy
from .lookahead import LookaheadPolicy
from .lru import LruPolicy
from .s3fifo import S3FifoPolicy

__all__ = ["EvictionPolicy", "EvictionStrategy", "PolicyIndex", "make_policy"]


class PolicyIndex(NamedTuple):
    """What a policy may look at when it evicts; arrays as in EvictionPolicy."""

    in_use: np.ndarray
    row_of_slot: np.ndarray
    slot_of_id: np.ndarray
    id_of_row: np.ndarray | None = None


class EvictionPolicy(Protocol):
    """The surface of a policy ("lookahead" has more). For one batch the order of calls is touch, evict, admit.

    `index` in `evict` is any object with these numpy arrays (the SlotTable has them):
    in_use int32 (C,), row_of_slot int (C,) with -1 = free, slot_of_id int32 (R,) with slot + 1 and 0 = not resident,
    id_of_row int (R,), or None where a row's number is its id.
    """

    name: str

    def __init__(self, num_slots: int, num_rows: int) -> None: ...

    def admit(self, slots: np.ndarray, rows: np.ndarray) -> None:
        """slots int32 (n,), free until now, hold rows int64 (n,) from now on; in order of admission."""

    def touch(self, slots: np.ndarray) -> None:
        """slots int32 (n,), resident, were used by a batch: each at most once, in order of first occurrence."""

    def evict(self, count: int, index: Any) -> np.ndarray:
        """Choose `count` slots whose `index.in_use` is 0, forget them, return them: int32 (count,), in eviction order.

        The caller guarantees that so many exist; an AssertionError otherwise, raised before anything was changed.
        """

    def grow(self, num_slots: int) -> None:
        """There are `num_slots` slots from now on, never fewer than before; the new ones are free. O(C)."""

    def check(self, row_of_slot: np.ndarray) -> None:
        """Assert that the policy's structures are sound and hold exactly the slots with row_of_slot[slot] >= 0."""

    def num_bytes(self) -> dict[str, int]:
        """Bytes of each part. A part that grows with the number of rows has "host" in its key; the others do not."""


class EvictionStrategy(str, Enum):  # noqa: UP042 (StrEnum would change str() and format() of the members)
    """The policies by name; each member equals its name as a string."""

    DATASET = "dataset"
    LFU = "lfu"
    LRU = "lru"
    S3FIFO = "s3fifo"
    LOOKAHEAD = "lookahead"

    @classmethod
    def parse(cls, value: str | EvictionStrategy) -> EvictionStrategy:
        """The member that `value` is or names, in any case.

        Raises ValueError with the choices for an unknown name.
        """
        try:
            return cls(value.lower())
        except (AttributeError, ValueError):
            choices = ", ".join(f'"{known.value}"' for known in cls)
            raise ValueError(f"unknown evict_strategy {value!r}: choose one of {choices}") from None


_POLICIES: dict[EvictionStrategy, type] = {
    EvictionStrategy.DATASET: DatasetPolicy,
    EvictionStrategy.LFU: LfuPolicy,
    EvictionStrategy.LRU: LruPolicy,
    EvictionStrategy.S3FIFO: S3FifoPolicy,
    EvictionStrategy.LOOKAHEAD: LookaheadPolicy,
}


def make_policy(
    strategy: str | EvictionStrategy, num_slots: int, num_rows: int, counts_of_row: np.ndarray | None = None
) -> EvictionPolicy:
    """An empty policy for a cache of `num_slots` slots over a table of `num_rows` rows; errors as in `parse`.

    counts_of_row: accesses of each row in the data set (R,), descending, where they are known; "lookahead" uses them.
    """
    strategy = EvictionStrategy.parse(strategy)
    if strategy is EvictionStrategy.LOOKAHEAD:
        return LookaheadPolicy(num_slots, num_rows, counts_of_row)
    return _POLICIES[strategy](num_slots, num_rows)
