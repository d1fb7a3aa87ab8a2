"""HalfKernels: any kernel set over rows of bfloat16 or float16. They are stored in 16 bits and computed in float32.

Every result is that of the set's own float32 functions on rows that were widened, which is exact, rounded once: to the
nearest, but for what an update writes into the records: that is rounded stochastically (`rounding`).
Rows are widened in pieces that stay in the processor's caches; whole blocks never are. What moves rows, and pooling of
bags with one position each, copies their bits.
Shapes as in `kernels`.
"""

from typing import Any

import torch

from ..rounding import Rounding

__all__ = ["HalfKernels"]

PIECE_BYTES = 1 << 19  # of widened rows in an update


class HalfKernels:
    """`inner` over 16-bit rows; `rounding` is that of the rows of one update (None: to the nearest).

    `inner` has, beside the protocol, `widen`, `narrow`, `widen_rows` and `narrow_rows`.
    """

    def __init__(self, inner: Any, rounding: Rounding | None = None) -> None:
        self._inner = inner
        self._rounding = rounding
        self.name = inner.name
        # They see no elements of rows, or move them as they are.
        for name in ("workspace_bytes", "copy_offsets", "plan", "distinct_ids", "add_pins", "order_slots", "copy_rows"):
            setattr(self, name, getattr(inner, name))

    def with_rounding(self, rounding: Rounding) -> "HalfKernels":
        """The set whose next update rounds by `rounding`: that of the rows in the order in which it gets them."""
        return type(self)(self._inner, rounding)

    def pool(self, records, dim, slot_of_unique, unique_of_position, offsets, weights, mean, num_tables):
        if weights is None and _has_one_position_a_bag(offsets, unique_of_position.numel()):
            arguments = (slot_of_unique, unique_of_position, offsets, None, False, num_tables)
            return self._inner.pool(_bits(records), dim, *arguments).view(records.dtype)
        rows, numbers = self._rows(records, dim, slot_of_unique)
        weights = None if weights is None else self._inner.widen(weights.detach())
        out = self._inner.pool(rows, dim, numbers, unique_of_position, offsets, weights, mean, num_tables)
        return self._inner.narrow(out, records.dtype)

    def pool_max(self, records, dim, slot_of_unique, unique_of_position, offsets, num_tables):
        rows, numbers = self._rows(records, dim, slot_of_unique)
        out, chosen = self._inner.pool_max(rows, dim, numbers, unique_of_position, offsets, num_tables)
        return self._inner.narrow(out, records.dtype), chosen

    def pool_backward(
        self, grad, unique_of_position, offsets, weights, mean, scale_by_freq, place_of_unique, num_places
    ):
        weights = None if weights is None else self._inner.widen(weights.detach())
        arguments = (unique_of_position, offsets, weights, mean, scale_by_freq, place_of_unique, num_places)
        return self._inner.narrow(self._inner.pool_backward(self._inner.widen(grad), *arguments), grad.dtype)

    def pool_max_backward(self, grad, unique_of_position, offsets, chosen, place_of_unique, num_places):
        arguments = (unique_of_position, offsets, chosen, place_of_unique, num_places)
        return self._inner.narrow(self._inner.pool_max_backward(self._inner.widen(grad), *arguments), grad.dtype)

    def weight_gradient(self, grad, records, dim, slot_of_unique, unique_of_position, offsets):
        rows, numbers = self._rows(records, dim, slot_of_unique)
        out = self._inner.weight_gradient(self._inner.widen(grad), rows, dim, numbers, unique_of_position, offsets)
        return self._inner.narrow(out, grad.dtype)

    def renormalize(self, records, dim, slots, max_norm, norm_type):
        rows, numbers = self._rows(records, dim, slots)
        changed = self._inner.renormalize(rows, dim, numbers, max_norm, norm_type)
        self._inner.narrow_rows(rows[changed], records, slots[changed], None)
        return changed

    def update_sgd(self, records, dim, slots, grads, lr):
        self._update(self._inner.update_sgd, records, dim, slots, (grads,), lr)

    def update_adagrad(self, records, dim, slots, grads, lr, eps):
        self._update(self._inner.update_adagrad, records, dim, slots, (grads,), lr, eps)

    def square_sums(self, grads):
        return self._inner.square_sums(self._inner.widen(grads))

    def update_rowwise_adagrad(self, records, dim, slots, grads, mean_squares, lr, eps):
        self._update(self._inner.update_rowwise_adagrad, records, dim, slots, (grads, mean_squares), lr, eps)

    def update_adam(self, records, dim, slots, grads, beta1, beta2, eps, step_size):
        self._update(self._inner.update_adam, records, dim, slots, (grads,), beta1, beta2, eps, step_size)

    def _rows(self, records, dim, slots):
        """(the rows in `slots` in float32, (n, dim); their numbers 0..n-1, int32)."""
        return self._inner.widen_rows(records, dim, slots), _numbers(slots.numel())

    def _update(self, update, records, dim, slots, per_row, *numbers) -> None:
        """update(records, dim, slots, *per_row, *numbers) on widened pieces; per_row: the gradients, and more."""
        width = records.shape[1]
        step = max(1, PIECE_BYTES // (4 * width))
        for first in range(0, slots.numel(), step):
            last = min(first + step, slots.numel())
            piece = slots[first:last]
            grads, *others = (values[first:last] for values in per_row)
            rows = self._inner.widen_rows(records, width, piece)
            update(rows, dim, _numbers(last - first), self._inner.widen(grads), *others, *numbers)
            rounding = None if self._rounding is None else self._rounding.part(first, last)
            self._inner.narrow_rows(rows, records, piece, rounding)


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int16)


def _numbers(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int32)


def _has_one_position_a_bag(offsets: torch.Tensor, num_positions: int) -> bool:
    return offsets.numel() == num_positions + 1 and bool((offsets[1:] > offsets[:-1]).all())
