"""Placement: which part of the tables one process's cache holds, and the whole of them in id order. Here: all of it.

Everything that has to know more than the local cache goes through a placement: initial values, reading and writing the
logical table, sums over whole rows. `parallel` has the placements that divide tables over ranks.
Shapes: R rows of all tables, D logical width, n ids of one call, U unique rows. An id of the whole is its table's
start + the id.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from .cache import CHUNK_BYTES, RowCache
from .config import FreqCacheConfig

__all__ = ["Piece", "Placement"]

Result = TypeVar("Result")


class Piece(NamedTuple):
    """What one rank holds of the ids start..stop-1 of the whole.

    places: which of those ids. first, last: their ids in its cache are first..last-1. columns: which of the D columns.
    """

    places: slice
    first: int
    last: int
    columns: slice


class Placement:
    """All rows and columns in one cache, of one process.

    Attributes:
        table_sizes, dim: rows of each logical table, and their width D. num_rows: R.
        table_starts: first id of the whole of each table.
        rank, world_size: this process among those that share the tables.
        pools: whether the cache's lookups pool bags; else they give rows, which are pooled where the bags are.
        divisor: what a table's gradient is divided by: the ranks whose losses are averaged.
        local_sizes, local_dim: the tables of this rank's cache.
        first_column: where its columns start among the D.
        budget_dim: the width by which a budget in bytes becomes slots, the same on all ranks.
        cache: this rank's RowCache, once it is attached.
    """

    rank = 0
    world_size = 1
    pools = True
    divisor = 1
    first_column = 0

    def __init__(self, table_sizes: Sequence[int], dim: int) -> None:
        self.table_sizes = [int(rows) for rows in table_sizes]
        self.dim = dim
        self.num_rows = sum(self.table_sizes)
        self.table_starts = (np.cumsum(self.table_sizes) - self.table_sizes).tolist()
        self.local_sizes = self.table_sizes
        self.local_dim = self.budget_dim = dim
        self.cache: RowCache | None = None

    def attach(self, cache: RowCache) -> None:
        """`cache` is the one that holds this rank's part."""
        self.cache = cache

    def agree(self, config: FreqCacheConfig) -> FreqCacheConfig:
        """The settings that all ranks use."""
        return config

    def local_padding(self, padding_ids: list[int]) -> list[int]:
        """Padding ids of the local tables (-1 for none), from those of the logical ones."""
        return padding_ids

    def local_counts(self, counts: np.ndarray | None) -> np.ndarray | None:
        """Counts of the local ids, from those of all (R,)."""
        return counts

    def piece(self, start: int, stop: int, rank: int | None = None) -> Piece | None:
        """What `rank` (default: this one) holds of ids start..stop-1, which lie in one table; None for nothing."""
        return Piece(slice(0, stop - start), start, stop, slice(0, self.dim))

    def ids_of_the_whole(self, ids: torch.Tensor) -> torch.Tensor:
        """int64[n]: ids of the logical tables, from those of this rank's cache."""
        return ids

    def table_ranges(self) -> list[tuple[int, int]]:
        """(first id of the whole, rows) of each logical table."""
        return list(zip(self.table_starts, self.table_sizes, strict=True))

    def chunks(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Ids start..stop-1 in pieces of about CHUNK_BYTES of weights, the same on all ranks; none crosses a table.

        Each but a table's last is a multiple of 16 ids, and none is shorter: a stream of normal_() or uniform_() over
        the pieces draws what one call over the whole table would (torch fills 16 elements at a time).
        """
        assert self.cache is not None
        step = max(16, CHUNK_BYTES // (self.dim * self.cache.layout.dtype.itemsize) // 16 * 16)
        for table_start, rows in self.table_ranges():
            first, end = max(start, table_start), min(stop, table_start + rows)
            while first < end:
                last = end if end - first - step < 16 else first + step
                yield first, last
                first = last

    # ---- records of the logical tables --------------------------------------------------------------------------

    def of_first_rank(self, values: torch.Tensor) -> torch.Tensor:
        """`values` as the first rank has them."""
        return values

    def initialise(self, start: int, weights: torch.Tensor) -> None:
        """First records of ids start..: `weights` (n, D), every state column at its initial value."""
        piece = self.piece(start, start + weights.shape[0])
        if piece is not None:
            layout = self.cache.layout
            weights = weights[piece.places, piece.columns]
            if layout.state:
                records = torch.empty(piece.last - piece.first, layout.width, dtype=layout.dtype)
                layout.fill_state(records)
                records[:, : layout.dim] = weights
            else:  # the weights are the records, and need no copy
                records = weights.to("cpu", layout.dtype).resolve_neg().contiguous()
            self.cache.write_ids(piece.first, records)

    def write(self, column: str, start: int, values: torch.Tensor, split: bool = True) -> None:
        """Column `column` of ids start.. becomes `values` (n, width), the same on all ranks.

        split: the column has D elements, of which a rank holds its own; else one value for the whole row.
        """
        piece = self.piece(start, start + values.shape[0])
        if piece is not None:
            values = values[piece.places, piece.columns if split else slice(None)]

            def fill(chunk: torch.Tensor, first: int) -> None:
                chunk.copy_(values[first - piece.first : first - piece.first + chunk.shape[0]])

            self.cache.update_column(column, piece.first, piece.last, fill)

    def read(
        self, column: str, start: int, stop: int, split: bool = True, to: int | None = None
    ) -> torch.Tensor | None:
        """Newest values of column `column` of ids start..stop-1 of one table, (n, width); a copy.

        Every rank must call it; with `to`, only that rank gets the values and the others None.
        """
        return self.cache.read_ids(start, stop)[:, self.cache.layout.columns(column)]

    # ---- what needs whole rows, or all ranks --------------------------------------------------------------------

    def together(self, action: Callable[[], Result], undo: Callable[[Result], Any] | None = None) -> Result:
        """action(); where it raises on any rank, raises on all, after `undo` of the results that other ranks have."""
        return action()

    def row_totals(self, parts: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """float64[U]: `parts` (each row's sum over the local columns) summed over all columns; slots int32[U]."""
        return parts

    def gather_norms(self, norm: torch.Tensor) -> torch.Tensor:
        """(ranks,): `norm` (0-d) of the parts of a table's gradient on every rank, in rank order."""
        return norm.reshape(1)

    def renormalize(self, slots: torch.Tensor, max_norm: float, norm_type: float) -> torch.Tensor:
        """Scales rows whose norm exceeds max_norm down to it; returns which, bool[U]."""
        cache = self.cache
        return cache.kernels.renormalize(cache.records, cache.layout.dim, slots, max_norm, norm_type)
