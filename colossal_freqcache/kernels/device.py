"""DeviceTorchKernels: the plain torch twin of what a cache needs whose maps are on the training device.

Shapes: N positions, U unique rows, M missing, C slots, T tables, B bags a table. Unique rows are numbered by id.
Runs on any device of torch; it counts on the host where it must, so it waits for the device many times a batch.
"""

from typing import NamedTuple

import torch

from ..device_slots import DeviceSlots
from .torch import TorchKernels

__all__ = ["DevicePlan", "DeviceTorchKernels", "Tables"]

KEYS = ("dataset", "lru", "lfu")  # by what a victim is chosen


class Tables(NamedTuple):
    """int64[T] each, on the device: rows, the first id of the whole, the local id that is padding (-1: none)."""

    rows: torch.Tensor
    starts: torch.Tensor
    padding: torch.Tensor


class DevicePlan:
    """What a batch needs, before any map has changed. All tensors on the device; U and M are known there first.

    order: int64[N], positions by id, stable; padding last. starts: int32[N+1], of which U+1 count: where in `order`
    each unique row's positions start. unique_of_position: int32[N], -1 for padding. bag_of_position: int32[N].
    id_of_unique, slot_of_unique: (N,), of which U count; slot -1 where missing.
    found: int64[5]: N - the first position with a bad id (0: none), U, M, whether the offsets are no bounds of bags,
        and what `count_protected` has counted.
    counts: int64[T, 4]: looked-up positions, missed positions, missing rows, 0.
    zeros: int32, all 0, for the first adjoint of the batch; None where there is none.
    """

    __slots__ = (
        "__weakref__",
        "bag_of_position",
        "counts",
        "found",
        "id_of_unique",
        "order",
        "slot_of_unique",
        "starts",
        "unique_of_position",
        "zeros",
    )

    def __init__(
        self,
        order: torch.Tensor,
        starts: torch.Tensor,
        unique_of_position: torch.Tensor,
        bag_of_position: torch.Tensor,
        id_of_unique: torch.Tensor,
        slot_of_unique: torch.Tensor,
        found: torch.Tensor,
        counts: torch.Tensor,
        zeros: torch.Tensor | None = None,
    ) -> None:
        self.order, self.starts = order, starts
        self.unique_of_position, self.bag_of_position = unique_of_position, bag_of_position
        self.id_of_unique, self.slot_of_unique = id_of_unique, slot_of_unique
        self.found, self.counts, self.zeros = found, counts, zeros

    def again(self) -> "DevicePlan":
        """Another object over the same tensors, which have new values."""
        return DevicePlan(
            self.order,
            self.starts,
            self.unique_of_position,
            self.bag_of_position,
            self.id_of_unique,
            self.slot_of_unique,
            self.found,
            self.counts,
            self.zeros,
        )

    def tensors(self) -> list[torch.Tensor]:
        """All of them."""
        names = (name for name in self.__slots__ if name != "__weakref__")
        return [tensor for tensor in map(self.__getattribute__, names) if tensor is not None]


class DeviceTorchKernels(TorchKernels):
    """The torch set for a cache on a device: `TorchKernels` for the rows, and the maps."""

    has_entries = False

    def turn(self) -> None:
        """What was launched until now comes before what is planned with `ahead` from now on."""

    def plan(
        self,
        values: torch.Tensor,
        offsets: torch.Tensor,
        tables: Tables,
        slots: DeviceSlots,
        use: int,
        ahead: bool = False,
    ) -> DevicePlan:
        """Looks a batch up; the resident rows are marked as used by batch number `use`, unless that is below 0.

        ahead: on a stream that waits for what was launched before the last `turn` only.
        """
        num_tables, size = tables.rows.numel(), values.numel()
        num_bags = offsets.numel() - 1
        lengths = offsets.diff()
        bad_offsets = bool((lengths < 0).any()) or int(offsets[0]) != 0 or int(offsets[-1]) != size
        positions = torch.arange(size, device=values.device)
        bag = (torch.searchsorted(offsets, positions, right=True) - 1).clamp(0, max(num_bags - 1, 0))
        table = bag // max(num_bags // num_tables, 1)
        bad = (values < 0) | (values >= tables.rows[table])
        kept = ~bad & (values != tables.padding[table])
        kept &= (positions >= offsets[bag]) & (positions < offsets[(bag + 1).clamp(max=num_bags)])
        keys = torch.where(kept, tables.starts[table] + values, slots.num_rows)
        sorted_keys, order = torch.sort(keys, stable=True)
        present = sorted_keys < slots.num_rows
        ids, number, sizes = torch.unique_consecutive(sorted_keys[present], return_inverse=True, return_counts=True)
        unique_of_position = torch.full((size,), -1, dtype=torch.int32, device=values.device)
        unique_of_position[order[present]] = number.int()
        starts = torch.zeros(size + 1, dtype=torch.int32, device=values.device)
        starts[1 : ids.numel() + 1] = sizes.cumsum(0)
        slot_of_unique = self.find(ids, slots)
        hits = slot_of_unique[slot_of_unique >= 0].long()
        if use >= 0:
            slots.last_use[hits] = use
            if slots.counts_uses:
                slots.uses[hits] += 1
        missing = slot_of_unique < 0
        table_of_unique = torch.searchsorted(tables.starts, ids, right=True) - 1
        counts = torch.zeros(num_tables, 4, dtype=torch.int64, device=values.device)
        counts[:, 0] = torch.bincount(table[kept], minlength=num_tables)
        counts[:, 1].index_add_(0, table_of_unique[missing], sizes[missing])
        counts[:, 2] = torch.bincount(table_of_unique[missing], minlength=num_tables)
        first_bad = bad.nonzero()[0, 0].item() if bad.any() else size
        found = [size - first_bad, ids.numel(), int(missing.sum()), int(bad_offsets), 0]
        return DevicePlan(
            order,
            starts,
            unique_of_position,
            bag.int(),
            ids,
            slot_of_unique,
            torch.tensor(found, device=values.device),
            counts,
        )

    def count_protected(self, slots: DeviceSlots, protected_from: int, plan: DevicePlan) -> None:
        """plan.found[4] = slots that a batch from `protected_from` on has used, this plan's included. O(C)."""
        plan.found[4] = (slots.last_use[: slots.num_used] >= protected_from).sum()

    def find(self, ids: torch.Tensor, slots: DeviceSlots) -> torch.Tensor:
        """int32[n]: the slots of int64 `ids`, -1 where they are not resident."""
        resident, slot = torch.sort(slots.id_of_slot[: slots.num_used].long())
        if not resident.numel():
            return torch.full((ids.numel(),), -1, dtype=torch.int32, device=ids.device)
        place = torch.searchsorted(resident, ids).clamp(max=resident.numel() - 1)
        return torch.where(resident[place] == ids, slot[place], -1).int()

    def missing(self, plan: DevicePlan, num_unique: int, num_missing: int) -> torch.Tensor:
        """int64[M]: which unique rows are missing."""
        return (plan.slot_of_unique[:num_unique] < 0).nonzero()[:, 0]

    def choose_victims(
        self, slots: DeviceSlots, key: str, count: int, hand: int, window: int, protected_from: int, limit: int
    ) -> torch.Tensor:
        """int32[count] slots that no batch from `protected_from` on uses: of the first `limit` such ones among the
        `window` slots from `hand` on, around, those that leave first by `key`, one of KEYS."""
        candidates = (hand + torch.arange(window, device=slots.device)) % slots.num_used
        candidates = candidates[slots.last_use[candidates] < protected_from][:limit]
        if key == "dataset":
            worst = slots.row_of_slot[candidates].long()
        elif key == "lru":
            worst = -slots.last_use[candidates].long()
        else:
            worst = -slots.uses[candidates].long()
            slots.uses[candidates] //= 2
        order = torch.sort(worst, descending=True, stable=True).indices
        return candidates[order[:count]].int()

    def rows_of_missing(self, plan: DevicePlan, missing, row_of_id):
        """(the plan's `missing` unique rows by ascending row, their rows), int64[M]; row_of_id may lie on the host.

        Neighbours in the store come one after the other then: a device reaches them faster.
        """
        rows = plan.id_of_unique[missing].long()
        if row_of_id is None:
            return missing, rows
        rows, order = torch.sort(row_of_id[rows.to(row_of_id.device)].to(rows.device).long())
        return missing[order], rows

    def exchange(self, slots: DeviceSlots, targets, num_fresh, missing, plan, new_rows, use, written):
        """Slots targets[M] change their rows to the plan's `missing` unique rows (int64[M]), whose slots they become.

        Returns the rows to write back, int64[M], -1 for none. The first `num_fresh` targets were free. new_rows: the
        missing ones' rows, int64[M]. `written` (int64[1]) goes up by the number of rows to write back.
        """
        places = targets.long()
        new_ids = plan.id_of_unique[missing].long()
        plan.slot_of_unique[missing] = targets
        leaves = slots.dirty[places] > 0
        old_rows = torch.where(leaves, slots.row_of_slot[places].long(), -1)
        written += leaves.sum()
        slots.id_of_slot[places] = new_ids.to(slots.number)
        if not slots.rows_are_ids:
            slots.row_of_slot[places] = new_rows.to(slots.number)
        slots.last_use[places] = use
        slots.dirty[places] = 0
        if slots.counts_uses:
            slots.uses[places] = 1
        slots.version += 1
        return old_rows

    def swap_rows(self, store: torch.Tensor, old_rows, new_rows, records: torch.Tensor, targets) -> None:
        """store[old_rows] = records[targets] where old_rows >= 0, then records[targets] = store[new_rows]."""
        places = targets.long()
        leaves = old_rows >= 0
        fetched = store[new_rows.to(store.device)].to(records.device)
        store[old_rows[leaves].to(store.device)] = records[places[leaves]].to(store.device)
        records[places] = fetched

    def copy_rows(self, source, source_rows, target, target_rows):
        values = source[source_rows.long().to(source.device)]
        target[target_rows.long().to(target.device)] = values.to(target.device)

    def bags(self, records, dim, slot_of_unique, plan, offsets, weights, mode, num_tables):
        """(out (B, T, D), what the adjoint needs of it or None)."""
        common = (records, dim, slot_of_unique, plan.unique_of_position, offsets)
        if mode == "max":
            return self.pool_max(*common, num_tables)
        return self.pool(*common, weights, mode == "mean", num_tables), None

    def row_gradients(
        self, grad, plan, offsets, kept, weights, mode, by_frequency, slot_of_unique, place_of_unique, num_unique
    ):
        """values[place_of_unique[u]] = unique row u's gradient, from grad (B, T, D): (U, D). kept: what `bags` gave."""
        arguments = (grad, plan.unique_of_position, offsets)
        places = (place_of_unique, num_unique)
        if mode == "max":
            return self.pool_max_backward(*arguments, kept, *places)
        return self.pool_backward(*arguments, weights, mode == "mean", by_frequency, *places)

    def train_rows(
        self,
        grad,
        plan,
        offsets,
        kept,
        weights,
        mode,
        by_frequency,
        slot_of_unique,
        num_unique,
        records,
        dirty,
        dim,
        rule,
    ) -> bool:
        """Trains the batch's rows straight from `grad` by `rule` (name, hyper-parameters), or does nothing: False."""
        return False

    def weight_gradients(self, grad, records, dim, slot_of_unique, plan, offsets):
        """As `weight_gradient`."""
        return self.weight_gradient(grad, records, dim, slot_of_unique, plan.unique_of_position, offsets)
