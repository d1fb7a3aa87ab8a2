"""RowLayout: what one record holds. Weight first, then the optimizer's state as named columns: [weight | state].

A record moves as one piece between store and cache, so optimizer state travels with its row by construction. Stores and
the kernels that move rows see only `width` elements of `dtype`.
"""

import dataclasses

import numpy as np
import torch

from .memory import aligned_empty

__all__ = ["RowLayout"]


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """`dim` weight elements, then the state columns, all of one dtype.

    Attributes:
        dim: embedding width in elements.
        dtype: torch.float32, float64, bfloat16 or float16.
        state: (name, width in elements, initial value) of each state column, in order.
    """

    dim: int
    dtype: torch.dtype
    state: tuple[tuple[str, int, float], ...] = ()

    @property
    def width(self) -> int:
        """Elements of one record."""
        return self.dim + sum(width for _, width, _ in self.state)

    @property
    def row_bytes(self) -> int:
        """Bytes of one record."""
        return self.width * self.dtype.itemsize

    def columns(self, name: str) -> slice:
        """Where column `name` ("weight" or a state column) stands in a record."""
        start = 0
        for column, width, _ in (("weight", self.dim, 0.0), *self.state):
            if column == name:
                return slice(start, start + width)
            start += width
        raise KeyError(f"no column {name!r}: a record holds {['weight', *(column for column, _, _ in self.state)]}")

    def state_names(self) -> list[str]:
        """The names of the state columns, in order."""
        return [name for name, _, _ in self.state]

    def empty(self, num_rows: int, whole_pages: bool = False) -> torch.Tensor:
        """(num_rows, width) uninitialised records that start on a cache line: address space until they are written.

        whole_pages: as in `memory.aligned_empty`.
        """
        kind = {torch.float32: np.float32, torch.float64: np.float64}.get(self.dtype, np.int16)  # numpy has no bfloat16
        return torch.from_numpy(aligned_empty((num_rows, self.width), kind, whole_pages)).view(self.dtype)

    def fill_state(self, records: torch.Tensor) -> None:
        """Writes every state column's initial value into `records` (n, width)."""
        for name, _, initial in self.state:
            records[:, self.columns(name)] = initial
