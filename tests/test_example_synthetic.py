"""python -m pytest tests/test_example_synthetic.py

Proves that the synthetic stream has the skew it was fitted to, that ranks are scattered by a bijection, that drift
moves ids and bursts repeat them, that bags of several ids are laid out table-major, and that labels can be learnt.
"""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "dlrm"))

from batches import DataError, table_offsets, train_rows
from data_synthetic import COVERAGE_SHARES, PRESETS, SyntheticData, TableFit, TableStream, ZipfMandelbrot
from metrics import auroc


@pytest.mark.parametrize("table", [3, 20])
def test_coverage_is_within_two_points_of_the_fit(table):
    """Shares of the accesses that fall where the hottest 0.1, 1 and 1.5 % of the ranks live."""
    preset = PRESETS["kaggle"]
    fit, num_rows = preset.fit(table), preset.table_sizes[table]
    stream = TableStream(num_rows, fit, salt=table)
    counts = np.bincount(stream.draw(300_000), minlength=num_rows)
    for share, published in list(zip(COVERAGE_SHARES, fit.fitted_coverage, strict=True))[:3]:
        hottest = stream.ids_of_ranks(np.arange(round(share * num_rows)))
        assert abs(counts[hottest].sum() / 300_000 - published) < 0.02


@pytest.mark.parametrize("a", [0.8, 1.0, 1.3])
@pytest.mark.parametrize("num_ranks", [10, 4096, 50_000])
def test_the_law_is_zipf_mandelbrot(a, num_ranks):
    """The share of every prefix of the ranks, against the exact sum, and drawn."""
    law, weight = ZipfMandelbrot(a, 2.0, num_ranks), (np.arange(1, num_ranks + 1) + 2.0) ** -a
    exact = np.cumsum(weight) / weight.sum()
    ranks = law.draw(np.random.default_rng(0), 200_000)
    assert ranks.min() >= 0 and ranks.max() < num_ranks
    for top in {1, 5, min(4097, num_ranks), num_ranks // 2, num_ranks}:
        assert law.mass_of_top(top) == pytest.approx(exact[top - 1], abs=1e-6)
        assert (ranks < top).mean() == pytest.approx(exact[top - 1], abs=0.006)


@pytest.mark.parametrize("num_rows", [1, 2, 7, 1000, 9973])
@pytest.mark.parametrize("sorted_ids", [False, True])
def test_ranks_of_the_table_are_scattered_by_a_bijection(num_rows, sorted_ids):
    ids = TableStream(num_rows, TableFit(), salt=5, sorted_ids=sorted_ids).ids_of_ranks(np.arange(num_rows))
    assert np.array_equal(np.sort(ids), np.arange(num_rows))
    assert not sorted_ids or np.array_equal(ids, np.arange(num_rows))


def test_a_larger_universe_is_folded_onto_the_table():
    ids = TableStream(1000, TableFit(1.05, 0, 50)).draw(50_000)
    assert ids.min() >= 0 and ids.max() < 1000


def test_drift_lowers_what_yesterdays_hot_set_covers():
    def late_share(drift):
        stream = TableStream(20_000, TableFit(1.1, 2, 1), drift=drift)
        early = np.bincount(stream.draw(200_000), minlength=20_000)
        stream.num_drawn = 5_000_000
        return np.isin(stream.draw(200_000), np.argsort(-early)[:300]).mean()

    assert late_share(0.1) < late_share(0.0) - 0.1


def test_bursts_repeat_recent_ids():
    """Over a uniform law: without bursts almost nothing comes back within 1,000 draws."""

    def repeats(burst):
        stream = TableStream(10_000_000, TableFit(uniform=True), burst=burst, window=1000)
        ids = np.concatenate([stream.draw(700) for _ in range(30)])
        return np.mean([ids[i] in ids[max(0, i - 1000) : i] for i in range(2000, 4000)])

    assert repeats(0.0) < 0.01 < 0.25 < repeats(0.3) < 0.35


def test_the_stream_goes_on_where_it_stopped_and_repeats_with_the_seed():
    one, other = (TableStream(5000, TableFit(), seed=7, salt=1) for _ in range(2))
    first, second = one.draw(100), one.draw(100)
    assert not np.array_equal(first, second)
    assert np.array_equal(other.draw(100), first) and np.array_equal(other.draw(100), second)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_preset_gives_table_major_batches_in_range(preset):
    data = SyntheticData(preset, scale=0.001, num_train=50, num_test=10)
    batches = list(data.train_batches(32))
    assert [batch.num_samples for batch in batches] == [32, 18] and data.num_train_batches(32) == 2
    for batch in batches:
        assert batch.num_tables == len(data.table_sizes) and batch.dense.shape == (batch.num_samples, data.num_dense)
        start = table_offsets(batch)
        for table, size in enumerate(data.table_sizes):
            ids = batch.values[start[table] : start[table + 1]]
            assert len(ids) == batch.num_samples * data.pooling[table] and ids.min() >= 0 and ids.max() < size
    assert sum(batch.num_samples for batch in data.test_batches(32)) == 10


def test_counting_sees_every_id_of_the_training_batches_at_its_global_place():
    data = SyntheticData("meta", scale=0.001, num_train=40, num_test=10)
    rows = np.concatenate(list(train_rows(data, 16)))
    assert len(rows) == 40 * sum(data.pooling) and rows.max() < sum(data.table_sizes)
    first_of_table_2 = sum(data.table_sizes[:2])
    expected = [batch.values[slice(*table_offsets(batch)[2:4])] for batch in data.train_batches(16)]
    of_table_2 = rows[(rows >= first_of_table_2) & (rows < first_of_table_2 + data.table_sizes[2])]
    np.testing.assert_array_equal(of_table_2 - first_of_table_2, np.concatenate(expected))


def test_training_batches_repeat_and_held_out_ones_differ():
    data = SyntheticData("kaggle", scale=0.001, num_train=64, num_test=64, seed=2)
    first, again = (next(data.train_batches(64, epoch)) for epoch in (0, 1))
    test = next(data.test_batches(64))
    np.testing.assert_array_equal(first.values, again.values)
    np.testing.assert_array_equal(first.labels, again.labels)
    assert not np.array_equal(first.values, test.values)


def test_the_hidden_model_can_be_learnt():
    """The dense features alone, with the hidden weights, already rank the held-out labels."""
    data = SyntheticData("kaggle", scale=0.001, num_train=10, num_test=4000)
    batch = next(iter(data.test_batches(4000)))
    assert 0.1 < batch.labels.mean() < 0.6
    assert auroc(batch.dense @ data.dense_weights, batch.labels) > 0.55


@pytest.mark.parametrize(
    ("keywords", "message"),
    [(dict(preset="criteo"), "unknown preset 'criteo'; choose one of kaggle"), (dict(scale=0), r"scale: expected")],
)
def test_wrong_settings_are_refused(keywords, message):
    with pytest.raises(DataError, match=message):
        SyntheticData(**keywords)
