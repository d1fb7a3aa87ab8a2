"""python -m pytest tests/test_benchmark_step.py

Proves that the benchmark of a training step runs with every peer that is installed, that the hits it reports are those
of a simulation on paper and would be refused otherwise, that tables which differ are refused, and that its result files
say what was measured. Nothing is asserted about time.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import contenders
import load
import step
from harness import REPOSITORY, Stopwatch, interleaved, ratio_of, verdict

TINY = "--scale 0.01 --batch-size 256 --steps 3 --dropped 1 --apart 1 --counted 4 --window 4 --threads 1 2".split()
TINY += ["--builds", "2"]
STEPS, BUILDS = 3, 2


def tiny_run(out, *arguments):
    return step.main([*TINY, *arguments, "--out", str(out)])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(what `main` returned, the path of the files without suffix): against torch."""
    out = tmp_path_factory.mktemp("results") / "step-1.2"
    threads = torch.get_num_threads()
    yield tiny_run(out, "--peers", "torch"), out
    torch.set_num_threads(threads)


def test_the_files_hold_what_was_measured(run):
    results, out = run
    assert json.loads(Path(f"{out}.json").read_text()) == results
    assert results["settings"]["batch_size"] == 256 and results["machine"]["versions"]["torch"] == torch.__version__
    told = [(one["optimizer"], one["ours"], one["threads"]) for one in results["runs"]]
    assert told == [
        (optimizer, ours, threads)
        for optimizer in ("sgd", "adagrad")  # torch has no row-wise Adagrad
        for ours in ("ours", "ours+lookahead")
        for threads in (1, 2)
    ]
    markdown = Path(f"{out}.md").read_text()
    for one in results["runs"]:
        assert f"| {one['optimizer']} | {one['ours']} | torch | {one['threads']} " in markdown
        assert f"{one['hit_ratio']:.4f}" in markdown and one["against"]["torch"]["verdict"] in markdown
        builds = BUILDS if one["ours"] == "ours" else 1
        assert [len(times) for times in one["all_ms"].values()] == [STEPS * builds, STEPS * builds]
        assert [len(medians) for medians in one["medians_by_build"].values()] == [builds, builds]
        assert one["against"]["torch"]["ratio"] == ratio_of(
            one["all_ms"]["ours" if builds > 1 else "ours+lookahead"], one["all_ms"]["torch"]
        )
        assert ("phases" in one, "parts" in one) == (one["ours"] == "ours", one["ours"] != "ours")
        assert "phases" not in one or set(one["phases"]) == set(step.GROUPS)


def test_real_misses_the_same_for_every_optimizer(run):
    """The hits were compared with the simulation inside of the run; here, that there was something to miss."""
    results, _ = run
    by_block = {}
    for one in results["runs"]:
        moved, miss_ratios = one["per_step"], np.array(one["miss_ratio_per_table"])
        assert 0 < one["hit_ratio_big_tables"] < one["hit_ratio"] == pytest.approx(1 - miss_ratios.mean())
        assert (miss_ratios[[5, 8, 19]] == 0).all() and miss_ratios[2] > 0.1  # tables of 24, 3 and 4 rows; of 100,000
        assert 0 < moved["belady_misses_unique"] and moved["rows_written_back"] > 0
        if one["ours"] == "ours":
            assert moved["belady_misses_unique"] <= moved["misses_unique"] == moved["rows_fetched"] <= moved["misses"]
        by_block.setdefault((one["ours"], one["threads"]), []).append(one["miss_ratio_per_table"])
    assert all(one == of_block[0] for of_block in by_block.values() for one in of_block)


def test_fused_trains_the_same_bits(run, tmp_path):
    """And its update is part of the backward."""
    results, _ = run
    fused = tiny_run(tmp_path / "step", "--peers", "torch", "--fused", "--optimizers", "sgd")
    (plain,) = {one["table_digest"] for one in results["runs"] if one["optimizer"] == "sgd"}
    assert {one["table_digest"] for one in fused["runs"]} == {plain}
    phases = fused["runs"][0]["phases"]
    assert "kernel of the update" in phases["backward"]["median_by_phase"]
    assert "kernel of the update" not in phases["optimizer"]["median_by_phase"]


def test_fbgemm_trains_the_same_tables(tmp_path):
    """That they agree is asserted in the run; here, how far, and that both optimizers ran."""
    pytest.importorskip("fbgemm_gpu", reason="a peer that only `make bench` installs")
    results = tiny_run(tmp_path / "step", "--peers", "fbgemm", "--threads", "1")
    assert {one["optimizer"] for one in results["runs"]} == {"sgd", "rowwise_adagrad"}
    for one in results["runs"]:
        assert one["contenders"] == [one["ours"], "fbgemm"]
        assert 0 < one["against"]["fbgemm"]["largest_difference"]["weight"] < 1e-5


@pytest.mark.slow
@pytest.mark.colossalai
def test_colossalai_trains_the_same_tables(tmp_path):
    """That its misses are the simulated ones is asserted in the run. CUDA's functions are torch's again afterwards."""
    pytest.importorskip("colossalai", reason="compares with colossalai's own class")
    cuda = torch.Tensor.cuda
    results = tiny_run(tmp_path / "step", "--peers", "torch", "colossal", "--optimizers", "sgd")
    for one in results["runs"]:
        assert one["contenders"] == [one["ours"], "torch", "colossal"]
        assert one["against"]["colossal"]["largest_difference"]["tolerances"] <= 1
    assert torch.Tensor.cuda is cuda


def test_a_wrong_hit_ratio_is_refused(tmp_path, monkeypatch):
    """A simulation of a cache of half the slots misses more, and the run says so."""
    simulate = step.simulate
    monkeypatch.setattr(
        step,
        "simulate",
        lambda world, rows, slots, *args, **options: simulate(world, rows, slots // 2, *args, **options),
    )
    with pytest.raises(RuntimeError, match="a simulation of its policy"):
        tiny_run(tmp_path / "step", "--peers", "torch", "--optimizers", "sgd")
    assert not list(tmp_path.iterdir())


def test_tables_that_differ_are_refused(tmp_path, monkeypatch):
    """Torch with a learning rate of its own does not train what ours does."""
    monkeypatch.setattr(contenders.Torch, "step", lambda self, batch: self.forward(batch))
    with pytest.raises(RuntimeError, match="a row of torch's differs from ours by"):
        tiny_run(tmp_path / "step", "--peers", "torch", "--optimizers", "sgd")
    assert not list(tmp_path.iterdir())


def test_fewer_misses_than_beladys_are_refused():
    expected = step.Expected(np.zeros((1, 1)), np.zeros(1), np.array([5]))
    stats = step.CacheStats()
    stats.misses_unique_per_table += 4
    with pytest.raises(RuntimeError, match="4 rows missed, Belady's optimum 5"):
        step.check_counts("ours+lookahead", step.Counted(stats), expected, slice(0, 1))


def test_a_peer_that_is_missing_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(contenders.Fbgemm, "distribution", "no-such-package")
    with pytest.raises(SystemExit):
        tiny_run(tmp_path / "step")
    assert "fbgemm needs no-such-package, which is not installed: see requirements-bench" in capsys.readouterr().err


def test_the_simulation_on_paper():
    """Two slots over one table of four ids, counted in their order, start with ids 0 and 1."""
    batches = [torch.tensor([number]) for number in (0, 2, 1, 3, 2)]
    ends = torch.tensor([0, 1])
    world = load.World([4], np.array([4, 3, 2, 1]), [load.StepBatch(ids, ids, ends) for ids in batches])
    row_of_id = load.frequency_rows(world.counts)
    _, missed = load.simulate(world, row_of_id, 2, 5, belady=False)
    assert missed.tolist() == [0, 1, 1, 1, 1]  # 2 evicts 1, 1 evicts 2, 3 evicts 1, 2 evicts 3: 0 stays
    _, missed = load.simulate(world, row_of_id, 2, 5, belady=True)
    assert missed.tolist() == [0, 1, 0, 1, 0]  # 2 evicts 0, which never comes again; 3 evicts 1
    missed, _ = load.simulate(world, row_of_id[::-1], 2, 1, belady=False)
    assert missed.tolist() == [[1]]  # in the opposite order ids 2 and 3 are there


def test_both_forms_of_a_batch_are_the_same_ids():
    world = load.make_world(0.001, 8, 1, 2, seed=0)
    batch = world.batches[1]
    table_major = batch.joined.view(8, world.num_tables).T.reshape(-1)
    firsts = torch.tensor(np.cumsum([0, *world.table_sizes[:-1]])).repeat_interleave(8)
    assert torch.equal(batch.values + firsts, table_major) and batch.ends[-1] == batch.num_ids == batch.offsets.numel()
    assert world.counts.sum() == 8 * world.num_tables and world.num_rows == world.counts.size


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


def test_ratios_and_verdicts():
    ratio = ratio_of([1.0, 2.0, 9.0], [4.0, 4.0, 2.0])
    assert ratio == {"of_median": 0.5, "of_min": 0.5}
    assert [verdict(ratio["of_median"], budget) for budget in (0.5, 0.4, None)] == ["met", "**MISSED**", "-"]


def test_the_extra_and_the_requirements_name_the_same_peers():
    """One pin in two places: requirements-bench.txt and the extra `bench` of setup.py."""
    pins = [line for line in (REPOSITORY / "requirements-bench.txt").read_text().splitlines() if "==" in line]
    assert pins and all(f'"{pin}"' in (REPOSITORY / "setup.py").read_text() for pin in pins)
