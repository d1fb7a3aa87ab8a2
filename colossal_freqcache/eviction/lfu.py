"""Evict the slot that was used least often, where old uses fade: LFU with dynamic ageing, in O(1).

    priority of a slot = number of batches that used it since it was admitted, at most 255, + the age at its last use
    victim             = lowest priority; among equals the one used longest ago
    age                = the highest priority among the victims so far

So rows that were hot once are overtaken as soon as the age has risen by their count, and the hit ratio recovers when
the working set moves; a plain LFU keeps them for ever and hits nothing. Priorities lie in age .. age + 255: one ring of
slots per priority, in order of last use, in a circle of 256 rings (priority p has ring p % 256; of the age, too, only
the remainder is kept). A slot in use that the age passes is lifted to the old end of the age's ring: order unchanged.

Shapes: C slots, n slots of one call. Nodes: 0..255 are the rings' ends, 256 + s is slot s. 9 bytes a slot.
Source: Arlitt et al. 2000, "Evaluating content management techniques for Web proxy caches" (LFU-DA), with the counts
capped; rings as in Shah, Mitra, Matani 2010, "An O(1) algorithm for implementing the LFU cache eviction scheme".
"""

from __future__ import annotations

import numpy as np
from numba import njit

OLDER, NEWER = 0, 1  # columns of links
RINGS = 256
MAX_COUNT = RINGS - 1


@njit(cache=True, nogil=True)
def _use(links, counts, age, slots, linked):
    """Count a use of slots int32 (n,) and put each at the new end of its ring; `linked`: they are in a ring already."""
    for slot in slots:
        node = slot + RINGS
        count = 1
        if linked:
            count = min(np.int64(counts[slot]) + 1, MAX_COUNT)
            links[links[node, OLDER], NEWER] = links[node, NEWER]
            links[links[node, NEWER], OLDER] = links[node, OLDER]
        counts[slot] = count
        ring = (age + count) % RINGS
        newest = links[ring, OLDER]
        links[node, OLDER] = newest
        links[node, NEWER] = ring
        links[newest, NEWER] = node
        links[ring, OLDER] = node


@njit(cache=True, nogil=True)
def _evict(links, age, in_use, victims):
    """Fill victims int32 (n,), unlink them; return how many there were and the new age. If too few, change nothing."""
    found = 0
    risen = 0
    for above in range(RINGS):
        if found == victims.size:
            break
        risen = above
        ring = (age + above) % RINGS
        node = links[ring, NEWER]
        while node != ring and found < victims.size:
            if in_use[node - RINGS] == 0:
                victims[found] = node - RINGS
                found += 1
            node = links[node, NEWER]
    if found < victims.size:
        return found, age
    for slot in victims:
        node = slot + RINGS
        links[links[node, OLDER], NEWER] = links[node, NEWER]
        links[links[node, NEWER], OLDER] = links[node, OLDER]
    target = (age + risen) % RINGS
    for above in range(risen - 1, -1, -1):  # what is left below the new age is in use: lift it, the lowest last
        ring = (age + above) % RINGS
        if links[ring, NEWER] != ring:
            oldest, newest, oldest_of_target = links[ring, NEWER], links[ring, OLDER], links[target, NEWER]
            links[target, NEWER] = oldest
            links[oldest, OLDER] = target
            links[newest, NEWER] = oldest_of_target
            links[oldest_of_target, OLDER] = newest
            links[ring, OLDER] = links[ring, NEWER] = ring
    return found, target


class LfuPolicy:
    """The policy "lfu": the C slots in 256 rings, one per priority; the slot used least often, with ageing, leaves."""

    name = "lfu"

    def __init__(self, num_slots: int, num_rows: int) -> None:
        self._links = np.zeros((RINGS + num_slots, 2), np.int32)
        self._links[:RINGS] = np.arange(RINGS)[:, None]
        self._counts = np.zeros(num_slots, np.uint8)
        self._age = 0  # modulo RINGS

    def admit(self, slots: np.ndarray, rows: np.ndarray) -> None:
        _use(self._links, self._counts, self._age, slots, False)

    def touch(self, slots: np.ndarray) -> None:
        _use(self._links, self._counts, self._age, slots, True)

    def evict(self, count: int, index) -> np.ndarray:
        victims = np.empty(count, np.int32)
        found, self._age = _evict(self._links, self._age, index.in_use, victims)
        assert found == count, f"asked for {count} victims, but only {found} resident slots are not in use"
        return victims

    def grow(self, num_slots: int) -> None:
        links, counts = np.zeros((RINGS + num_slots, 2), np.int32), np.zeros(num_slots, np.uint8)
        links[: len(self._links)], counts[: len(self._counts)] = self._links, self._counts
        self._links, self._counts = links, counts

    def check(self, row_of_slot: np.ndarray) -> None:
        slots = []
        for ring in range(RINGS):
            node = ring
            while (newer := int(self._links[node, NEWER])) != ring:
                assert self._links[newer, OLDER] == node and len(slots) < len(row_of_slot)
                assert (ring - self._age) % RINGS <= self._counts[newer - RINGS]  # the age only rises after a use
                slots.append(newer - RINGS)
                node = newer
            assert self._links[ring, OLDER] == node
        assert np.array_equal(np.sort(slots), np.flatnonzero(row_of_slot >= 0))

    def num_bytes(self) -> dict[str, int]:
        return {"index": self._links.nbytes + self._counts.nbytes}
