"""RowCache: the hot rows of a table on the training device, all rows in a store; `prepare` makes a batch resident.

Knows ids, rows, slots and records; nothing of gradients, optimizers or modules. Work per call is O(ids + misses).
Shapes: N positions, U unique rows, M missing rows, C slots, R rows, W record width, T tables, B bags a table.
Source: Fang et al. 2022 (arXiv:2208.05321); it differs in dirty bits, pins, state that travels with its row, growth.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from .ahead import Ahead
from .config import FreqCacheConfig
from .eviction import EvictionStrategy, PolicyIndex, make_policy
from .kernels import BatchPlan, WantedIds, make_kernels
from .metrics import CacheStats
from .row_layout import RowLayout
from .row_order import RowOrder
from .slots import SlotTable, split_missing
from .stores import make_store

__all__ = ["CHUNK_BYTES", "CacheTooSmallError", "Lookup", "RowCache", "converted"]

# Whole-table passes (initialise, load, save, re-lay out) go through buffers of about this many bytes.
CHUNK_BYTES = 16 << 20


class CacheTooSmallError(ValueError):
    """A batch needs more rows at once than the cache may hold; nothing was modified."""


class Lookup(NamedTuple):
    """Where the rows of one batch sit. Valid while its rows are pinned.

    unique_of_position: int32[N], -1 for padding. slot_of_unique: int32[U]. offsets: int64[T*B+1]. num_tables: T.
    """

    unique_of_position: torch.Tensor
    slot_of_unique: torch.Tensor
    offsets: torch.Tensor
    num_tables: int

    @property
    def hold(self) -> torch.Tensor:
        """What `RowCache.unpin` takes: the slots."""
        return self.slot_of_unique


class RowCache:
    """Tables of R rows in all, C of them in `records`, the cache block.

    Args:
        table_sizes: rows of each table, T ints; tables share the cache. An id of the whole is its table's start + id.
        layout: what a record holds.
        config: settings.
        counts: accesses of each id (R,), or None; orders the rows.
        budget_row_bytes: by what `max_cache_bytes` becomes slots; default: the bytes of a record. (Shards of unequal
            width take the widest's, so that all have the same number of slots.)

    Attributes:
        records: (ceiling, W) tensor, the cache block; slots from `num_slots` on are untouched pages.
        layout, stats, slots (SlotTable), store, order (RowOrder).
        moves: goes up whenever a slot changes its row.
        ahead: the batches to come. strategy: the eviction policy's name.
        budget_row_bytes: bytes that a slot takes of `max_cache_bytes`.
        device: where `records` are. on_device: whether the maps are there, too (DeviceCache).
    """

    device = torch.device("cpu")
    on_device = False

    def __init__(
        self,
        table_sizes: list[int],
        layout: RowLayout,
        config: FreqCacheConfig,
        counts: np.ndarray | None,
        budget_row_bytes: int | None = None,
    ) -> None:
        self.config = config
        self.table_rows = torch.tensor(table_sizes, dtype=torch.int64)
        self.table_starts = torch.cumsum(self.table_rows, 0) - self.table_rows
        self.num_rows = int(self.table_rows.sum())
        strategy = config.evict_strategy
        if strategy is None:
            strategy = EvictionStrategy.S3FIFO if counts is None else EvictionStrategy.DATASET
        self.strategy = EvictionStrategy.parse(strategy)
        self.layout = layout
        self.kernels = self._make_kernels()
        self.stats = CacheStats(len(table_sizes))
        self.order = RowOrder.from_counts(counts, self.num_rows)
        self._count_runs = None  # distinct counts, descending, and how many rows have each: all that is kept of them
        if counts is not None:
            descending = np.asarray(counts)[self.order.id_of_row]
            starts = np.flatnonzero(np.concatenate([[True], descending[1:] != descending[:-1]]))
            self._count_runs = descending[starts].astype(np.float64), np.diff(starts, append=self.num_rows)
        self.moves = 0
        self.store = make_store(config.store, self._host_kernels())
        self.budget_row_bytes = budget_row_bytes or layout.row_bytes
        config.check_slots_fit(self.num_rows, self.budget_row_bytes)
        num_slots, ceiling = self.size_in_slots(self.budget_row_bytes)
        self._warned_of_growth = False
        self.store.allocate(self.num_rows, layout)
        self.ahead = self._make_ahead()
        self._start_empty(num_slots, ceiling)

    def _make_kernels(self) -> Any:
        return make_kernels(self.config.kernels, self.layout.dtype)

    def _host_kernels(self) -> Any:
        """The set that moves rows in host memory."""
        return self.kernels

    def _make_ahead(self) -> Any:
        return Ahead(self)

    def size_in_slots(self, row_bytes: int) -> tuple[int, int]:
        """(initial slots, ceiling) where a row takes `row_bytes` of `max_cache_bytes`."""
        return self.config.size_in_slots(self.num_rows, row_bytes)

    def _start_empty(self, num_slots: int, ceiling: int) -> None:
        """Fresh maps and an untouched block: nothing is resident."""
        self.slots = SlotTable(num_slots, self.num_rows, self.order.id_of_row is None)
        self.records = self.layout.empty(ceiling)  # pages are faulted in when a slot is first filled
        self._prefetched = np.empty(0, np.int32)
        self.moves += 1
        self.renew_policy()

    def renew_policy(self, strategy: EvictionStrategy | None = None) -> None:
        """A policy that has seen the resident rows admitted, in row order backwards, and nothing else.

        O(slots); for "lookahead" with counts O(rows).

        strategy: which one from here on; default: as before.
        """
        self.strategy = strategy or self.strategy
        counts_of_row = np.repeat(*self._count_runs) if self.foresees and self._count_runs is not None else None
        self.policy = make_policy(self.strategy, self.num_slots, self.num_rows, counts_of_row)
        used = np.flatnonzero(self.slots.row_of_slot.numpy() >= 0).astype(np.int32)
        rows = self.slots.row_of_slot.numpy()[used].astype(np.int64)
        order = np.argsort(-rows)
        self.policy.admit(used[order], rows[order])
        self.ahead.tell_policy()

    can_foresee = True  # there is a policy that does

    def kernels_of_thread(self) -> Any:
        """A kernel set for another thread, with a workspace of its own."""
        return self._make_kernels()

    @property
    def foresees(self) -> bool:
        """Whether the policy wants to know the batches to come."""
        return self.strategy is EvictionStrategy.LOOKAHEAD

    @property
    def may_replay(self) -> bool:
        """Whether CUDA graphs may train rows unseen by the host."""
        return False

    def is_capturing(self) -> bool:
        """Whether what is launched now goes into a CUDA graph."""
        return False

    @property
    def num_slots(self) -> int:
        """Current slots, C."""
        return self.slots.num_slots

    @property
    def ceiling(self) -> int:
        """Slots that the cache may grow to."""
        return self.records.shape[0]

    # ---- a batch ------------------------------------------------------------------------------------------------

    def prepare(
        self, values: torch.Tensor, offsets: torch.Tensor, padding_ids: torch.Tensor, counted: bool = True
    ) -> Lookup:
        """Makes every row of a batch resident and pins each once; the caller unpins `slot_of_unique`.

        Args:
            values: int64[N] ids local to their table, table-major. offsets: int64[T*B+1], from 0 to N, not decreasing.
            padding_ids: int64[T], positions of this local id are left out; -1 for none.
            counted: whether hits and misses are.

        Raises:
            ValueError: an id is outside its table. CacheTooSmallError: the rows do not fit. Nothing was changed.
        """
        plan = self._plan(values, offsets, padding_ids)
        if self.ahead.is_moving and self._needs_moves(plan.slot_of_unique.numpy()):
            self.ahead.finish()
        was_holding = self.ahead.is_holding  # what was counted for it may be let go to make room
        slot_of_unique = self._admit(plan)
        if counted:
            self._count(plan.counts, prefetching=False, prepaid_are_misses=was_holding)
        self._take_over(slot_of_unique.numpy())
        return Lookup(plan.unique_of_position, slot_of_unique, offsets, self.table_rows.numel())

    def prefetch(self, values: torch.Tensor, offsets: torch.Tensor, padding_ids: torch.Tensor) -> None:
        """Makes a later batch's rows resident now, pinned until `prepare` uses them or the next `prefetch`.

        Raises as `prepare`; then the previous prefetch stays as it was.
        """
        self.ahead.finish()
        plan = self._plan(values, offsets, padding_ids)
        planned = plan.slot_of_unique.numpy()
        newly_paid = planned < 0
        newly_paid[~newly_paid] = self.slots.marked(SlotTable.PREPAID, planned[~newly_paid])
        held = self._prefetched[self.slots.marked(SlotTable.PREFETCHED, self._prefetched)]
        paid = held[self.slots.marked(SlotTable.PREPAID, held)]
        self.end_prefetch()
        try:
            slots = self._admit(plan).numpy()
        except CacheTooSmallError:
            self.slots.num_pinned += self.kernels.add_pins(self.slots.pins, torch.from_numpy(held), 1)
            self._hold_for_prefetch(held, paid)
            raise
        self._hold_for_prefetch(slots, slots[newly_paid])
        self._count(plan.counts, prefetching=True)

    def _hold_for_prefetch(self, slots: np.ndarray, paid: np.ndarray) -> None:
        """One pin of each of `slots` is the prefetch's from here on; the misses of `paid` were counted."""
        self._prefetched = slots
        self.slots.mark(slots, SlotTable.PREFETCHED)
        self.slots.mark(paid, SlotTable.PREPAID)

    def end_prefetch(self) -> None:
        """Unpins what is still held for the last prefetch."""
        self._unpin_prefetched(self._prefetched)
        self._prefetched = np.empty(0, np.int32)

    def wanted_ids(
        self, values: torch.Tensor, offsets: torch.Tensor, padding_ids: torch.Tensor, kernels: Any
    ) -> WantedIds:
        """What `ahead` wants to know of a batch. Raises ValueError as `prepare`. kernels: of the thread that calls."""
        wanted = kernels.distinct_ids(values, offsets, self.table_rows, self.table_starts, padding_ids)
        if not isinstance(wanted, WantedIds):
            raise self._bad_id(values, offsets, wanted)
        return wanted

    def unpin(self, slots: torch.Tensor) -> None:
        """Takes one pin off each of `slots` (int32[n], unique)."""
        self.slots.num_pinned += self.kernels.add_pins(self.slots.pins, slots, -1)

    def mark_dirty(self, slots: torch.Tensor) -> None:
        """The records in `slots` are about to differ from the store's."""
        self.slots.mark(slots.numpy(), SlotTable.DIRTY)

    def rows_stay(self, slots: torch.Tensor, holds: list) -> bool:
        """Whether all of `slots` (int64[n]) are pinned; holds: of the graphs whose gradient it may be."""
        return self.slots.are_pinned(slots.numpy())

    def rows_in(self, slots: torch.Tensor) -> torch.Tensor:
        """The rows in `slots` (int64[n])."""
        return self.slots.row_of_slot[slots]

    def _plan(self, values: torch.Tensor, offsets: torch.Tensor, padding_ids: torch.Tensor) -> BatchPlan:
        plan = self.kernels.plan(values, offsets, self.table_rows, self.table_starts, padding_ids, self.slots)
        if not isinstance(plan, BatchPlan):
            raise self._bad_id(values, offsets, plan)
        return plan

    def _bad_id(self, values: torch.Tensor, offsets: torch.Tensor, position: int) -> ValueError:
        num_tables = self.table_rows.numel()
        bags_per_table = (offsets.numel() - 1) // num_tables
        table = int(torch.searchsorted(offsets[::bags_per_table].contiguous(), position, right=True)) - 1
        where = f" of table {table}" if num_tables > 1 else ""
        return ValueError(
            f"id {int(values[position])} at position {position} is outside the valid range{where}: "
            f"0..{int(self.table_rows[table]) - 1}"
        )

    def _needs_moves(self, slots: np.ndarray) -> bool:
        """Whether a batch in `slots` (-1: missing) wants a record that is on its way, or will change the maps."""
        return bool((slots < 0).any()) or bool(self.slots.marked(SlotTable.MOVING, slots).any())

    def _touch(self, slots: np.ndarray) -> None:
        """Tells the policy of rows that a batch uses; it has heard of those that were admitted ahead for it."""
        if self._prefetched.size or self.ahead.is_holding:
            slots = slots[~self.slots.marked(SlotTable.PREFETCHED | SlotTable.AHEAD, slots)]
        self.policy.touch(slots)

    def _admit(self, plan: BatchPlan) -> torch.Tensor:
        """Plan, evict, write back, fetch, publish: int32[U] slots, each pinned once more. Unchanged if it raises.

        Any exception leaves each row's newest value where I3 wants it: victims keep their slot until they are written
        back, and a slot that was being filled is free until the fetch has returned.
        """
        planned = plan.slot_of_unique.numpy()
        resident, missing = split_missing(planned)
        resident = torch.from_numpy(resident)
        newly_pinned = self.kernels.add_pins(self.slots.pins, resident, 1)
        self.slots.num_pinned += newly_pinned
        try:
            if not missing.size:
                self._touch(planned)
                return plan.slot_of_unique
            self._ensure_room(missing.size)
            self._touch(resident.numpy())
            ids = plan.id_of_unique.numpy()[missing]
            rows = self.order.rows(ids)
            self._evict(missing.size - self.slots.num_free)
            taken = self.slots.take_free(missing.size)
            try:
                self.store.read(torch.from_numpy(rows), self.records, torch.from_numpy(taken))
            except BaseException:
                self.slots.give_back(taken)
                raise
        except BaseException:
            self.unpin(resident)
            raise
        self.slots.admit(ids, rows, taken)
        self.policy.admit(taken, rows)
        self.slots.num_pinned += self.kernels.add_pins(self.slots.pins, torch.from_numpy(taken), 1)
        self.moves += 1
        self.stats.rows_fetched += taken.size
        self.stats.bytes_fetched += taken.size * self.layout.row_bytes
        slot_of_unique = plan.slot_of_unique.clone()
        slot_of_unique.numpy()[missing] = taken
        return slot_of_unique

    def _ensure_room(self, num_missing: int) -> None:
        """Grows the cache if free slots and unpinned rows are fewer than `num_missing`; the batch's hits are pinned."""
        self.ahead.make_room(num_missing)
        pinned = self.slots.num_pinned
        needed = pinned + num_missing
        if needed <= self.num_slots:
            return
        if needed > self.ceiling:
            raise self._too_small(needed, num_missing, pinned)
        self.grow(min(self.ceiling, max(needed, self.num_slots + self.num_slots // 2)))

    def _too_small(self, needed: int, num_missing: int, in_use: int) -> CacheTooSmallError:
        return CacheTooSmallError(
            f"{needed} rows have to be resident at once ({num_missing} to fetch beside {in_use} in use by this batch, "
            f"by graphs that wait for their backward or step, or by a prefetch), and the cache may hold {self.ceiling} "
            f"({self.ceiling * self.budget_row_bytes} bytes of {self.budget_row_bytes} a row). "
            f"{self.config.advice(needed, self.budget_row_bytes)}, or make the batch smaller, or step sooner"
        )

    def grow(self, num_slots: int) -> None:
        """Enlarges the cache to `num_slots` slots, at most the ceiling; warns the first time."""
        if not self._warned_of_growth:
            self._warned_of_growth = True
            warnings.warn(
                f"a batch needs more rows than the cache's {self.num_slots} slots: it grows to {num_slots} (ceiling "
                f"{self.ceiling}). Give a larger cache_ratio or num_slots, or limit it by max_cache_bytes",
                stacklevel=2,
            )
        self.slots.grow(num_slots)
        self.policy.grow(num_slots)
        self.stats.growths += 1

    def _evict(self, count: int) -> None:
        """Frees `count` slots: the policy's choice, written back where dirty."""
        if count <= 0:
            return
        slots = self.slots
        victims = self.choose_victims(count)
        try:
            self._write_back(victims[slots.marked(SlotTable.DIRTY, victims)])  # `evict` clears their marks
        except BaseException:
            self.policy.admit(victims, slots.row_of_slot.numpy()[victims].astype(np.int64))
            raise
        slots.evict(victims)
        self.stats.evictions += victims.size

    def choose_victims(self, count: int) -> np.ndarray:
        """The policy's choice of `count` slots without a pin, int32; it forgets them, the maps do not."""
        slots = self.slots
        index = PolicyIndex(
            slots.pins.numpy(), slots.row_of_slot.numpy(), slots.slot_of_id.numpy(), self.order.id_of_row
        )
        return self.policy.evict(count, index)

    def _write_back(self, dirty: np.ndarray) -> None:
        if not dirty.size:
            return
        rows = self.slots.row_of_slot.numpy()[dirty].astype(np.int64)
        self.store.write(torch.from_numpy(rows), self.records, torch.from_numpy(dirty))
        self.stats.rows_written_back += dirty.size
        self.stats.bytes_written_back += dirty.size * self.layout.row_bytes

    def _mark_clean(self, slots: np.ndarray) -> None:
        """The store has the records in `slots`. A pinned one stays dirty: its gradient may yet be used, by hand."""
        self.slots.unmark(slots[self.slots.pins.numpy()[slots] == 0], SlotTable.DIRTY)

    def _take_over(self, slots: np.ndarray) -> None:
        """A batch uses `slots`: a prefetch's pins on them end, and what was counted for it is not counted again."""
        self._unpin_prefetched(slots)
        if self.ahead.is_holding:
            self.slots.unmark(slots, SlotTable.PREPAID)

    def _unpin_prefetched(self, slots: np.ndarray) -> None:
        """Of `slots`, those that a prefetch holds lose that pin; they count as used from here on."""
        if self._prefetched.size:
            held = slots[self.slots.marked(SlotTable.PREFETCHED, slots)]
            self.slots.unmark(held, SlotTable.PREFETCHED | SlotTable.PREPAID)
            self.unpin(torch.from_numpy(held))

    def _count(self, counts: torch.Tensor, prefetching: bool, prepaid_are_misses: bool = False) -> None:
        looked_up, missed, missed_unique, prepaid = counts.numpy().T
        self.stats.misses_per_table += missed
        self.stats.misses_unique_per_table += missed_unique
        if not prefetching:
            self.stats.hits_per_table += looked_up - missed - prepaid
            if prepaid_are_misses:  # first uses of rows that were admitted ahead, and counted as unique misses then
                self.stats.misses_per_table += prepaid

    def flush(self) -> None:
        """Writes every dirty row back; the rows stay resident. O(slots)."""
        self.ahead.finish()
        dirty = np.flatnonzero(self.slots.marked(SlotTable.DIRTY)).astype(np.int32)
        self._write_back(dirty)
        self._mark_clean(dirty)

    def warm_up(self) -> None:
        """Fills free slots with the most frequent rows: warmup_ratio of the slots if the ids' counts are known.

        A cache with a slot for every row is filled in any case. Counted neither as misses nor as fetches.
        """
        known = self.order.id_of_row is not None
        share = 1.0 if self.num_slots == self.num_rows else self.config.warmup_ratio if known else 0.0
        wanted = int(self.num_slots * share) - self.slots.num_used
        if wanted <= 0 or self.slots.num_used:
            return
        rows = np.arange(wanted, dtype=np.int64)[::-1].copy()  # the most frequent come last: the freshest to a policy
        taken = self.slots.take_free(wanted)
        self.store.read(torch.from_numpy(rows), self.records, torch.from_numpy(taken))
        self.slots.admit(self.order.ids(rows), rows, taken)
        self.policy.admit(taken, rows)
        self.moves += 1

    # ---- the whole table, in id order ---------------------------------------------------------------------------

    def id_chunks(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """start..stop in pieces of about CHUNK_BYTES of records; each but the last a multiple of 16 ids, none shorter.

        So a stream of normal_() or uniform_() over the pieces draws what one call over the whole would draw (torch
        fills 16 elements at a time).
        """
        step = max(16, CHUNK_BYTES // self.layout.row_bytes // 16 * 16)
        first = start
        while first < stop:
            last = stop if stop - first - step < 16 else first + step
            yield first, last
            first = last

    def read_ids(self, start: int, stop: int) -> torch.Tensor:
        """The newest records of ids start..stop-1 of the whole, (stop - start, W); a copy."""
        self.ahead.finish()
        ids = np.arange(start, stop, dtype=np.int64)
        records = torch.empty(stop - start, self.layout.width, dtype=self.layout.dtype)
        places = torch.arange(stop - start)
        self.store.read(torch.from_numpy(self.order.rows(ids)), records, places)
        slots = self.slots.slot_of_id[start:stop] - 1
        resident = (slots >= 0).nonzero()[:, 0]
        self.kernels.copy_rows(self.records, slots[resident], records, resident)
        return records

    def write_ids(self, start: int, records: torch.Tensor) -> None:
        """Sets the records of ids start.. to `records` (n, W), in the cache where resident, and in the store."""
        self.ahead.finish()
        stop = start + records.shape[0]
        ids = np.arange(start, stop, dtype=np.int64)
        slots = self.slots.slot_of_id[start:stop] - 1
        resident = (slots >= 0).nonzero()[:, 0]
        slots = slots[resident]
        self.slots.mark(slots.numpy(), SlotTable.DIRTY)  # until the store has them: its write may raise
        self.kernels.copy_rows(records, resident, self.records, slots)
        self.store.write(torch.from_numpy(self.order.rows(ids)), records, torch.arange(stop - start))
        self._mark_clean(slots.numpy())

    def update_column(self, name: str, start: int, stop: int, fill: Callable[[torch.Tensor, int], None]) -> None:
        """Calls fill(values, first id) on column `name` of consecutive chunks of ids start..stop-1, in place."""
        columns = self.layout.columns(name)
        for first, last in self.id_chunks(start, stop):
            records = self.read_ids(first, last)
            values = records[:, columns].contiguous()
            fill(values, first)
            records[:, columns] = values
            self.write_ids(first, records)

    def relayout(self, layout: RowLayout, keep_slots: bool = False, budget_row_bytes: int | None = None) -> None:
        """Re-lays store and block out for `layout`: weights stay, state columns start at their initial value.

        Streamed, into a second store. The rows stay in their slots unless `max_cache_bytes` now allows another number
        of slots than before: then the cache starts anew, warmed up; with `keep_slots` that is an error instead.

        Raises:
            ValueError: `max_cache_bytes` holds no record (or not the block, with `keep_slots`); nothing was changed.
        """
        budget_row_bytes = budget_row_bytes or layout.row_bytes
        num_slots, ceiling = self.size_in_slots(budget_row_bytes)
        if keep_slots and ceiling < self.ceiling:
            raise ValueError(
                f"{self.ceiling} slots of {budget_row_bytes} bytes ({self.budget_row_bytes} before the optimizer's "
                f"state) pass max_cache_bytes={self.config.max_cache_bytes}: reserve the state from the start with the "
                f"bag's optimizer= keyword, or raise max_cache_bytes to {self.ceiling * budget_row_bytes}"
            )
        self.ahead.finish()
        store = self.store.spawn()
        store.allocate(self.num_rows, layout)
        old_layout, old_store = self.layout, self.store
        self.flush()
        for first, last in self.id_chunks(0, self.num_rows):  # as rows, not ids: a straight copy
            rows, places = torch.arange(first, last), torch.arange(last - first)
            old = torch.empty(last - first, old_layout.width, dtype=old_layout.dtype)
            old_store.read(rows, old, places)
            store.write(rows, converted(old, layout), places)
        self.layout, self.store, self.budget_row_bytes = layout, store, budget_row_bytes
        if ceiling != self.ceiling and not keep_slots:
            self.ahead.let_go()
            self._start_empty(num_slots, ceiling)
            self.warm_up()
            self.ahead.store_changed()
            return
        self._replace_block(layout)
        self.ahead.store_changed()

    def _replace_block(self, layout: RowLayout) -> None:
        """The block in `layout`; every row keeps its slot."""
        block = layout.empty(self.ceiling)
        used = (self.slots.id_of_slot >= 0).nonzero()[:, 0]
        for chunk in used.split(max(1, CHUNK_BYTES // layout.row_bytes)):
            block[chunk] = converted(self.records[chunk], layout)
        self.records = block

    def reset_state(self) -> None:
        """Sets every state column of every row to its initial value."""
        for first, last in self.id_chunks(0, self.num_rows):
            records = self.read_ids(first, last)
            self.layout.fill_state(records)
            self.write_ids(first, records)

    def clone(self) -> "RowCache":
        """A cache of its own over a copy of all records, warmed up, with fresh counters; the row order is shared."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        copy._reset_for_clone()
        copy.kernels = copy._make_kernels()
        copy.stats = CacheStats(self.table_rows.numel())
        copy.ahead = copy._make_ahead()
        copy.store = self.store.spawn()
        copy.store.allocate(self.num_rows, self.layout)
        copy._start_empty(self.num_slots, self.ceiling)
        for first, last in self.id_chunks(0, self.num_rows):
            copy.write_ids(first, self.read_ids(first, last))
        copy.warm_up()
        return copy

    def _reset_for_clone(self) -> None:
        """A copy of another cache's attributes forgets what belongs to that one's batches."""

    # ---- accounts -----------------------------------------------------------------------------------------------

    def num_bytes(self) -> dict[str, int]:
        """Bytes by part; parts on the host that may grow with the table have "host" in their name.

        cache: num_slots * row_bytes. reserved: address space between the slots and the ceiling (untouched on a CPU).
        index: every per-slot array. workspace: what depends on the largest batch, and on the batches announced ahead.
        """
        slots = self.slots.num_bytes()
        policy = self.policy.num_bytes()
        return {
            "cache": self.num_slots * self.layout.row_bytes,
            "reserved": (self.ceiling - self.num_slots) * self.layout.row_bytes,
            "index": slots.pop("index") + policy.pop("index", 0),
            "workspace": self.kernels.workspace_bytes() + policy.pop("window", 0) + self.ahead.num_bytes(),
            "host_store": self.store.num_bytes(),
            "host_row_order": self.order.num_bytes(),
            **slots,
            **policy,
        }

    def check(self) -> None:
        """Asserts every invariant, I3 by value. For tests: O(rows)."""
        self.ahead.finish()
        self.slots.check(self.order.row_of_id)
        self.policy.check(self.slots.row_of_slot.numpy())
        clean = ~torch.from_numpy(self.slots.marked(SlotTable.DIRTY)) & (self.slots.id_of_slot >= 0)
        slots = clean.nonzero()[:, 0]
        stored = torch.empty(slots.numel(), self.layout.width, dtype=self.layout.dtype)
        self.store.read(self.slots.row_of_slot[slots].long(), stored, torch.arange(slots.numel()))
        assert torch.equal(stored, self.records[slots]), "I3: a clean slot differs from the store"


def converted(records: torch.Tensor, layout: RowLayout) -> torch.Tensor:
    """Records of another layout of the same dim in `layout`: the weight kept, the state initial."""
    new = torch.empty(records.shape[0], layout.width, dtype=layout.dtype, device=records.device)
    new[:, : layout.dim] = records[:, : layout.dim]
    layout.fill_state(new)
    return new
