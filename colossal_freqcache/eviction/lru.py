"""Evict the slot whose last use is longest ago.

The slots form one ring in order of last use: node 0 is both ends, node s + 1 is slot s, links[0, NEWER] is the oldest.
Admitted and touched slots move to the new end, in the order of the call; a slot in use stays where it is.

Shapes: C slots, n slots of one call. 8 bytes a slot.
"""

from __future__ import annotations

import numpy as np
from numba import njit

OLDER, NEWER = 0, 1  # columns of links


@njit(cache=True, nogil=True)
def _append(links, slots, linked):
    """Put slots int32 (n,) at the new end; `linked`: take them out of their places first."""
    for slot in slots:
        node = slot + 1
        if linked:
            links[links[node, OLDER], NEWER] = links[node, NEWER]
            links[links[node, NEWER], OLDER] = links[node, OLDER]
        newest = links[0, OLDER]
        links[node, OLDER] = newest
        links[node, NEWER] = 0
        links[newest, NEWER] = node
        links[0, OLDER] = node


@njit(cache=True, nogil=True)
def _evict(links, in_use, victims):
    """Fill victims int32 (n,) from the old end, unlink them; return how many there were. If too few, change nothing."""
    found = 0
    node = links[0, NEWER]
    while found < victims.size and node != 0:
        if in_use[node - 1] == 0:
            victims[found] = node - 1
            found += 1
        node = links[node, NEWER]
    if found == victims.size:
        for slot in victims:
            node = slot + 1
            links[links[node, OLDER], NEWER] = links[node, NEWER]
            links[links[node, NEWER], OLDER] = links[node, OLDER]
    return found


class LruPolicy:
    """The policy "lru": the C slots in one ring, in order of last use; the slot used longest ago leaves first."""

    name = "lru"

    def __init__(self, num_slots: int, num_rows: int) -> None:
        self._links = np.zeros((num_slots + 1, 2), np.int32)

    def admit(self, slots: np.ndarray, rows: np.ndarray) -> None:
        _append(self._links, slots, False)

    def touch(self, slots: np.ndarray) -> None:
        _append(self._links, slots, True)

    def evict(self, count: int, index) -> np.ndarray:
        victims = np.empty(count, np.int32)
        found = _evict(self._links, index.in_use, victims)
        assert found == count, f"asked for {count} victims, but only {found} resident slots are not in use"
        return victims

    def grow(self, num_slots: int) -> None:
        links = np.zeros((num_slots + 1, 2), np.int32)
        links[: len(self._links)] = self._links
        self._links = links

    def check(self, row_of_slot: np.ndarray) -> None:
        slots, node = [], 0
        while (newer := int(self._links[node, NEWER])) != 0:
            assert self._links[newer, OLDER] == node and len(slots) < len(row_of_slot)
            slots.append(newer - 1)
            node = newer
        assert self._links[0, OLDER] == node
        assert np.array_equal(np.sort(slots), np.flatnonzero(row_of_slot >= 0))

    def num_bytes(self) -> dict[str, int]:
        return {"index": self._links.nbytes}
