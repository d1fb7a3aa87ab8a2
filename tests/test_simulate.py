"""python -m pytest tests/test_simulate.py

Proves that a replayed trace misses and evicts what real bags do, with every policy; that "belady" is the optimum, by an
exhaustive search over victims; that traces of arrays, batches, files and presets hold the rows, counts and first uses
that plain Python finds; and that the command line prints, writes and refuses what it says.
"""

import csv
import itertools
import re
import runpy
import sys
from collections import Counter, OrderedDict
from functools import cache

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_freqcache import FreqAwareEmbeddingBag, FreqAwareEmbeddingBagCollection, IdFrequency, Lookahead
from colossal_freqcache.cli import main
from colossal_freqcache.eviction.lookahead import LookaheadPolicy
from colossal_freqcache.simulate import POLICIES, Replay, Trace, draw, simulate, write_csv
from colossal_freqcache.synthetic import PRESETS, TableStream

ALL_POLICIES = (*POLICIES, "lookahead-0")
NUM_IDS, BATCH = 60, 20
FEW_SLOTS = 34  # two batches together need fewer


def skewed(num_ids=2000, num_distinct=NUM_IDS, seed=0) -> np.ndarray:
    return (np.random.default_rng(seed).random(num_ids) ** 3 * num_distinct).astype(np.int64)


def rows_by_batch(trace) -> list[list[int]]:
    return [part.tolist() for part in np.split(trace.rows, trace.ends[1:-1])]


# ---- traces


def expected_uses(batches):
    """(id, count, first?) of each use, batch by batch, in plain Python; an id may be any hashable."""
    seen, uses = set(), []
    for batch in batches:
        counts = Counter(batch)
        uses.append([(id_, counts[id_], id_ not in seen) for id_ in dict.fromkeys(batch)])
        seen |= set(batch)
    return uses


def found_uses(trace):
    """The same of a trace; ids are (table, id) where there are several tables."""
    ids = trace.id_of_row[trace.rows].tolist()
    if trace.num_tables > 1:
        ids = list(zip(trace.table_of_row[trace.rows].tolist(), ids))
    uses = list(zip(ids, trace.counts.tolist(), trace.is_first.tolist()))
    return [uses[start:end] for start, end in itertools.pairwise(trace.ends.tolist())]


@given(st.lists(st.integers(-3, 12), min_size=1, max_size=60), st.integers(1, 9))
def test_a_trace_holds_the_uses_of_each_batch(ids, batch_size):
    trace = Trace.from_ids(ids, batch_size)
    batches = [ids[start : start + batch_size] for start in range(0, len(ids), batch_size)]
    assert found_uses(trace) == expected_uses(batches)
    by_count = sorted(Counter(ids).items(), key=lambda item: (-item[1], item[0]))
    assert list(zip(trace.id_of_row.tolist(), trace.counts_of_row.tolist())) == by_count
    assert (trace.num_ids, trace.num_batches, trace.num_rows) == (len(ids), len(batches), len(by_count))
    for depth in range(4):
        together = [batches[max(0, last - depth) : last + 1] for last in range(len(batches))]
        assert trace.slots_needed(depth) == max(len(set(itertools.chain(*window))) for window in together)


def test_columns_are_tables_with_ids_of_their_own():
    """The same numbers in two tables are different rows; a batch is looked up table after table."""
    ids = np.stack([skewed(50, 9), skewed(50, 9, seed=1)], axis=1)
    batches = [
        [(table, id_) for table in (0, 1) for id_ in ids[start : start + 8, table].tolist()]
        for start in range(0, 50, 8)
    ]
    assert found_uses(Trace.from_ids(ids, 8)) == expected_uses(batches)
    assert found_uses(Trace.from_batches([ids[s : s + 8] for s in range(0, 50, 8)])) == expected_uses(batches)


def test_pieces_are_joined_and_batches_are_not():
    ids = skewed(100)
    pieces = [ids[:30], [], torch.from_numpy(ids[30:95]), ids[95:].tolist()]
    assert found_uses(Trace.from_ids(iter(pieces), 20)) == found_uses(Trace.from_ids(ids, 20))
    as_they_are = Trace.from_batches(pieces)
    assert found_uses(as_they_are) == expected_uses([list(map(int, piece)) for piece in pieces])
    assert (
        found_uses(Trace.from_ids(ids.astype(np.uint64) + np.uint64(2**63), 20))[0][0][1:]
        == found_uses(Trace.from_ids(ids, 20))[0][0][1:]
    )


@pytest.mark.parametrize("ending", [".npy", ".npz", ".csv", ".parquet"])
def test_files_of_every_kind(tmp_path, ending):
    """Two files, one after the other: one column; and two, which are tables."""
    first, second = skewed(70), skewed(70, seed=1)
    paths = [tmp_path / f"{part}{ending}" for part in (0, 1)]
    for path, part in zip(paths, (slice(0, 45), slice(45, 70))):
        columns = {"item": first[part], "shop": second[part]}
        if ending == ".npy":
            np.save(path, np.asfortranarray(np.stack(list(columns.values()), axis=1)))
        elif ending == ".npz":
            np.savez(path, **columns, both=np.stack(list(columns.values()), axis=1))
        elif ending == ".csv":
            np.savetxt(path, np.stack(list(columns.values()), axis=1), "%d", ",", header="item,shop", comments="")
        else:
            pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed here")
            pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed here").write_table(
                pyarrow.table(columns), path
            )
    tables = found_uses(Trace.from_ids(np.stack([first, second], axis=1), 16))
    names = [()] if ending == ".npy" else [("item", "shop")] + [("both",)] * (ending == ".npz")
    for columns in names:
        assert found_uses(Trace.from_files(paths, columns, 16)) == tables
    if ending != ".npy":
        assert found_uses(Trace.from_files(paths, ["shop"], 16)) == found_uses(Trace.from_ids(second, 16))


def test_a_preset_gives_the_stream_of_its_tables():
    sizes, fit = PRESETS["kaggle"].table_sizes, PRESETS["kaggle"].fit
    one = Trace.synthetic("kaggle", 500, 64, tables=[3], max_rows=1000, drift=0.1, burst=0.2, seed=4)
    ids = TableStream(1000, fit(3), seed=4, salt=3, drift=0.1, burst=0.2).draw(500)
    assert found_uses(one) == found_uses(Trace.from_ids(ids, 64)) and one.name == "synthetic kaggle table 3"
    drawn = [TableStream(sizes[table], fit(table), salt=table).draw(50) for table in (0, 4)]
    both = Trace.synthetic("kaggle", 99, 16, tables=[0, 4])
    assert found_uses(both) == found_uses(Trace.from_ids(np.stack(drawn, axis=1), 16))


def test_a_preset_with_long_bags_looks_them_up_sample_by_sample():
    trace = Trace.synthetic("meta", 40, 2, tables=[0, 2], max_rows=50)  # 3 ids and 1 a sample
    fit = PRESETS["meta"].fit
    long, short = (TableStream(50, fit(table), salt=table).draw(10 * n).tolist() for table, n in ((0, 3), (2, 1)))
    batches = [[(0, i) for i in long[3 * s : 3 * s + 6]] + [(1, i) for i in short[s : s + 2]] for s in range(0, 10, 2)]
    assert found_uses(trace) == expected_uses(batches)


# ---- the replay, against plain Python


def plain_lru(batches, num_slots):
    """Uses missed: rows leave in the order of their last use, never one of the batch."""
    resident, missed = OrderedDict(), 0
    for batch in batches:
        for row in filter(resident.__contains__, batch):
            resident.move_to_end(row)
        missing = [row for row in batch if row not in resident]
        for row in [row for row in resident if row not in batch][: max(0, len(resident) + len(missing) - num_slots)]:
            del resident[row]
        resident.update(dict.fromkeys(missing))
        missed += len(missing)
    return missed


def plain_dataset(batches, num_slots):
    """Uses missed: the largest row leaves, never one of the batch."""
    resident, missed = set(), 0
    for batch in batches:
        missing = set(batch) - resident
        others = sorted(resident - set(batch), reverse=True)
        resident -= set(others[: max(0, len(resident) + len(missing) - num_slots)])
        resident |= missing
        missed += len(missing)
    return missed


@pytest.mark.parametrize(("policy", "plain"), [("lru", plain_lru), ("dataset", plain_dataset)])
@pytest.mark.parametrize("num_slots", [20, FEW_SLOTS])
def test_misses_are_those_of_plain_python(policy, plain, num_slots):
    trace = Trace.from_ids(skewed(), BATCH)
    (replay,) = simulate(trace, [policy], [num_slots])
    assert replay.misses_unique == plain(rows_by_batch(trace), num_slots) and replay.evictions > 0


def fewest_misses(batches, num_slots, resident):
    """By trying all victims at every batch."""

    @cache
    def fewest(number, resident):
        if number == len(batches):
            return 0
        batch = frozenset(batches[number])
        missing = batch - resident
        num_victims = max(0, len(resident | batch) - num_slots)
        choices = itertools.combinations(sorted(resident - batch), num_victims)
        return len(missing) + min(fewest(number + 1, (resident | batch) - set(victims)) for victims in choices)

    return fewest(0, frozenset(resident))


@settings(max_examples=60)
@given(st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=3), min_size=2, max_size=9), st.booleans())
def test_belady_is_the_optimum(batches, warm):
    trace = Trace.from_batches(batches)
    for num_slots in range(trace.slots_needed(), min(trace.num_rows, 5) + 1):
        (belady,) = simulate(trace, ["belady"], [num_slots], warm=warm)
        beginning = range(num_slots) if warm else ()
        assert belady.misses_unique == fewest_misses(rows_by_batch(trace), num_slots, beginning)


def test_a_window_over_the_whole_trace_without_depth_is_the_optimum():
    """And a wider window misses less; the depth costs slots, and so misses."""
    trace = Trace.from_ids(skewed(), BATCH)
    belady, blind = simulate(trace, ["belady", "lookahead-0"], [FEW_SLOTS])

    def misses(window, depth):
        return simulate(trace, ["lookahead"], [FEW_SLOTS], window, depth)[0].misses_unique

    assert misses(trace.num_batches, 0) == misses(1000, 0) == belady.misses_unique
    by_window = [blind.misses_unique, misses(1, 0), misses(4, 0), misses(16, 0), belady.misses_unique]
    assert by_window == sorted(by_window, reverse=True) and by_window[0] > by_window[2] > by_window[4]
    assert misses(1000, 1) > belady.misses_unique


@pytest.mark.parametrize(("window", "depth"), [(1, 0), (1, 1), (4, 1), (5, 3)])
def test_what_is_known_and_what_is_in_use(monkeypatch, window, depth):
    """When batch b is admitted, those up to (b - depth) + window are announced, and b - depth .. b - 1 are in use."""
    trace = Trace.from_ids(skewed(), BATCH)
    batches, num_known, spies = list(map(set, rows_by_batch(trace))), [], []

    class Spy(LookaheadPolicy):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            spies.append(self)

        def advance(self, slots):
            num_known.append(len(num_known) + self.num_announced)
            super().advance(slots)

        def evict(self, count, index):
            number = len(num_known) - 1
            held = set().union(*batches[max(0, number - depth) : number])
            resident = set(index.row_of_slot.tolist())
            in_use = set(index.row_of_slot[index.in_use > 0].tolist())
            assert in_use == held | (batches[number] & resident) and held <= resident
            return super().evict(count, index)

    monkeypatch.setattr("colossal_freqcache.simulate.make_policy", lambda strategy, *sizes: Spy(*sizes))
    num_slots = trace.slots_needed(depth)
    (replay,) = simulate(trace, ["lookahead"], [num_slots], window, depth)
    assert num_known == [min(len(batches), max(0, b - depth) + window + 1) for b in range(len(batches))]
    assert replay.evictions > 0 and len(spies) == 1


def test_first_touches_stand_apart():
    """A cold cache misses every row once, with any policy; a warm one does not miss those that it began with."""
    trace = Trace.from_ids(skewed(), BATCH)
    for cold, warm in zip(
        simulate(trace, ALL_POLICIES, [FEW_SLOTS]), simulate(trace, ALL_POLICIES, [FEW_SLOTS], warm=True)
    ):
        assert cold.misses_first_touch == trace.num_rows < cold.misses_unique < cold.misses
        assert cold.evictions == cold.misses_unique - FEW_SLOTS and warm.evictions == warm.misses_unique
        assert trace.num_rows - FEW_SLOTS <= warm.misses_first_touch < trace.num_rows
        assert cold.miss_ratio == cold.misses / 2000 and cold.miss_ratio_unique == cold.misses_unique / trace.num_uses


def test_a_cache_of_all_rows_misses_first_touches_only():
    trace = Trace.from_ids(skewed(), BATCH)
    for replay in simulate(trace, ALL_POLICIES, [1.0, 10 * NUM_IDS]):
        assert replay.misses_unique == replay.misses_first_touch == trace.num_rows and replay.evictions == 0


# ---- the replay, against real bags


def run_bag(bag, batches, ahead):
    """Looks every batch up, through a Lookahead(window, depth) if `ahead`."""
    with torch.no_grad():
        for batch in Lookahead(batches, bag, window=ahead[0], depth=ahead[1]) if ahead else batches:
            bag(*batch) if isinstance(batch, tuple) else bag(batch)
    return bag.stats.misses, bag.stats.misses_unique, bag.stats.evictions


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("policy", [*(name for name in POLICIES if name != "belady"), "lookahead-0", "lookahead deep"])
def test_a_bag_misses_and_evicts_the_same(policy, warm):
    """Both know the counts of other data, in which some ids never occur and others often that the trace lacks."""
    ids = skewed(1000) % 57
    counts = np.bincount(skewed(500, seed=3), minlength=NUM_IDS)
    trace = Trace.from_ids(ids, BATCH)
    ahead = {"lookahead": (trace.num_batches, 1), "lookahead deep": (trace.num_batches, 3)}.get(policy)
    window, depth = ahead or (64, 1)
    num_slots = max(FEW_SLOTS, trace.slots_needed(depth))
    bag = FreqAwareEmbeddingBag(
        NUM_IDS,
        4,
        num_slots=num_slots,
        ids_freq_mapping=counts,
        evict_strategy=policy.split("-")[0].split()[0],
        warmup_ratio=float(warm),
    )
    found = run_bag(bag, list(torch.from_numpy(ids).view(-1, BATCH, 1)), ahead)
    (replay,) = simulate(trace, [policy.split()[0]], [num_slots], window, depth, warm, counts=counts)
    assert found == (replay.misses, replay.misses_unique, replay.evictions) and replay.evictions > 0


def test_a_collection_of_two_tables_misses_the_same():
    ids = np.stack([skewed(400, 20), skewed(400, 40, seed=1)], axis=1)
    counts = [np.bincount(ids[:200, table], minlength=size) for table, size in ((0, 20), (1, 40))]
    collection = FreqAwareEmbeddingBagCollection(
        [20, 40], 4, num_slots=FEW_SLOTS, ids_freq_mapping=counts, evict_strategy="s3fifo", warmup_ratio=0.0
    )
    batches = [(torch.from_numpy(ids[s : s + 10].T.flatten()), torch.arange(20)) for s in range(0, 400, 10)]
    found = run_bag(collection, batches, None)
    (replay,) = simulate(Trace.from_ids(ids, 10), ["s3fifo"], [FEW_SLOTS], counts=counts)
    assert found == (replay.misses, replay.misses_unique, replay.evictions) and replay.evictions > 0


# ---- sizes, counts, and what is refused


def test_sizes_are_slots_or_shares_and_come_in_order():
    trace = Trace.from_ids(np.arange(200) % 50, 5)
    replays = simulate(trace, "lru", [0.5, 10, 1.0, np.float32(0.25), np.int64(25)])
    assert [replay.num_slots for replay in replays] == [10, 12, 25, 50]
    assert [replay.share for replay in replays] == [0.2, 0.24, 0.5, 1.0]


def test_a_cache_that_is_too_small_says_what_it_needs():
    trace = Trace.from_batches([[1, 2, 3], [3, 4, 5]])
    lru, ahead = simulate(trace, ["lru", "lookahead"], [4])
    assert lru.misses == 5 and lru.note == ""
    assert ahead == Replay("lookahead", 4, 0.8, 5, note="too small: 2 batches together need up to 5 slots")
    assert simulate(trace, ["belady"], [2])[0].note == "too small: a batch needs up to 3 slots"


def test_counts_of_the_trace_change_lookahead_alone():
    trace = Trace.from_ids(skewed(), BATCH)
    unknown, known = (simulate(trace, ALL_POLICIES, [FEW_SLOTS], window=2, counts=counts) for counts in (None, "trace"))
    differing = {one.policy for one, other in zip(unknown, known) if one != other}
    assert "lookahead-0" in differing <= {"lookahead", "lookahead-0"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(policies=["fifo"]), "unknown policy 'fifo': choose some of dataset, lfu, lru"),
        (dict(sizes=[0]), "size 0 is not allowed: slots .* or a share"),
        (dict(sizes=[1.5]), "size 1.5 is not allowed"),
        (dict(sizes=[True]), "size True is not allowed"),
        (dict(window=0), "window=0 is not allowed: a number of batches, at least 1"),
        (dict(depth=-1), "depth=-1 is not allowed"),
        (dict(window=2, depth=3), "depth=3 is not allowed: at most window=2"),
        (dict(counts=[3, 1]), "id 2 has no count: they are of ids 0..1"),
        (dict(counts=[[3, 1, 1], [2]]), r"2 vector\(s\) of counts for 1 table"),
        (dict(counts=[1, -1, 2]), "counts has -1 at index 1"),
    ],
)
def test_bad_settings_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        simulate(Trace.from_ids([0, 1, 2], 1), **options)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Trace.from_ids([]), ValueError, "ids has 0 ids"),
        (lambda: Trace.from_batches([]), ValueError, "batches has 0 ids"),
        (lambda: Trace.from_ids([0.5]), TypeError, "ids have dtype float64"),
        (lambda: Trace.from_ids(np.zeros((2, 2, 2), int)), ValueError, r"shape \(2, 2, 2\)"),
        (lambda: Trace.from_ids(np.zeros((3, 0), int)), ValueError, r"shape \(3, 0\)"),
        (lambda: Trace.from_ids(np.array(7)), ValueError, r"shape \(\)"),
        (lambda: Trace.from_batches([[1], [[1, 2]]]), ValueError, r"shape \(1, 2\), \(1,\)"),
        (lambda: Trace.from_ids([1], batch_size=0), ValueError, "batch_size=0 is not allowed: .* at least 1"),
        (lambda: Trace.synthetic("criteo"), ValueError, "unknown preset 'criteo': choose one of kaggle"),
        (lambda: Trace.synthetic("avazu", tables=[21]), ValueError, "'avazu' has no table 21: it has 21"),
        (lambda: Trace.synthetic("avazu", num_ids=0), ValueError, "num_ids=0 is not allowed"),
        (lambda: Trace.synthetic("avazu", burst=1), ValueError, "expected 0 <= burst < 1"),
    ],
)
def test_bad_traces_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_columns_of_unequal_length_are_refused(tmp_path):
    np.savez(tmp_path / "ids.npz", a=[1, 2], b=[1, 2, 3], c=[[1], [2]])
    for columns, shapes in ((["a", "b"], r"'a' \(2,\), 'b' \(3,\)"), (["a", "c"], r"'a' \(2,\), 'c' \(2, 1\)")):
        with pytest.raises(ValueError, match=f"ids.npz: .* one id a sample.* {shapes}"):
            Trace.from_files(tmp_path / "ids.npz", columns)


# ---- what comes out


@pytest.fixture
def replays():
    return simulate(Trace.from_ids(skewed(), BATCH), sizes=[10, FEW_SLOTS, 50])


def test_the_csv_file_holds_every_field(replays, tmp_path):
    write_csv(replays, tmp_path / "out.csv")
    with open(tmp_path / "out.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(replays) == 18 and list(lines[0]) == list(Replay.__dataclass_fields__)
    for line, replay in zip(lines, replays):
        assert line == {key: "" if value is None else str(value) for key, value in vars(replay).items()}


def test_the_picture_is_one(replays, tmp_path):
    """Also of sizes that are all too small."""
    image = pytest.importorskip("matplotlib.image", reason="matplotlib, for pictures, is not installed here")
    for shown in (replays, [replay for replay in replays if replay.note]):
        draw(shown, tmp_path / "out.png", title="a title")
        pixels = image.imread(tmp_path / "out.png")
        assert pixels.shape == (600, 1440, 4) and pixels.std() > 0.01


def test_without_matplotlib_it_says_what_to_install(replays, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"matplotlib .* pip install 'colossal_freqcache\[plot\]'"):
        draw(replays, tmp_path / "out.png")


# ---- the command line


def call(*arguments):
    return CliRunner().invoke(main, ["simulate", *map(str, arguments)])


def test_the_command_prints_a_table_and_writes_both_files(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib, for pictures, is not installed here")
    np.save(tmp_path / "ids.npy", skewed())
    ids = tmp_path / "ids.npy"
    result = call(
        ids, "--batch-size", BATCH, "--slots", f"{FEW_SLOTS},10", "--window", 8, "--out", tmp_path / "new/out"
    )
    assert (result.exit_code, result.stderr) == (0, "")
    expected = simulate(Trace.from_ids(skewed(), BATCH), sizes=[10, FEW_SLOTS], window=8)
    lines = [[cell.strip() for cell in line.split("│")] for line in result.stdout.splitlines() if line.startswith("│")]
    assert [line[3] for line in lines] == list(POLICIES) * 2
    assert lines[0][1:6] == ["10", "16.67%", "dataset", "does not fit", "needs 17"]
    for line, replay in zip(lines[6:], expected[6:]):
        assert line[4:7] == [f"{replay.miss_ratio:.2%}", f"{replay.misses_unique:,}", f"{replay.miss_ratio_unique:.2%}"]
        assert line[9] == f"{replay.misses_unique / expected[-1].misses_unique:.3f}"
    with open(tmp_path / "new/out/simulate.csv", newline="") as file:
        assert [line["misses_unique"] for line in csv.DictReader(file)][6:] == [
            str(r.misses_unique) for r in expected[6:]
        ]
    assert (tmp_path / "new/out/simulate.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_command_still_writes_the_csv_file(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = call("--synthetic", "kaggle", "--table", 0, "--ids", 500, "--out", tmp_path)
    assert result.exit_code == 1 and result.stderr.startswith("error: matplotlib draws the picture")
    assert (tmp_path / "simulate.csv").exists() and "synthetic kaggle table 0" in result.stdout


def test_counts_of_a_file_order_the_rows(tmp_path):
    counts = IdFrequency(np.bincount(skewed(500, seed=3), minlength=NUM_IDS))
    counts.save(tmp_path / "freq.npz")
    (tmp_path / "ids.csv").write_text("item,shop\n" + "".join(f"0,{id_}\n" for id_ in skewed()))
    options = [
        "--column",
        1,
        "--batch-size",
        BATCH,
        "--slots",
        FEW_SLOTS,
        "--policies",
        "dataset,lookahead-0",
        "--warm",
    ]
    result = call(tmp_path / "ids.csv", *options, "--counts", tmp_path / "freq.npz")
    assert result.exit_code == 0, result.stderr
    trace = Trace.from_ids(skewed(), BATCH)
    for replay in simulate(trace, ["dataset", "lookahead-0"], [FEW_SLOTS], warm=True, counts=counts):
        assert f"{replay.misses_unique:,}" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "give the files of a trace, or --synthetic PRESET"),
        (["ids.npy", "--synthetic", "kaggle"], 2, "not both"),
        (["--synthetic", "kaggle", "--slots", "9", "--ratios", "0.1"], 2, "--ratios and --slots both"),
        (["--synthetic", "kaggle", "--ratios", "0.1,x"], 2, "'0.1,x'"),
        (["--synthetic", "kaggle", "--ratios", "1.5"], 2, r"1.5 is no share in \(0, 1\]"),
        (["--synthetic", "kaggle", "--slots", "0"], 2, "0 is no number of slots"),
        (["--synthetic", "kaggle", "--policies", "fifo"], 2, "unknown policy 'fifo', choose some of dataset"),
        (["--synthetic", "kaggle", "--window", "1", "--depth", "2"], 2, "--depth 2 is more than --window 1"),
        (["--synthetic", "kaggle", "--column", "item"], 2, "--column is for files only"),
        (["ids.npy", "--burst", "0.1"], 2, "--burst is for --synthetic only"),
        (["--batch-size", "0"], 2, "--batch-size"),
        (["--bogus"], 2, "--bogus"),
        (["missing.npy"], 1, "no such file: missing.npy"),
        (["--synthetic", "criteo"], 1, "unknown preset 'criteo': choose one of kaggle"),
        (["--synthetic", "kaggle", "--counts", "missing.npz"], 1, "missing.npz"),
        (["--synthetic", "avazu", "--drift", "-1", "--ids", "9"], 1, "drift >= 0"),
    ],
)
def test_mistakes_are_one_line(arguments, code, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call(*arguments)
    assert result.exit_code == code and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error: ")
    assert re.search(words, result.stderr)


def test_python_m_runs_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["colossal_freqcache", "simulate", "--help"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("colossal_freqcache", run_name="__main__")
    assert exit_.value.code == 0 and "--policies" in capsys.readouterr().out


def test_without_a_command_it_lists_them():
    result = CliRunner().invoke(main, [])
    assert result.exit_code == 0 and "simulate" in result.stdout
