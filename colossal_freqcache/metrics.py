"""CacheStats: what a cache did, in rows and bytes. Plain host integers: reading them never syncs a device.

A *hit* is an occurrence of an id whose row was resident when its batch was prepared; every occurrence of a row that had
to be fetched for the batch is a *miss*. A miss is counted once, at admission, whoever asked for the row: the
occurrences in the first forward after a prefetch admitted the row are neither hits nor misses. Of a row that Lookahead
admitted, the unique miss is counted then, and the occurrences, as misses, in the first forward that uses it.
"""

import numpy as np

__all__ = ["CacheStats"]


class CacheStats:
    """Counters of one cache since it was built (or since `reset`).

    Attributes:
        hits, misses: occurrences of ids (positions of batches; padding does not count).
        misses_unique: rows that had to be fetched for a batch, each once per batch.
        evictions: rows that left the cache for another row.
        rows_fetched, rows_written_back: rows moved from and to the store (the warm-up at the start apart).
        bytes_fetched, bytes_written_back: the same in bytes of whole records, optimizer state included.
        growths: times that the cache was enlarged.
        hits_per_table, misses_per_table, misses_unique_per_table: int64[T] arrays.
    """

    def __init__(self, num_tables: int = 1) -> None:
        self._num_tables = num_tables
        self.reset()

    def reset(self) -> None:
        """Sets every counter to zero."""
        self.hits_per_table = np.zeros(self._num_tables, np.int64)
        self.misses_per_table = np.zeros(self._num_tables, np.int64)
        self.misses_unique_per_table = np.zeros(self._num_tables, np.int64)
        self.evictions = 0
        self.rows_fetched = 0
        self.rows_written_back = 0
        self.bytes_fetched = 0
        self.bytes_written_back = 0
        self.growths = 0

    @property
    def hits(self) -> int:
        """Occurrences of ids whose row was resident when their batch was prepared, over all tables."""
        return int(self.hits_per_table.sum())

    @property
    def misses(self) -> int:
        """Occurrences of ids whose row had to be fetched for their batch, over all tables."""
        return int(self.misses_per_table.sum())

    @property
    def misses_unique(self) -> int:
        """Rows that had to be fetched for a batch, each once per batch, over all tables."""
        return int(self.misses_unique_per_table.sum())

    @property
    def hit_ratio(self) -> float:
        """hits / (hits + misses), 0..1; 0.0 before the first lookup."""
        looked_up = self.hits + self.misses
        return self.hits / looked_up if looked_up else 0.0

    def as_dict(self) -> dict[str, int | float]:
        """The totals by name."""
        names = ("hits", "misses", "misses_unique", "hit_ratio", "evictions", "rows_fetched", "rows_written_back")
        return {name: getattr(self, name) for name in (*names, "bytes_fetched", "bytes_written_back", "growths")}

    def __repr__(self) -> str:
        return f"CacheStats({', '.join(f'{name}={value}' for name, value in self.as_dict().items())})"
