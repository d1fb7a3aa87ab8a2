"""CudaKernels: the Triton kernel set, for a cache whose block and maps are on a CUDA device.

Launches only: what a kernel computes stands beside it in `index` (integers) and `rows` (records). Under Triton's
interpreter (TRITON_INTERPRET=1) the same kernels run on CPU tensors. float64 tables take the plain twin's updates,
since Triton passes scalars as float32.
Shapes as in `kernels.device`.
"""

from typing import Any

import torch
import triton

from ...device_slots import DeviceSlots
from ..device import KEYS, DevicePlan, DeviceTorchKernels, Tables
from . import index, rows

__all__ = ["CudaKernels"]

IS_INTERPRETED = triton.knobs.runtime.interpret if hasattr(triton, "knobs") else triton.runtime.jit.JITFunction is None

BLOCK = 128  # integers of a program: one for each thread of four warps
WINDOW_BLOCK = 512
TILE_ELEMENTS = 1024  # of a tile of rows
RULE_NUMBERS = {
    "sgd": rows.SGD,
    "adagrad": rows.ADAGRAD,
    "rowwise_adagrad": rows.ROWWISE_ADAGRAD,
    "adam": rows.ADAM,
}
# Each product and sum is rounded as it is written, so that a fused update has the bits of a separate one.
AS_WRITTEN = {} if IS_INTERPRETED else {"enable_fp_fusion": False}


def _programs(count: int, block: int) -> tuple[int]:
    return (-(-count // block),)


def _steps(count: int) -> int:
    """Halvings until one of `count` is left; rounded up, so that few kernels are compiled."""
    return max(count - 1, 1).bit_length()


def _tile(width: int) -> dict[str, int]:
    """Rows and padded width of a tile."""
    block = triton.next_power_of_2(width)
    return {"ROWS": max(1, TILE_ELEMENTS // block), "BLOCK": block}


class CudaKernels(DeviceTorchKernels):
    """The Triton set."""

    name = "cuda"
    has_entries = True
    takes_means = True  # row-wise Adagrad's, inside its update

    # ---- maps ---------------------------------------------------------------------------------------------------

    def plan(self, values: torch.Tensor, offsets: torch.Tensor, tables: Tables, slots: DeviceSlots, use: int):
        """As the twin's; without waiting for the device."""
        device, size, num_bags = values.device, values.numel(), offsets.numel() - 1
        num_tables = tables.rows.numel()
        absent = slots.num_rows
        counts = torch.zeros(num_tables, 4, dtype=torch.int64, device=device)
        found = torch.zeros(4, dtype=torch.int64, device=device)
        found[0].fill_(size)

        def integers(count: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.empty(count, dtype=dtype, device=device)

        keys, bag_of_position = integers(size, slots.number), integers(size)
        index.number_ids[_programs(max(size, num_bags, 1), BLOCK)](
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
            max(num_bags // num_tables, 1),
            absent,
            STEPS=_steps(num_bags) + 1,
            BLOCK=BLOCK,
        )
        starts = integers(size + 1)
        if not size:
            empty = integers(0)
            return DevicePlan(
                integers(0, torch.int64), starts.zero_(), empty, empty, keys, empty, empty, empty, found, counts
            )
        keys, order = torch.sort(keys, stable=True)
        is_head = integers(size)
        index.mark_heads[_programs(size, BLOCK)](keys, is_head, size, absent, BLOCK=BLOCK)
        heads_up_to = torch.cumsum(is_head, 0, dtype=torch.int32)
        unique_of_position, id_of_unique = integers(size), integers(size, slots.number)
        index.number_uniques[_programs(size, BLOCK)](
            keys, order, heads_up_to, unique_of_position, id_of_unique, starts, size, absent, BLOCK=BLOCK
        )
        slot_of_unique, is_missing = integers(size), is_head
        index.probe_uniques[_programs(size, BLOCK)](
            slots.entries,
            slots.id_of_slot,
            slots.last_use,
            slots.uses,
            id_of_unique,
            starts,
            heads_up_to,
            tables.starts,
            slot_of_unique,
            is_missing,
            found,
            counts,
            use,
            size,
            num_tables,
            slots.num_buckets,
            slots.slot_bits,
            COUNT_USES=slots.counts_uses,
            STEPS=_steps(num_tables) + 1,
            BLOCK=BLOCK,
        )
        missing_up_to = torch.cumsum(is_missing, 0, dtype=torch.int32)
        found[2:3] = missing_up_to[-1:]
        return DevicePlan(
            order,
            starts,
            unique_of_position,
            bag_of_position,
            id_of_unique,
            slot_of_unique,
            is_missing,
            missing_up_to,
            found,
            counts,
        )

    def find(self, ids: torch.Tensor, slots: DeviceSlots) -> torch.Tensor:
        found = torch.empty(ids.numel(), dtype=torch.int32, device=ids.device)
        if ids.numel():
            index.find_slots[_programs(ids.numel(), BLOCK)](
                slots.entries,
                slots.id_of_slot,
                ids,
                found,
                ids.numel(),
                slots.num_buckets,
                slots.slot_bits,
                BLOCK=BLOCK,
            )
        return found

    def missing(self, plan: DevicePlan, num_unique: int, num_missing: int) -> torch.Tensor:
        missing = torch.empty(num_missing, dtype=torch.int64, device=plan.is_missing.device)
        index.list_missing[_programs(num_unique, BLOCK)](
            plan.is_missing, plan.missing_up_to, missing, num_unique, BLOCK=BLOCK
        )
        return missing

    def choose_victims(
        self, slots: DeviceSlots, key: str, count: int, hand: int, window: int, protected_from: int, limit: int
    ) -> torch.Tensor:
        grid = _programs(window, WINDOW_BLOCK)
        counts = torch.empty(grid[0], dtype=torch.int32, device=slots.device)
        arguments = (hand, window, slots.num_used, protected_from)
        index.count_candidates[grid](slots.last_use, counts, *arguments, BLOCK=WINDOW_BLOCK)
        candidates = torch.full((limit,), -1, dtype=torch.int32, device=slots.device)
        keys = torch.full((limit,), -(2**62), dtype=torch.int64, device=slots.device)
        index.take_candidates[grid](
            slots.last_use,
            slots.uses,
            slots.row_of_slot,
            torch.cumsum(counts, 0, dtype=torch.int32),
            candidates,
            keys,
            *arguments,
            limit,
            KEY=KEYS.index(key),
            BLOCK=WINDOW_BLOCK,
        )
        return candidates[torch.sort(keys, descending=True, stable=True).indices[:count]]

    def exchange(self, slots: DeviceSlots, targets, num_fresh, new_ids, rows_of, by_id, use, written):
        count = targets.numel()
        old_rows, new_rows = (torch.empty(count, dtype=torch.int64, device=slots.device) for _ in range(2))
        if count:
            index.exchange_slots[_programs(count, BLOCK)](
                slots.entries,
                slots.id_of_slot,
                slots.row_of_slot,
                slots.last_use,
                slots.uses,
                slots.dirty,
                slots.id_of_slot if rows_of is None else rows_of,
                targets,
                new_ids,
                old_rows,
                new_rows,
                written,
                use,
                count,
                num_fresh,
                slots.num_buckets,
                slots.slot_bits,
                ORDERED=rows_of is not None,
                BY_ID=by_id,
                COUNT_USES=slots.counts_uses,
                BLOCK=BLOCK,
            )
            index.insert_entries[_programs(count, BLOCK)](
                slots.entries, new_ids, targets, count, slots.num_buckets, slots.slot_bits, BLOCK=BLOCK
            )
        slots.version += 1
        return old_rows, new_rows

    # ---- records ------------------------------------------------------------------------------------------------

    def swap_rows(self, store: torch.Tensor, old_rows, new_rows, records: torch.Tensor, targets) -> None:
        count, width = targets.numel(), records.shape[1]
        if count:
            tile = _tile(width)
            rows.swap_rows[_programs(count, tile["ROWS"])](
                store, store.stride(0), old_rows, new_rows, records, records.stride(0), targets, count, width, **tile
            )

    def copy_rows(self, source, source_rows, target, target_rows):
        count, width = source_rows.numel(), source.shape[1]
        if count:
            tile = _tile(width)
            rows.copy_rows[_programs(count, tile["ROWS"])](
                source, source.stride(0), source_rows, target, target.stride(0), target_rows, count, width, **tile
            )

    def bags(self, records, dim, slot_of_unique, plan, offsets, weights, mode, num_tables):
        num_bags = offsets.numel() - 1
        bags_per_table = num_bags // num_tables
        out = records.new_empty(bags_per_table, num_tables, dim)
        tile = _tile(dim)
        grid = _programs(num_bags, tile["ROWS"])
        sizes = (num_bags, max(bags_per_table, 1), num_tables, dim)
        if mode == "max":
            kept = torch.empty(num_bags, dim, dtype=torch.int64, device=records.device)
        else:
            kept = torch.empty(num_bags if mode == "mean" else 0, dtype=torch.int32, device=records.device)
        if not num_bags:
            return out, kept
        common = (records, records.stride(0), slot_of_unique, plan.unique_of_position, offsets)
        if mode == "max":
            rows.pool_max[grid](*common, out, kept, *sizes, **tile)
        else:
            flags = {"HAS_WEIGHTS": weights is not None, "MEAN": mode == "mean"}
            weights = records if weights is None else weights.detach()
            rows.pool[grid](*common, weights, out, kept, *sizes, **flags, **tile, **AS_WRITTEN)
        return out, kept

    def row_gradients(
        self, grad, plan, offsets, kept, weights, mode, by_frequency, slot_of_unique, place_of_unique, num_unique
    ):
        values = grad.new_empty(num_unique, grad.shape[2])
        self._sum_rows(
            grad, plan, offsets, kept, weights, mode, by_frequency, slot_of_unique, place_of_unique, num_unique,
            values, values, plan.starts, rows.KEEP, (0.0,) * 4,
        )  # fmt: skip
        return values

    def train_rows(
        self, grad, plan, offsets, kept, weights, mode, by_frequency, slot_of_unique, num_unique, records, dirty, dim, rule
    ) -> bool:
        if records.dtype != torch.float32:
            return False
        name, hyper = rule
        self._sum_rows(
            grad, plan, offsets, kept, weights, mode, by_frequency, slot_of_unique, slot_of_unique, num_unique,
            records, grad, dirty, RULE_NUMBERS[name], _four(name, hyper),
        )  # fmt: skip
        return True

    def _sum_rows(
        self, grad, plan, offsets, kept, weights, mode, by_frequency, slot_of_unique, place_of_unique, num_unique,
        records, values, dirty, rule, hyper,
    ) -> None:  # fmt: skip
        """Short rows in one pass; long ones in chunks, so that no program has much more to do than the others."""
        if not num_unique:
            return
        grad = grad.contiguous()
        dim, size, device = grad.shape[2], plan.order.numel(), grad.device
        num_tables = grad.shape[1]
        flags = {"HAS_WEIGHTS": weights is not None, "MEAN": mode == "mean", "MAX": mode == "max"}
        weights = grad if weights is None else weights.detach()
        kept = plan.starts if kept is None else kept
        common = (grad, plan.order, plan.starts, plan.bag_of_position, kept, weights, kept)
        shape = ((offsets.numel() - 1) // num_tables, num_tables, dim)
        tile = _tile(dim)
        rows.sum_rows[_programs(num_unique, tile["ROWS"])](
            *common,
            slot_of_unique,
            place_of_unique,
            records,
            records.stride(0),
            values,
            dirty,
            num_unique,
            *shape,
            *hyper,
            **flags,
            RULE=rule,
            BY_FREQUENCY=by_frequency,
            SHORT=rows.SHORT,
            **tile,
            **AS_WRITTEN,
        )
        most_rows = size // (rows.SHORT + 1)
        if not most_rows:
            return
        most_chunks = most_rows + size // rows.CHUNK
        long_rows, first_chunks = torch.empty(2, most_rows, dtype=torch.int32, device=device)
        chunk_rows, chunk_numbers = torch.empty(2, most_chunks, dtype=torch.int32, device=device)
        num_long = torch.zeros(2, dtype=torch.int32, device=device)
        sums = grad.new_empty(most_chunks, dim)
        rows.list_long_rows[_programs(num_unique, WINDOW_BLOCK)](
            plan.starts,
            long_rows,
            first_chunks,
            chunk_rows,
            chunk_numbers,
            num_long,
            num_unique,
            SHORT=rows.SHORT,
            CHUNK=rows.CHUNK,
            BLOCK=WINDOW_BLOCK,
        )
        across = {"CHUNK": rows.CHUNK, "TILE": rows.TILE, "BLOCK": tile["BLOCK"]}
        rows.sum_chunks[(most_chunks,)](
            *common, chunk_rows, chunk_numbers, num_long, sums, *shape, **flags, **across, **AS_WRITTEN
        )
        rows.sum_long_rows[(most_rows,)](
            sums,
            plan.starts,
            long_rows,
            first_chunks,
            num_long,
            slot_of_unique,
            place_of_unique,
            records,
            records.stride(0),
            values,
            dirty,
            dim,
            *hyper,
            RULE=rule,
            BY_FREQUENCY=by_frequency,
            **across,
            **AS_WRITTEN,
        )

    def weight_gradients(self, grad, records, dim, slot_of_unique, plan, offsets):
        size, num_tables = plan.order.numel(), grad.shape[1]
        out = grad.new_empty(size)
        if size:
            tile = _tile(dim)
            rows.weight_gradient[_programs(size, tile["ROWS"])](
                grad.contiguous(),
                records,
                records.stride(0),
                slot_of_unique,
                plan.unique_of_position,
                plan.bag_of_position,
                out,
                size,
                (offsets.numel() - 1) // num_tables,
                num_tables,
                dim,
                **tile,
            )
        return out

    # ---- row rules ----------------------------------------------------------------------------------------------

    def _update(self, name: str, records: torch.Tensor, dim: int, slots, grads, *hyper: float) -> None:
        if slots.numel():
            tile = _tile(dim)
            dirty = torch.empty(0, dtype=torch.uint8, device=records.device)
            rows.update_rows[_programs(slots.numel(), tile["ROWS"])](
                grads,
                slots,
                records,
                records.stride(0),
                dirty,
                slots.numel(),
                dim,
                *_four(name, hyper),
                RULE=RULE_NUMBERS[name],
                MARKS=False,
                **tile,
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


def _four(name: str, hyper: tuple[Any, ...]) -> tuple[float, ...]:
    """A rule's hyper-parameters as the kernels take them."""
    hyper = tuple(float(number) for number in hyper)
    if name == "adam":
        beta1, beta2, eps, step_size = hyper
        return 1 - beta1, 1 - beta2, eps, step_size
    return hyper + (0.0,) * (4 - len(hyper))
