"""Evict rows that were used once quickly, and keep those that come back: S3-FIFO, three first-in-first-out queues.

    small   a tenth of the slots: new rows enter here; at its old end a row that was used again moves to main, any
            other leaves the cache and is remembered by ghost
    main    the rest: at its old end a row with uses left goes round again with one use fewer, any other leaves
    ghost   the last rows that left from small, as many as main has slots: a row remembered here is admitted to main

A use is a batch after the one that admitted the row; at most 3 are counted. A victim comes from small while small has
its share of the slots or more. All victims of a batch are chosen before its rows are admitted, so the i-th victim
counts i rows as in small already: as if rows came one by one. Rows in use keep their places and the search goes on
behind them; where one queue has nothing else, the other gives the victim. The number of rows that move on instead of
leaving is bounded per call, else the first miss after a long time of hits would walk all slots; after that, rows leave
in queue order.

Ghost is no queue but a set-associative hash of row -> clock, which counts the rows remembered before it: that gives an
entry's age. A set is written round and round; 4/3 as many places as entries, so that few are overwritten early.

Shapes: C slots, n slots of one call. Nodes: 0 and 1 stand before the oldest of small and main, 2 + s is slot s.
About 15 bytes a slot with 4-byte rows.
Source: Yang et al. 2023, "FIFO queues are all you need for cache eviction" (SOSP'23, doi.org/10.1145/3600006.3613147);
but one use, not two, takes a row from small to main, as a batch counts as one use however often it has the id.
"""

from __future__ import annotations

import numpy as np
from numba import njit

SMALL, MAIN, END = 0, 1, -1
MAX_USES = 3
SECOND_CHANCES, CHANCES_PER_CALL = 4, 256  # rows that may move on: per victim, and in any call beside those
WAYS = 16  # entries of a set of ghost
STAMP_MASK = 2**32 - 1
LONG_AGO = 2**31  # an age that no living entry has: living ones are overwritten long before
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: spreads neighbouring rows over all sets


@njit(cache=True, nogil=True)
def _ghost_set(row, num_sets):
    spread = (np.uint64(row) * GOLDEN) >> np.uint64(32)
    return np.int64((spread * np.uint64(num_sets)) >> np.uint64(32))


@njit(cache=True, nogil=True)
def _remember(ghost_rows, ghost_stamps, ghost_turns, clock, row):
    ghost_set = _ghost_set(row, len(ghost_rows))
    way = ghost_turns[ghost_set]
    ghost_rows[ghost_set, way] = row
    ghost_stamps[ghost_set, way] = clock & STAMP_MASK
    ghost_turns[ghost_set] = (way + 1) % WAYS


@njit(cache=True, nogil=True)
def _remember_again(ghost_rows, ghost_stamps, ghost_turns, rows, clocks):
    for i in range(rows.size):
        _remember(ghost_rows, ghost_stamps, ghost_turns, clocks[i], rows[i])


@njit(cache=True, nogil=True)
def _recall(ghost_rows, ghost_stamps, clock, capacity, row):
    """Whether ghost remembers the row; it does not from now on."""
    ghost_set = _ghost_set(row, len(ghost_rows))
    for way in range(WAYS):  # an expired entry of the row may stand before a living one: look at both
        if ghost_rows[ghost_set, way] == row and (clock - ghost_stamps[ghost_set, way]) & STAMP_MASK <= capacity:
            ghost_stamps[ghost_set, way] = (clock - LONG_AGO) & STAMP_MASK
            return True
    return False


@njit(cache=True, nogil=True)
def _append(newer, newest, sizes, queue, node):
    newer[newest[queue]] = node
    newer[node] = END
    newest[queue] = node
    sizes[queue] += 1


@njit(cache=True, nogil=True)
def _admit(newer, newest, sizes, uses, ghost_rows, ghost_stamps, clock, capacity, slots, rows):
    for i in range(slots.size):
        remembered = _recall(ghost_rows, ghost_stamps, clock[0], capacity, rows[i])
        uses[slots[i]] = 0
        _append(newer, newest, sizes, MAIN if remembered else SMALL, slots[i] + 2)


@njit(cache=True, nogil=True)
def _touch(uses, slots):
    for slot in slots:
        uses[slot] = min(uses[slot] + 1, MAX_USES)


@njit(cache=True, nogil=True)
def _count_free(newer, in_use, limit):
    """Number of queued slots that are not in use, counted up to `limit`."""
    found = 0
    for queue in range(2):
        node = newer[queue]
        while node != END and found < limit:
            found += in_use[node - 2] == 0
            node = newer[node]
    return found


@njit(cache=True, nogil=True)
def _evict(newer, newest, sizes, uses, small_share, ghost_rows, ghost_stamps, ghost_turns, clock, maps, victims):
    """Fill victims int32 (n,); at least n queued slots are not in use, so one of the two walks can always go on."""
    in_use, row_of_slot = maps
    found = 0
    chances = SECOND_CHANCES * victims.size + CHANCES_PER_CALL
    before = np.array([SMALL, MAIN])  # in each queue, the node before the next candidate: rows in use stay behind it
    while found < victims.size:
        queue = SMALL if sizes[SMALL] + found >= small_share else MAIN
        if newer[before[queue]] == END:
            queue = SMALL + MAIN - queue
        node = newer[before[queue]]
        slot = node - 2
        if in_use[slot] != 0:
            before[queue] = node
            continue
        newer[before[queue]] = newer[node]
        if newest[queue] == node:
            newest[queue] = before[queue]
        sizes[queue] -= 1
        if chances > 0 and uses[slot] > 0:
            chances -= 1
            uses[slot] = 0 if queue == SMALL else uses[slot] - 1
            _append(newer, newest, sizes, MAIN, node)
            continue
        if queue == SMALL:
            _remember(ghost_rows, ghost_stamps, ghost_turns, clock[0], row_of_slot[slot])
            clock[0] += 1
        victims[found] = slot
        found += 1


class S3FifoPolicy:
    """The policy "s3fifo": the C slots in two queues, small and main, and a memory, ghost, of rows that left small."""

    name = "s3fifo"

    # Q1  a resident slot is in exactly one queue, a free one in none; sizes[q] is the length of queue q
    # Q2  a row that ghost remembers is not resident
    # Q3  ghost remembers a row  =>  it was among the last `ghost_capacity` that left from small

    def __init__(self, num_slots: int, num_rows: int) -> None:
        self._newer = np.full(2 + num_slots, END, np.int32)
        self._newest = np.array([SMALL, MAIN])
        self._sizes = np.zeros(2, np.int64)
        self._uses = np.zeros(num_slots, np.uint8)
        self._row_dtype = np.int32 if num_rows < 2**31 else np.int64
        self._clock = np.array([LONG_AGO])  # rows remembered so far, + LONG_AGO so that a zero stamp is of long ago
        self._size_for(num_slots)

    def _size_for(self, num_slots: int) -> None:
        self._small_share = max(1, num_slots // 10)
        self._ghost_capacity = num_slots - self._small_share
        num_sets = max(1, -(-4 * self._ghost_capacity // (3 * WAYS)))
        self._ghost_rows = np.zeros((num_sets, WAYS), self._row_dtype)
        self._ghost_stamps = np.zeros((num_sets, WAYS), np.uint32)
        self._ghost_turns = np.zeros(num_sets, np.uint8)

    def _remembered(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows that ghost remembers and their clocks, oldest first. O(C): for growth and checks."""
        age = (self._clock - self._ghost_stamps) & STAMP_MASK
        living = age <= self._ghost_capacity
        order = np.argsort(-age[living])
        return self._ghost_rows[living][order], (self._clock - age[living])[order]

    def admit(self, slots: np.ndarray, rows: np.ndarray) -> None:
        ghost = self._ghost_rows, self._ghost_stamps, self._clock, self._ghost_capacity
        _admit(self._newer, self._newest, self._sizes, self._uses, *ghost, slots, rows)

    def touch(self, slots: np.ndarray) -> None:
        _touch(self._uses, slots)

    def evict(self, count: int, index) -> np.ndarray:
        found = _count_free(self._newer, index.in_use, count)
        assert found == count, f"asked for {count} victims, but only {found} resident slots are not in use"
        victims = np.empty(count, np.int32)
        queues = self._newer, self._newest, self._sizes, self._uses, self._small_share
        ghost = self._ghost_rows, self._ghost_stamps, self._ghost_turns, self._clock
        _evict(*queues, *ghost, (index.in_use, index.row_of_slot), victims)
        return victims

    def grow(self, num_slots: int) -> None:
        added = num_slots - len(self._uses)
        self._newer = np.append(self._newer, np.full(added, END, np.int32))
        self._uses = np.append(self._uses, np.zeros(added, np.uint8))
        remembered = self._remembered()
        self._size_for(num_slots)
        _remember_again(self._ghost_rows, self._ghost_stamps, self._ghost_turns, *remembered)

    def check(self, row_of_slot: np.ndarray) -> None:
        slots = []
        for queue in (SMALL, MAIN):
            node, before = queue, len(slots)
            while (newer := int(self._newer[node])) != END:
                assert len(slots) < len(row_of_slot)
                slots.append(newer - 2)
                node = newer
            assert self._newest[queue] == node and self._sizes[queue] == len(slots) - before
        assert np.array_equal(np.sort(slots), np.flatnonzero(row_of_slot >= 0))
        rows, _ = self._remembered()
        assert len(np.unique(rows)) == len(rows) and not np.isin(rows, row_of_slot).any()
        assert (self._uses <= MAX_USES).all()

    def num_bytes(self) -> dict[str, int]:
        history = self._ghost_rows.nbytes + self._ghost_stamps.nbytes + self._ghost_turns.nbytes
        return {"index": self._newer.nbytes + self._uses.nbytes, "history": history}  # "ghost" would read as "host"
