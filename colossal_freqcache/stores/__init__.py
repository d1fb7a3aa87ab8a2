"""Row stores: where all rows of a table live. A store knows rows and records; not ids, slots' owners or policies.

`RowStore` is the whole surface; `make_store` chooses one. Shapes: R rows, W record width, n rows moved.
"""

from typing import Any, Protocol

import torch

from ..row_layout import RowLayout
from .ram import RamStore

__all__ = ["RamStore", "RowStore", "make_store"]


class RowStore(Protocol):
    """Holds R records of one layout, of any dtype it has. Rows are int64 tensors on the host, unique within a call.

    Calls come one at a time, but from several threads: a second one fills a large table and moves the rows of a
    `Lookahead`.
    """

    def allocate(self, num_rows: int, layout: RowLayout) -> None:
        """Makes room for `num_rows` records; their values are undefined. Called again, it forgets the old ones."""

    def read(self, rows: torch.Tensor, records: torch.Tensor, places: torch.Tensor) -> None:
        """records[places[i]] = record of rows[i]; `records` is (n', W), `places` integer (n,)."""

    def write(self, rows: torch.Tensor, records: torch.Tensor, places: torch.Tensor) -> None:
        """record of rows[i] = records[places[i]]; safe to reuse `records` on return."""

    def spawn(self) -> "RowStore":
        """An empty store of the same kind, for the table in another layout while this one is still read."""

    def num_bytes(self) -> int:
        """Bytes of all records."""


def make_store(store: Any, kernels: Any) -> RowStore:
    """The store that a user's `store=` names: "ram", or an object with the methods of RowStore.

    Raises:
        ValueError: unknown; lists the choices that exist.
        NotImplementedError: "mmap:PATH", which is planned.
    """
    if isinstance(store, str):
        if store == "ram":
            return RamStore(kernels)
        if store.startswith("mmap:"):
            raise NotImplementedError(
                f'store={store!r}: a memory-mapped file (tables larger than RAM) is planned, not built yet; use "ram"'
            )
    elif all(callable(getattr(store, name, None)) for name in ("allocate", "read", "write", "spawn", "num_bytes")):
        return store
    raise ValueError(f'store={store!r} is unknown: choose "ram", or pass an object with the methods of stores.RowStore')
