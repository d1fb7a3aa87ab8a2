"""What every data source of this example hands to the trainer: batches in the layout of the embedding collection.

Knows nothing of models, files or devices.

Shapes: T tables, B samples in a batch, N ids in a batch (N = T * B where every bag holds one id), F dense features.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

__all__ = ["Batch", "ClickData", "DataError", "one_id_per_bag", "pooled", "share_of", "table_offsets", "train_rows"]


class DataError(ValueError):
    """A file or a setting of the data is wrong; the message names the place and what is expected there."""


@dataclass(frozen=True)
class Batch:
    """One batch, ids table-major: all bags of table 0, then all bags of table 1, and so on.

    dense: (B, F) float32. values: (N,) int64, ids local to their table. offsets: (T*B,) int64, where each bag starts
    in `values`. labels: (B,) float32, 0 or 1."""

    dense: np.ndarray
    values: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray

    @property
    def num_samples(self) -> int:
        return len(self.labels)

    @property
    def num_tables(self) -> int:
        return len(self.offsets) // max(1, len(self.labels))


class ClickData(Protocol):
    """A data source: who implements these members can be trained on.

    `train_batches` of one epoch always gives the same batches for the same seed, in the order of time;
    `test_batches` gives later data, which no count, vocabulary or statistic has seen."""

    table_names: list[str]
    table_sizes: list[int]
    num_dense: int

    def num_train_batches(self, batch_size: int) -> int | None: ...

    def train_batches(self, batch_size: int, epoch: int = 0) -> Iterator[Batch]: ...

    def test_batches(self, batch_size: int) -> Iterator[Batch]: ...


def one_id_per_bag(dense: np.ndarray, ids: np.ndarray, labels: np.ndarray) -> Batch:
    """The usual case: `ids` is (T, B), one id per table and sample, already table-major."""
    values = np.ascontiguousarray(ids, dtype=np.int64).reshape(-1)
    return Batch(
        np.ascontiguousarray(dense, dtype=np.float32),
        values,
        np.arange(len(values), dtype=np.int64),
        np.ascontiguousarray(labels, dtype=np.float32),
    )


def pooled(dense: np.ndarray, ids_per_table: Sequence[np.ndarray], labels: np.ndarray) -> Batch:
    """Several ids a bag: `ids_per_table[t]` is (B, L_t), L_t ids for each sample of table t."""
    lengths = np.repeat([ids.shape[1] for ids in ids_per_table], len(labels))
    offsets = np.zeros(len(lengths), dtype=np.int64)
    np.cumsum(lengths[:-1], out=offsets[1:])
    values = np.concatenate([np.asarray(ids, dtype=np.int64).reshape(-1) for ids in ids_per_table])
    return Batch(
        np.ascontiguousarray(dense, dtype=np.float32), values, offsets, np.ascontiguousarray(labels, dtype=np.float32)
    )


def share_of(batch: Batch, rank: int, world_size: int) -> Batch:
    """The part of a batch that one of `world_size` processes trains on: consecutive samples, nearly equally many."""
    if world_size == 1:
        return batch
    first, last = (batch.num_samples * part // world_size for part in (rank, rank + 1))
    starts = batch.offsets.reshape(batch.num_tables, -1)
    ends = np.append(batch.offsets[1:], len(batch.values)).reshape(starts.shape)
    lengths = (ends - starts)[:, first:last]
    offsets = np.zeros(lengths.size, dtype=np.int64)
    np.cumsum(lengths.reshape(-1)[:-1], out=offsets[1:])
    if first == last:
        values = batch.values[:0]
    else:
        values = np.concatenate([batch.values[a:b] for a, b in zip(starts[:, first], ends[:, last - 1], strict=True)])
    return Batch(batch.dense[first:last], values, offsets[: lengths.size], batch.labels[first:last])


def table_offsets(batch: Batch) -> np.ndarray:
    """(T+1,) int64: the ids of table t are `values[start[t]:start[t + 1]]`."""
    return np.append(batch.offsets[:: batch.num_samples], len(batch.values))


def train_rows(data: ClickData, batch_size: int, max_batches: int | None = None) -> Iterator[np.ndarray]:
    """For counting: the ids of each training batch (of the first `max_batches`), as positions in the tables laid end
    to end: id i of table t is `sum(table_sizes[:t]) + i`. (N,) int64 a batch; the held-out data is never read."""
    first_id = np.concatenate(([0], np.cumsum(data.table_sizes)[:-1]))
    for batch in itertools.islice(data.train_batches(batch_size), max_batches):
        yield batch.values + np.repeat(first_id, np.diff(table_offsets(batch)))
