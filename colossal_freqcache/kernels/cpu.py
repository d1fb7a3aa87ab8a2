"""The CPU kernel set: flat numba functions, serial, GIL released, compiled once and cached on disk.

No fastmath: every sum has the order of the batch's positions, so the bits depend neither on slots nor on threads.
The loops index by int64 and stay free of closures: in that form LLVM vectorises the innermost one over D.
Shapes as in `kernels`.
"""

import numpy as np
import torch
from numba import njit

from . import BatchPlan, WantedIds

__all__ = ["CpuKernels"]

# 2**64 / golden ratio: spreads consecutive ids over the miss table (Knuth, TAOCP 3, section 6.4).
_HASH_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@njit(cache=True, nogil=True)
def _plan(
    values,
    offsets,
    table_rows,
    table_starts,
    padding_ids,
    bags_per_table,
    slot_of_id,
    unique_of_slot,
    marks,
    prepaid_bit,
    miss_id,
    miss_unique,
    miss_stamp,
    stamp,
    unique_of_position,
    slot_of_unique,
    id_of_unique,
    counts,
):
    """Fills the four outputs of a BatchPlan; returns (U, first bad position or -1).

    A resident row was seen before in this batch if unique_of_slot[s] names an entry that names s back (so the array
    needs no clearing); a missing one if the open-addressing table miss_* holds it under this call's stamp.
    """
    num_unique = 0
    shift = np.uint64(64)
    size = miss_id.size
    while size > 1:
        shift -= np.uint64(1)
        size >>= 1
    last = miss_id.size - 1
    for t in range(table_rows.size):
        rows = table_rows[t]
        start = table_starts[t]
        padding_id = padding_ids[t]
        looked_up = 0
        missed = 0
        missed_unique = 0
        counted_before = 0
        for i in range(offsets[t * bags_per_table], offsets[(t + 1) * bags_per_table]):
            local = values[i]
            if local < 0 or local >= rows:
                return num_unique, i
            if local == padding_id:
                unique_of_position[i] = -1
                continue
            looked_up += 1
            identity = start + local
            slot = slot_of_id[identity] - 1
            if slot >= 0:
                u = unique_of_slot[slot]
                if u >= num_unique or slot_of_unique[u] != slot:
                    u = num_unique
                    unique_of_slot[slot] = u
                    slot_of_unique[u] = slot
                    id_of_unique[u] = identity
                    num_unique += 1
                if marks[slot] & prepaid_bit:
                    counted_before += 1
            else:
                missed += 1
                place = np.int64((np.uint64(identity) * _HASH_MULTIPLIER) >> shift) & last
                while miss_stamp[place] == stamp and miss_id[place] != identity:
                    place = (place + 1) & last
                if miss_stamp[place] == stamp:
                    u = miss_unique[place]
                else:
                    u = num_unique
                    miss_stamp[place] = stamp
                    miss_id[place] = identity
                    miss_unique[place] = u
                    slot_of_unique[u] = -1
                    id_of_unique[u] = identity
                    num_unique += 1
                    missed_unique += 1
            unique_of_position[i] = u
        counts[t, 0] = looked_up
        counts[t, 1] = missed
        counts[t, 2] = missed_unique
        counts[t, 3] = counted_before
    return num_unique, -1


@njit(cache=True, nogil=True)
def _distinct_ids(
    values,
    offsets,
    table_rows,
    table_starts,
    padding_ids,
    bags_per_table,
    seen_id,
    seen_stamp,
    stamp,
    ids,
    table_ends,
):
    """Fills the outputs of WantedIds, by the table of `_plan`'s misses; returns the first bad position or -1."""
    num_unique = 0
    shift = np.uint64(64)
    size = seen_id.size
    while size > 1:
        shift -= np.uint64(1)
        size >>= 1
    last = seen_id.size - 1
    for t in range(table_rows.size):
        for i in range(offsets[t * bags_per_table], offsets[(t + 1) * bags_per_table]):
            local = values[i]
            if local < 0 or local >= table_rows[t]:
                return i
            if local == padding_ids[t]:
                continue
            identity = table_starts[t] + local
            place = np.int64((np.uint64(identity) * _HASH_MULTIPLIER) >> shift) & last
            while seen_stamp[place] == stamp and seen_id[place] != identity:
                place = (place + 1) & last
            if seen_stamp[place] != stamp:
                seen_stamp[place] = stamp
                seen_id[place] = identity
                ids[num_unique] = identity
                num_unique += 1
        table_ends[t + 1] = num_unique
    return -1


@njit(cache=True, nogil=True)
def _add_pins(in_use, slots, delta):
    change = 0
    for i in range(slots.size):
        slot = slots[i]
        before = in_use[slot]
        after = before + delta
        in_use[slot] = after
        change += (after > 0) - (before > 0)
    return change


@njit(cache=True, nogil=True)
def _copy_rows(source, source_rows, target, target_rows):
    width = source.shape[1]
    for i in range(source_rows.size):
        a = source_rows[i]
        b = target_rows[i]
        for d in range(width):
            target[b, d] = source[a, d]


@njit(cache=True, nogil=True)
def _pool(records, dim, slot_of_unique, unique_of_position, offsets, weights, weighted, mean, out):
    bags_per_table, num_tables = out.shape[:2]
    for order in range(offsets.size - 1):  # sample by sample, as `out` lies in memory
        b = order // num_tables
        t = order - b * num_tables
        bag = t * bags_per_table + b
        taken = 0
        for i in range(offsets[bag], offsets[bag + 1]):
            u = unique_of_position[i]
            if u < 0:
                continue
            slot = np.int64(slot_of_unique[u])
            if weighted:
                w = weights[i]
                if taken == 0:
                    for d in range(dim):
                        out[b, t, d] = w * records[slot, d]
                else:
                    for d in range(dim):
                        out[b, t, d] += w * records[slot, d]
            elif taken == 0:
                for d in range(dim):
                    out[b, t, d] = records[slot, d]
            else:
                for d in range(dim):
                    out[b, t, d] += records[slot, d]
            taken += 1
        if taken == 0:
            for d in range(dim):
                out[b, t, d] = 0
        elif mean and taken > 1:
            count = out.dtype.type(taken)
            for d in range(dim):
                out[b, t, d] /= count


@njit(cache=True, nogil=True)
def _pool_max(records, dim, slot_of_unique, unique_of_position, offsets, out, chosen):
    bags_per_table, num_tables = out.shape[:2]
    for order in range(offsets.size - 1):  # sample by sample, as `out` lies in memory
        b = order // num_tables
        t = order - b * num_tables
        bag = t * bags_per_table + b
        taken = 0
        for d in range(dim):
            out[b, t, d] = 0
            chosen[bag, d] = -1
        for i in range(offsets[bag], offsets[bag + 1]):
            u = unique_of_position[i]
            if u < 0:
                continue
            slot = np.int64(slot_of_unique[u])
            for d in range(dim):
                if taken == 0 or records[slot, d] > out[b, t, d]:
                    out[b, t, d] = records[slot, d]
                    chosen[bag, d] = i
            taken += 1


@njit(cache=True, nogil=True)
def _count_positions(unique_of_position, num_unique):
    positions = np.zeros(num_unique, np.int64)
    for i in range(unique_of_position.size):
        if unique_of_position[i] >= 0:
            positions[unique_of_position[i]] += 1
    return positions


@njit(cache=True, nogil=True)
def _pool_backward(
    grad, unique_of_position, offsets, weights, weighted, mean, positions, scaled, place_of_unique, seen, values
):
    """A row belongs to one table, whose positions come in batch order: so do the addends of each sum."""
    bags_per_table, num_tables, dim = grad.shape
    one = grad.dtype.type(1)
    for order in range(offsets.size - 1):  # sample by sample, as `grad` lies in memory
        b = order // num_tables
        t = order - b * num_tables
        bag = t * bags_per_table + b
        scale = one
        if mean:
            taken = 0
            for i in range(offsets[bag], offsets[bag + 1]):
                taken += unique_of_position[i] >= 0
            if taken > 1:
                scale = one / grad.dtype.type(taken)
        for i in range(offsets[bag], offsets[bag + 1]):
            u = unique_of_position[i]
            if u < 0:
                continue
            w = scale
            if weighted:
                w = weights[i]
            if scaled:
                w /= grad.dtype.type(positions[u])
            place = np.int64(place_of_unique[u])
            if not seen[u]:
                seen[u] = True
                for d in range(dim):
                    values[place, d] = w * grad[b, t, d]
            else:
                for d in range(dim):
                    values[place, d] += w * grad[b, t, d]


@njit(cache=True, nogil=True)
def _pool_max_backward(grad, unique_of_position, offsets, chosen, place_of_unique, values):
    bags_per_table = grad.shape[0]
    for bag in range(offsets.size - 1):
        t = bag // bags_per_table
        b = bag - t * bags_per_table
        for d in range(grad.shape[2]):
            i = chosen[bag, d]
            if i >= 0:
                values[place_of_unique[unique_of_position[i]], d] += grad[b, t, d]


@njit(cache=True, nogil=True)
def _weight_gradient(grad, records, dim, slot_of_unique, unique_of_position, offsets, out):
    bags_per_table = grad.shape[0]
    for bag in range(offsets.size - 1):
        t = bag // bags_per_table
        b = bag - t * bags_per_table
        for i in range(offsets[bag], offsets[bag + 1]):
            u = unique_of_position[i]
            total = 0.0
            if u >= 0:
                slot = np.int64(slot_of_unique[u])
                for d in range(dim):
                    total += np.float64(grad[b, t, d]) * np.float64(records[slot, d])
            out[i] = total


@njit(cache=True, nogil=True, error_model="numpy")
def _renormalize(records, dim, slots, max_norm, norm_type, changed):
    for i in range(slots.size):
        slot = np.int64(slots[i])
        norm = 0.0
        if norm_type == 2.0:
            for d in range(dim):
                norm += np.float64(records[slot, d]) ** 2
            norm = np.sqrt(norm)
        elif norm_type == np.inf:
            for d in range(dim):
                norm = max(norm, np.abs(np.float64(records[slot, d])))
        elif norm_type == -np.inf:
            norm = np.inf
            for d in range(dim):
                norm = min(norm, np.abs(np.float64(records[slot, d])))
        elif norm_type == 0.0:
            for d in range(dim):
                norm += records[slot, d] != 0
        else:
            for d in range(dim):
                norm += np.abs(np.float64(records[slot, d])) ** norm_type
            norm **= 1.0 / norm_type
        changed[i] = norm > max_norm
        if changed[i]:
            scale = records.dtype.type(max_norm / (norm + 1e-7))
            for d in range(dim):
                records[slot, d] *= scale


@njit(cache=True, nogil=True)
def _update_sgd(records, dim, slots, grads, lr):
    for i in range(slots.size):
        slot = np.int64(slots[i])
        for d in range(dim):
            records[slot, d] -= lr * grads[i, d]


@njit(cache=True, nogil=True)
def _update_adagrad(records, dim, slots, grads, lr, eps):
    for i in range(slots.size):
        slot = np.int64(slots[i])
        for d in range(dim):
            g = grads[i, d]
            s = records[slot, dim + d] + g * g
            records[slot, dim + d] = s
            records[slot, d] -= lr * (g / (np.sqrt(s) + eps))


@njit(cache=True, nogil=True)
def _square_sums(grads, sums):
    for i in range(grads.shape[0]):
        squares = 0.0
        for d in range(grads.shape[1]):
            squares += np.float64(grads[i, d]) ** 2
        sums[i] = squares


@njit(cache=True, nogil=True)
def _update_rowwise_adagrad(records, dim, slots, grads, mean_squares, lr, eps):
    for i in range(slots.size):
        slot = np.int64(slots[i])
        s = records.dtype.type(records[slot, dim] + mean_squares[i])
        records[slot, dim] = s
        scale = lr / (np.sqrt(s) + eps)
        for d in range(dim):
            records[slot, d] -= scale * grads[i, d]


@njit(cache=True, nogil=True)
def _update_adam(records, dim, slots, grads, rest1, rest2, eps, step_size):
    for i in range(slots.size):
        slot = np.int64(slots[i])
        for d in range(dim):
            g = grads[i, d]
            m = records[slot, dim + d]
            v = records[slot, 2 * dim + d]
            m += (g - m) * rest1
            v += (g * g - v) * rest2
            records[slot, dim + d] = m
            records[slot, 2 * dim + d] = v
            records[slot, d] -= step_size * (m / (np.sqrt(v) + eps))


_NO_WEIGHTS = {torch.float32: np.empty(0, np.float32), torch.float64: np.empty(0, np.float64)}
_NO_POSITIONS = np.empty(0, np.int64)


class CpuKernels:
    """The numba set. Holds the workspace of `plan` (16 bytes per position of twice the largest batch)."""

    name = "cpu"

    def __init__(self) -> None:
        self._stamp = 0
        self._resize_miss_table(64)

    def _resize_miss_table(self, size: int) -> None:
        self._miss_id = np.zeros(size, np.int64)
        self._miss_unique = np.zeros(size, np.int32)
        self._miss_stamp = np.zeros(size, np.int32)

    def workspace_bytes(self) -> int:
        """Bytes that depend on the largest batch seen."""
        return self._miss_id.nbytes + self._miss_unique.nbytes + self._miss_stamp.nbytes

    def _clear_miss_table(self, num_positions: int) -> None:
        if 2 * num_positions > self._miss_id.size:
            self._resize_miss_table(1 << (2 * num_positions - 1).bit_length())
        if self._stamp == np.iinfo(np.int32).max:
            self._stamp = 0
            self._miss_stamp[:] = 0
        self._stamp += 1

    def plan(self, values, offsets, table_rows, table_starts, padding_ids, slots):
        num_positions = values.numel()
        self._clear_miss_table(num_positions)
        unique_of_position = np.empty(num_positions, np.int32)
        slot_of_unique = np.empty(num_positions, np.int32)
        id_of_unique = np.empty(num_positions, np.int64)
        counts = np.zeros((table_rows.numel(), 4), np.int64)
        num_unique, bad_position = _plan(
            values.numpy(),
            offsets.numpy(),
            table_rows.numpy(),
            table_starts.numpy(),
            padding_ids.numpy(),
            (offsets.numel() - 1) // table_rows.numel(),
            slots.slot_of_id.numpy(),
            slots.unique_of_slot.numpy(),
            slots.marks.numpy(),
            slots.PREPAID,
            self._miss_id,
            self._miss_unique,
            self._miss_stamp,
            self._stamp,
            unique_of_position,
            slot_of_unique,
            id_of_unique,
            counts,
        )
        if bad_position >= 0:
            return int(bad_position)
        # The copies let go of the two arrays of batch length.
        return BatchPlan(
            torch.from_numpy(unique_of_position),
            torch.from_numpy(slot_of_unique[:num_unique].copy()),
            torch.from_numpy(id_of_unique[:num_unique].copy()),
            torch.from_numpy(counts),
        )

    def distinct_ids(self, values, offsets, table_rows, table_starts, padding_ids):
        num_positions = values.numel()
        self._clear_miss_table(num_positions)
        ids = np.empty(num_positions, np.int64)
        table_ends = np.zeros(table_rows.numel() + 1, np.int64)
        bad_position = _distinct_ids(
            values.numpy(),
            offsets.numpy(),
            table_rows.numpy(),
            table_starts.numpy(),
            padding_ids.numpy(),
            (offsets.numel() - 1) // table_rows.numel(),
            self._miss_id,
            self._miss_stamp,
            self._stamp,
            ids,
            table_ends,
        )
        if bad_position >= 0:
            return int(bad_position)
        return WantedIds(torch.from_numpy(ids[: table_ends[-1]].copy()), torch.from_numpy(table_ends))

    def add_pins(self, in_use, slots, delta):
        return int(_add_pins(in_use.numpy(), slots.numpy(), np.int32(delta)))

    def copy_rows(self, source, source_rows, target, target_rows):
        _copy_rows(source.numpy(), source_rows.numpy(), target.numpy(), target_rows.numpy())

    def pool(self, records, dim, slot_of_unique, unique_of_position, offsets, weights, mean, num_tables):
        out = _empty_output(offsets, num_tables, dim, records.dtype)
        _pool(
            records.numpy(),
            dim,
            slot_of_unique.numpy(),
            unique_of_position.numpy(),
            offsets.numpy(),
            _NO_WEIGHTS[records.dtype] if weights is None else weights.detach().numpy(),
            weights is not None,
            mean,
            out,
        )
        return torch.from_numpy(out)

    def pool_max(self, records, dim, slot_of_unique, unique_of_position, offsets, num_tables):
        out = _empty_output(offsets, num_tables, dim, records.dtype)
        chosen = np.empty((offsets.numel() - 1, dim), np.int64)
        _pool_max(
            records.numpy(),
            dim,
            slot_of_unique.numpy(),
            unique_of_position.numpy(),
            offsets.numpy(),
            out,
            chosen,
        )
        return torch.from_numpy(out), torch.from_numpy(chosen)

    def pool_backward(
        self, grad, unique_of_position, offsets, weights, mean, scale_by_freq, place_of_unique, num_places
    ):
        grad = grad.contiguous()
        values = torch.empty(num_places, grad.shape[2], dtype=grad.dtype)
        positions = _NO_POSITIONS
        if scale_by_freq:
            positions = _count_positions(unique_of_position.numpy(), place_of_unique.numel())
        _pool_backward(
            grad.numpy(),
            unique_of_position.numpy(),
            offsets.numpy(),
            _NO_WEIGHTS[grad.dtype] if weights is None else weights.detach().numpy(),
            weights is not None,
            mean,
            positions,
            scale_by_freq,
            place_of_unique.numpy(),
            np.zeros(num_places, np.bool_),
            values.numpy(),
        )
        return values

    def pool_max_backward(self, grad, unique_of_position, offsets, chosen, place_of_unique, num_places):
        grad = grad.contiguous()
        values = torch.zeros(num_places, grad.shape[2], dtype=grad.dtype)
        _pool_max_backward(
            grad.numpy(),
            unique_of_position.numpy(),
            offsets.numpy(),
            chosen.numpy(),
            place_of_unique.numpy(),
            values.numpy(),
        )
        return values

    def weight_gradient(self, grad, records, dim, slot_of_unique, unique_of_position, offsets):
        out = torch.zeros(unique_of_position.numel(), dtype=grad.dtype)
        _weight_gradient(
            grad.contiguous().numpy(),
            records.numpy(),
            dim,
            slot_of_unique.numpy(),
            unique_of_position.numpy(),
            offsets.numpy(),
            out.numpy(),
        )
        return out

    def renormalize(self, records, dim, slots, max_norm, norm_type):
        changed = np.empty(slots.numel(), np.bool_)
        _renormalize(records.numpy(), dim, slots.numpy(), float(max_norm), float(norm_type), changed)
        return torch.from_numpy(changed)

    def update_sgd(self, records, dim, slots, grads, lr):
        block, real = _block(records)
        _update_sgd(block, dim, slots.numpy(), grads.numpy(), real(lr))

    def update_adagrad(self, records, dim, slots, grads, lr, eps):
        block, real = _block(records)
        _update_adagrad(block, dim, slots.numpy(), grads.numpy(), real(lr), real(eps))

    def square_sums(self, grads):
        sums = np.empty(grads.shape[0], np.float64)
        _square_sums(grads.numpy(), sums)
        return torch.from_numpy(sums)

    def update_rowwise_adagrad(self, records, dim, slots, grads, mean_squares, lr, eps):
        block, real = _block(records)
        _update_rowwise_adagrad(block, dim, slots.numpy(), grads.numpy(), mean_squares.numpy(), real(lr), real(eps))

    def update_adam(self, records, dim, slots, grads, beta1, beta2, eps, step_size):
        block, real = _block(records)
        _update_adam(
            block, dim, slots.numpy(), grads.numpy(), real(1 - beta1), real(1 - beta2), real(eps), real(step_size)
        )


def _block(records: torch.Tensor):
    """(the records as an array, the scalar type of their dtype: float32 arithmetic stays float32)."""
    block = records.numpy()
    return block, block.dtype.type


def _empty_output(offsets: torch.Tensor, num_tables: int, dim: int, dtype: torch.dtype) -> np.ndarray:
    """An uninitialised (B, T, D) array. numpy asks for huge pages; torch.empty faults in 4-KiB ones (4x slower)."""
    shape = ((offsets.numel() - 1) // num_tables, num_tables, dim)
    return np.empty(shape, np.float32 if dtype == torch.float32 else np.float64)
