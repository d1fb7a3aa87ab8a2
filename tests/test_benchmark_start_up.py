"""python -m pytest tests/test_benchmark_start_up.py

Proves that the table whose start the benchmark times is filled with what nn.EmbeddingBag draws, in the order of the
counts, and that another order would be refused. Nothing is asserted about time.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import start_up

TINY = "--scale 0.01 --batch-size 256 --counted 2 --repeats 1".split()


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_the_table_is_ready(tmp_path):
    results = start_up.main([*TINY, "--out", str(tmp_path / "start")])
    first = results["first_batch"]
    assert 0 < first["misses"] < first["looked_up"] == 256 * 26
    assert results["num_rows"] > 50 * first["num_slots"] > 0
    named = {name for *_, name in (*start_up.PHASES, start_up.PHASE_BESIDE)}
    assert set(results["phases"]) == named | {start_up.THE_REST}
    assert results["beyond_s"] == pytest.approx(results["all_s"]["ours"][0] - results["all_s"]["torch"][0])
    assert f"the first batch missed {first['misses']:,} of 6,656 ids" in (tmp_path / "start.md").read_text()


def test_another_order_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(start_up, "frequency_rows", lambda counts: np.arange(counts.size))
    with pytest.raises(RuntimeError, match="the first batch missed .* the most counted rows miss"):
        start_up.main([*TINY, "--out", str(tmp_path / "start")])


def test_other_weights_are_refused(tmp_path, monkeypatch):
    build = start_up.build_torch

    def build_another(world, args):
        whole = build(world, args)
        whole.weight.data[1461] += 1
        return whole

    monkeypatch.setattr(start_up, "build_torch", build_another)
    with pytest.raises(RuntimeError, match="table 1 was not filled with what nn.EmbeddingBag draws"):
        start_up.main([*TINY, "--out", str(tmp_path / "start")])
