"""Replays: lookups of a DeviceCache within a CUDA graph that the user captures and replays.

A replay runs without the host: it looks its batch up anew, and trains the rows that it finds, but it fetches none. So a
batch's rows have to be resident before (`prefetch` makes them so, and keeps them). What a replay does not find, or what
is wrong with its batch, it adds to three counters on the device; whatever waits for the device next looks at them.
A replayed lookup marks no row as used by a batch: its number would be that of the capture.
"""

from typing import Any

import torch

from .kernels.device import Tables

__all__ = ["NO_USE", "NUM_COUNTERS", "Replays"]

NO_USE = -1  # the number of a batch that marks nothing
NUM_COUNTERS = 3


class Replays:
    """What graphs that were captured over one cache share.

    Attributes:
        has_captured: whether there is one.
        faults: int64[3] on the device: replays with bad ids, rows that were not resident, replays with bad offsets.
        prepaid: int64[T] on the device: positions of the last prefetch that were counted as misses; a replay takes
            them for those of its own batch.
    """

    def __init__(self, num_tables: int, device: torch.device) -> None:
        self.has_captured = False
        self.faults = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=device)
        self.prepaid = torch.zeros(num_tables, dtype=torch.int64, device=device)

    def num_bytes(self) -> int:
        """Bytes on the device."""
        return self.faults.nbytes + self.prepaid.nbytes

    def plan(self, kernels: Any, slots: Any, counts: torch.Tensor, values, offsets, tables: Tables) -> tuple:
        """(plan, offsets that lie within the batch) for the graph that is being captured; `counts` goes up by it."""
        self.has_captured = True
        plan = kernels.plan(values, offsets, tables, slots, NO_USE)
        bad_from_end, _, num_missing, bad_offsets, _ = plan.found.unbind()
        self.faults += torch.stack([(bad_from_end > 0).long(), num_missing, (bad_offsets > 0).long()])
        counts += plan.counts
        counts[:, 0] -= self.prepaid
        self.prepaid.zero_()
        return plan, offsets.clamp(0, values.numel())

    def ask(self) -> None:
        """`check`, where the host waits for the device anyway."""
        if self.has_captured:
            self.check(self.faults.tolist())

    def check(self, faults: list[int]) -> None:
        """RuntimeError where the host has read that a replay went wrong; said once."""
        bad_ids, missing, bad_offsets = faults
        if not any(faults):
            return
        self.faults.zero_()
        raise RuntimeError(
            f"replays of a CUDA graph since the last check met {missing} row(s) that were not resident, {bad_ids} "
            f"batch(es) with ids out of range and {bad_offsets} with bad offsets: those rows gave zeros and were not "
            f"trained. Call prefetch() with a batch before its replay, with nothing looked up in between"
        )
