"""Ahead: what a RowCache knows of the batches to come, and what it holds for those that come next.

Knows ids, rows and slots; nothing of loaders, modules or gradients. All maps are changed in the thread that calls, in
the order of the calls; only records are moved by another thread (`transfers`), between slots that nobody else touches.
So neither values nor decisions depend on timing.

The life of a batch:
    announced    its ids are known: the policy orders its rows by them. It holds no slot.
    admitted     its rows have slots, one pin each, though some records may still be on their way. In order only, and
                 only where they fit beside what is in use; what does not fit is admitted by its own forward.
    current      it was handed out. If it is admitted, its records are there, and its pins stay until the next batch is
                 handed out (unless a forward needs the room), so its micro-batches find their rows; after a forward
                 that autograd recorded, tokens hold them as well.

Three stories that the order of these steps is made for:
    early eviction   batch t+2 is admitted while t trains: it may not push out a row of t or t+1. Both hold pins.
    dirty fetch      t+1 evicts a row that was trained, t+2 wants it back: it must not read the store before t+1's
                     move has written it there. Moves are done in order, and any other access waits for all of them.
    stale slot       a row is trained while it is being written back: the store would keep half of it. Only rows without
                     a pin leave, and a row with a gradient has one until its step.
"""

import itertools
import warnings
from collections import deque
from typing import Any, NamedTuple

import numpy as np
import torch

from .kernels import WantedIds
from .slots import SlotTable, split_missing
from .transfers import Move, RowMover

__all__ = ["Ahead"]

_NO_SLOTS = np.empty(0, np.int32)


class _Gone(NamedTuple):
    """Rows that left for a move: what is needed to put them back."""

    slots: np.ndarray
    ids: np.ndarray
    rows: np.ndarray
    dirty: np.ndarray


class _Moving(NamedTuple):
    """A move under way, the slots that it fills, and the rows that made room."""

    move: Move
    taken: np.ndarray
    gone: _Gone


class _Coming:
    """An announced batch. `slots`: int32[U] while it holds them, else None."""

    def __init__(self, wanted: WantedIds) -> None:
        self.wanted = wanted
        self.slots: np.ndarray | None = None
        self.advanced = False  # the policy was told of its turn


class Ahead:
    """The batches to come, of one cache, which is a RowCache."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self._coming: deque[_Coming] = deque()
        self._current: _Coming | None = None
        self._moving: deque[_Moving] = deque()
        self._mover: RowMover | None = None
        self._warned = self._failed = False
        self.abandoned = False  # whoever announced is gone, and could not say so in the training thread

    @property
    def num_announced(self) -> int:
        """Batches that are known and not handed out."""
        return len(self._coming)

    @property
    def num_admitted(self) -> int:
        """Of these, those whose rows have slots."""
        return sum(batch.slots is not None for batch in self._coming)

    @property
    def is_moving(self) -> bool:
        """Whether records are, or may be, on their way."""
        return bool(self._moving)

    @property
    def is_holding(self) -> bool:
        """Whether a batch holds slots."""
        return any(batch.slots is not None for batch in self._holders())

    def _holders(self) -> list[_Coming]:
        batches = [] if self._current is None else [self._current]
        return [batch for batch in (*batches, *self._coming) if batch.slots is not None]

    # ---- what a loader calls ------------------------------------------------------------------------------------

    def announce(self, wanted: WantedIds) -> None:
        """The batch after all announced ones wants these ids."""
        if not self._failed:
            self._coming.append(_Coming(wanted))
            self._tell_policy(wanted)

    def hand_out(self, depth: int) -> None:
        """The next announced batch becomes the current one; the one before lets go of its rows.

        The `depth` batches behind it are given slots, in order and as far as they fit, and their rows start to be
        fetched. So is the current one, where it did not fit until now; with depth 0 that is left to its forward.

        Raises what the store raised while rows were moved; the maps are those of before the moves then.
        """
        if self._failed:
            return  # a move has failed since, and was told: nothing is announced any more
        if self._current is not None:
            self._let_go(self._current)
        self._current = batch = self._coming.popleft()
        if not batch.advanced and not depth:
            self._advance(batch, self._slots_of(batch.wanted))
        if depth and (batch.slots is not None or self._admit(batch)):
            self._finish(batch)
            for coming in itertools.islice(self._coming, depth):
                if coming.slots is None and not self._admit(coming):
                    break

    def end(self) -> None:
        """No batch comes any more: lets go of all rows, ends the thread. Raises as `hand_out`."""
        try:
            self.finish()
        finally:
            self.let_go()
            self._coming.clear()
            self._current = None
            self._failed = self.abandoned = False
            if self._cache.foresees:
                self._cache.policy.forget()
            self._close()

    def end_if_abandoned(self) -> None:
        """`end`, where nobody could call it."""
        if self.abandoned:
            self.end()

    # ---- what the cache calls -----------------------------------------------------------------------------------

    def finish(self) -> None:
        """Returns when no record is on its way. Raises as `hand_out`."""
        while self._moving:
            self._finish_one()

    def let_go(self) -> None:
        """No batch holds slots any more; what is announced stays so."""
        for batch in self._holders():
            self._let_go(batch)

    def store_changed(self) -> None:
        """The cache has another store and block, and no move is under way."""
        self._close()

    def tell_policy(self) -> None:
        """The cache has a new policy, and no batch holds slots: it hears of all batches to come."""
        for batch in self._coming:
            batch.advanced = False
            self._tell_policy(batch.wanted)

    def make_room(self, num_missing: int) -> None:
        """Lets go of rows, the farthest batch's first, until `num_missing` more fit into the slots, or none is held."""
        slots = self._cache.slots
        for batch in reversed(self._holders()):
            if slots.num_pinned + num_missing <= slots.num_slots:
                return
            self._warn(slots.num_pinned + num_missing, "a forward's rows do not fit beside those of coming batches")
            self._let_go(batch)

    def num_bytes(self) -> int:
        """Bytes of the ids of announced batches."""
        return sum(sum(part.nbytes for part in batch.wanted) for batch in self._coming)

    # ---- how ----------------------------------------------------------------------------------------------------

    def _tell_policy(self, wanted: WantedIds) -> None:
        if self._cache.foresees:
            self._cache.policy.announce(self._cache.order.rows(wanted.ids.numpy()), self._slots_of(wanted))

    def _slots_of(self, wanted: WantedIds) -> np.ndarray:
        return self._cache.slots.slots_of(wanted.ids.numpy())

    def _advance(self, batch: _Coming, slots: np.ndarray) -> None:
        batch.advanced = True
        if self._cache.foresees:
            self._cache.policy.advance(slots)

    def _finish(self, batch: _Coming) -> None:
        """Returns when all records of an admitted batch are there; those of the batches behind it may follow."""
        while self._moving and self._cache.slots.marked(SlotTable.MOVING, batch.slots).any():
            self._finish_one()

    def _admit(self, batch: _Coming) -> bool:
        """As RowCache's, but the records follow later. False, and no slot changed its row, where it does not fit."""
        cache, table = self._cache, self._cache.slots
        slots = self._slots_of(batch.wanted)
        if not batch.advanced:
            self._advance(batch, slots)
        resident, missing = split_missing(slots)
        resident = torch.from_numpy(resident)
        table.num_pinned += cache.kernels.add_pins(table.pins, resident, 1)
        if table.num_pinned + missing.size > table.num_slots:
            needed = table.num_pinned + missing.size
            cache.unpin(resident)
            self._warn(needed, "the rows of the next batch do not fit beside those in use")
            return False
        cache.policy.touch(resident.numpy())
        if missing.size:
            slots[missing] = self._start_move(batch.wanted.ids.numpy()[missing])
        batch.slots = slots
        table.mark(slots, SlotTable.AHEAD)
        self._count(batch.wanted, missing)
        return True

    def _start_move(self, ids: np.ndarray) -> np.ndarray:
        """Slots for `ids`, int32[M], each pinned once, in all maps; their records are on their way."""
        cache, table = self._cache, self._cache.slots
        rows = cache.order.rows(ids)
        gone = self._remove(ids.size - table.num_free)
        taken = table.take_free(ids.size)
        table.admit(ids, rows, taken)
        cache.policy.admit(taken, rows)
        table.num_pinned += cache.kernels.add_pins(table.pins, torch.from_numpy(taken), 1)
        table.mark(taken, SlotTable.MOVING | SlotTable.PREPAID)
        table.mark(taken, SlotTable.AHEAD)
        cache.moves += 1
        dirty = torch.from_numpy(gone.dirty)
        move = Move(
            torch.from_numpy(gone.rows)[dirty],
            torch.from_numpy(gone.slots)[dirty],
            torch.from_numpy(rows),
            torch.from_numpy(taken),
        )
        if self._mover is None:
            self._mover = RowMover(cache.store, cache.records)
        self._mover.start(move)
        self._moving.append(_Moving(move, taken, gone))
        return taken

    def _remove(self, count: int) -> _Gone:
        """The policy's choice of `count` rows leaves the maps; its records are written by the move that follows."""
        table = self._cache.slots
        victims = self._cache.choose_victims(count) if count > 0 else _NO_SLOTS
        ids, rows = (array.numpy()[victims].astype(np.int64) for array in (table.id_of_slot, table.row_of_slot))
        gone = _Gone(victims, ids, rows, table.marked(SlotTable.DIRTY, victims))
        table.evict(victims)
        self._cache.stats.evictions += victims.size
        return gone

    def _count(self, wanted: WantedIds, missing: np.ndarray) -> None:
        """The rows that are fetched. Occurrences are counted where they are looked up."""
        table_of_missing = np.searchsorted(wanted.table_ends.numpy(), missing, side="right") - 1
        per_table = self._cache.stats.misses_unique_per_table
        per_table += np.bincount(table_of_missing, minlength=per_table.size)

    def _let_go(self, batch: _Coming) -> None:
        if batch.slots is None:
            return
        slots, batch.slots = batch.slots, None
        table = self._cache.slots
        table.unmark(slots, SlotTable.AHEAD)
        for other in self._holders():
            table.mark(other.slots, SlotTable.AHEAD)
        table.unmark(slots[~table.marked(SlotTable.AHEAD, slots)], SlotTable.PREPAID)
        self._cache.unpin(torch.from_numpy(slots))

    def _finish_one(self) -> None:
        """Waits for the oldest move."""
        moving = self._moving[0]
        error = self._mover.wait(moving.move)
        if error is not None:
            self._undo()
            error.add_note("(raised while rows were fetched for a coming batch; none is admitted ahead any more)")
            raise error
        self._moving.popleft()
        cache = self._cache
        cache.slots.unmark(moving.taken, SlotTable.MOVING)
        num_written = moving.move.written_rows.numel()
        cache.stats.rows_written_back += num_written
        cache.stats.bytes_written_back += num_written * cache.layout.row_bytes
        cache.stats.rows_fetched += moving.taken.size
        cache.stats.bytes_fetched += moving.taken.size * cache.layout.row_bytes

    def _undo(self) -> None:
        """A move failed: the maps become those of before it and of the ones behind it, whose records did not move.

        What it wrote is in the store, what it did not write is still in its slot: that row gets its slot back.
        """
        cache, table = self._cache, self._cache.slots
        self.let_go()
        self._coming.clear()
        self._current = None
        while self._moving:
            move, taken, gone = self._moving.pop()
            table.unmark(taken, SlotTable.MOVING)
            table.evict(taken)
            if not move.written:  # nor are those behind it: the mover skips what follows a failure
                table.take_back(gone.slots)
                table.admit(gone.ids, gone.rows, gone.slots)
                table.mark(gone.slots[gone.dirty], SlotTable.DIRTY)
        cache.moves += 1
        cache.renew_policy()
        self._close()
        self._failed = True

    def _close(self) -> None:
        if self._mover is not None:
            self._mover.close()
            self._mover = None

    def _warn(self, needed: int, what: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{what} ({needed} for {self._cache.num_slots} slots): coming batches are admitted later, at the "
                f"latest when they are looked up. A larger cache, or a smaller depth, avoids that",
                stacklevel=3,
            )
