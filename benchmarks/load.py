"""The load of the suites: ids shaped as Criteo's Kaggle set, and what a cache must miss on them.

26 tables, one id a bag, as skewed as there (the package's calibrated generator: synthetic, calibrated). A batch comes
in the form of each side: table-major ids local to their table for ours and FBGEMM's, sample-major ids of the tables
laid end to end for one nn.EmbeddingBag, so that both give (B, T, D) without another copy.

Shapes: B samples, T tables, N = B * T ids in a batch, R rows of all tables, S steps.
"""

from typing import NamedTuple

import numpy as np
import torch

from colossal_freqcache.synthetic import PRESETS, TableStream

__all__ = ["StepBatch", "World", "frequency_rows", "make_world", "simulate"]

PRESET = PRESETS["kaggle"]


class StepBatch(NamedTuple):
    """One batch in the form of each side.

    values: (N,) ids local to their table, table-major. joined: (N,) ids of the whole, sample-major. ends: (N+1,), the
    start of each bag and the end of the last."""

    values: torch.Tensor
    joined: torch.Tensor
    ends: torch.Tensor

    @property
    def offsets(self) -> torch.Tensor:
        """(N,) the start of each bag."""
        return self.ends[:-1]

    @property
    def num_ids(self) -> int:
        return self.values.numel()


class World(NamedTuple):
    """table_sizes: T ints. counts: (R,) of the batches before. batches: what is trained on, and what comes after."""

    table_sizes: list[int]
    counts: np.ndarray
    batches: list[StepBatch]

    @property
    def num_rows(self) -> int:
        return sum(self.table_sizes)

    @property
    def num_tables(self) -> int:
        return len(self.table_sizes)

    @property
    def batch_size(self) -> int:
        return self.batches[0].num_ids // self.num_tables

    @property
    def most_distinct_rows(self) -> int:
        """Of one batch, among the first five."""
        return max(batch.joined.unique().numel() for batch in self.batches[:5])

    def num_slots(self, cache_ratio: float) -> int:
        """That share of the rows; at small scales twice a batch's distinct rows, so that the next one fits beside."""
        return max(int(cache_ratio * self.num_rows), 2 * self.most_distinct_rows)


def make_world(scale: float, batch_size: int, num_counted: int, num_batches: int, seed: int) -> World:
    """`num_counted` batches that are counted, then `num_batches` of the same stream.

    scale: multiplies the rows of tables of more than 10,000."""
    sizes = [size if size <= 10_000 else max(10_000, round(size * scale)) for size in PRESET.table_sizes]
    streams = [TableStream(size, PRESET.fit(table), seed=seed, salt=table) for table, size in enumerate(sizes)]
    first_id = np.cumsum([0, *sizes[:-1]])[:, None]
    counts = np.zeros(sum(sizes), np.int64)
    ends = torch.arange(len(sizes) * batch_size + 1)
    batches = []
    for number in range(num_counted + num_batches):
        values = np.stack([stream.draw(batch_size) for stream in streams])
        joined = values + first_id
        if number < num_counted:
            np.add.at(counts, joined.reshape(-1), 1)
        else:
            sample_major = torch.from_numpy(np.ascontiguousarray(joined.T).reshape(-1))
            batches.append(StepBatch(torch.from_numpy(values.reshape(-1)), sample_major, ends))
    return World(sizes, counts, batches)


def frequency_rows(counts: np.ndarray) -> np.ndarray:
    """row_of_id (R,): 0 for the most counted id, equal ones by id."""
    row_of_id = np.empty(counts.size, np.int64)
    row_of_id[np.argsort(-counts, kind="stable")] = np.arange(counts.size)
    return row_of_id


def simulate(
    world: World, row_of_id: np.ndarray, num_slots: int, num_steps: int, belady: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(occurrences missed by step and table (S, T), rows missed by step (S,)) of the world's first `num_steps` batches.

    The cache has `num_slots` and starts with the rows 0..num_slots-1. A step's rows must all be resident; for those
    that are not, the resident rows of the highest priority to leave go: the largest row numbers (the least counted
    rows), or with `belady` those whose next use is farthest."""
    batches = world.batches[:num_steps]
    unique_rows = [np.unique(row_of_id[batch.joined.numpy()]) for batch in batches]
    resident = np.zeros(world.num_rows, np.bool_)
    resident[:num_slots] = True
    next_use = np.full(world.num_rows, num_steps, np.int32)  # after the step at hand
    following = [np.empty(0, np.int32)] * num_steps  # by step, the use after that of its rows
    for number in range(num_steps - 1, -1, -1):
        following[number] = next_use[unique_rows[number]]
        next_use[unique_rows[number]] = number
    missed = np.zeros((num_steps, world.num_tables), np.int64)
    missed_rows = np.zeros(num_steps, np.int64)
    for number, (batch, unique) in enumerate(zip(batches, unique_rows, strict=True)):
        missed[number] = (~resident[row_of_id[batch.joined.numpy()]]).reshape(-1, world.num_tables).sum(axis=0)
        num_victims = missed_rows[number] = np.count_nonzero(~resident[unique])
        resident[unique] = False  # they stay: not candidates
        candidates = np.flatnonzero(resident)
        if num_victims and belady:
            victims = candidates[np.argpartition(-next_use[candidates], num_victims - 1)[:num_victims]]
        else:
            victims = candidates[candidates.size - num_victims :]
        resident[victims] = False
        resident[unique] = True
        next_use[unique] = following[number]
    return missed, missed_rows
