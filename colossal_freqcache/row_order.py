"""RowOrder: which row of the table an id has. Row 0 belongs to the most frequent id of the data set; ties go by id.

Host arrays only. The order is fixed when the table is built: the rows are stored in it, so weights and optimizer state
stay with their ids. Shapes: R rows. Source: the static frequency order of Fang et al. 2022 (arXiv:2208.05321).
"""

import numpy as np
from numba import njit

from .memory import aligned_empty
from .vectors import prefetch

__all__ = ["RowOrder"]

AHEAD = 16  # places asked for before they are needed


@njit(cache=True, nogil=True)
def _take(array, places, taken):
    for i in range(places.size):
        if i + AHEAD < places.size:
            prefetch(array, places[i + AHEAD])
        taken[i] = array[places[i]]


def _taken(array: np.ndarray, places: np.ndarray) -> np.ndarray:
    """array[places], int64; the array is large, the places are anywhere in it."""
    taken = np.empty(places.size, np.int64)
    _take(array, places, taken)
    return taken


class RowOrder:
    """The bijection id <-> row over R rows; identity where no frequencies are known (then it holds no array).

    Attributes:
        row_of_id, id_of_row: int32[R] (int64 from 2**31 rows on), or None where row == id.
    """

    def __init__(self, num_rows: int, id_of_row: np.ndarray | None = None) -> None:
        self.num_rows = num_rows
        self.id_of_row = id_of_row
        self.row_of_id = None
        if id_of_row is not None:
            self.row_of_id = aligned_empty(id_of_row.shape, id_of_row.dtype, whole_pages=True)  # a device may read it
            self.row_of_id[id_of_row] = np.arange(num_rows, dtype=id_of_row.dtype)

    @classmethod
    def from_counts(cls, counts: np.ndarray | None, num_rows: int) -> "RowOrder":
        """The order by descending `counts` (one per id, shape (R,)), ties by ascending id; None gives the identity."""
        if counts is None:
            return cls(num_rows)
        dtype = np.int32 if num_rows < 2**31 else np.int64
        counts = np.asarray(counts)
        descending = counts.max() - counts if counts.dtype.kind == "u" else -counts  # unsigned: no negatives
        return cls(num_rows, np.argsort(descending, kind="stable").astype(dtype))

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """int64 rows of int64 `ids`."""
        return ids if self.row_of_id is None else _taken(self.row_of_id, ids)

    def ids(self, rows: np.ndarray) -> np.ndarray:
        """int64 ids of int64 `rows`."""
        return rows if self.id_of_row is None else _taken(self.id_of_row, rows)

    def num_bytes(self) -> int:
        """Host bytes of the two maps."""
        return 0 if self.row_of_id is None else self.row_of_id.nbytes + self.id_of_row.nbytes
