"""python -m pytest tests/test_scaling.py

Proves that the bytes of docs/scaling.md are what two ranks send, at every step: by the counter of the package, by a
count of what torch.distributed is handed, and by the model; that the misses of the example are those of a real cache;
and that the page shows the numbers of the result file, which the present model still gives.
"""

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import scaling
from harness import REPOSITORY

from colossal_freqcache import FreqAwareEmbeddingBagCollection, optim
from colossal_freqcache.row_rules import RULES


@pytest.fixture(scope="module")
def found():
    """What two ranks counted in two training steps."""
    return scaling.count_on(2, num_steps=2)


@pytest.mark.slow
def test_counted_bytes_equal_the_model(found):
    """`compare` raises where they differ; here, that each sharding did send ids, rows and numbers, and had misses."""
    entries = scaling.compare(found)
    assert [entry["sharding"] for entry in entries] == ["column", "column", "row", "table"]
    for entry in entries:
        assert entry["model"] == {name: entry["counted"][name] for name in entry["model"]}
        assert all(entry["counted"].values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ids", "rows", "numbers", "wire", "looked_up", "fetched_bytes"])
@pytest.mark.parametrize("check", range(len(scaling.CHECKS)))
def test_a_single_byte_would_be_noticed(found, check, name):
    changed = copy.deepcopy(found)
    changed[1][check][name][1] += 1
    with pytest.raises(RuntimeError, match=f"sharding='{scaling.CHECKS[check][0]}'.* rank 1 of 2, step 1: counted"):
        scaling.compare(changed)


def test_equal_shares_in_closed_form():
    """The formulas of the page, where W divides D and T: 8 ranks, 16 tables of width 32, 100 bags of 300 ids in all."""
    ranks, bags, ids, tables, dim = 8, 100, 300, 16, 32
    share = scaling.Share(ranks, bags, bags * (ranks - 1), ids, tables, dim)
    pooled = 2 * tables * bags * dim * 4 * (ranks - 1) // ranks
    headers = (8 * (4 + ranks) + 2) * (ranks - 1)
    assert scaling.column_sent(share, dim // ranks, updated_rows=50) == {
        "ids": (tables * bags + ids) * 4 * (ranks - 1),
        "rows": pooled,
        "numbers": headers + 8 * 50 * (ranks - 1),
    }
    assert scaling.table_sent(share, tables // ranks, 300 // ranks) == {
        "ids": (tables * bags * (ranks - 1) // ranks + ids - ids // ranks) * 4,
        "rows": pooled,
        "numbers": headers,
    }
    assert scaling.row_sent(share, 210, 210) == {"ids": 840, "rows": 2 * 210 * dim * 4, "numbers": headers}


def test_one_rank_sends_nothing():
    share = scaling.Share(1, 100, 0, 300, 16, 32)
    for sent in (
        scaling.column_sent(share, scaling.column_width(32, 1), updated_rows=50),
        scaling.row_sent(share, 0, 0),
        scaling.table_sent(share, 16, 300),
    ):
        assert not any(sent.values())


def test_column_and_row_send_the_same_where_they_meet():
    bags, ids, tables, dim, distinct = 1000, 40_000, 26, 128, 60_000
    meet = scaling.column_meets_row(bags, ids, tables, dim, distinct)

    def sent(ranks: float) -> tuple[float, float]:
        share = scaling.Share(ranks, bags, bags * (ranks - 1), ids, tables, dim)
        requested = distinct * (ranks - 1) / ranks
        return tuple(
            by_kind["ids"] + by_kind["rows"]
            for by_kind in (scaling.column_sent(share, dim / ranks), scaling.row_sent(share, requested, requested))
        )

    column, row = sent(meet)
    assert meet > 1 and column == pytest.approx(row, rel=1e-12)
    column, row = sent(2 * meet)
    assert column > row


@pytest.mark.parametrize("optimizer", sorted(RULES))
def test_records_are_those_of_the_package(optimizer):
    assert scaling.record_bytes(24, optimizer) == RULES[optimizer]().layout(24, torch.float32, {}).row_bytes


def test_efficiency_of_the_link():
    assert scaling.link_efficiency(256) == 256 / 280 and scaling.link_efficiency(512) == 512 / 560
    assert scaling.link_efficiency(64) == 64 / 88 and scaling.link_efficiency(8) == 8 / 32


def test_misses_of_the_example_are_those_of_a_cache():
    """Two steps of a small stream through a real cache with the same counts and slots: step two misses what is said."""
    samples, scale, dim = 64, 0.001, 2
    told = scaling.measure_stream("kaggle", samples, 4, seed=3, scale=scale)["by_ranks"]["4"]
    counted, stream = scaling.Stream("kaggle", 6, scale), scaling.Stream("kaggle", 7, scale)
    num_rows = sum(stream.sizes)
    counts = sum(np.bincount(ids, minlength=num_rows) for ids in counted.draw(4 * samples))
    shares = [np.concatenate(list(stream.draw(samples))) for _ in range(8)]
    steps = [np.concatenate(shares[:4]), np.concatenate(shares[4:])]
    slots = max(int(scaling.CACHE_RATIO * num_rows), *(np.unique(ids).size for ids in steps))
    tables = FreqAwareEmbeddingBagCollection(
        [num_rows], dim, mode="sum", num_slots=slots, ids_freq_mapping=counts, optimizer="sgd"
    )
    trained_by = optim.SGD(tables.parameters(), lr=0.1)
    for ids in steps:
        tables.stats.reset()
        tables(torch.from_numpy(ids), torch.arange(ids.size)).sum().backward()
        trained_by.step()
        trained_by.zero_grad()
    assert np.unique(steps[1]).size == told["distinct"]
    assert tables.stats.rows_fetched == told["missed"] > 0
    assert tables.stats.growths == 0


@pytest.fixture(scope="module")
def results():
    return json.loads((REPOSITORY / "benchmarks/results/scaling.json").read_text())


def test_the_result_file_is_what_the_model_gives(results):
    settings = results["settings"]
    samples, dim = settings["samples"], settings["dim"]
    assert results["example"] == scaling.evaluate(results["stream"], samples, dim, settings["optimizer"])
    assert results["long_bags"] == scaling.evaluate_long_bags(results["long_bags_share"], samples, dim)
    markdown = (REPOSITORY / "benchmarks/results/scaling.md").read_text()
    assert markdown.rstrip() == scaling.as_markdown(results).rstrip()


def test_the_page_shows_the_numbers_of_the_result_file(results):
    page = (REPOSITORY / "docs/scaling.md").read_text()
    assert results["command"] in page and "benchmarks/results/scaling.md" in page
    assert scaling.summary_table(results["example"]) in page
    assert scaling.long_bags_table(results["long_bags"]) in page
    for number in (
        f"{results['stream']['distinct_a_share']:,}",
        f"{results['long_bags_share']['distinct_a_share']:,}",
        f"{results['long_bags_meet']:.1f}",
    ):
        assert number in page
