"""The CPU kernel set: flat numba functions, GIL released, compiled once and cached on disk.

Large arrays that a step leaves behind (outputs, gradients, positions) are used again by later steps. What reads and
writes rows uses torch.get_num_threads() threads where the batch is large enough; the bits do not depend on it.
Shapes as in `kernels`.
"""

import itertools

import numpy as np
import torch

from ..memory import RecycledArrays
from ..rounding import HALVES
from ..vectors import row_width
from . import BatchPlan, WantedIds, cpu_halves, cpu_lookup, cpu_rows
from .halves import HalfKernels
from .parts import in_parts, num_parts

__all__ = ["CpuHalfKernels", "CpuKernels"]

GRAIN = 1 << 17  # elements of rows that are worth a thread of their own: about 0.1 ms
PLAN_GRAIN = 1 << 15  # positions
MOST_UNEVEN = 1.25  # positions of the largest part of the tables, in even shares
_NO_WEIGHTS = {torch.float32: np.empty(0, np.float32), torch.float64: np.empty(0, np.float64)}
_NO_POSITIONS = np.empty(0, np.int64)
_REAL = {torch.float32: np.float32, torch.float64: np.float64, torch.int16: np.int16}  # int16: the bits of halves


class CpuKernels:
    """The numba set. Holds the workspace of `plan` and `distinct_ids`, and what steps leave behind."""

    name = "cpu"

    def __init__(self) -> None:
        self._arrays = RecycledArrays()
        self._slot_of_unique = np.empty(0, np.int32)
        self._id_of_unique = np.empty(0, np.int64)
        self._kind_of_unique = np.empty(0, np.uint8)
        self._orders = np.empty((2, 0), np.int64)
        self._one_hot = torch.arange(
            1, device="cpu"
        )  # offsets of the last batch with one position in every bag; never changed
        self._seen = np.zeros(64, np.int64)
        self._stamp = 0

    def workspace_bytes(self) -> int:
        """Bytes that depend on the largest batch seen."""
        scratch = (self._slot_of_unique, self._id_of_unique, self._kind_of_unique, self._orders, self._seen)
        return sum(array.nbytes for array in scratch) + self._one_hot.nbytes + self._arrays.num_bytes()

    def copy_offsets(self, offsets, num_values, has_end):
        size = offsets.numel() + (not has_end)
        if size == num_values + 1 and cpu_lookup.is_one_hot(offsets.numpy()):
            one_hot = self._one_hot  # read once: another thread may replace it
            if one_hot.numel() != size:
                self._one_hot = one_hot = torch.arange(size, device="cpu")
            return one_hot, True
        copy = self._arrays.take((size,), np.int64)
        rising = cpu_lookup.copy_offsets(offsets.numpy(), num_values, copy)
        return torch.from_numpy(copy), bool(rising)

    def plan(self, values, offsets, table_rows, table_starts, padding_ids, slots):
        num_positions = values.numel()
        if num_positions > self._slot_of_unique.size:
            self._slot_of_unique = np.empty(num_positions, np.int32)
            self._id_of_unique = np.empty(num_positions, np.int64)
            self._kind_of_unique = np.empty(num_positions, np.uint8)
        num_tables = table_rows.numel()
        bags_per_table = (offsets.numel() - 1) // num_tables
        unique_of_position = self._arrays.take((num_positions,), np.int32)
        counts = np.zeros((num_tables, 4), np.int64)
        arguments = (
            values.numpy(),
            offsets.numpy(),
            table_rows.numpy(),
            table_starts.numpy(),
            padding_ids.numpy(),
            bags_per_table,
            slots.slot_of_id.numpy(),
            slots.marks.numpy(),
            slots.PREPAID,
            unique_of_position,
            self._slot_of_unique,
            self._id_of_unique,
            self._kind_of_unique,
            counts,
        )
        starts = offsets.numpy()[bags_per_table * np.arange(num_tables + 1)]
        tables = _equal_parts(starts, num_parts(num_positions, PLAN_GRAIN))
        found = [(0, -1)] * (len(tables) - 1)

        def plan_parts(first, last):
            for part in range(first, last):
                found[part] = cpu_lookup.plan(*arguments, *tables[part : part + 2])

        in_parts(plan_parts, len(found), len(found))
        bad_position = next((bad for _, bad in found if bad >= 0), None)
        if bad_position is not None:
            return int(bad_position)
        begins = [int(starts[table]) for table in tables]
        num_before = list(itertools.accumulate((num for num, _ in found), initial=0))
        for part in range(1, len(found)):
            cpu_lookup.renumber(unique_of_position, *begins[part : part + 2], num_before[part])
        pieces = [slice(begin, begin + num) for begin, (num, _) in zip(begins[:-1], found, strict=True)]
        return BatchPlan(
            torch.from_numpy(unique_of_position),
            *(
                torch.from_numpy(np.concatenate([scratch[piece] for piece in pieces]))
                for scratch in (self._slot_of_unique, self._id_of_unique)
            ),
            torch.from_numpy(counts),
        )

    def distinct_ids(self, values, offsets, table_rows, table_starts, padding_ids):
        num_positions = values.numel()
        if 2 * num_positions > self._seen.size:
            self._seen = np.zeros(1 << (2 * num_positions - 1).bit_length(), np.int64)
            self._stamp = 0
        elif self._stamp == (1 << (63 - cpu_lookup.ID_BITS)) - 1:
            self._seen[:] = 0
            self._stamp = 0
        self._stamp += 1
        ids = np.empty(num_positions, np.int64)
        table_ends = np.zeros(table_rows.numel() + 1, np.int64)
        bad_position = cpu_lookup.distinct_ids(
            values.numpy(),
            offsets.numpy(),
            table_rows.numpy(),
            table_starts.numpy(),
            padding_ids.numpy(),
            (offsets.numel() - 1) // table_rows.numel(),
            self._seen,
            self._stamp,
            ids,
            table_ends,
        )
        if bad_position >= 0:
            return int(bad_position)
        return WantedIds(torch.from_numpy(ids[: table_ends[-1]].copy()), torch.from_numpy(table_ends))

    def add_pins(self, in_use, slots, delta):
        return int(cpu_lookup.add_pins(in_use.numpy(), slots.numpy(), np.int32(delta)))

    def order_slots(self, slot_of_unique):
        num_unique = slot_of_unique.numel()
        if num_unique > self._orders.shape[1]:
            self._orders = np.empty((2, num_unique), np.int64)
        slots = self._arrays.take((num_unique,), np.int64)
        places = self._arrays.take((num_unique,), np.int32)
        cpu_lookup.order_slots(slot_of_unique.numpy(), slots, places, *self._orders[:, :num_unique])
        return torch.from_numpy(slots), torch.from_numpy(places)

    def copy_rows(self, source, source_rows, target, target_rows):
        if source.dtype in HALVES:
            source, target = source.view(torch.int16), target.view(torch.int16)
        arrays = source.numpy(), source_rows.numpy(), target.numpy(), target_rows.numpy()
        row = _row(source.shape[1], source.dtype)
        _in_parts(cpu_rows.copy_rows, source_rows.numel(), source.shape[1], *arrays, row)

    def pool(self, records, dim, slot_of_unique, unique_of_position, offsets, weights, mean, num_tables):
        out = self._output(offsets, num_tables, dim, records.dtype)
        lookup = records.numpy(), slot_of_unique.numpy(), unique_of_position.numpy()
        row = _row(dim, records.dtype)
        per_sample = dim * unique_of_position.numel() // max(1, out.shape[0])
        if weights is None and self._is_one_hot(offsets):
            _in_parts(cpu_rows.pool_one_hot, out.shape[0], per_sample, *lookup, out, row)
        else:
            _in_parts(
                cpu_rows.pool,
                out.shape[0],
                per_sample,
                *lookup,
                offsets.numpy(),
                _NO_WEIGHTS[records.dtype] if weights is None else weights.detach().numpy(),
                weights is not None,
                mean,
                out,
                row,
            )
        return torch.from_numpy(out)

    def pool_max(self, records, dim, slot_of_unique, unique_of_position, offsets, num_tables):
        out = self._output(offsets, num_tables, dim, records.dtype)
        chosen = self._arrays.take((offsets.numel() - 1, dim), np.int64)
        _in_parts(
            cpu_rows.pool_max,
            out.shape[0],
            dim * unique_of_position.numel() // max(1, out.shape[0]),
            records.numpy(),
            dim,
            slot_of_unique.numpy(),
            unique_of_position.numpy(),
            offsets.numpy(),
            out,
            chosen,
        )
        return torch.from_numpy(out), torch.from_numpy(chosen)

    def _is_one_hot(self, offsets):
        return offsets is self._one_hot or cpu_lookup.is_one_hot(offsets.numpy())

    def _output(self, offsets, num_tables, dim, dtype):
        """An uninitialised (B, T, D) array."""
        return self._arrays.take(((offsets.numel() - 1) // num_tables, num_tables, dim), _REAL[dtype])

    def pool_backward(
        self, grad, unique_of_position, offsets, weights, mean, scale_by_freq, place_of_unique, num_places
    ):
        grad = grad.contiguous()
        dim = grad.shape[2]
        values = self._arrays.take((num_places, dim), _REAL[grad.dtype])
        where = grad.numpy(), unique_of_position.numpy()
        places = place_of_unique.numpy(), values, _row(dim, grad.dtype)
        if weights is None and not scale_by_freq and self._is_one_hot(offsets):
            _in_parts_of_unique(cpu_rows.pool_one_hot_backward, num_places, offsets, *where, *places)
        else:
            positions = _NO_POSITIONS
            if scale_by_freq:
                positions = cpu_lookup.count_positions(unique_of_position.numpy(), num_places)
            _in_parts_of_unique(
                cpu_rows.pool_backward,
                num_places,
                offsets,
                *where,
                offsets.numpy(),
                _NO_WEIGHTS[grad.dtype] if weights is None else weights.detach().numpy(),
                weights is not None,
                mean,
                positions,
                scale_by_freq,
                *places,
            )
        return torch.from_numpy(values)

    def pool_max_backward(self, grad, unique_of_position, offsets, chosen, place_of_unique, num_places):
        grad = grad.contiguous()
        values = self._arrays.take((num_places, grad.shape[2]), _REAL[grad.dtype])
        values[:] = 0
        cpu_rows.pool_max_backward(
            grad.numpy(),
            unique_of_position.numpy(),
            offsets.numpy(),
            chosen.numpy(),
            place_of_unique.numpy(),
            values,
        )
        return torch.from_numpy(values)

    def weight_gradient(self, grad, records, dim, slot_of_unique, unique_of_position, offsets):
        out = torch.zeros(unique_of_position.numel(), dtype=grad.dtype)
        cpu_rows.weight_gradient(
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
        cpu_rows.renormalize(records.numpy(), dim, slots.numpy(), float(max_norm), float(norm_type), changed)
        return torch.from_numpy(changed)

    def update_sgd(self, records, dim, slots, grads, lr):
        _update(cpu_rows.update_sgd, records, _row(dim, records.dtype), slots, grads, lr)

    def update_adagrad(self, records, dim, slots, grads, lr, eps):
        _update(cpu_rows.update_adagrad, records, dim, slots, grads, lr, eps)

    def square_sums(self, grads):
        sums = np.empty(grads.shape[0], np.float64)
        _in_parts(cpu_rows.square_sums, grads.shape[0], grads.shape[1], grads.numpy(), sums)
        return torch.from_numpy(sums)

    def update_rowwise_adagrad(self, records, dim, slots, grads, mean_squares, lr, eps):
        _update(cpu_rows.update_rowwise_adagrad, records, dim, slots, grads, lr, eps, arrays=(mean_squares.numpy(),))

    def update_adam(self, records, dim, slots, grads, beta1, beta2, eps, step_size):
        _update(cpu_rows.update_adam, records, dim, slots, grads, 1 - beta1, 1 - beta2, eps, step_size)

    def widen(self, values):
        return torch.from_numpy(self._arrays.take(tuple(values.shape), np.float32)).copy_(values)

    def narrow(self, values, dtype):
        return torch.from_numpy(self._arrays.take(tuple(values.shape), np.int16)).view(dtype).copy_(values)

    def widen_rows(self, records, width, slots):
        rows = self._arrays.take((slots.numel(), width), np.float32)
        _in_parts(cpu_halves.widen_rows, slots.numel(), width, _bits(records), slots.numpy(), rows)
        return torch.from_numpy(rows)

    def narrow_rows(self, rows, records, slots, rounding):
        if rounding is None:
            records[slots.long(), : rows.shape[1]] = rows.to(records.dtype)
            return
        arguments = (rows.numpy(), _bits(records), slots.numpy(), *_key(rounding))
        _in_parts(cpu_halves.round_rows, slots.numel(), rows.shape[1], *arguments)


class CpuHalfKernels(HalfKernels):
    """The numba set over 16-bit rows. What a step spends its time in is done in one pass, to the same bits."""

    def pool_backward(
        self, grad, unique_of_position, offsets, weights, mean, scale_by_freq, place_of_unique, num_places
    ):
        arguments = unique_of_position, offsets, weights, mean, scale_by_freq, place_of_unique, num_places
        if weights is not None or scale_by_freq or not self._inner._is_one_hot(offsets):
            return super().pool_backward(grad, *arguments)
        values = self._inner._arrays.take((num_places, grad.shape[2]), np.float32)
        arrays = _bits(grad.contiguous()), unique_of_position.numpy(), place_of_unique.numpy(), values
        _in_parts_of_unique(cpu_halves.pool_one_hot_backward, num_places, offsets, *arrays)
        return self._inner.narrow(torch.from_numpy(values), grad.dtype)

    def update_sgd(self, records, dim, slots, grads, lr):
        if not self._update_at_once(cpu_halves.update_sgd, records, dim, slots, grads, lr):
            super().update_sgd(records, dim, slots, grads, lr)

    def update_adagrad(self, records, dim, slots, grads, lr, eps):
        if not self._update_at_once(cpu_halves.update_adagrad, records, dim, slots, grads, lr, eps):
            super().update_adagrad(records, dim, slots, grads, lr, eps)

    def update_rowwise_adagrad(self, records, dim, slots, grads, mean_squares, lr, eps):
        arrays = (mean_squares.numpy(),)
        update = cpu_halves.update_rowwise_adagrad
        if not self._update_at_once(update, records, dim, slots, grads, lr, eps, arrays=arrays):
            super().update_rowwise_adagrad(records, dim, slots, grads, mean_squares, lr, eps)

    def update_adam(self, records, dim, slots, grads, beta1, beta2, eps, step_size):
        numbers = 1 - beta1, 1 - beta2, eps, step_size
        if not self._update_at_once(cpu_halves.update_adam, records, dim, slots, grads, *numbers):
            super().update_adam(records, dim, slots, grads, beta1, beta2, eps, step_size)

    def _update_at_once(self, function, records, dim, slots, grads, *numbers, arrays=()) -> bool:
        """Whether it was done: it is where the rounding is stochastic."""
        if self._rounding is None:
            return False
        numbers = tuple(np.float32(number) for number in numbers)
        arguments = (_bits(records), dim, slots.numpy(), _bits(grads), *_key(self._rounding), *arrays, *numbers)
        _in_parts(function, slots.numel(), records.shape[1], *arguments)
        return True


def _equal_parts(starts, parts):
    """Numbers of the tables that begin each part, and how many there are, for parts of about equally many positions."""
    num_tables, num_positions = len(starts) - 1, int(starts[-1])
    bounds = [int(np.searchsorted(starts, num_positions * part // parts)) for part in range(1, parts)]
    return [0, *sorted({bound for bound in bounds if 0 < bound < num_tables}), num_tables]


def _in_parts(function, size, elements_each, *arguments):
    """function(*arguments, first, last) over the parts of range(size), whose members cost `elements_each`."""
    in_parts(
        lambda first, last: function(*arguments, first, last), size, num_parts(size * max(1, elements_each), GRAIN)
    )


def _in_parts_of_unique(function, num_unique, offsets, grad, unique_of_position, *arguments):
    """function(grad, unique_of_position, *arguments, first table, last, first unique row, last) over parts of the rows.

    Where the tables can be shared out so, no two parts look at the same position.
    """
    bags_per_table, num_tables, dim = grad.shape
    parts = num_parts(dim * unique_of_position.size, GRAIN)
    if parts == 1:
        function(grad, unique_of_position, *arguments, 0, num_tables, 0, num_unique)
        return
    bounds = _parts_of_tables(offsets.numpy()[bags_per_table * np.arange(num_tables + 1)], unique_of_position, parts)
    if bounds is None:
        ends = [num_unique * part // parts for part in range(parts + 1)]
        bounds = [(0, num_tables, *ends[part : part + 2]) for part in range(parts)]

    def do(first, last):
        for part in range(first, last):
            function(grad, unique_of_position, *arguments, *bounds[part])

    in_parts(do, parts, parts)


def _parts_of_tables(starts, unique_of_position, parts):
    """(first table, last, first unique row, last) of each part; None where parts are uneven, or share numbers.

    Numbers given table after table, as `plan` gives them, are not shared; ranks that exchange rows give others.
    """
    tables = _equal_parts(starts, parts)
    if len(tables) - 1 < parts or parts * np.diff(starts[tables]).max() > MOST_UNEVEN * unique_of_position.size:
        return None
    bounds, end = [], 0
    for first, last in itertools.pairwise(tables):
        smallest, beyond = cpu_lookup.unique_range(unique_of_position, starts[first], starts[last])
        if smallest < beyond:
            if smallest < end:
                return None
            end = beyond
        bounds.append((first, last, smallest, beyond))
    return bounds


def _bits(values):
    """The bits of 16-bit values, in the type by which `cpu_halves` knows what they mean."""
    bits = values.view(torch.int16).numpy()
    return bits.view(np.uint16) if values.dtype == torch.bfloat16 else bits


def _key(rounding):
    return np.int64(rounding.stream), rounding.ids.numpy(), rounding.columns.numpy().astype(np.uint32)


def _row(num_elements, dtype):
    """The width of a row in the form of `vectors`."""
    return row_width(num_elements, dtype.itemsize)


def _update(function, records, dim, slots, grads, *numbers, arrays=()):
    """An update of `slots`; `numbers` become scalars of the records' dtype: float32 arithmetic stays float32."""
    block = records.numpy()
    numbers = tuple(block.dtype.type(number) for number in numbers)
    _in_parts(function, slots.numel(), grads.shape[1], block, dim, slots.numpy(), grads.numpy(), *arrays, *numbers)
