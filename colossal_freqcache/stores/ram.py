"""RamStore: every record in one host array. Pages are faulted in as rows are first written."""

import torch

from ..row_layout import RowLayout

__all__ = ["RamStore"]


class RamStore:
    """The table in host memory, one record a row; rows move by the kernel set's `copy_rows`, without staging."""

    def __init__(self, kernels) -> None:
        self._kernels = kernels
        self._records = torch.empty(0)

    def allocate(self, num_rows: int, layout: RowLayout) -> None:
        # In huge pages: a table is read at random, so each row would else cost a TLB miss.
        self._records = layout.empty(num_rows, whole_pages=True)

    def read(self, rows: torch.Tensor, records: torch.Tensor, places: torch.Tensor) -> None:
        self._kernels.copy_rows(self._records, rows, records, places)

    def write(self, rows: torch.Tensor, records: torch.Tensor, places: torch.Tensor) -> None:
        self._kernels.copy_rows(records, places, self._records, rows)

    @property
    def host_records(self) -> torch.Tensor:
        """(R, W): all records, for a device that reads and writes them itself."""
        return self._records

    def spawn(self) -> "RamStore":
        return RamStore(self._kernels)

    def num_bytes(self) -> int:
        return self._records.numel() * self._records.element_size()
