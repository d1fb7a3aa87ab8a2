"""A synthetic click stream: ids as skewed as those of public click logs, with labels that can be learnt.

The ids come from the package's generator, `colossal_freqcache.synthetic`, which says how they are drawn.

Labels come from a hidden logistic model: a fixed effect for each id (a hash, so nothing is stored), products of such
effects for some pairs of tables, and weights of the dense features. A model can therefore learn something, and two runs
with the same seed see the same stream.

Shapes: n draws, B samples, T tables, R rows of one table, L_t ids a bag of table t.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from batches import Batch, DataError, pooled

from colossal_freqcache.synthetic import (
    COVERAGE_SHARES,
    PRESETS,
    Preset,
    TableFit,
    TableStream,
    ZipfMandelbrot,
    hash64,
    unit_interval,
)

__all__ = [
    "COVERAGE_SHARES",
    "PRESETS",
    "Preset",
    "SyntheticData",
    "TableFit",
    "TableStream",
    "ZipfMandelbrot",
    "calibration",
]

NUM_DENSE = 13


class SyntheticData:
    """`num_train` samples and, later in the same stream, `num_test` held-out ones, in the tables of a preset.

    Args:
        preset (str): one of PRESETS.
        scale (float): multiplies the rows of every table of more than 10,000 rows (no table grows).
        seed (int): everything depends on it but the places of the ids.
        drift, burst, sorted_ids: see TableStream.
    """

    num_dense = NUM_DENSE

    def __init__(
        self,
        preset: str = "kaggle",
        scale: float = 1.0,
        num_train: int = 1_000_000,
        num_test: int = 200_000,
        seed: int = 0,
        drift: float = 0.0,
        burst: float = 0.0,
        sorted_ids: bool = False,
    ):
        if preset not in PRESETS:
            raise DataError(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
        if not 0 < scale <= 1:
            raise DataError(f"scale: expected a number in (0, 1], got {scale}")
        self.preset, self.seed = PRESETS[preset], seed
        self.num_train, self.num_test = num_train, num_test
        self.stream_options = dict(drift=drift, burst=burst, sorted_ids=sorted_ids)
        self.table_names = [f"{preset}_{table}" for table in range(len(self.preset.table_sizes))]
        self.table_sizes: list[int] = [
            size if size <= 10_000 else max(10_000, round(size * scale)) for size in self.preset.table_sizes
        ]
        num_tables = len(self.table_sizes)
        self.pooling = list(self.preset.pooling) or [1] * num_tables
        hidden = np.random.default_rng([seed, 0xC11C])
        self.dense_weights = hidden.normal(scale=0.15, size=NUM_DENSE)
        self.table_weights = hidden.normal(scale=0.25, size=num_tables)
        self.pairs = hidden.choice(num_tables, size=(num_tables // 2, 2), replace=True)
        self.pair_weights = hidden.normal(scale=0.3, size=len(self.pairs))
        self.bias = -1.1

    def num_train_batches(self, batch_size: int) -> int:
        return -(-self.num_train // batch_size)

    def train_batches(self, batch_size: int, epoch: int = 0) -> Iterator[Batch]:
        """The same stream in every epoch."""
        return self._batches(self.num_train, batch_size, start_at=0, part=0)

    def test_batches(self, batch_size: int) -> Iterator[Batch]:
        return self._batches(self.num_test, batch_size, start_at=self.num_train, part=1)

    def _batches(self, num_samples: int, batch_size: int, start_at: int, part: int) -> Iterator[Batch]:
        streams = [self._stream(table, start_at, part) for table in range(len(self.table_sizes))]
        generator = np.random.default_rng([self.seed, part, 0xD1CE])
        for start in range(0, num_samples, batch_size):
            size = min(batch_size, num_samples - start)
            ids = [stream.draw(size * length).reshape(size, length) for stream, length in zip(streams, self.pooling)]
            dense = generator.standard_normal((size, NUM_DENSE))
            clicked = generator.random(size) < self._click_probability(dense, ids)
            yield pooled(dense, ids, clicked)

    def _stream(self, table: int, start_at: int, part: int) -> TableStream:
        try:
            return TableStream(
                self.table_sizes[table],
                self.preset.fit(table),
                seed=self.seed * 2 + part,
                salt=table,
                start_at=start_at * self.pooling[table],
                **self.stream_options,
            )
        except ValueError as error:
            raise DataError(str(error)) from None

    def _click_probability(self, dense: np.ndarray, ids: list[np.ndarray]) -> np.ndarray:
        """(B,): the hidden model. Each id's effect has mean 0 and deviation 1 over the ids of its table."""
        effects = [
            ((unit_interval(hash64(table_ids, self.seed * 1000 + 7 + table)) - 0.5) * math.sqrt(12.0)).mean(axis=1)
            for table, table_ids in enumerate(ids)
        ]
        logit = self.bias + dense @ self.dense_weights
        for weight, effect in zip(self.table_weights, effects):
            logit += weight * effect
        for weight, (left, right) in zip(self.pair_weights, self.pairs):
            logit += weight * effects[left] * effects[right]
        return 1.0 / (1.0 + np.exp(-logit))


@dataclass(frozen=True)
class TableCalibration:
    """One line of the calibration table; coverages are shares of the accesses, in the order of COVERAGE_SHARES."""

    table: int
    num_rows: int
    fit: TableFit
    law_coverage: tuple[float, ...]
    drawn_coverage: tuple[float, ...]
    num_distinct: int
    ids_per_second: float


def calibration(
    preset: str, num_draws: int = 2_000_000, scale: float = 1.0, seed: int = 0
) -> Iterator[TableCalibration]:
    """For each big table: draws ids and measures how many fall where the hottest ranks live.

    The share is taken over the ids of the hottest *ranks*, not over those that happened to be drawn most often, so that
    it does not flatter a short run."""
    import time

    data = SyntheticData(preset, scale=scale, seed=seed)
    for table, num_rows in enumerate(data.table_sizes):
        if num_rows < 50_000:
            continue
        fit = data.preset.fit(table)
        stream = TableStream(num_rows, fit, seed=seed, salt=table)
        began = time.perf_counter()
        ids = np.concatenate([stream.draw(100_000) for _ in range(-(-num_draws // 100_000))])
        seconds = time.perf_counter() - began
        counts = np.bincount(ids, minlength=num_rows)
        tops = [max(1, round(share * num_rows)) for share in COVERAGE_SHARES]
        hottest_first = counts[stream.ids_of_ranks(np.arange(tops[-1]))]
        drawn = tuple(float(hottest_first[:top].sum() / len(ids)) for top in tops)
        rest = 1 - fit.default_share
        law = (
            tuple(top / num_rows for top in tops)
            if stream.law is None
            else tuple(fit.default_share + rest * stream.law.mass_of_top(top) for top in tops)
        )
        yield TableCalibration(table, num_rows, fit, law, drawn, int((counts > 0).sum()), len(ids) / seconds)
