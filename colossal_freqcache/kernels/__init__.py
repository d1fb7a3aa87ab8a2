"""Kernel sets: the arithmetic and the row moves of a cache step, behind one protocol. `make_kernels` chooses one.

Every set takes and returns torch tensors. The torch set is the plain twin: slower, readable, compared with by value.
Shapes: N positions of a batch, U unique rows, C slots, W record width, D embedding width, T tables, B bags a table.
A *record* is a row of a (C, W) block: D weights, then the optimizer's state (RowLayout).
"""

import importlib.util
import os
import warnings
from typing import Any, NamedTuple, Protocol

import torch
from torch.cuda import get_device_capability

from ..rounding import HALVES, Rounding

__all__ = ["KERNEL_SETS", "BatchPlan", "Kernels", "WantedIds", "make_device_kernels", "make_kernels"]

KERNEL_SETS = ("cpu", "torch")  # of a cache on the host; on a device: "cuda", "torch"


class BatchPlan(NamedTuple):
    """What a batch needs, before any map has changed. Unique rows are numbered by first occurrence in the batch.

    unique_of_position: int32[N], which unique row stands at a position; -1 for padding.
    slot_of_unique: int32[U], its slot; -1 where the row is not resident.
    id_of_unique: int64[U], its id (over all tables).
    counts: int64[T, 4]: looked-up positions, missed positions, unique misses, positions of PREPAID rows.
    """

    unique_of_position: torch.Tensor
    slot_of_unique: torch.Tensor
    id_of_unique: torch.Tensor
    counts: torch.Tensor


class WantedIds(NamedTuple):
    """The distinct ids of a batch, wherever their rows are; numbered as in BatchPlan, so table after table.

    ids: int64[U], over all tables. table_ends: int64[T+1], where those of each table end in `ids`, after a 0.
    """

    ids: torch.Tensor
    table_ends: torch.Tensor


class Kernels(Protocol):
    """The whole surface of a kernel set. All index arguments are tensors on the host of a CPU cache."""

    name: str

    def copy_offsets(self, offsets, num_values, has_end) -> tuple[torch.Tensor, bool]:
        """(copy of offsets int64[n], num_values behind them unless `has_end`; whether none is below the one before).

        Nobody may change the copy: equal ones may be one tensor."""

    def plan(self, values, offsets, table_rows, table_starts, padding_ids, slots) -> BatchPlan | int:
        """Looks a batch up. values int64[N] local ids, offsets int64[T*B+1]; an int is the first bad position."""

    def distinct_ids(self, values, offsets, table_rows, table_starts, padding_ids) -> WantedIds | int:
        """What of `plan` depends on the batch alone; an int is the first bad position."""

    def add_pins(self, in_use, slots, delta) -> int:
        """in_use[slots] += delta (slots unique); returns by how much the number of slots in use changed."""

    def order_slots(self, slot_of_unique) -> tuple[torch.Tensor, torch.Tensor]:
        """(slot_of_unique ascending, int64[U], where in it each unique row went: place_of_unique, int32[U])."""

    def copy_rows(self, source, source_rows, target, target_rows) -> None:
        """target[target_rows[i]] = source[source_rows[i]] for whole records."""

    def pool(self, records, dim, slot_of_unique, unique_of_position, offsets, weights, mean, num_tables):
        """out[b, t] = sum of w_i * row_i over bag t*B+b, divided by its positions when `mean`: (B, T, D)."""

    def pool_max(self, records, dim, slot_of_unique, unique_of_position, offsets, num_tables):
        """(elementwise maximum (B, T, D), the position it came from, int64[T*B, D], -1 where the bag is empty)."""

    def pool_backward(
        self, grad, unique_of_position, offsets, weights, mean, scale_by_freq, place_of_unique, num_places
    ):
        """values[place_of_unique[u]] = sum of `pool`'s adjoint over u's positions, in batch order: (num_places, D)."""

    def pool_max_backward(self, grad, unique_of_position, offsets, chosen, place_of_unique, num_places):
        """The same for `pool_max`: each bag's gradient goes to the position that was chosen."""

    def weight_gradient(self, grad, records, dim, slot_of_unique, unique_of_position, offsets):
        """d loss / d per_sample_weights: dot(grad of the bag, row), (N,)."""

    def renormalize(self, records, dim, slots, max_norm, norm_type) -> torch.Tensor:
        """row *= max_norm / (norm + 1e-7) where the row's norm exceeds max_norm; returns which did, bool[n]."""

    def update_sgd(self, records, dim, slots, grads, lr) -> None:
        """w -= lr * g"""

    def update_adagrad(self, records, dim, slots, grads, lr, eps) -> None:
        """s += g * g; w -= lr * g / (sqrt(s) + eps)"""

    def square_sums(self, grads) -> torch.Tensor:
        """sum over d of g * g, in the order of the columns: float64[U]."""

    def update_rowwise_adagrad(self, records, dim, slots, grads, mean_squares, lr, eps) -> None:
        """s += mean_squares (float64[U], over the whole row); w -= lr / (sqrt(s) + eps) * g"""

    def update_adam(self, records, dim, slots, grads, beta1, beta2, eps, step_size) -> None:
        """m += (1-b1)(g-m); v += (1-b2)(g*g-v); w -= step_size * m / (sqrt(v) + eps)"""

    # ---- for rows of 16 bits (`halves`) -------------------------------------------------------------------------

    def widen(self, values) -> torch.Tensor:
        """`values` (bfloat16 or float16, any shape) in float32."""

    def narrow(self, values, dtype) -> torch.Tensor:
        """`values` (float32, any shape) as `dtype`, rounded to the nearest."""

    def widen_rows(self, records, width, slots) -> torch.Tensor:
        """records[slots, :width] in float32."""

    def narrow_rows(self, rows, records, slots, rounding: Rounding | None) -> None:
        """records[slots, :width of rows] = rows (float32), rounded by `rounding`, or to the nearest without it."""


def make_kernels(name: str, dtype: torch.dtype = torch.float32) -> Kernels:
    """The kernel set called `name`, for rows of `dtype`: "cpu" (numba), "torch" (plain twin), "auto" (cpu).

    Raises:
        ValueError: unknown name, or "cuda", which is for a device; lists the sets that exist.
    """
    kernels = _make_kernels(name)
    if dtype not in HALVES:
        return kernels
    if kernels.name == "cpu":
        from .cpu import CpuHalfKernels

        return CpuHalfKernels(kernels)
    from .halves import HalfKernels

    return HalfKernels(kernels)


def _make_kernels(name: str) -> Kernels:
    if name in ("auto", "cpu"):
        from .cpu import CpuKernels

        return CpuKernels()
    if name == "torch":
        from .torch import TorchKernels

        return TorchKernels()
    raise ValueError(
        f'kernels={name!r} is unknown: choose "auto" or one of {", ".join(map(repr, KERNEL_SETS))} ("cuda" on a device)'
    )


def make_device_kernels(name: str, device: torch.device) -> Any:
    """The kernel set called `name` for a cache whose maps are on `device`: "cuda" (Triton), "torch" (its plain twin),
    "auto" (cuda where it runs, else torch, with a warning).

    Raises:
        ValueError: unknown name, or "cpu".
        RuntimeError: "cuda" where it cannot run; says why.
    """
    if name not in ("auto", "torch", "cuda"):
        raise ValueError(f"kernels={name!r} on {device}: choose 'auto', 'cuda' or 'torch'")
    from .device import DeviceTorchKernels

    if name == "torch":
        return DeviceTorchKernels()
    problem = _problem_with_triton(device)
    if problem is None:
        from .cuda import CudaKernels

        return CudaKernels()
    if name == "cuda":
        raise RuntimeError(f"kernels='cuda' on {device}: {problem}; kernels='torch' runs there, only slower")
    warnings.warn(f"{problem}: the torch kernel set is used, which is correct, only slower", stacklevel=2)
    return DeviceTorchKernels()


def _problem_with_triton(device: torch.device) -> str | None:
    """Why the Triton set cannot run on `device`, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cpu":
        return None if os.environ.get("TRITON_INTERPRET") == "1" else "on a CPU it needs Triton's interpreter"
    if device.type != "cuda":
        return f"Triton kernels do not run on {device.type}"
    # (`torch` is this package's own module by the time this runs.)
    capability = get_device_capability(device)
    return None if capability >= (7, 0) else f"the GPU's compute capability is {capability}, and Triton needs (7, 0)"
