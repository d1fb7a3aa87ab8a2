"""DeviceAhead: the batches to come, of a DeviceCache: looked up and admitted on a stream of their own.

A batch that comes is first planned (its rows are looked up, and its counts set out for the host), and at the next batch
that is handed out, when its counts have long arrived, admitted: victims are chosen, written back, and its rows fetched,
while the current batch trains. A batch is held until the second one after it is handed out, so what is admitted then
need not wait for the end of the batch before, but for that of the one before it, which the device has mostly reached.
So nobody waits for anybody, but for the rows themselves.

Three stories that the order of streams is made for (m: the stream that trains, s: the one that admits; t was handed out
just now):
    early eviction   batch t+1 is admitted while t trains, and t-1 may still: it may not push out a row of theirs. All
                     three hold their numbers, and a slot that a batch from the oldest held number on has used is no
                     victim.
    dirty fetch      t+1 evicts a row that t-2 has trained, t+2 wants it back. s waits for m up to the end of t-2 before
                     it looks whether the row is dirty and writes it back, and t+2's fetch comes later on s: it reads
                     what was written. After a lookup that went its own way on m, s waits for all of m.
    stale slot       t+1's rows are used by m before they are there, or a victim is trained while it is written back.
                     m waits for the event behind t+1's fetch; and a row that m will still train is held by its batch,
                     or its training was launched before the point up to which s waits.

Knows batches as tensors of ids; nothing of loaders, modules or gradients.
"""

from collections import deque
from typing import Any

import torch

__all__ = ["DeviceAhead"]


class _Coming:
    """An announced batch."""

    def __init__(self, values: torch.Tensor, offsets: torch.Tensor, padding_ids: torch.Tensor) -> None:
        self.values, self.offsets, self.padding_ids = values, offsets, padding_ids
        self.planned: Any = None  # looked up, and held; None also once it is admitted
        self.lookup: Any = None  # admitted, and held
        self.ready: torch.cuda.Event | None = None  # behind its fetch
        self.use = 0  # its number, once it was admitted
        self.is_counted = False  # its hits and misses are in the counters


class DeviceAhead:
    """The batches to come, of one cache, which is a DeviceCache."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self._coming: deque[_Coming] = deque()
        self._current: _Coming | None = None
        self._stream: torch.cuda.Stream | None = None
        self._is_apart = False  # the side stream has work that the training stream has not waited for
        self._before: _Coming | None = None  # the batch that was current before
        self._reached: torch.cuda.Event | None = (
            None  # what the training stream had to do when `_current` was handed out
        )
        self.abandoned = False

    @property
    def num_announced(self) -> int:
        """Batches that are known and not handed out."""
        return len(self._coming)

    @property
    def num_admitted(self) -> int:
        """Of these, those whose rows have slots."""
        return sum(batch.lookup is not None for batch in self._coming)

    @property
    def is_current(self) -> bool:
        """Whether a batch was handed out, and the loop over them has not ended."""
        return self._current is not None

    # ---- what a loader calls ------------------------------------------------------------------------------------

    def announce(self, wanted: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        """The batch after all announced ones: values, offsets, padding ids, on the device."""
        self._coming.append(_Coming(*wanted))

    def hand_out(self, depth: int) -> None:
        """The next announced batch becomes the current one; the one before lets go of its rows.

        The `depth` batches behind it are admitted as far as they fit, in order, and the one behind them is planned.
        """
        if self._before is not None:
            self._release(self._before)
        self._before, self._current = self._current, self._coming.popleft()
        if not depth:
            return
        with self._side_stream():
            self._admit_ahead(depth)
        self._cache.kernels.turn()
        if self._cache.replays.has_captured:  # a replay asks nobody whether a row is there yet
            self.interrupt()

    def _admit_ahead(self, depth: int) -> None:
        for number, batch in enumerate(self._coming):
            if number > depth:
                break
            if batch.lookup is not None:
                continue
            if batch.planned is not None and batch.planned.version != self._cache.slots.version:
                self._forget_plan(batch)  # somebody else has changed the maps since
            if batch.planned is None:
                batch.planned = self._cache.plan(batch.values, batch.offsets, batch.padding_ids, ahead=True)
                if number == depth:
                    break
            if not self._admit(batch):
                break

    def _admit(self, batch: _Coming) -> bool:
        """False where its rows do not fit now, or it has a bad id: its own forward will see."""
        cache, planned = self._cache, batch.planned
        cache.wait_for_counts(planned)
        batch.planned = None
        try:
            batch.lookup = cache.admit(planned, counted=not batch.is_counted)
        except ValueError:
            return False
        batch.is_counted, batch.use = True, planned.use
        if self._stream is not None:
            batch.ready = self._stream.record_event()
        return True

    def end(self) -> None:
        """No batch comes any more: lets go of all rows."""
        self.let_go()
        self._coming.clear()
        self._current = self._before = None
        self.abandoned = False
        self.interrupt()

    def end_if_abandoned(self) -> None:
        """`end`, where nobody could call it."""
        if self.abandoned:
            self.end()

    # ---- what the cache calls -----------------------------------------------------------------------------------

    def take(self, values: torch.Tensor) -> Any:
        """The lookup of the current batch, if it is the one with these `values` and was admitted, once more held."""
        batch = self._current
        if batch is None or batch.values is not values or batch.lookup is None:
            return None
        lookup = batch.lookup
        if batch.ready is not None:
            stream = torch.cuda.current_stream(self._cache.device)
            stream.wait_event(batch.ready)
            for tensor in lookup.plan.tensors():
                tensor.record_stream(stream)
        self._cache.hold(lookup.hold)
        return lookup

    def has_counted(self, values: torch.Tensor) -> bool:
        """Whether the current batch is the one with these `values`, and its hits and misses were counted."""
        return self._current is not None and self._current.values is values and self._current.is_counted

    def find(self, *given: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(values, offsets) on the device of the current batch, if they were made from what is given."""
        batch = self._current
        if batch is None or not getattr(batch.values, "_freqcache_seen", lambda *_: False)(*given):
            return None
        return batch.values, batch.offsets

    def interrupt(self) -> None:
        """The training stream is about to use the maps: it runs behind what was launched on the side, and then the side
        behind it."""
        self._reached = None
        if self._is_apart:
            self._is_apart = False
            torch.cuda.current_stream(self._cache.device).wait_stream(self._stream)

    def finish(self) -> None:
        """As `interrupt`."""
        self.interrupt()

    def let_go(self) -> None:
        """No batch holds slots any more; what is announced stays so."""
        for batch in self._batches():
            self._release(batch)

    def released(self, use: int) -> None:
        """Somebody holds the rows of batch `use` no more. If it was trained after the next one was handed out, the side
        has to wait for that, too."""
        if self._current is not None and (not self._current.use or self._current.use > use):
            self._reached = None

    def let_go_of_farthest(self) -> bool:
        """Lets go of the rows of the farthest batch that holds some; False if none does."""
        for batch in reversed(self._batches()):
            if batch.planned is not None or batch.lookup is not None:
                self._release(batch)
                return True
        return False

    def store_changed(self) -> None:
        """The cache has another store and block."""
        self.let_go()

    def num_bytes(self) -> int:
        """Bytes of the ids of announced batches."""
        return sum(batch.values.nbytes + batch.offsets.nbytes for batch in self._coming)

    # ---- how ----------------------------------------------------------------------------------------------------

    def _batches(self) -> list[_Coming]:
        return [batch for batch in (self._before, self._current, *self._coming) if batch is not None]

    def _side_stream(self) -> Any:
        device = self._cache.device
        if device.type != "cuda":
            return torch.no_grad()
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        now = torch.cuda.current_stream(device).record_event()
        self._stream.wait_event(now if self._reached is None else self._reached)
        if self._reached is None:
            self._cache.kernels.turn()  # nothing was launched since that could still use a plan
        self._reached, self._is_apart = now, True
        for batch in self._coming:
            batch.values.record_stream(self._stream)
            batch.offsets.record_stream(self._stream)
        return torch.cuda.stream(self._stream)

    def _release(self, batch: _Coming) -> None:
        lookup, batch.lookup = batch.lookup, None
        if lookup is not None:
            self._cache.let_go(lookup.hold.use)
        self._forget_plan(batch)

    def _forget_plan(self, batch: _Coming) -> None:
        planned, batch.planned = batch.planned, None
        if planned is not None:
            self._cache.let_go(planned.use)
