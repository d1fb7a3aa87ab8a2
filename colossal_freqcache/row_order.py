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
MOST_BUCKETS = 1 << 16  # of the sort by count, or as many as the table has rows: one for each count up to the highest


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


@njit(cache=True, nogil=True)
def _sort_by_count(counts, row_of_count, row_of_id, id_of_row):
    """Both maps, from int64 counts below row_of_count.size; `row_of_count` comes in as zeros."""
    for count in counts:
        row_of_count[count] += 1
    first = 0
    for count in range(row_of_count.size - 1, -1, -1):
        ids = row_of_count[count]
        row_of_count[count] = first
        first += ids
    for i in range(counts.size):
        row = row_of_count[counts[i]]
        row_of_count[counts[i]] = row + 1
        row_of_id[i] = row
        id_of_row[row] = i


class RowOrder:
    """The bijection id <-> row over R rows; identity where no frequencies are known (then it holds no array).

    Attributes:
        row_of_id, id_of_row: int32[R] (int64 from 2**31 rows on), or None where row == id.
    """

    def __init__(self, num_rows: int, row_of_id: np.ndarray | None = None, id_of_row: np.ndarray | None = None) -> None:
        self.num_rows = num_rows
        self.row_of_id, self.id_of_row = row_of_id, id_of_row

    @classmethod
    def from_counts(cls, counts: np.ndarray | None, num_rows: int) -> "RowOrder":
        """The order by descending `counts` (one per id, shape (R,)), ties by ascending id; None gives the identity."""
        if counts is None:
            return cls(num_rows)
        dtype = np.int32 if num_rows < 2**31 else np.int64
        counts = np.asarray(counts)
        row_of_id = aligned_empty((num_rows,), dtype, whole_pages=True)  # a device may read it
        highest = counts.max(initial=0)
        if counts.dtype == np.int64 and highest < max(num_rows, MOST_BUCKETS):
            id_of_row = np.empty(num_rows, dtype)
            _sort_by_count(counts, np.zeros(highest + 1, np.int64), row_of_id, id_of_row)
        else:
            descending = highest - counts if counts.dtype.kind == "u" else -counts  # unsigned: no negatives
            id_of_row = np.argsort(descending, kind="stable").astype(dtype)
            row_of_id[id_of_row] = np.arange(num_rows, dtype=dtype)
        return cls(num_rows, row_of_id, id_of_row)

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """int64 rows of int64 `ids`."""
        return ids if self.row_of_id is None else _taken(self.row_of_id, ids)

    def ids(self, rows: np.ndarray) -> np.ndarray:
        """int64 ids of int64 `rows`."""
        return rows if self.id_of_row is None else _taken(self.id_of_row, rows)

    def num_bytes(self) -> int:
        """Host bytes of the two maps."""
        return 0 if self.row_of_id is None else self.row_of_id.nbytes + self.id_of_row.nbytes
