"""AUROC, log loss, and the one-feature baselines that a model has to beat.

Shapes: N samples, T tables, R rows of one table."""

from collections.abc import Sequence

import numpy as np
from batches import Batch, table_offsets

__all__ = ["auroc", "log_loss", "LabelRates"]


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve, exact: the chance that a positive scores above a negative, ties counting one half.

    scores: (N,) any real dtype. labels: (N,) 0 or 1. With r_i the rank of sample i (1..N, tied samples sharing their
    mean rank), P positives and Q negatives: (sum of r_i over positives - P (P + 1) / 2) / (P Q).
    nan where one class is absent."""
    scores, positive = np.asarray(scores), np.asarray(labels) > 0.5
    num_positive = int(positive.sum())
    num_negative = len(positive) - num_positive
    if num_positive == 0 or num_negative == 0:
        return float("nan")
    _, value_of_sample, ties = np.unique(scores, return_inverse=True, return_counts=True)
    # twice the mean rank stays an integer, so the sum below is exact whatever the order of the samples
    last_rank = np.cumsum(ties)
    twice_mean_rank = 2 * last_rank - ties + 1
    twice_rank_sum = int(twice_mean_rank[value_of_sample.reshape(-1)][positive].sum())
    return (twice_rank_sum - num_positive * (num_positive + 1)) / (2 * num_positive * num_negative)


def log_loss(probabilities: np.ndarray, labels: np.ndarray, eps: float = 1e-7) -> float:
    """Mean of -log p(label), natural logarithm, probabilities kept within [eps, 1 - eps]; summed in float64."""
    p = np.clip(np.asarray(probabilities, dtype=np.float64), eps, 1 - eps)
    positive = np.asarray(labels) > 0.5
    return float(-np.where(positive, np.log(p), np.log1p(-p)).mean())


class LabelRates:
    """The label's smoothed rate for every id of every table, from training data only: one-feature predictors.

    The prediction for an id is (positives + a * prior) / (count + a), for each a of `strengths`; an id never seen
    gets the prior, the rate over all training samples. A bag of several ids gets the mean of their rates.

    Tables above `max_rows` rows are left out (their counters would cost more than the tables' share of the cache)."""

    def __init__(
        self,
        table_names: Sequence[str],
        table_sizes: Sequence[int],
        strengths: Sequence[float] = (1.0, 5.0, 20.0),
        max_rows: int = 20_000_000,
    ):
        self.table_names, self.strengths = list(table_names), tuple(strengths)
        self.tables = [t for t, size in enumerate(table_sizes) if size <= max_rows]
        self.counts: dict[int, np.ndarray] = {t: np.zeros(table_sizes[t], dtype=np.float32) for t in self.tables}
        self.positives: dict[int, np.ndarray] = {t: np.zeros(table_sizes[t], dtype=np.float32) for t in self.tables}
        self.num_samples = 0
        self.num_positive = 0.0

    @property
    def prior(self) -> float:
        return self.num_positive / self.num_samples if self.num_samples else 0.5

    def update(self, batch: Batch) -> None:
        """Counts one training batch."""
        start, lengths = table_offsets(batch), np.diff(np.append(batch.offsets, len(batch.values)))
        for table in self.tables:
            ids = batch.values[start[table] : start[table + 1]]
            bags = slice(table * batch.num_samples, (table + 1) * batch.num_samples)
            np.add.at(self.counts[table], ids, 1)
            np.add.at(self.positives[table], ids, np.repeat(batch.labels, lengths[bags]))
        self.num_samples += batch.num_samples
        self.num_positive += float(batch.labels.sum())

    def update_columns(self, ids: np.ndarray, labels: np.ndarray) -> None:
        """Counts all training samples at once; ids: (T, N), one id per table and sample."""
        for table in self.tables:
            size = len(self.counts[table])
            self.counts[table] += np.bincount(ids[table], minlength=size).astype(np.float32)
            self.positives[table] += np.bincount(ids[table], weights=labels, minlength=size).astype(np.float32)
        self.num_samples += len(labels)
        self.num_positive += float(labels.sum())

    def score(self, batch: Batch) -> np.ndarray:
        """(len(tables) * len(strengths), B) float32: every one-feature prediction for one batch."""
        start = table_offsets(batch)
        lengths = np.diff(np.append(batch.offsets, len(batch.values)))
        rows: list[np.ndarray] = []
        for table in self.tables:
            ids = batch.values[start[table] : start[table + 1]]
            bag_lengths = lengths[table * batch.num_samples : (table + 1) * batch.num_samples]
            bag_of_id = np.repeat(np.arange(batch.num_samples), bag_lengths)
            counts, positives = self.counts[table][ids], self.positives[table][ids]
            for strength in self.strengths:
                rate = (positives + strength * self.prior) / (counts + strength)
                if len(ids) == batch.num_samples and bag_lengths.max(initial=0) == 1:
                    rows.append(rate.astype(np.float32))
                else:
                    total = np.bincount(bag_of_id, weights=rate, minlength=batch.num_samples)
                    rows.append(
                        np.where(bag_lengths > 0, total / np.maximum(bag_lengths, 1), self.prior).astype(np.float32)
                    )
        return np.stack(rows) if rows else np.zeros((0, batch.num_samples), dtype=np.float32)

    @property
    def score_names(self) -> list[str]:
        return [f"rate of {self.table_names[t]} (smoothing {s:g})" for t in self.tables for s in self.strengths]

    @staticmethod
    def best(scores: dict[str, np.ndarray], labels: np.ndarray) -> tuple[str | None, float, list[tuple[str, float]]]:
        """The strongest single predictor, chosen on the held-out data itself, which favours the baseline.

        Returns (name, AUROC, every (name, AUROC) from best to worst)."""
        ranked = sorted(((name, auroc(s, labels)) for name, s in scores.items()), key=lambda item: -item[1])
        return (ranked[0][0], ranked[0][1], ranked) if ranked else (None, 0.5, [])
