"""SlotTable: which row sits in which slot, what is dirty, what is in use. Every map change of the cache happens here.

Knows nothing of stores, policies or values. Host arrays. Shapes: R rows (= ids) of all tables, C slots, n entries.
The one array that grows with the table, slot_of_id, is on the host; it is zero where a row is absent, so that a fresh
one is untouched zero pages. Source: MEASURED facts in docs/measured_facts.md (a map keyed by id halves the lookup).
"""

import numpy as np
import torch
from numba import njit

from .vectors import prefetch

__all__ = ["FREE", "SlotTable", "split_missing"]

FREE = -1
AHEAD = 16  # places of the map asked for before they are needed


@njit(cache=True, nogil=True)
def _mark(marks, slots, kept, added):
    for slot in slots:
        marks[slot] = (marks[slot] & kept) | added


@njit(cache=True, nogil=True)
def _marked(marks, slots, bits, marked):
    for i in range(slots.size):
        marked[i] = (marks[slots[i]] & bits) != 0


@njit(cache=True, nogil=True)
def _split(planned, resident, missing):
    found = 0
    for u in range(planned.size):  # without a branch: nobody can guess which are missing
        is_missing = planned[u] < 0
        resident[found] = planned[u]
        missing[u - found] = u
        found += 1 - is_missing
    return found


@njit(cache=True, nogil=True)
def _num_pinned(pins, slots):
    num_pinned = 0
    for slot in slots:
        num_pinned += pins[slot] > 0
    return num_pinned


@njit(cache=True, nogil=True)
def _slots_of(ids, slot_of_id, slots):
    for i in range(ids.size):
        if i + AHEAD < ids.size:
            prefetch(slot_of_id, ids[i + AHEAD])
        slots[i] = slot_of_id[ids[i]] - 1


@njit(cache=True, nogil=True)
def _admit(ids, rows, slots, slot_of_id, id_of_slot, row_of_slot):
    for i in range(slots.size):
        if i + AHEAD < slots.size:
            coming = np.int64(slots[i + AHEAD])
            prefetch(id_of_slot, coming)
            prefetch(row_of_slot, coming)
            prefetch(slot_of_id, ids[i + AHEAD])
        id_of_slot[slots[i]] = ids[i]
        row_of_slot[slots[i]] = rows[i]
        slot_of_id[ids[i]] = slots[i] + 1


@njit(cache=True, nogil=True)
def _evict(slots, slot_of_id, id_of_slot, row_of_slot, marks):
    for i in range(slots.size):
        if i + 2 * AHEAD < slots.size:
            prefetch(id_of_slot, np.int64(slots[i + 2 * AHEAD]))
        if i + AHEAD < slots.size:
            coming = np.int64(slots[i + AHEAD])
            prefetch(row_of_slot, coming)
            prefetch(marks, coming)
            prefetch(slot_of_id, np.int64(id_of_slot[coming]))
        slot = slots[i]
        slot_of_id[id_of_slot[slot]] = 0
        id_of_slot[slot] = FREE
        row_of_slot[slot] = FREE
        marks[slot] = 0


def split_missing(planned: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of int32[U] slots, -1 where missing: those that are not; int64, where the others stand."""
    resident, missing = np.empty(planned.size, np.int32), np.empty(planned.size, np.int64)
    found = _split(planned, resident, missing)
    return resident[:found], missing[: planned.size - found]


class SlotTable:
    """The maps between ids, rows and slots, and the marks of a slot.

    Attributes (torch tensors over host memory):
        slot_of_id: int32[R], slot + 1, 0 where the row is not resident (negative only while `Kernels.plan` runs).
        id_of_slot, row_of_slot: int32[C] (int64 from 2**31 rows on), FREE where empty; one array where row == id.
        marks: uint8[C], bits: DIRTY, the slot's record may differ from the store's; PREFETCHED, one of the pins is a
            prefetch's; AHEAD, some are of batches admitted ahead; PREPAID, one of those two admitted the row and
            counted its misses, and no forward has used it yet; MOVING, its record is on its way from the store.
        pins: int32[C], how many holders need the slot's row to stay (forwards, tokens, prefetches, batches ahead).
        num_slots, num_used, num_pinned: C, slots that hold a row, slots with pins > 0.
    """

    DIRTY, PREFETCHED, PREPAID, AHEAD, MOVING = map(np.uint8, (1, 2, 4, 8, 16))

    # I1  row_of_slot[s] == r and id_of_slot[s] == i  <=>  slot_of_id[i] == s + 1 and row_of_id[i] == r
    # I2  marks[s] != 0 or pins[s] > 0                 =>   row_of_slot[s] != FREE
    # I3  the newest value of a row is in its slot if it has one, else in the store, or in a move under way that will
    #     write it there before anyone else reads the store; of a MOVING slot's row, in the store likewise
    # I4  PREPAID or MOVING => PREFETCHED or AHEAD => pins[s] > 0

    def __init__(self, num_slots: int, num_rows: int, rows_are_ids: bool) -> None:
        self.num_rows = num_rows
        self._rows_are_ids = rows_are_ids
        self._number = np.int32 if num_rows < 2**31 else np.int64
        self.slot_of_id = torch.from_numpy(np.zeros(num_rows, np.int32))
        self.num_slots = self.num_used = self.num_pinned = 0
        self._fresh = 0  # slots from here on were never used
        self._returned = np.empty(0, np.int32)  # used once, free now
        self.id_of_slot = self.row_of_slot = torch.from_numpy(np.empty(0, self._number))
        self.marks = torch.empty(0, dtype=torch.uint8)
        self.pins = torch.empty(0, dtype=torch.int32)
        self.grow(num_slots)

    def grow(self, num_slots: int) -> None:
        """Adds free slots up to `num_slots`; the others keep everything."""

        def longer(old: torch.Tensor, fill: int) -> torch.Tensor:
            new = torch.full((num_slots,), fill, dtype=old.dtype)
            new[: old.numel()] = old
            return new

        self.id_of_slot = longer(self.id_of_slot, FREE)
        self.row_of_slot = self.id_of_slot if self._rows_are_ids else longer(self.row_of_slot, FREE)
        self.marks = longer(self.marks, 0)
        self.pins = longer(self.pins, 0)
        self.num_slots = num_slots
        self._marks, self._pins = self.marks.numpy(), self.pins.numpy()  # the same memory: numpy() takes its time
        self._maps = self.slot_of_id.numpy(), self.id_of_slot.numpy(), self.row_of_slot.numpy()

    def are_pinned(self, slots: np.ndarray) -> bool:
        """Whether all of `slots` have pins."""
        return _num_pinned(self._pins, slots) == slots.size

    def slots_of(self, ids: np.ndarray) -> np.ndarray:
        """int32[n]: where the rows of int64 `ids` are, -1 where they are not resident."""
        slots = np.empty(ids.size, np.int32)
        _slots_of(ids, self._maps[0], slots)
        return slots

    def mark(self, slots: np.ndarray, bit: np.uint8) -> None:
        """Sets a bit of `slots` (unique)."""
        _mark(self._marks, slots, np.uint8(0xFF), np.uint8(bit))

    def unmark(self, slots: np.ndarray, bits: int) -> None:
        """Clears bits of `slots` (unique)."""
        _mark(self._marks, slots, np.uint8(~bits & 0xFF), np.uint8(0))

    def marked(self, bits: np.uint8, slots: np.ndarray | None = None) -> np.ndarray:
        """Which of `slots` (default: all, O(C)) have one of the bits, bool."""
        if slots is None:
            return (self._marks & bits) != 0
        marked = np.empty(slots.size, np.bool_)
        _marked(self._marks, slots, np.uint8(bits), marked)
        return marked

    @property
    def num_free(self) -> int:
        """Slots that hold no row."""
        return self.num_slots - self.num_used

    def take_free(self, count: int) -> np.ndarray:
        """`count` free slots, int32[count], for rows that are about to be admitted. They stay free until `admit`."""
        assert count <= self.num_free
        reused = min(count, self._returned.size)
        fresh = np.arange(self._fresh, self._fresh + count - reused, dtype=np.int32)
        taken = np.concatenate([self._returned[self._returned.size - reused :], fresh])
        self._returned = self._returned[: self._returned.size - reused]
        self._fresh += fresh.size
        return taken

    def give_back(self, slots: np.ndarray) -> None:
        """Undoes `take_free`."""
        self._returned = np.concatenate([self._returned, slots])

    def take_back(self, slots: np.ndarray) -> None:
        """Free slots are about to get the rows back that they were taken from. They stay free until `admit`."""
        self._returned = self._returned[~np.isin(self._returned, slots)]

    def admit(self, ids: np.ndarray, rows: np.ndarray, slots: np.ndarray) -> None:
        """Row rows[i] of ids[i] now sits, clean, in the free slot slots[i]."""
        _admit(ids, rows, slots, *self._maps)
        self.num_used += slots.size

    def evict(self, slots: np.ndarray) -> None:
        """The rows in `slots` leave; the store has their newest values, or a move will write them."""
        assert not _num_pinned(self._pins, slots)
        _evict(slots, *self._maps, self._marks)
        self.num_used -= slots.size
        self._returned = np.concatenate([self._returned, slots])

    def num_bytes(self) -> dict[str, int]:
        """Bytes per slot array ("index") and of the map over all rows ("host_slot_of_id")."""
        arrays = [self.id_of_slot, self.marks, self.pins]
        if not self._rows_are_ids:
            arrays.append(self.row_of_slot)
        return {
            "index": sum(array.nbytes for array in arrays),
            "host_slot_of_id": self.slot_of_id.nbytes,
        }

    def check(self, row_of_id=None) -> None:
        """Asserts I1, I2 and I4 and the counters. For tests: O(rows)."""
        ids, rows = self.id_of_slot.numpy(), self.row_of_slot.numpy()
        used = np.flatnonzero(ids != FREE)
        assert np.array_equal(used, np.flatnonzero(rows != FREE))
        assert np.array_equal(self.slot_of_id.numpy()[ids[used]], used + 1), "I1"
        assert np.count_nonzero(self.slot_of_id.numpy()) == used.size == self.num_used, "I1: a row in two slots"
        assert np.array_equal(ids[used] if row_of_id is None else row_of_id[ids[used]], rows[used]), "I1: rows"
        free = ids == FREE
        assert not self.marks.numpy()[free].any() and not self.pins.numpy()[free].any(), "I2"
        assert (self.pins.numpy() >= 0).all() and np.count_nonzero(self.pins.numpy()) == self.num_pinned
        held = self.marked(self.PREFETCHED | self.AHEAD)
        assert (held >= self.marked(self.PREPAID | self.MOVING)).all() and (self.pins.numpy() >= held).all(), "I4"
        assert self._returned.size + self.num_slots - self._fresh == self.num_free
        assert free[self._returned].all() and free[self._fresh :].all()
