"""python -m pytest tests/test_benchmark_end_to_end.py

Proves that the benchmark of the example's DLRM trains as many steps cached as uncached, in turn, with real misses, and
that runs which differ are refused. The trainer itself is tested in test_example_train.py. Nothing is asserted about
time.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import end_to_end

CONFIG = """
SYNTHETIC = "kaggle"
SYNTHETIC_OPTIONS = dict(scale=0.002, num_train=2_000, num_test=200)
EMBEDDING_DIM, BATCH_SIZE = 8, 100
freq_cache = dict(cache_ratio=0.05, evict_strategy="dataset", optimizer="adagrad")
"""


@pytest.mark.slow
@pytest.mark.colossalai
def test_both_sides_train_the_same_steps(tmp_path):
    pytest.importorskip("colossalai", reason="the example reads its configuration with colossalai")
    config = tmp_path / "tiny.py"
    config.write_text(CONFIG)
    out = tmp_path / "end"
    results = end_to_end.main(["--config", str(config), "--steps", "3", "--repeats", "1", "--out", str(out)])
    cached, uncached = results["first"]["cached"], results["first"]["uncached"]
    assert cached["steps"] == uncached["steps"] == 3
    assert 0 < cached["hit_ratio"] < 1 == uncached["hit_ratio"]
    assert cached["logloss"] == pytest.approx(uncached["logloss"], abs=1e-4)
    assert results["verdict"] in Path(f"{out}.md").read_text()


def told(steps=5, misses=7, rate=100.0):
    return {"steps": steps, "samples_per_s": rate, "cache": {"misses": misses}}


def test_sides_take_turns(monkeypatch):
    order = []
    monkeypatch.setattr(end_to_end, "train", lambda side, args: order.append(side) or told())
    end_to_end.measure(end_to_end.parse(["--repeats", "2"]))
    assert order == ["cached", "uncached", "uncached", "cached"]


@pytest.mark.parametrize(
    "result, message",
    [(dict(misses=0), "the cache missed nothing"), (dict(steps=4), r"the runs trained \{4, 5\} steps")],
)
def test_a_run_that_does_not_compare_is_refused(monkeypatch, result, message):
    monkeypatch.setattr(end_to_end, "train", lambda side, args: told() if side == "uncached" else told(**result))
    with pytest.raises(RuntimeError, match=message):
        end_to_end.measure(end_to_end.parse(["--repeats", "1"]))


def test_a_scale_is_a_share_of_the_demos_steps():
    assert end_to_end.parse([]).steps is None
    assert end_to_end.parse(["--scale", "0.1"]).steps == round(0.1 * end_to_end.whole_training())
    assert end_to_end.parse(["--scale", "0.1", "--steps", "7"]).steps == 7
