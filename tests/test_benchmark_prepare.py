"""python -m pytest tests/test_benchmark_prepare.py

Proves that the lookups which the benchmark times did hit, every id of them, and that a miss would be refused. Nothing
is asserted about time.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import prepare

TINY = "--scale 0.01 --batch-size 128 --batches 2 --rounds 2 --threads 1".split()


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_every_lookup_hits(tmp_path):
    results = prepare.main([*TINY, "--out", str(tmp_path / "prepare")])
    (run,) = results["runs"]
    assert (run["hits"], run["misses"]) == (3 * 2 * 2 * 128 * 26, 0)  # three of ours, rounds, batches, ids
    assert set(run["ratio"]) == {"prepare", "check + prepare", "forward"} and len(run["all_ms"]["torch"]) == 4
    assert json.loads((tmp_path / "prepare.json").read_text()) == results
    markdown = (tmp_path / "prepare.md").read_text()
    assert "39,936 hits and 0 misses" in markdown and "| check + prepare | 1 |" in markdown


def test_a_lookup_that_misses_is_refused(tmp_path, monkeypatch):
    """Slots for one batch, and the counts of the first alone: the two push each other's rows out."""
    in_hindsight = prepare.in_hindsight
    monkeypatch.setattr(
        prepare,
        "in_hindsight",
        lambda world: world._replace(counts=in_hindsight(world._replace(batches=world.batches[:1])).counts),
    )
    with pytest.raises(RuntimeError, match="39936 ids were to be hits; counted .* misses"):
        prepare.main([*TINY, "--cache-ratio", "0.006", "--out", str(tmp_path / "prepare")])
    assert not list(tmp_path.iterdir())
