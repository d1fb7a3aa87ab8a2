"""Evict the row whose next use is farthest: known for the announced batches, expected from decayed counts beyond them.

The caller announces batches ahead of their use, in order, and says when the next of them becomes the current one.

    next use known     the slot stands in the bucket of that batch; the farthest bucket leaves first
    none known         the slot stands in the ring of its score; the lowest score leaves first
    victim             a slot of the rings; only when those have none, one of the buckets

Score: every use of a row counts 1, and its count halves in each half-life of H. A row with count c at time t has

    score = t + H log2(c)            which does not change until the next use, at t' > t:
    c'    = 2^((score - t') / H) + 1, score' = t' + H log2(c')

so ordering by decayed counts needs one number per slot, written at uses only. Time runs in rows used: H is 8 times the
slots, 16 times where the data set's counts are known. It is cut into H/16, one ring each. The score of an evicted row
is remembered, so a row that comes and goes is known for what it is; and a row's count at its admission is at least what
the data set's counts let expect, relative to the row that would be the last in a cache of the most frequent ones.

Nothing is announced, and this is LRFU with a memory. Everything is announced, and it is Belady's optimum for batches.

A use of a row by an announced batch is an *entry*: the row, the batch, the row's next and previous entries. Entries are
numbered in order; last_entry[row] is the number of the row's last one, and one is alive while its batch is yet to come.

Shapes: C slots, R rows, n rows or slots of one call, E entries of the announced batches. Nodes: rings 0..255, then at
least as many buckets as announced batches (batch b has bucket b % their number), then the slots. 10 bytes a slot. Host
memory per row: 2 bytes (memory of scores) + 1 with counts + 4 once a batch is announced, zero pages until used; 16
bytes an entry (20 from 2**31 rows on).
Source: Belady 1966, "A study of replacement algorithms for a virtual-storage computer" (doi.org/10.1147/sj.52.0078);
Lee et al. 2001, "LRFU: a spectrum of policies" (doi.org/10.1109/TC.2001.970573), here in O(1) and with a memory.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numba import njit

from ..vectors import prefetch

OLDER, NEWER = 0, 1  # columns of links
RINGS = 256
STEPS = 16  # rings in a half-life: score' - t' for score - t = d rings is USED[d + BEHIND]
BEHIND, AHEAD = 160, 95  # rings kept before and after the present one: counts from 2^-10 to 2^5.9
USED = np.rint(STEPS * np.log2(1 + np.exp2(np.arange(-BEHIND, AHEAD + 1) / STEPS))).astype(np.int64)
HALF_LIFE_FILLS, HALF_LIFE_FILLS_WITH_COUNTS = 8, 16  # in slots
START = 4096  # the time at the start: what is 0 was long ago
KNOWN = 1 << 15  # bit of scores: the slot stands in a bucket; the others are the score modulo 2^15
SCORES = KNOWN - 1
MEMORY_STEP = 4  # rings in one step of a remembered score, kept modulo 2^16
MEMORIES = 2**16 - 1
EXPECTED_AT_MARGIN = 5.0  # count expected of row C - 1, where the data set's counts are known
STAMPS = 2**32 - 1
COMING, SOON = 16, 8  # how far ahead places of rows and slots are asked for, and what those point to
BATCH, NEXT, PREVIOUS = 0, 1, 2  # columns of entries: two batches, and how many entries before this one


@njit(cache=True, nogil=True)
def _expect(links, buckets, slots, i):
    """Ask for the node of a slot behind slots[i], and for the neighbours of a nearer one, asked for before."""
    if i + COMING < slots.size and slots[i + COMING] >= 0:
        prefetch(links, 2 * (np.int64(slots[i + COMING]) + RINGS + buckets))
    if i + SOON < slots.size and slots[i + SOON] >= 0:
        node = np.int64(slots[i + SOON]) + RINGS + buckets
        prefetch(links, 2 * np.int64(links[node, OLDER]))
        prefetch(links, 2 * np.int64(links[node, NEWER]))


@njit(cache=True, nogil=True)
def _unlink(links, node):
    links[links[node, OLDER], NEWER] = links[node, NEWER]
    links[links[node, NEWER], OLDER] = links[node, OLDER]


@njit(cache=True, nogil=True)
def _append(links, ring, node):
    newest = links[ring, OLDER]
    links[node, OLDER] = newest
    links[node, NEWER] = ring
    links[newest, NEWER] = node
    links[ring, OLDER] = node


@njit(cache=True, nogil=True)
def _since(score, now, mask):
    """score - now, where the score is known modulo mask + 1; no further back than BEHIND."""
    half = (mask + 1) >> 1
    return min(max(((score - now + half) & mask) - half, -BEHIND), AHEAD)


@njit(cache=True, nogil=True)
def _place(links, scores, now, buckets, slot, batch, since):
    """Link a slot where its next use, `batch` (0: none is known), or its score, now + since, puts it."""
    node = slot + RINGS + buckets
    score = (now + since) & SCORES
    if batch > 0:
        scores[slot] = score | KNOWN
        _append(links, RINGS + (batch & (buckets - 1)), node)
    else:
        scores[slot] = score
        _append(links, (now + since) % RINGS, node)


@njit(cache=True, nogil=True)
def _splice(links, ring, target):
    """Put what is in a ring before the oldest of the target."""
    if links[ring, NEWER] != ring:
        oldest, newest, oldest_of_target = links[ring, NEWER], links[ring, OLDER], links[target, NEWER]
        links[target, NEWER] = oldest
        links[oldest, OLDER] = target
        links[newest, NEWER] = oldest_of_target
        links[oldest_of_target, OLDER] = newest
        links[ring, OLDER] = links[ring, NEWER] = ring


@njit(cache=True, nogil=True)
def _pass(links, now, steps):
    """Time goes on by some rings: what falls behind stays in the oldest one."""
    for _ in range(steps):
        _splice(links, (now - BEHIND) % RINGS, (now - BEHIND + 1) % RINGS)
        now += 1


@njit(cache=True, nogil=True)
def _entry(last_entry, entry_rows, end, num_alive, row):
    """Number of the row's last entry if that is alive, else -1."""
    behind = (end - last_entry[row]) & STAMPS
    if 1 <= behind <= num_alive and entry_rows[(end - behind) & (entry_rows.size - 1)] == row:
        return end - behind
    return np.int64(-1)


@njit(cache=True, nogil=True)
def _next_use(last_entry, entry_rows, entries, end, num_alive, row):
    """The next announced batch that uses the row, 0 if there is none."""
    entry = _entry(last_entry, entry_rows, end, num_alive, row)
    if entry < 0:
        return np.int64(0)
    while True:
        previous = np.int64(entries[entry & (entry_rows.size - 1), PREVIOUS])
        if previous == 0 or previous > num_alive - (end - entry):
            return np.int64(entries[entry & (entry_rows.size - 1), BATCH])
        entry -= previous


@njit(cache=True, nogil=True)
def _announce(links, scores, buckets, last_entry, entry_rows, entries, end, num_alive, batch, rows, slots):
    """Entries for rows int (n,) unique, where `slots` int32 (n,) holds them (-1: not resident)."""
    capacity = entry_rows.size
    for i in range(rows.size):
        _expect(links, buckets, slots, i)
        if i + COMING < rows.size:
            prefetch(last_entry, np.int64(rows[i + COMING]))
        if i + SOON < rows.size:
            behind = (end - last_entry[rows[i + SOON]]) & STAMPS
            if behind <= num_alive:
                prefetch(entry_rows, (end - behind) & (capacity - 1))
                prefetch(entries, 3 * ((end - behind) & (capacity - 1)))
        row = rows[i]
        number = end + i
        last = _entry(last_entry, entry_rows, number, num_alive + i, row)
        at = number & (capacity - 1)
        entry_rows[at] = row
        entries[at, BATCH] = batch
        entries[at, NEXT] = 0
        entries[at, PREVIOUS] = 0
        last_entry[row] = number & STAMPS
        if last >= 0:
            entries[last & (capacity - 1), NEXT] = batch
            entries[at, PREVIOUS] = number - last
        elif slots[i] >= 0:
            node = slots[i] + RINGS + buckets
            _unlink(links, node)
            _append(links, RINGS + (batch & (buckets - 1)), node)
            scores[slots[i]] |= KNOWN


@njit(cache=True, nogil=True)
def _advance(links, scores, now, buckets, entry_rows, entries, first, slots, absent_rows, absent_next):
    """Rows that are not resident go to `absent_rows`, their next use to `absent_next`; returns how many there are."""
    num_absent = 0
    for i in range(slots.size):
        _expect(links, buckets, slots, i)
        slot = slots[i]
        at = (first + i) & (len(entries) - 1)
        batch = np.int64(entries[at, NEXT])
        if slot >= 0:
            _unlink(links, slot + RINGS + buckets)
            _place(links, scores, now, buckets, slot, batch, _since(np.int64(scores[slot]) & SCORES, now, SCORES))
        else:
            absent_rows[num_absent] = entry_rows[at]
            absent_next[num_absent] = batch
            num_absent += 1
    return num_absent


@njit(cache=True, nogil=True)
def _next_uses(last_entry, entry_rows, entries, end, num_alive, rows):
    batches = np.zeros(rows.size, np.int32)
    if num_alive > 0:
        for i in range(rows.size):
            batches[i] = _next_use(last_entry, entry_rows, entries, end, num_alive, rows[i])
    return batches


@njit(cache=True, nogil=True)
def _admit(links, scores, now, buckets, memory, expected, slots, rows, batches):
    for i in range(slots.size):
        if i + COMING < slots.size:
            prefetch(memory, np.int64(rows[i + COMING]))
            if expected.size:
                prefetch(expected, np.int64(rows[i + COMING]))
        row = rows[i]
        since = -BEHIND
        if memory[row] != 0:
            since = max(since, _since(np.int64(memory[row]), now // MEMORY_STEP, MEMORIES) * MEMORY_STEP)
        if expected.size:
            since = max(since, np.int64(expected[row]) - BEHIND)
        _place(links, scores, now, buckets, slots[i], np.int64(batches[i]), USED[min(since, AHEAD) + BEHIND])


@njit(cache=True, nogil=True)
def _touch(links, scores, now, buckets, slots):
    for i in range(slots.size):
        _expect(links, buckets, slots, i)
        slot = slots[i]
        known = np.int64(scores[slot]) & KNOWN
        since = USED[_since(np.int64(scores[slot]) & SCORES, now, SCORES) + BEHIND]
        if known:
            scores[slot] = ((now + since) & SCORES) | KNOWN
        else:
            _unlink(links, slot + RINGS + buckets)
            _place(links, scores, now, buckets, slot, np.int64(0), since)


@njit(cache=True, nogil=True)
def _take(links, ring, base, in_use, victims, found):
    """Victims from one ring or bucket, oldest first; returns how many there are by then. Unlinks nothing."""
    node = links[ring, NEWER]
    while node != ring and found < victims.size:
        if in_use[node - base] == 0:
            victims[found] = node - base
            found += 1
        node = links[node, NEWER]
    return found


@njit(cache=True, nogil=True)
def _evict(links, scores, now, buckets, last_batch, memory, maps, victims):
    """Fill victims int32 (n,), unlink them, remember their scores; return how many. If too few, change nothing."""
    in_use, row_of_slot = maps
    found = 0
    base = RINGS + buckets
    for ring in range(RINGS):
        if found == victims.size:
            break
        found = _take(links, (now - BEHIND + ring) % RINGS, base, in_use, victims, found)
    for before in range(buckets):
        if found == victims.size:
            break
        found = _take(links, RINGS + ((last_batch - before) & (buckets - 1)), base, in_use, victims, found)
    if found < victims.size:
        return found
    for i in range(victims.size):
        if i + COMING < victims.size:
            prefetch(memory, np.int64(row_of_slot[victims[i + COMING]]))
        slot = victims[i]
        _unlink(links, slot + base)
        since = _since(np.int64(scores[slot]) & SCORES, now, SCORES)
        memory[row_of_slot[slot]] = max(((now + since) // MEMORY_STEP) & MEMORIES, 1)
    return found


@njit(cache=True, nogil=True)
def _copy_rings(links, buckets, new_links, new_buckets, first_batch, num_batches):
    """Every ring and the buckets of num_batches batches from first_batch on, in order, into a larger array."""
    for ring in range(RINGS + num_batches):
        old_ring, new_ring = ring, ring
        if ring >= RINGS:
            old_ring = RINGS + ((first_batch + ring - RINGS) & (buckets - 1))
            new_ring = RINGS + ((first_batch + ring - RINGS) & (new_buckets - 1))
        node = links[old_ring, NEWER]
        while node != old_ring:
            _append(new_links, new_ring, node - buckets + new_buckets)
            node = links[node, NEWER]


@njit(cache=True, nogil=True)
def _forget(links, scores, now, buckets, first_batch, num_batches):
    for batch in range(first_batch, first_batch + num_batches):
        ring = RINGS + (batch & (buckets - 1))
        while links[ring, NEWER] != ring:
            slot = links[ring, NEWER] - RINGS - buckets
            _unlink(links, links[ring, NEWER])
            since = _since(np.int64(scores[slot]) & SCORES, now, SCORES)
            _place(links, scores, now, buckets, slot, np.int64(0), since)


def _expected(counts_of_row: np.ndarray, num_slots: int) -> np.ndarray:
    """uint8 (R,): STEPS * log2(expected count) + BEHIND, within 0..RINGS - 1."""
    at_margin = max(int(counts_of_row[min(num_slots, counts_of_row.size) - 1]), 1)
    steps = STEPS * np.log2(np.maximum(counts_of_row, 1e-9) * (EXPECTED_AT_MARGIN / at_margin))
    return np.clip(np.rint(steps) + BEHIND, 0, BEHIND + AHEAD).astype(np.uint8)


class LookaheadPolicy:
    """The policy "lookahead": slots in buckets by their next announced use, the others in rings by decayed count."""

    name = "lookahead"

    # L1  a resident slot is in exactly one ring or bucket, a free one in none
    # L2  in the bucket of batch b, with KNOWN set  <=>  b is the first announced batch that uses the slot's row
    # L3  else in the ring of its score, or in the oldest ring if that score has fallen behind

    def __init__(self, num_slots: int, num_rows: int, counts_of_row: np.ndarray | None = None) -> None:
        self._num_rows = num_rows
        self._buckets = 1
        self._links = np.empty((0, 2), np.int32)
        self._scores = np.zeros(0, np.uint16)
        self._now, self._used = START, 0  # time in rings, and rows used since it last went on
        self._memory = np.zeros(num_rows, np.uint16)
        self._expected = np.empty(0, np.uint8) if counts_of_row is None else _expected(counts_of_row, num_slots)
        self._half_life = HALF_LIFE_FILLS if counts_of_row is None else HALF_LIFE_FILLS_WITH_COUNTS
        self._sizes: deque[int] = deque()  # rows of each announced batch
        self._batch = 0  # the current one; those announced are the next numbers
        self._end = 1  # number of the next entry
        self._num_alive = 0
        self._last_entry = np.empty(0, np.uint32)
        self._entry_rows = np.zeros(1, np.int32 if num_rows < 2**31 else np.int64)
        self._entries = np.zeros((1, 3), np.int32)
        self._absent = self._entry_rows[:0], self._entries[:0, NEXT]  # rows of the current batch, and their next uses
        self._resize(num_slots, 1)

    def _resize(self, num_slots: int, buckets: int) -> None:
        links = np.empty((RINGS + buckets + num_slots, 2), np.int32)
        links[:] = np.arange(len(links))[:, None]
        if len(self._links):
            _copy_rings(self._links, self._buckets, links, buckets, self._batch + 1, len(self._sizes))
        scores = np.zeros(num_slots, np.uint16)
        scores[: len(self._scores)] = self._scores
        self._links, self._scores, self._buckets = links, scores, buckets

    def _use(self, count: int) -> None:
        """Some rows are used: time goes on."""
        self._used += count
        ring_uses = max(1, self._half_life * len(self._scores) // STEPS)
        steps = self._used // ring_uses
        if steps:
            _pass(self._links, self._now, steps)
            self._now += steps
            self._used -= steps * ring_uses

    # ---- what is to come ----------------------------------------------------------------------------------------

    @property
    def num_announced(self) -> int:
        """Batches that are announced and not yet current."""
        return len(self._sizes)

    def announce(self, rows: np.ndarray, slots: np.ndarray) -> None:
        """The batch after all announced ones uses rows int (n,), unique; slots int32 (n,) hold them, -1: none does."""
        if not len(self._last_entry):
            self._last_entry = np.zeros(self._num_rows, np.uint32)
        if len(self._sizes) == self._buckets:
            self._resize(len(self._scores), 2 * self._buckets)
        self._make_room(self._num_alive + rows.size)
        self._absent = self._absent[0][:0], self._absent[1][:0]  # they may be among these
        self._sizes.append(rows.size)
        batch = self._batch + len(self._sizes)
        known = self._last_entry, self._entry_rows, self._entries, self._end, self._num_alive
        _announce(self._links, self._scores, self._buckets, *known, batch, rows, slots)
        self._end += rows.size
        self._num_alive += rows.size

    def _make_room(self, num_alive: int) -> None:
        old = len(self._entries)
        if num_alive > old:
            capacity = 1 << (num_alive - 1).bit_length()
            numbers = np.arange(self._end - self._num_alive, self._end)
            for name in ("_entry_rows", "_entries"):
                array = getattr(self, name)
                larger = np.zeros((capacity, *array.shape[1:]), array.dtype)
                larger[numbers % capacity] = array[numbers % old]
                setattr(self, name, larger)

    def advance(self, slots: np.ndarray) -> None:
        """The next announced batch is the current one; its rows, in the announced order, are in slots int32 (n,)."""
        first = self._end - self._num_alive
        rows, batches = np.empty(slots.size, self._entry_rows.dtype), np.empty(slots.size, np.int32)
        rings = self._links, self._scores, self._now, self._buckets
        absent = _advance(*rings, self._entry_rows, self._entries, first, slots, rows, batches)
        self._absent = rows[:absent].copy(), batches[:absent].copy()
        self._batch += 1
        self._num_alive -= self._sizes.popleft()

    def forget(self) -> None:
        """Nothing is announced any more."""
        _forget(self._links, self._scores, self._now, self._buckets, self._batch + 1, len(self._sizes))
        self._batch += len(self._sizes)
        self._absent = self._absent[0][:0], self._absent[1][:0]
        self._sizes.clear()
        self._num_alive = 0

    # ---- EvictionPolicy -----------------------------------------------------------------------------------------

    def admit(self, slots: np.ndarray, rows: np.ndarray) -> None:
        self._use(slots.size)
        absent_rows, batches = self._absent
        if not np.array_equal(rows, absent_rows):  # others than those that the current batch lacked
            batches = _next_uses(self._last_entry, self._entry_rows, self._entries, self._end, self._num_alive, rows)
        self._absent = absent_rows[:0], self._absent[1][:0]
        past = self._memory, self._expected
        _admit(self._links, self._scores, self._now, self._buckets, *past, slots, rows, batches)

    def touch(self, slots: np.ndarray) -> None:
        self._use(slots.size)
        _touch(self._links, self._scores, self._now, self._buckets, slots)

    def evict(self, count: int, index) -> np.ndarray:
        victims = np.empty(count, np.int32)
        last_batch = self._batch + len(self._sizes)
        rings = self._links, self._scores, self._now, self._buckets
        found = _evict(*rings, last_batch, self._memory, (index.in_use, index.row_of_slot), victims)
        assert found == count, f"asked for {count} victims, but only {found} resident slots are not in use"
        return victims

    def grow(self, num_slots: int) -> None:
        self._resize(num_slots, self._buckets)

    def check(self, row_of_slot: np.ndarray) -> None:
        slots = []
        base = RINGS + self._buckets
        for ring in range(base):
            node = ring
            while (newer := int(self._links[node, NEWER])) != ring:
                assert self._links[newer, OLDER] == node and len(slots) < len(row_of_slot)
                slot = newer - base
                next_use = self._next_use(row_of_slot[slot])
                assert bool(self._scores[slot] & KNOWN) == (next_use > 0) == (ring >= RINGS), "L2"
                assert ring < RINGS or ring == RINGS + next_use % self._buckets, "L2"
                since = _since(int(self._scores[slot]) & SCORES, self._now, SCORES)
                assert ring >= RINGS or ring == (self._now + since) % RINGS, "L3"
                slots.append(slot)
                node = newer
            assert self._links[ring, OLDER] == node
        assert np.array_equal(np.sort(slots), np.flatnonzero(row_of_slot >= 0)), "L1"

    def _next_use(self, row: int) -> int:
        if not self._num_alive:
            return 0
        return _next_use(self._last_entry, self._entry_rows, self._entries, self._end, self._num_alive, row)

    def num_bytes(self) -> dict[str, int]:
        parts = {
            "index": self._links.nbytes + self._scores.nbytes,
            "window": self._entry_rows.nbytes + self._entries.nbytes,
            "host_scores": self._memory.nbytes + self._expected.nbytes,
        }
        return {**parts, "host_last_entry": self._last_entry.nbytes} if len(self._last_entry) else parts
