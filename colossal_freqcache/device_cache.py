"""DeviceCache: a RowCache whose maps live on the training device, so that the host decides nothing about single rows.

Batches have numbers, and a slot remembers the last one that used its row. A row must stay while a batch from the oldest
number on that somebody holds has used it: so holding and letting go are host arithmetic, not a pass over slots. That
keeps some rows longer than needed; where they are in the way, one pass over the slots tells exactly.
The host learns of a batch what it needs to size what follows (a bad id, how many rows are unique, how many missing):
five integers, in one read, which `wait_for_counts` does and counts. (With what replays of captured graphs met, eight.)
Shapes: N positions, U unique rows, M missing, C slots, W record width, T tables, B bags a table.
"""

from typing import Any

import numpy as np
import torch

from .cache import CHUNK_BYTES, CacheTooSmallError, RowCache, converted
from .device_ahead import DeviceAhead
from .device_replay import NUM_COUNTERS, Replays
from .device_slots import DeviceSlots
from .eviction import EvictionStrategy
from .host_memory import PinnedPages
from .kernels import make_device_kernels, make_kernels
from .kernels.device import DevicePlan, Tables
from .metrics import CacheStats
from .row_layout import RowLayout

__all__ = ["BadOffsetsError", "DeviceCache", "DeviceLookup", "Hold"]

# A victim is the worst of so many candidates: sampling by a sweep, as close to the policy's order as caches need.
CHOICES = 8


class BadOffsetsError(ValueError):
    """Offsets that are no bounds of bags; nothing was modified."""


STRATEGIES = {EvictionStrategy.DATASET: "dataset", EvictionStrategy.LRU: "lru", EvictionStrategy.LFU: "lfu"}


class Hold:
    """Rows that must stay: those that batch number `use` has used, in `slots` (int32[U]).

    plan: whose memory `slots` may be, and which is not used again while anybody refers to it.
    unique_before: unique rows of all batches before it.
    """

    __slots__ = ("plan", "slots", "unique_before", "use")

    def __init__(self, use: int, slots: torch.Tensor, plan: DevicePlan, unique_before: int) -> None:
        self.use, self.slots, self.plan, self.unique_before = use, slots, plan, unique_before

    def numel(self) -> int:
        """U."""
        return self.slots.numel()


class DeviceLookup:
    """Where the rows of one batch sit. Valid while it is held.

    Attributes: plan; slot_of_unique int32[U]; num_unique U; offsets int64[T*B+1]; num_tables T; hold.
    In a CUDA graph the host does not know U: num_unique is N then, and slot_of_unique int32[N], of which the device
    knows how many count.
    """

    def __init__(
        self, plan: DevicePlan, hold: Hold, slot_of_unique: torch.Tensor, offsets: torch.Tensor, num_tables: int
    ) -> None:
        self.plan, self.hold, self.offsets, self.num_tables = plan, hold, offsets, num_tables
        self.slot_of_unique, self.num_unique = slot_of_unique, slot_of_unique.numel()


class Mailbox:
    """Pinned host memory for a batch's counts, and an event behind their copy; used again and again."""

    def __init__(self) -> None:
        self.counts = torch.zeros(5 + NUM_COUNTERS, dtype=torch.int64, pin_memory=True)
        self.event = torch.cuda.Event()

    def send(self, found: torch.Tensor, faults: torch.Tensor | None) -> None:
        """Sets `found` (int64[5]) and `faults` (int64[3]; None: all 0) out for the host; both are on the device."""
        self.counts[:5].copy_(found, non_blocking=True)
        if faults is not None:
            self.counts[5:].copy_(faults, non_blocking=True)
        self.event.record()


class Planned:
    """A batch that was looked up on the device, and whose counts are on their way to the host."""

    def __init__(
        self, cache: "DeviceCache", values: torch.Tensor, offsets: torch.Tensor, tables: Tables, ahead: bool
    ) -> None:
        self.values, self.offsets, self.tables = values, offsets, tables
        self.is_ahead = ahead
        self.use = cache.next_use()
        self.version = cache.slots.version
        self.plan = cache.kernels.plan(values, offsets, tables, cache.slots, self.use, ahead)
        self.is_counted = cache.is_tight  # how many slots are protected
        if self.is_counted:
            cache.kernels.count_protected(cache.slots, cache.oldest_held, self.plan)
        self.missing: torch.Tensor | None = None  # which unique rows were fetched, int64[M]; None: none
        self._counts: list[int] | None = None
        self._faults = cache.replays.faults if cache.replays.has_captured else None
        self._mailbox = None
        if self.plan.found.is_cuda:
            self._mailboxes = cache.mailboxes
            self._mailbox = self._mailboxes.pop() if self._mailboxes else Mailbox()
            self._mailbox.send(self.plan.found, self._faults)

    @property
    def is_known(self) -> bool:
        """Whether the counts are on the host."""
        return self._mailbox is None or self._mailbox.event.query()

    def wait(self) -> None:
        """Returns when they are."""
        if self._mailbox is not None:
            self._mailbox.event.synchronize()

    def counts(self) -> list[int]:
        """Once they are known: N - the first position with a bad id (0: none), U, M, whether the offsets are bad, slots
        in use (if `is_counted`), and what replays met (`Replays.faults`)."""
        if self._counts is None:
            if self._mailbox is None:
                faults = [0] * NUM_COUNTERS if self._faults is None else self._faults.tolist()
                self._counts = self.plan.found.tolist() + faults
            else:
                self._counts = self._mailbox.counts.tolist()
                self._mailboxes.append(self._mailbox)
                self._mailbox = None
        return self._counts


class DeviceCache(RowCache):
    """As RowCache, for a training device: the same methods where others call them.

    Args:
        device: where the block and the maps are. The others as RowCache's.

    Attributes:
        slots: DeviceSlots. ahead: DeviceAhead. num_syncs: times that the host waited for a batch's counts.
        replays: Replays, for lookups within a CUDA graph.

    The cache does not grow: `num_slots` is the ceiling.
    """

    on_device = True
    can_foresee = False

    def __init__(self, *arguments: Any, device: torch.device, **options: Any) -> None:
        dtype = arguments[1].dtype
        if dtype not in (torch.float32, torch.float64):
            raise NotImplementedError(
                f"dtype={dtype} on {device}: rows of 16 bits are cached on the CPU only for now; use torch.float32"
            )
        self.device = device
        self.num_syncs = 0
        self.mailboxes: list[Mailbox] = []  # that nobody waits for
        self._last_use = 0
        self._held: dict[int, int] = {}  # number of a batch -> how often it is held
        self._hold_of_use: dict[int, Hold] = {}
        self._unique_before: dict[int, int] = {}  # unique rows of all batches before that number
        self._num_unique = self._last_unique = 0
        self._uncounted: list[Planned] = []  # planned, and not in `_num_unique`
        self._prefetched: Hold | None = None
        self._prepaid: torch.Tensor | None = None  # slots of rows that the prefetch has fetched and counted
        self._pages: PinnedPages | None = None
        super().__init__(*arguments, **options)

    # ---- how RowCache builds it ---------------------------------------------------------------------------------

    def _make_kernels(self) -> Any:
        return make_device_kernels(self.config.kernels, self.device)

    def _make_ahead(self) -> Any:
        return DeviceAhead(self)

    def _host_kernels(self) -> Any:
        return make_kernels("cpu")

    def size_in_slots(self, row_bytes: int) -> tuple[int, int]:
        num_slots, _ = self.config.size_in_slots(self.num_rows, row_bytes)
        return num_slots, num_slots

    def _start_empty(self, num_slots: int, ceiling: int) -> None:
        self.renew_policy()
        self.slots = DeviceSlots(
            num_slots, self.num_rows, self.order.id_of_row is None, self._key == "lfu", self.device
        )
        self.records = torch.zeros(ceiling, self.layout.width, dtype=self.layout.dtype, device=self.device)
        self._hand = 0
        self.moves += 1
        self._pin()

    def _pin(self) -> None:
        """The store's pages, where it has its rows in memory, and the map to them, are read by the device itself."""
        rows = getattr(self.store, "host_records", None)
        self._row_of_id = None if self.order.row_of_id is None else torch.from_numpy(self.order.row_of_id)
        wanted = [tensor for tensor in (rows, self._row_of_id) if tensor is not None]
        if self._pages is not None:
            self._pages.close()
        self._pages = PinnedPages(wanted, self.device)
        self._store_records = rows if self._pages.is_pinned else None

    def renew_policy(self, strategy: EvictionStrategy | None = None) -> None:
        """Checks the policy's name; a device cache keeps the policies' numbers in its maps."""
        if self.config.evict_strategy is None and not self.knows_counts:
            self.strategy = EvictionStrategy.LRU
        self.strategy = strategy or self.strategy
        if self.strategy not in STRATEGIES:
            raise NotImplementedError(
                f"evict_strategy={self.strategy.value!r} on {self.device.type}: a cache on a device has "
                f"{', '.join(repr(key) for key in STRATEGIES.values())} (others are planned); with None it takes "
                f"'dataset' with counts, else 'lru'"
            )
        self._key = STRATEGIES[self.strategy]

    @property
    def knows_counts(self) -> bool:
        """Whether rows are ordered by the counts of their ids."""
        return self.order.id_of_row is not None

    @property
    def foresees(self) -> bool:
        return False

    @property
    def may_replay(self) -> bool:
        return self.replays.has_captured

    # ---- a batch ------------------------------------------------------------------------------------------------

    def prepare(
        self, values: torch.Tensor, offsets: torch.Tensor, padding_ids: torch.Tensor, counted: bool = True
    ) -> DeviceLookup:
        """As RowCache.prepare; all tensors on the device. The caller gives `hold` to `unpin`."""
        if self.is_capturing():
            return self._captured(values, offsets, padding_ids)
        if counted and self.replays.has_captured:
            self.replays.prepaid.zero_()  # this batch takes what its prefetch has counted
        ready = self.ahead.take(values) if counted else None
        if ready is not None:
            self._end_used_prefetch()
            return ready
        self.ahead.interrupt()
        prepaid = None if self._prefetched is None else self._waiting_for_use(self._prepaid)
        planned = self.plan(values, offsets, padding_ids)
        self.wait_for_counts(planned)
        lookup = self.admit(planned, counted=False)
        if counted and not self.ahead.has_counted(values):
            self._count(planned.plan, lookup.num_unique, prepaid)
        self._end_used_prefetch()
        return lookup

    def is_capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _captured(self, values: torch.Tensor, offsets: torch.Tensor, padding_ids: torch.Tensor) -> DeviceLookup:
        """The lookup of a graph that is being captured."""
        if not self.kernels.has_entries:
            raise NotImplementedError("kernels='torch' cannot be captured in a CUDA graph: they wait for the device")
        if self.ahead.is_current:
            raise RuntimeError("a CUDA graph cannot be captured within a Lookahead's loop: capture it before, or after")
        tables = Tables(self._device_rows, self._device_starts, padding_ids)
        plan, offsets = self.replays.plan(self.kernels, self.slots, self._device_counts, values, offsets, tables)
        use = self.next_use()
        hold = self.hold(Hold(use, plan.slot_of_unique[:0], plan, self._unique_before[use]))
        return DeviceLookup(plan, hold, plan.slot_of_unique, offsets, self.table_rows.numel())

    def prefetch(self, values: torch.Tensor, offsets: torch.Tensor, padding_ids: torch.Tensor) -> None:
        if self.is_capturing():
            raise RuntimeError("prefetch() cannot be captured in a CUDA graph: call it before the graph's replay")
        self.ahead.interrupt()
        before, prepaid = self._prefetched, self._prepaid
        still_prepaid = self._waiting_for_use(prepaid)
        planned = self.plan(values, offsets, padding_ids)
        self.wait_for_counts(planned)
        try:
            lookup = self.admit(planned, counted=False)
        except CacheTooSmallError:
            if before is None:
                raise
            self.let_go(before.use)  # the earlier prefetch is given up for this one, if that helps
            planned = self.plan(values, offsets, padding_ids)
            self.wait_for_counts(planned)
            try:
                lookup = self.admit(planned, counted=False)
            except CacheTooSmallError:
                self._prefetched = self.hold(before)
                raise
        else:
            self.end_prefetch()
        fetched = lookup.slot_of_unique[:0] if planned.missing is None else lookup.slot_of_unique[planned.missing]
        self._prefetched = lookup.hold
        # Prepaid: what this prefetch has fetched, and what the one before had, if it is wanted here, too.
        wanted_again = still_prepaid[torch.isin(still_prepaid, lookup.slot_of_unique)]
        self._prepaid = torch.cat([fetched, wanted_again])
        counts = planned.plan.counts.clone()
        counts[:, 0] = counts[:, 1]  # hits are the forward's
        self._device_counts += counts
        self.replays.prepaid.copy_(counts[:, 1])

    def _end_used_prefetch(self) -> None:
        if self._prefetched is not None and not self._waiting_for_use().numel():
            self.end_prefetch()

    def _waiting_for_use(self, slots: torch.Tensor | None = None) -> torch.Tensor:
        """Of `slots` (default: all that the prefetch holds), those whose rows no forward has used since it. Waits."""
        hold = self._prefetched
        if hold is None:
            return torch.empty(0, dtype=torch.int32, device=self.device)
        slots = hold.slots if slots is None else slots
        return slots[self.slots.last_use[slots.long()] == hold.use]

    def _count(self, plan: DevicePlan, num_unique: int, prepaid: torch.Tensor | None) -> None:
        """Adds a batch's counts; positions of rows whose miss a prefetch has counted (`prepaid` slots) are no hits."""
        counts = plan.counts
        if prepaid is not None and prepaid.numel():
            paid = torch.isin(plan.slot_of_unique[:num_unique], prepaid)
            lengths = plan.starts[1 : num_unique + 1] - plan.starts[:num_unique]
            table = torch.searchsorted(self._device_starts, plan.id_of_unique[:num_unique].long(), right=True) - 1
            counts = counts.clone()
            counts[:, 0].index_add_(0, table[paid], -lengths[paid].long())
        self._device_counts += counts

    def end_prefetch(self) -> None:
        if self._prefetched is not None:
            hold, self._prefetched = self._prefetched, None
            self.unpin(hold)

    def next_use(self) -> int:
        """The number of the batch that is looked up next; nobody holds it yet."""
        self._last_use += 1
        self._unique_before[self._last_use] = self._num_unique
        return self._last_use

    @property
    def oldest_held(self) -> int:
        """The number of the oldest batch that is held; of the next one, where none is."""
        return min(self._held, default=self._last_use)

    @property
    def is_tight(self) -> bool:
        """Whether the held batches and one more like them may want most of the slots, if no row is in two of them."""
        bound = self._num_unique - self._unique_before.get(self.oldest_held, self._num_unique)
        return bound + 2 * self._last_unique > self.slots.num_used // 2

    def plan(
        self, values: torch.Tensor, offsets: torch.Tensor, padding_ids: torch.Tensor, ahead: bool = False
    ) -> Planned:
        """Looks a batch up; changes no map. The host does not wait. ahead: as of the kernels' `plan`."""
        planned = Planned(self, values, offsets, Tables(self._device_rows, self._device_starts, padding_ids), ahead)
        self._held[planned.use] = 1
        self._uncounted.append(planned)
        return planned

    def wait_for_counts(self, planned: Planned) -> None:
        """The one place where a step waits for the device."""
        if not planned.is_known:
            self.num_syncs += 1
            planned.wait()

    def admit(self, planned: Planned, counted: bool = True) -> DeviceLookup:
        """Makes the planned batch's rows resident and holds them. Nothing was changed if it raises."""
        plan = planned.plan
        for other in self._uncounted:  # they have marked rows as used
            self.wait_for_counts(other)
            other.unique_until_then = self._num_unique
            self._num_unique += other.counts()[1]
        self._uncounted.clear()
        bad_from_end, num_unique, num_missing, bad_offsets, _, *faults = planned.counts()
        self._last_unique = num_unique
        try:
            self.replays.check(faults)
            if bad_offsets:
                raise BadOffsetsError("offsets are not the bounds of bags: from 0 to the number of ids, not decreasing")
            if bad_from_end:
                position = planned.values.numel() - bad_from_end
                raise self._bad_id(planned.values.cpu(), planned.offsets.cpu(), position)
            slots = plan.slot_of_unique[:num_unique]
            if num_missing:
                self._fetch(planned, slots, num_missing)
        except BaseException:
            self.let_go(planned.use)
            raise
        if counted:
            self._device_counts += plan.counts
        self._hold_of_use[planned.use] = hold = Hold(planned.use, slots, plan, self._unique_before[planned.use])
        return DeviceLookup(plan, hold, slots, planned.offsets, self.table_rows.numel())

    def hold(self, hold: Hold) -> Hold:
        """One more holder of a batch whose rows are still resident; `hold` may have ended just now."""
        self._held[hold.use] = self._held.get(hold.use, 0) + 1
        self._hold_of_use[hold.use] = hold
        self._unique_before.setdefault(hold.use, hold.unique_before)
        return hold

    def unpin(self, hold: Hold) -> None:
        """Ends a hold."""
        self.ahead.released(hold.use)
        self.let_go(hold.use)

    def let_go(self, use: int) -> None:
        """One holder less of batch `use`."""
        self._held[use] -= 1
        if not self._held[use]:
            del self._held[use]
            self._hold_of_use.pop(use, None)
            oldest = min(self._held, default=self._last_use + 1)
            for number in [number for number in self._unique_before if number < oldest]:
                del self._unique_before[number]

    def _fetch(self, planned: Planned, slots: torch.Tensor, num_missing: int) -> None:
        """Evicts, writes back and fetches; `slots` gets the missing rows' slots."""
        table = self.slots
        num_fresh = min(num_missing, table.num_slots - table.num_used)
        targets = torch.arange(table.num_used, table.num_used + num_fresh, dtype=torch.int32, device=self.device)
        if num_missing > num_fresh:
            victims = self._choose_victims(planned, slots, num_missing, num_missing - num_fresh)
            targets = torch.cat([targets, victims]) if num_fresh else victims
        planned.missing = missing = self.kernels.missing(planned.plan, slots.numel(), num_missing)
        if self._store_records is None:
            self._move_through_buffers(targets, num_fresh, missing, planned)
        else:
            missing, rows = self.kernels.rows_of_missing(planned.plan, missing, self._row_of_id)
            old_rows = self.kernels.exchange(
                table, targets, num_fresh, missing, planned.plan, rows, planned.use, self._device_written
            )
            self.kernels.swap_rows(self._store_records, old_rows, rows, self.records, targets)
        table.num_used += num_fresh
        self.moves += 1
        stats = self._stats
        stats.evictions += num_missing - num_fresh
        stats.rows_fetched += num_missing
        stats.bytes_fetched += num_missing * self.layout.row_bytes

    def _move_through_buffers(self, targets, num_fresh: int, missing, planned: Planned) -> None:
        """Where the device cannot reach the store: the store reads and writes, and the host waits.

        The rows are read, and the victims written, before a map changes: a store that raises changes nothing.
        """
        rows = self._host_rows(planned.plan.id_of_unique[missing].cpu().long().numpy())
        fetched = torch.empty(rows.numel(), self.layout.width, dtype=self.layout.dtype)
        self.store.read(rows, fetched, torch.arange(rows.numel()))
        leaving = targets[num_fresh:].long()
        self._write_back_slots(leaving[self.slots.dirty[leaving] > 0])
        written = torch.zeros_like(self._device_written)
        rows = rows.to(self.device)
        self.kernels.exchange(self.slots, targets, num_fresh, missing, planned.plan, rows, planned.use, written)
        self.records[targets.long()] = fetched.to(self.device)

    def _host_rows(self, ids: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.order.rows(ids)))

    def _choose_victims(self, planned: Planned, slots: torch.Tensor, num_missing: int, count: int) -> torch.Tensor:
        """Slots of rows that nobody holds, int32[count].

        At most `in_use` slots are protected, so a window that is longer by `limit` has `limit` candidates.
        """
        table = self.slots
        oldest = min(self._held)
        in_use = min(self._num_unique - self._unique_before[oldest] - num_missing, table.num_used)
        if planned.is_counted:  # what the plan has seen, and what was planned after it
            later = self._num_unique - planned.unique_until_then - slots.numel()
            in_use = min(in_use, planned.counts()[4] + later)
        while table.num_used - in_use < count:
            if planned.is_ahead:  # it can wait, and need not know exactly
                raise self._too_small(in_use + num_missing, num_missing, in_use)
            exact = self._protect_exactly(planned.use, slots)
            oldest = min(self._held)
            if table.num_used - exact >= count:
                in_use = exact
            elif not self.ahead.let_go_of_farthest():
                raise self._too_small(exact + num_missing, num_missing, exact)
        limit = min(CHOICES * count, table.num_used - in_use)
        window = min(table.num_used, in_use + limit)
        victims = self.kernels.choose_victims(table, self._key, count, self._hand, window, oldest, limit)
        step = limit * table.num_used // max(table.num_used - in_use, 1)
        self._hand = (self._hand + min(window, step)) % table.num_used
        return victims

    def _protect_exactly(self, use: int, slots: torch.Tensor) -> int:
        """Marks just the rows that are held as used by a batch from the oldest held on; returns their number. O(C)."""
        if self._prefetched is not None:
            self._prefetched.slots = self._waiting_for_use()  # a row that was used since may leave
        oldest = min(self._held)
        last_use = self.slots.last_use
        last_use.clamp_(max=oldest - 1)
        for number, hold in sorted(self._hold_of_use.items()):
            last_use[hold.slots.long()] = number
        last_use[slots[slots >= 0].long()] = use
        self.num_syncs += self.device.type == "cuda"
        return int((last_use[: self.slots.num_used] >= oldest).sum())

    def mark_dirty(self, slots: torch.Tensor) -> None:
        self.slots.dirty.index_fill_(0, slots.long(), 1)

    def rows_stay(self, slots: torch.Tensor, holds: list[Hold]) -> bool:
        if not holds:  # who asks has compared `moves`
            return True
        return bool(torch.isin(slots, torch.cat([hold.slots for hold in holds])).all())

    def rows_in(self, slots: torch.Tensor) -> torch.Tensor:
        return self.slots.row_of_slot[slots]

    # ---- counters -----------------------------------------------------------------------------------------------

    @property
    def stats(self) -> CacheStats:
        """The counters; reading them waits for the device."""
        self.ahead.interrupt()  # the side stream adds to them, too
        looked_up, missed, missing = self._device_counts[:, :3].to("cpu", copy=True).numpy().T
        written = int(self._device_written)
        self.replays.ask()
        self._device_counts.zero_()
        self._device_written.zero_()
        self._stats.hits_per_table += looked_up - missed
        self._stats.misses_per_table += missed
        self._stats.misses_unique_per_table += missing
        self._stats.rows_written_back += written
        self._stats.bytes_written_back += written * self.layout.row_bytes
        return self._stats

    @stats.setter
    def stats(self, stats: CacheStats) -> None:
        with torch.inference_mode(False):
            num_tables = self.table_rows.numel()
            self._device_counts = torch.zeros(num_tables, 4, dtype=torch.int64, device=self.device)
            self._device_written = torch.zeros(1, dtype=torch.int64, device=self.device)
            self._device_rows, self._device_starts = self.table_rows.to(self.device), self.table_starts.to(self.device)
            self.replays = Replays(num_tables, self.device)
        self._stats = stats

    # ---- the whole table ----------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """All that was launched has ended: the host may look at the store, and kernels at what the host writes."""
        self.ahead.interrupt()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.replays.ask()

    def _write_back_slots(self, slots: torch.Tensor) -> None:
        """The records of `slots` (int64) to the store, by way of the host."""
        for chunk in slots.split(max(1, CHUNK_BYTES // self.layout.row_bytes)):
            rows = self.slots.row_of_slot[chunk].cpu().long()
            self.store.write(rows, self.records[chunk].cpu(), torch.arange(rows.numel()))
        self._stats.rows_written_back += slots.numel()
        self._stats.bytes_written_back += slots.numel() * self.layout.row_bytes

    def flush(self) -> None:
        self._finish()
        self._write_back_slots(self.slots.dirty[: self.slots.num_used].nonzero()[:, 0])
        if not self._held:  # else a gradient may yet be used, by hand
            self.slots.dirty.zero_()

    def warm_up(self) -> None:
        share = 1.0 if self.num_slots == self.num_rows else self.config.warmup_ratio if self.knows_counts else 0.0
        wanted = int(self.num_slots * share)
        if wanted <= 0 or self.slots.num_used:
            return
        rows = torch.arange(wanted)
        ids = torch.from_numpy(np.ascontiguousarray(self.order.ids(rows.numpy()))).to(self.device, self.slots.number)
        targets = torch.arange(wanted, dtype=torch.int32, device=self.device)
        nothing = targets.new_empty(0)
        plan = DevicePlan(nothing, nothing, nothing, nothing, ids, targets.clone(), nothing, nothing)
        self.kernels.exchange(
            self.slots, targets, wanted, targets.long(), plan, rows.to(self.device), 0, self._device_written
        )
        for chunk in rows.split(max(1, CHUNK_BYTES // self.layout.row_bytes)):
            records = torch.empty(chunk.numel(), self.layout.width, dtype=self.layout.dtype)
            self.store.read(chunk, records, torch.arange(chunk.numel()))
            self.records[chunk[0] : chunk[-1] + 1] = records.to(self.device)
        self.slots.num_used = wanted
        self.moves += 1

    def read_ids(self, start: int, stop: int) -> torch.Tensor:
        self._finish()
        rows, places = self._rows_of_range(start, stop), torch.arange(stop - start)
        records = torch.empty(stop - start, self.layout.width, dtype=self.layout.dtype)
        self.store.read(rows, records, places)
        resident, slots = self._resident(start, stop)
        records[resident] = self.records[slots].cpu()
        return records

    def write_ids(self, start: int, records: torch.Tensor) -> None:
        self._finish()
        stop = start + records.shape[0]
        resident, slots = self._resident(start, stop)
        were_dirty = self.slots.dirty[slots]
        self.slots.dirty[slots] = 1  # until the store has them: its write may raise
        self.records[slots] = records[resident].to(self.device)
        self.store.write(self._rows_of_range(start, stop), records, torch.arange(stop - start))
        self.slots.dirty[slots] = were_dirty

    def _rows_of_range(self, start: int, stop: int) -> torch.Tensor:
        return self._host_rows(np.arange(start, stop, dtype=np.int64))

    def _resident(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of ids start..stop-1: (which are resident, on the host; their slots), int64 both."""
        if not self.slots.num_used:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64, device=self.device)
        slots = self.kernels.find(torch.arange(start, stop, device=self.device), self.slots)
        resident = (slots >= 0).nonzero()[:, 0]
        return resident.cpu(), slots[resident].long()

    def relayout(self, layout: RowLayout, keep_slots: bool = False, budget_row_bytes: int | None = None) -> None:
        """As RowCache.relayout; refused once a CUDA graph refers to the block."""
        if self.replays.has_captured:
            raise RuntimeError(
                "a captured CUDA graph refers to the cache's block, so its rows cannot be laid out anew: bind the "
                "optimizer (or reserve its state by optimizer=) before the capture"
            )
        super().relayout(layout, keep_slots, budget_row_bytes)

    def _replace_block(self, layout: RowLayout) -> None:
        block = torch.zeros(self.ceiling, layout.width, dtype=layout.dtype, device=self.device)
        step = max(1, CHUNK_BYTES // layout.row_bytes)
        for first in range(0, self.slots.num_used, step):
            places = slice(first, min(first + step, self.slots.num_used))
            block[places] = converted(self.records[places], layout)
        self.records = block
        self._pin()  # the store is another one, too

    def grow(self, num_slots: int) -> None:
        raise AssertionError("a cache on a device does not grow")

    def _reset_for_clone(self) -> None:
        self._held, self._hold_of_use, self._unique_before, self._uncounted = {}, {}, {}, []
        self._num_unique = self._last_unique = self._last_use = self.num_syncs = 0
        self._prefetched = self._pages = None
        self.mailboxes = []

    # ---- accounts -----------------------------------------------------------------------------------------------

    def num_bytes(self) -> dict[str, int]:
        """As RowCache.num_bytes. index: all maps and the counters of tables. On the device nothing grows with the rows.

        workspace: the ids of batches admitted ahead; what a batch takes while it is looked up and trained comes from
        torch's allocator, and goes back to it.
        """
        tables = (self._device_counts, self._device_written, self._device_rows, self._device_starts)
        return {
            "cache": self.num_slots * self.layout.row_bytes,
            "reserved": 0,
            "index": self.slots.num_bytes() + sum(tensor.nbytes for tensor in tables) + self.replays.num_bytes(),
            "workspace": self.ahead.num_bytes(),
            "host_store": self.store.num_bytes(),
            "host_row_order": self.order.num_bytes(),
        }

    def check(self) -> None:
        self._finish()
        self.slots.check(self._row_of_id, self.kernels.has_entries)
        assert self.slots.id_of_slot.max() < self.num_rows
        assert all(count > 0 for count in self._held.values())
        clean = (self.slots.dirty[: self.slots.num_used] == 0).nonzero()[:, 0]
        stored = torch.empty(clean.numel(), self.layout.width, dtype=self.layout.dtype)
        self.store.read(self.slots.row_of_slot[clean].cpu().long(), stored, torch.arange(clean.numel()))
        assert torch.equal(stored, self.records[clean].cpu()), "I3: a clean slot differs from the store"
