"""python -m pytest tests/test_benchmark_moves.py

Proves that what the benchmark times are moves of the rows and bytes it reports, and that records which do not arrive
are refused. Nothing is asserted about time.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import moves

TINY = "--scale 0.0005 --moved 100 --repeats 3 --threads 1".split()


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_rows_and_bytes_are_those_of_the_records(tmp_path):
    results = moves.main([*TINY, "--out", str(tmp_path / "moves")])
    assert [run["row_bytes"] for run in results["runs"]] == [128, 132, 256]  # weight; and a sum; and a sum each
    for run in results["runs"]:
        assert run["num_moved"] == 100 and set(run["ratio"]) == {"fetch", "write back"}
        for name, rate in run["rows_per_s"].items():
            assert rate == pytest.approx(100 / run["ms"][name]["median"] * 1e3)
            assert run["bytes_per_s"][name] == pytest.approx(rate * run["row_bytes"])
    assert "| adagrad | 1 | 256 | write back |" in (tmp_path / "moves.md").read_text()


@pytest.mark.parametrize("method", ["read", "write"])
def test_records_that_do_not_arrive_are_refused(tmp_path, monkeypatch, method):
    monkeypatch.setattr(moves.Mover, "fetch" if method == "read" else "write_back", lambda self, move: None)
    with pytest.raises(RuntimeError, match="records did not arrive"):
        moves.main([*TINY, "--optimizers", "sgd", "--out", str(tmp_path / "moves")])
    assert not list(tmp_path.iterdir())
