"""CudaKernels: the Triton kernel set, for a cache whose block and maps are on a CUDA device.

Launches only: what a kernel computes stands beside it in `index` (integers) and `rows` (records). Under Triton's
interpreter (TRITON_INTERPRET=1) the same kernels run on CPU tensors. float64 tables take the plain twin's updates,
since Triton passes scalars as float32.
Shapes as in `kernels.device`.
"""

import functools
from typing import Any

import torch
import triton

from ...device_slots import DeviceSlots
from ..device import KEYS, DevicePlan, DeviceTorchKernels, Tables
from . import index, rows
from .graphs import GraphedPlans
from .launch import IS_INTERPRETED, launch

__all__ = ["CudaKernels"]

BLOCK = 128  # integers of a program: one for each thread of four warps
WINDOW_BLOCK = 512
COUNT_BLOCK = 4096
# A few programs with many rows each keep the link to the host busy, and leave the multiprocessors to what trains.
LINK_PROGRAMS, LINK_TILE_ELEMENTS, LINK_WARPS = 16, 8192, {} if IS_INTERPRETED else {"num_warps": 8}
TILE_ELEMENTS = 1024  # of a tile of rows
NO_NUMBERS = (0.0,) * 4
RULE_NUMBERS = {
    "sgd": rows.SGD,
    "adagrad": rows.ADAGRAD,
    "rowwise_adagrad": rows.ROWWISE_ADAGRAD,
    "adam": rows.ADAM,
}
# Each product and sum is rounded as it is written, so that a fused update has the bits of a separate one.
AS_WRITTEN = {} if IS_INTERPRETED else {"enable_fp_fusion": False}


def _programs(count: int, block: int) -> int:
    return -(-count // block)


def _steps(count: int) -> int:
    """Halvings until one of `count` is left; rounded up, so that few kernels are compiled."""
    return max(count - 1, 1).bit_length()


@functools.cache
def _tile(width: int, elements: int = TILE_ELEMENTS) -> dict[str, int]:
    """Rows and padded width of a tile."""
    block = triton.next_power_of_2(width)
    return {"ROWS": max(1, elements // block), "BLOCK": block}


class CudaKernels(DeviceTorchKernels):
    """The Triton set."""

    name = "cuda"
    has_entries = True
    takes_means = True  # row-wise Adagrad's, inside its update

    # ---- maps ---------------------------------------------------------------------------------------------------

    def __init__(self) -> None:
        self._graphs = GraphedPlans(_plan)

    def turn(self) -> None:
        self._graphs.turn()

    def plan(
        self,
        values: torch.Tensor,
        offsets: torch.Tensor,
        tables: Tables,
        slots: DeviceSlots,
        use: int,
        ahead: bool = False,
    ) -> DevicePlan:
        """As the twin's; without waiting for the device."""
        plan = self._graphs.plan(values, offsets, tables, slots, use, ahead)
        if plan is None:
            number = torch.full((1,), use, dtype=torch.int32, device=values.device)
            plan = _plan(values, offsets, tables, slots, number)
        return plan

    def find(self, ids: torch.Tensor, slots: DeviceSlots) -> torch.Tensor:
        found = torch.empty(ids.numel(), dtype=torch.int32, device=ids.device)
        if ids.numel():
            launch(
                index.find_slots,
                _programs(ids.numel(), BLOCK),
                (slots.entries, slots.id_of_slot, ids, found, ids.numel(), slots.num_buckets, slots.slot_bits),
                {"BLOCK": BLOCK},
            )
        return found

    def count_protected(self, slots: DeviceSlots, protected_from: int, plan: DevicePlan) -> None:
        if slots.num_used:
            launch(
                index.count_protected,
                _programs(slots.num_used, COUNT_BLOCK),
                (slots.last_use, plan.found, slots.num_used, protected_from),
                {"BLOCK": COUNT_BLOCK},
            )

    def missing(self, plan: DevicePlan, num_unique: int, num_missing: int) -> torch.Tensor:
        slots = plan.slot_of_unique[:num_unique]
        missing = torch.empty(num_missing, dtype=torch.int64, device=slots.device)
        missing_up_to = torch.cumsum(slots < 0, 0, dtype=torch.int32)
        launch(
            index.list_missing,
            _programs(num_unique, BLOCK),
            (slots, missing_up_to, missing, num_unique),
            {"BLOCK": BLOCK},
        )
        return missing

    def choose_victims(
        self, slots: DeviceSlots, key: str, count: int, hand: int, window: int, protected_from: int, limit: int
    ) -> torch.Tensor:
        grid = _programs(window, WINDOW_BLOCK)
        counts = torch.empty(grid, dtype=torch.int32, device=slots.device)
        arguments = (hand, window, slots.num_used, protected_from)
        launch(index.count_candidates, grid, (slots.last_use, counts, *arguments), {"BLOCK": WINDOW_BLOCK})
        candidates = torch.empty(limit, dtype=torch.int32, device=slots.device)
        dtype = slots.number if key == "dataset" else torch.int32
        keys = torch.full((limit,), torch.iinfo(dtype).min, dtype=dtype, device=slots.device)
        launch(
            index.take_candidates,
            grid,
            (
                slots.last_use,
                slots.uses,
                slots.row_of_slot,
                torch.cumsum(counts, 0, dtype=torch.int32),
                candidates,
                keys,
                *arguments,
                limit,
            ),
            {"KEY": KEYS.index(key), "BLOCK": WINDOW_BLOCK},
        )
        return candidates[torch.sort(keys, descending=True, stable=True).indices[:count]]

    def rows_of_missing(self, plan: DevicePlan, missing, row_of_id):
        rows = torch.empty(missing.numel(), dtype=torch.int64, device=missing.device)
        launch(
            index.take_rows,
            _programs(missing.numel(), BLOCK),
            (plan.id_of_unique, missing, rows if row_of_id is None else row_of_id, rows, missing.numel()),
            {"ORDERED": row_of_id is not None, "BLOCK": BLOCK},
        )
        if row_of_id is None:
            return missing, rows
        rows, order = torch.sort(rows)
        return missing[order], rows

    def exchange(self, slots: DeviceSlots, targets, num_fresh, missing, plan, new_rows, use, written):
        count = targets.numel()
        old_rows = torch.empty(count, dtype=torch.int64, device=slots.device)
        if count:
            new_ids = torch.empty(count, dtype=slots.number, device=slots.device)
            launch(
                index.exchange_slots,
                _programs(count, BLOCK),
                (
                    slots.entries,
                    slots.id_of_slot,
                    slots.row_of_slot,
                    slots.last_use,
                    slots.uses,
                    slots.dirty,
                    new_rows,
                    targets,
                    missing,
                    plan.id_of_unique,
                    plan.slot_of_unique,
                    new_ids,
                    old_rows,
                    written,
                    use,
                    count,
                    num_fresh,
                    slots.num_buckets,
                    slots.slot_bits,
                ),
                {
                    "ORDERED": not slots.rows_are_ids,
                    "COUNT_USES": slots.counts_uses,
                    "BLOCK": BLOCK,
                },
            )
            launch(
                index.insert_entries,
                _programs(count, BLOCK),
                (slots.entries, new_ids, targets, count, slots.num_buckets, slots.slot_bits),
                {"BLOCK": BLOCK},
            )
        slots.version += 1
        return old_rows

    # ---- records ------------------------------------------------------------------------------------------------

    def swap_rows(self, store: torch.Tensor, old_rows, new_rows, records: torch.Tensor, targets) -> None:
        count, width = targets.numel(), records.shape[1]
        if count:
            tile = _tile(width, LINK_TILE_ELEMENTS)
            launch(
                rows.swap_rows,
                min(_programs(count, tile["ROWS"]), LINK_PROGRAMS),
                (store, old_rows, new_rows, records, targets, count),
                {"store_stride": store.stride(0), "stride": records.stride(0), "width": width, **tile},
                **LINK_WARPS,
            )

    def copy_rows(self, source, source_rows, target, target_rows):
        count, width = source_rows.numel(), source.shape[1]
        if count:
            tile = _tile(width, LINK_TILE_ELEMENTS)
            launch(
                rows.copy_rows,
                min(_programs(count, tile["ROWS"]), LINK_PROGRAMS),
                (source, source_rows, target, target_rows, count),
                {"source_stride": source.stride(0), "target_stride": target.stride(0), "width": width, **tile},
                **LINK_WARPS,
            )

    def bags(self, records, dim, slot_of_unique, plan, offsets, weights, mode, num_tables):
        num_bags = offsets.numel() - 1
        out = records.new_empty(num_bags // num_tables, num_tables, dim)
        kept = None
        if mode != "sum":
            shape, dtype = ((num_bags, dim), torch.int64) if mode == "max" else (num_bags, torch.int32)
            kept = torch.empty(shape, dtype=dtype, device=records.device)
        if not num_bags:
            return out, kept
        tile = _tile(dim)
        grid = _programs(num_bags, tile["ROWS"])
        sizes = (num_bags, num_bags // num_tables, num_tables)
        common = (records, slot_of_unique, plan.unique_of_position, offsets)
        shape = {"stride": records.stride(0), "dim": dim}
        if mode == "max":
            launch(rows.pool_max, grid, (*common, out, kept, *sizes), {**shape, **tile})
            return out, kept
        flags = {"HAS_WEIGHTS": weights is not None, "MEAN": mode == "mean"}
        weights = records if weights is None else weights.detach()
        unused = plan.starts if kept is None else kept
        launch(rows.pool, grid, (*common, weights, out, unused, *sizes), {**shape, **flags, **tile}, **AS_WRITTEN)
        return out, kept

    def row_gradients(
        self, grad, plan, offsets, kept, weights, mode, by_frequency, slot_of_unique, place_of_unique, num_unique
    ):
        values = grad.new_empty(num_unique, grad.shape[2])
        self._sum_rows(
            (grad, plan, offsets, kept, weights, mode, by_frequency, slot_of_unique, place_of_unique, num_unique),
            (values, values, plan.starts),
            rows.KEEP,
            NO_NUMBERS,
        )
        return values

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
        if records.dtype != torch.float32:
            return False
        name, numbers = rule
        self._sum_rows(
            (grad, plan, offsets, kept, weights, mode, by_frequency, slot_of_unique, slot_of_unique, num_unique),
            (records, grad, dirty),
            RULE_NUMBERS[name],
            _four(name, numbers),
        )
        return True

    def _sum_rows(self, batch: tuple, targets: tuple, rule: int, numbers: tuple[float, ...]) -> None:
        """Short rows in one pass; long ones in chunks, so that no program has much more to do than the others."""
        grad, plan, offsets, kept, weights, mode, by_frequency, slot_of_unique, place_of_unique, num_unique = batch
        if not num_unique:
            return
        grad = grad.contiguous()
        by_frequency = by_frequency and mode != "max"  # (of a maximum, torch refuses it)
        _, num_tables, dim = grad.shape
        size = plan.order.numel()
        most_rows, most_chunks = _most_long(size)
        work, plan.zeros = plan.zeros, None
        if work is None:
            work = torch.zeros(_work_size(size), dtype=torch.int32, device=grad.device)
        kept = plan.starts if kept is None else kept
        flags = {"HAS_WEIGHTS": weights is not None, "MEAN": mode == "mean", "MAX": mode == "max"}
        weights = grad if weights is None else weights.detach()
        common = (grad, plan.order, plan.starts, plan.bag_of_position, kept, weights, kept, work)
        shape = ((offsets.numel() - 1) // num_tables, num_tables)
        row = {"stride": targets[0].stride(0), "dim": dim}
        tile = _tile(dim)
        launch(
            rows.sum_rows,
            _programs(num_unique, tile["ROWS"]),
            (*common, slot_of_unique, place_of_unique, *targets, plan.found, most_rows, most_chunks, *shape, *numbers),
            {
                **row,
                **flags,
                "RULE": rule,
                "BY_FREQUENCY": by_frequency,
                "SHORT": rows.SHORT,
                "CHUNK": rows.CHUNK,
                **tile,
            },
            **AS_WRITTEN,
        )
        if not most_rows:
            return
        sums = grad.new_empty(most_chunks, dim)
        across = {"CHUNK": rows.CHUNK, "TILE": rows.TILE, "BLOCK": tile["BLOCK"]}
        launch(
            rows.sum_chunks,
            most_chunks,
            (*common, sums, most_rows, most_chunks, *shape),
            {"dim": dim, **flags, **across},
            **AS_WRITTEN,
        )
        launch(
            rows.sum_long_rows,
            most_rows,
            (sums, plan.starts, work, slot_of_unique, place_of_unique, *targets, most_rows, *numbers),
            {**row, "RULE": rule, "BY_FREQUENCY": by_frequency, **across},
            **AS_WRITTEN,
        )

    def weight_gradients(self, grad, records, dim, slot_of_unique, plan, offsets):
        size, num_tables = plan.order.numel(), grad.shape[1]
        out = grad.new_empty(size)
        if size:
            tile = _tile(dim)
            launch(
                rows.weight_gradient,
                _programs(size, tile["ROWS"]),
                (
                    grad.contiguous(),
                    records,
                    slot_of_unique,
                    plan.unique_of_position,
                    plan.bag_of_position,
                    out,
                    size,
                    (offsets.numel() - 1) // num_tables,
                    num_tables,
                ),
                {"stride": records.stride(0), "dim": dim, **tile},
            )
        return out

    # ---- row rules ----------------------------------------------------------------------------------------------

    def _update(self, name: str, records: torch.Tensor, dim: int, slots, grads, *numbers: float) -> None:
        if slots.numel():
            tile = _tile(dim)
            launch(
                rows.update_rows,
                _programs(slots.numel(), tile["ROWS"]),
                (grads, slots, records, slots.numel(), *_four(name, numbers)),
                {"stride": records.stride(0), "dim": dim, "RULE": RULE_NUMBERS[name], **tile},
                **AS_WRITTEN,
            )

    def update_sgd(self, records, dim, slots, grads, lr):
        if records.dtype != torch.float32:
            return super().update_sgd(records, dim, slots, grads, lr)
        self._update("sgd", records, dim, slots, grads, lr)

    def update_adagrad(self, records, dim, slots, grads, lr, eps):
        if records.dtype != torch.float32:
            return super().update_adagrad(records, dim, slots, grads, lr, eps)
        self._update("adagrad", records, dim, slots, grads, lr, eps)

    def update_rowwise_adagrad(self, records, dim, slots, grads, mean_squares, lr, eps):
        if records.dtype != torch.float32:
            mean_squares = self.square_sums(grads) / dim if mean_squares is None else mean_squares
            return super().update_rowwise_adagrad(records, dim, slots, grads, mean_squares, lr, eps)
        self._update("rowwise_adagrad", records, dim, slots, grads, lr, eps)

    def update_adam(self, records, dim, slots, grads, beta1, beta2, eps, step_size):
        if records.dtype != torch.float32:
            return super().update_adam(records, dim, slots, grads, beta1, beta2, eps, step_size)
        self._update("adam", records, dim, slots, grads, beta1, beta2, eps, step_size)


def _plan(
    values: torch.Tensor, offsets: torch.Tensor, tables: Tables, slots: DeviceSlots, use: torch.Tensor
) -> DevicePlan:
    """`use`: int32[1], on the device."""
    device, size, num_bags = values.device, values.numel(), offsets.numel() - 1
    num_tables, absent = tables.rows.numel(), slots.num_rows
    counters = torch.zeros(6 + 4 * num_tables, dtype=torch.int64, device=device)
    found, counts = counters[:5], counters[6:].view(num_tables, 4)
    keys = torch.empty(size, dtype=slots.number, device=device)
    padded = -(-size // 4) * 4  # every array starts at a multiple of 16 bytes
    numbers = torch.empty(5 * padded + 1, dtype=torch.int32, device=device)
    starts = numbers[4 * padded :]
    arrays = numbers[: 4 * padded].view(4, padded)[:, :size]
    bag_of_position, is_head, unique_of_position, slot_of_unique = arrays.unbind()
    bags_per_table = max(num_bags // num_tables, 1)
    launch(
        index.number_ids,
        _programs(max(size, num_bags, 1), BLOCK),
        (
            values,
            offsets,
            tables.rows,
            tables.starts,
            tables.padding,
            keys,
            bag_of_position,
            found,
            counts,
            size,
            num_bags,
            bags_per_table,
            absent,
        ),
        {"STEPS": _steps(num_bags) + 1, "BLOCK": BLOCK},
    )
    if not size:
        order = torch.empty(0, dtype=torch.int64, device=device)
        starts.zero_()
        return DevicePlan(order, starts, unique_of_position, bag_of_position, keys, slot_of_unique, found, counts)
    keys, order = torch.sort(keys, stable=True)
    grid = _programs(size, BLOCK)
    launch(index.mark_heads, grid, (keys, is_head, size, absent), {"BLOCK": BLOCK})
    heads_up_to = torch.cumsum(is_head, 0, dtype=torch.int32)
    id_of_unique = torch.empty(size, dtype=slots.number, device=device)
    launch(
        index.number_uniques,
        grid,
        (keys, order, heads_up_to, unique_of_position, id_of_unique, starts, size, absent),
        {"BLOCK": BLOCK},
    )
    launch(
        index.probe_uniques,
        grid,
        (
            slots.entries,
            slots.id_of_slot,
            slots.last_use,
            slots.uses,
            id_of_unique,
            starts,
            heads_up_to,
            tables.starts,
            slot_of_unique,
            found,
            counts,
            use,
            size,
            num_tables,
            slots.num_buckets,
            slots.slot_bits,
        ),
        {"COUNT_USES": slots.counts_uses, "STEPS": _steps(num_tables) + 1, "BLOCK": BLOCK},
    )
    zeros = torch.zeros(_work_size(size), dtype=torch.int32, device=device)
    return DevicePlan(
        order, starts, unique_of_position, bag_of_position, id_of_unique, slot_of_unique, found, counts, zeros
    )


def _most_long(size: int) -> tuple[int, int]:
    """(rows with more than SHORT positions, their chunks) at most, of `size` positions."""
    most_rows = size // (rows.SHORT + 1)
    return most_rows, most_rows + size // rows.CHUNK


def _work_size(size: int) -> int:
    """Integers that listing them takes."""
    return 2 + 2 * sum(_most_long(size))


def _four(name: str, numbers: tuple[Any, ...]) -> tuple[float, ...]:
    """A rule's hyper-parameters as the kernels take them."""
    numbers = tuple(float(number) for number in numbers)
    if name == "adam":
        beta1, beta2, eps, step_size = numbers
        return 1 - beta1, 1 - beta2, eps, step_size
    return numbers + NO_NUMBERS[len(numbers) :]
