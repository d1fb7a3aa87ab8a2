"""python -m pytest tests/test_benchmark_scale.py

Proves that steps over tables and caches of all sizes do the same: as many hits, rows missed, fetched and written back;
and that a step which does not would be refused. Nothing is asserted about time.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import scale

TINY = "--scale 0.002 --steps 3".split()


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_every_size_misses_the_same(tmp_path):
    results = scale.main([*TINY, "--out", str(tmp_path / "scale")])
    assert list(results["sweeps"]) == list(scale.SWEEPS)
    rows, slots = results["sweeps"]["rows"], results["sweeps"]["slots"]
    assert [entry["num_rows"] for entry in rows] == [2_000, 20_000, 200_000]
    assert [(entry["policy"], entry["num_slots"]) for entry in slots] == [
        (policy, size) for policy in ("dataset", "lru") for size in (20, 200, 2_000, 20_000)
    ]
    for entries in (rows, slots):
        assert len({(entry["hit_ratio"], entry["rows_missed"], entry["num_ids"]) for entry in entries}) == 1
        assert 0 < entries[0]["rows_missed"] and 0 < entries[0]["hit_ratio"] < 1
        assert entries[0]["ratio"] == {"of_median": 1.0, "of_min": 1.0}
    for name in ("batch", "dim", "pooling"):
        assert all(0 < entry["hit_ratio"] < 1 and entry["rows_missed"] > 0 for entry in results["sweeps"][name])
    assert [entry["dim"] for entry in results["sweeps"]["dim"]] == [8, 16, 32, 64, 128, 256]
    assert [entry["pooling"] for entry in results["sweeps"]["pooling"]] == [1, 4, 10, 32, 100]
    assert "| 200,000 | 200 | lru |" in (tmp_path / "scale.md").read_text()


def test_a_step_that_misses_other_rows_is_refused(tmp_path, monkeypatch):
    """New ids that come again are no misses."""
    batches = scale.steady_batches

    def repeated(*args):
        last = list(batches(*args))[-1]
        return (last for _ in range(args[3]))

    monkeypatch.setattr(scale, "steady_batches", repeated)
    with pytest.raises(RuntimeError, match="hits, misses, rows fetched and written back were .* and should be"):
        scale.main([*TINY, "--sweeps", "rows", "--out", str(tmp_path / "scale")])


def test_ids_of_a_steady_batch():
    """5 hot ids in each, as often as there is room; 3 new ones a step, never twice."""
    batches = list(scale.steady_batches(5, 3, 20, 4, seed=0))
    assert [sorted(set(batch) - set(range(5))) for batch in batches] == [
        [number, number + 1, number + 2] for number in (5, 8, 11, 14)
    ]
    assert all(batch.size == 20 and set(range(5)) < set(batch) for batch in batches)
    for num_rows in (2_000, 10**8):
        bag = scale.Steady.__new__(scale.Steady)
        bag.num_rows = num_rows
        ids = bag.ids(np.concatenate([np.arange(1000), np.arange(num_rows - 1000, num_rows)]))
        assert np.unique(ids).size == 2_000 and 0 <= ids.min() and ids.max() < num_rows
