"""python -m pytest tests/test_example_metrics.py

Proves that the example's AUROC is exact, ties included; that its log loss is the definition; and that the one-feature
baselines are smoothed rates of the training labels, with the prior for ids they never saw.
"""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "dlrm"))

from batches import one_id_per_bag, pooled
from metrics import LabelRates, auroc, log_loss


def auroc_by_pairs(scores, labels):
    positive, negative = scores[labels == 1], scores[labels == 0]
    wins = (positive[:, None] > negative[None, :]).sum() + 0.5 * (positive[:, None] == negative[None, :]).sum()
    return wins / (len(positive) * len(negative))


@pytest.mark.parametrize("num_values", [2, 7, 10_000])
def test_auroc_equals_the_count_over_all_pairs(num_values):
    """Few distinct scores make many ties."""
    generator = np.random.default_rng(num_values)
    for size in (2, 3, 50, 401):
        labels = generator.integers(0, 2, size).astype(np.float32)
        labels[:2] = 0, 1
        scores = generator.integers(0, num_values, size).astype(np.float32)
        assert auroc(scores, labels) == pytest.approx(auroc_by_pairs(scores, labels), abs=1e-12)


def test_auroc_does_not_depend_on_the_order_of_the_samples():
    generator = np.random.default_rng(0)
    scores, labels = generator.integers(0, 50, 1000).astype(np.float32), generator.integers(0, 2, 1000)
    order = generator.permutation(1000)
    assert auroc(scores, labels) == auroc(scores[order], labels[order])


def test_auroc_of_one_class_is_nan():
    assert np.isnan(auroc(np.arange(3.0), np.ones(3)))


def test_log_loss_is_the_mean_negative_log_likelihood():
    probabilities, labels = np.array([0.9, 0.2, 0.5]), np.array([1, 0, 1])
    assert log_loss(probabilities, labels) == pytest.approx(-(np.log(0.9) + np.log(0.8) + np.log(0.5)) / 3)


def test_log_loss_of_a_certain_mistake_is_finite():
    assert np.isfinite(log_loss(np.array([0.0, 1.0], np.float32), np.array([1, 0])))


def test_label_rates_are_smoothed_and_unseen_ids_get_the_prior():
    rates = LabelRates(["a"], [3], strengths=(1.0,))
    rates.update(one_id_per_bag(np.zeros((4, 1)), np.array([[0, 0, 0, 1]]), np.array([1, 1, 0, 0])))
    scores = rates.score(one_id_per_bag(np.zeros((3, 1)), np.array([[0, 1, 2]]), np.zeros(3)))
    np.testing.assert_allclose(scores, [[(2 + 0.5) / 4, 0.5 / 2, 0.5]])


def test_label_rates_of_a_bag_are_the_mean_over_its_ids():
    rates = LabelRates(["one", "two"], [2, 2], strengths=(1.0,))
    rates.update(pooled(np.zeros((2, 1)), [np.array([[0], [1]]), np.array([[0, 0], [1, 1]])], np.array([1, 0])))
    scores = rates.score(pooled(np.zeros((1, 1)), [np.array([[0]]), np.array([[0, 1]])], np.zeros(1)))
    assert scores[0, 0] == pytest.approx((1 + 0.5) / 2)
    assert scores[1, 0] == pytest.approx(((2 + 0.5) / 3 + 0.5 / 3) / 2)


def test_counting_at_once_equals_counting_by_batches():
    generator = np.random.default_rng(1)
    ids, labels = generator.integers(0, 5, (2, 40)), generator.integers(0, 2, 40).astype(np.float32)
    at_once, by_batches = LabelRates(["a", "b"], [5, 5]), LabelRates(["a", "b"], [5, 5])
    at_once.update_columns(ids, labels)
    for part in (slice(0, 16), slice(16, 40)):
        by_batches.update(one_id_per_bag(np.zeros((len(labels[part]), 1)), ids[:, part], labels[part]))
    batch = one_id_per_bag(np.zeros((40, 1)), ids, labels)
    np.testing.assert_array_equal(at_once.score(batch), by_batches.score(batch))


def test_the_best_single_feature_wins():
    labels = np.array([0, 0, 1, 1])
    name, value, ranked = LabelRates.best({"bad": np.array([1, 2, 1, 2]), "good": np.array([1, 2, 3, 4])}, labels)
    assert (name, value, [each for each, _ in ranked]) == ("good", 1.0, ["good", "bad"])
