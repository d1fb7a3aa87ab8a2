"""python -m pytest tests/test_benchmark_step.py

Proves that the benchmark of a training step runs, that the hits it reports are those of a simulation on paper and would
be refused otherwise, and that its result files say what was measured. Nothing is asserted about time.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import step
from harness import Stopwatch, interleaved

TINY = "--scale 0.01 --batch-size 256 --steps 3 --dropped 1 --apart 1 --counted 4".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(what `main` returned, the path of the files without suffix)"""
    out = tmp_path_factory.mktemp("results") / "step-1.2"
    return step.main([*TINY, "--out", str(out)]), out


def test_the_files_hold_what_was_measured(run):
    results, out = run
    assert json.loads(Path(f"{out}.json").read_text()) == results
    assert results["settings"]["batch_size"] == 256 and results["machine"]["versions"]["torch"] == torch.__version__
    markdown = Path(f"{out}.md").read_text()
    for name, pair in results["optimizers"].items():
        assert f"| {name} " in markdown and f"{pair['hit_ratio']:.4f}" in markdown
        assert [len(times) for times in pair["all_ms"].values()] == [3, 3]
        assert set(pair["phases"]) == set(step.GROUPS)


def test_real_misses_the_same_for_every_optimizer(run):
    """The hit ratio was compared with the simulation inside of the run; here, that there was something to miss."""
    results, _ = run
    pairs = list(results["optimizers"].values())
    assert len(pairs) == 3 and len({pair["hit_ratio"] for pair in pairs}) == 1
    for pair in pairs:
        assert 0 < pair["hit_ratio_big_tables"] < pair["hit_ratio"] < 1
        moved = pair["per_step"]
        assert 0 < moved["belady_misses_unique"] <= moved["misses_unique"] == moved["rows_fetched"] <= moved["misses"]
        assert moved["rows_written_back"] > 0


def test_a_wrong_hit_ratio_is_refused(tmp_path, monkeypatch):
    """A simulation of a cache of half the slots misses more, and the run says so."""
    simulate = step.simulate
    monkeypatch.setattr(
        step, "simulate", lambda world, warm, slots, belady: simulate(world, warm // 2, slots // 2, belady)
    )
    with pytest.raises(RuntimeError, match="a simulation of its policy"):
        step.main([*TINY, "--optimizers", "sgd", "--out", str(tmp_path / "step")])
    assert not list(tmp_path.iterdir())


def test_the_simulation_on_paper():
    """Two slots over one table of four ids, counted in their order, start with ids 0 and 1."""
    batches = [torch.tensor([number]) for number in (0, 2, 1, 3, 2)]
    world = step.World([4], [], np.array([4, 3, 2, 1]), [step.StepBatch(ids, ids, ids) for ids in batches])
    _, missed = step.simulate(world, 2, 2, belady=False)
    assert missed.tolist() == [0, 1, 1, 1, 1]  # 2 evicts 1, 1 evicts 2, 3 evicts 1, 2 evicts 3: 0 stays
    _, missed = step.simulate(world, 2, 2, belady=True)
    assert missed.tolist() == [0, 1, 0, 1, 0]  # 2 evicts 0, which never comes again; 3 evicts 1


def test_contenders_take_turns_and_inner_phases_are_taken_off():
    calls = []
    times = interleaved({"a": lambda batch: calls.append("a"), "b": lambda batch: calls.append("b")}, range(3))
    assert "".join(calls) == "abbaab" and len(times["a"]) == len(times["b"]) == 3
    watch = Stopwatch()
    with watch.phase("outer", "first"), watch.phase("inner"), watch.phase("other", "second"):
        pass
    taken = watch.take()
    assert list(taken) == [("second", "other"), ("first", "inner"), ("first", "outer")] and min(taken.values()) >= 0
    assert not watch.take()
