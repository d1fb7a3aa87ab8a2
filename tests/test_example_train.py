"""python -m pytest tests/test_example_train.py

Proves that the plain tables are nn.EmbeddingBag table by table, that the DLRM is its formula, that a seed fixes the
weights whatever the embedding, and that the whole job gives the same result to the last digit with a small cache as
with every row resident, and nearly that of plain tables.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "dlrm"))

import train as job
from batches import one_id_per_bag, pooled, share_of
from data_synthetic import SyntheticData
from model import DLRM, PlainTables, uniform_rows

EXAMPLE = Path(job.__file__).parent


def batch_of_three_tables():
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randint(0, size, (4,), generator=generator) for size in (5, 7, 3)])
    return one_id_per_bag(torch.rand(4, 2, generator=generator).numpy(), ids.numpy(), [0, 1, 1, 0]), ids


def test_plain_tables_are_embedding_bags_stacked_by_sample_then_table():
    batch, ids = batch_of_three_tables()
    tables = PlainTables([5, 7, 3], 6)
    out = tables(torch.from_numpy(batch.values), torch.from_numpy(batch.offsets))
    assert out.shape == (4, 3, 6)
    for sample in range(4):
        for table in range(3):
            torch.testing.assert_close(out[sample, table], tables.tables[table].weight[ids[table, sample]])


def test_plain_tables_pool_bags_of_several_ids():
    ids = [torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1], [0]])]
    batch = pooled([[0.0], [0.0]], [each.numpy() for each in ids], [0, 1])
    tables = PlainTables([4, 2], 3)
    out = tables(torch.from_numpy(batch.values), torch.from_numpy(batch.offsets))
    torch.testing.assert_close(out[1, 0], tables.tables[0].weight[[2, 3]].mean(dim=0))
    torch.testing.assert_close(out[0, 1], tables.tables[1].weight[1])


def test_plain_tables_refuse_offsets_that_are_not_one_per_table_and_sample():
    with pytest.raises(ValueError, match="4 offsets do not divide by 3 tables"):
        PlainTables([2, 2, 2], 1)(torch.zeros(4, dtype=torch.int64), torch.arange(4))


def test_dlrm_is_its_formula():
    batch, _ = batch_of_three_tables()
    tables = PlainTables([5, 7, 3], 6)
    model = DLRM(tables, 3, 6, 2, bottom=(4,), top=(8,))
    dense, values, offsets, _ = job.tensors(batch)
    x = model.bottom(dense)
    vectors = [x, *tables(values, offsets).unbind(1)]
    dots = [(vectors[i] * vectors[j]).sum(1) for i in range(4) for j in range(i + 1, 4)]
    expected = model.top(torch.cat([x, torch.stack(dots, 1)], 1)).squeeze(1)
    torch.testing.assert_close(model(dense, values, offsets), expected)


def settings_of(**changes):
    return {**job.DEFAULTS, "EMBEDDING_DIM": 8, "BOTTOM_MLP": (16,), "TOP_MLP": (16,), "BATCH_SIZE": 32, **changes}


def small_data(num_train=1200, num_test=600):
    return SyntheticData("kaggle", scale=0.001, num_train=num_train, num_test=num_test, seed=5)


def test_weights_depend_on_the_seed_alone():
    """Not on what was drawn while the tables were built."""
    data, weights = small_data(), []
    for seed, drawn_before in ((1, 0), (1, 9), (2, 0)):
        torch.rand(drawn_before)
        model = job.build_model(settings_of(SEED=seed), PlainTables(data.table_sizes, 8), data)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_the_cached_tables_start_with_the_plain_tables_weights():
    data = small_data()
    plain = PlainTables(data.table_sizes, 8)
    counts = job.count_ids(data, settings_of())
    cached = job.cached_tables(settings_of()["freq_cache"], 0.015, data.table_sizes, 8, counts)
    section = settings_of()["freq_cache"]
    halves = job.cached_tables(section, 0.015, data.table_sizes, 8, counts, dtype=torch.bfloat16)
    for embedding in (plain, cached, halves):
        torch.manual_seed(3)
        embedding.init_(uniform_rows(0.5))
    for table in (0, 2, 25):
        assert torch.equal(plain.tables[table].weight, cached.logical_weight(table))
        assert torch.equal(plain.tables[table].weight.bfloat16(), halves.logical_weight(table))
    assert halves.num_slots == cached.num_slots == halves.weight.shape[0]


@pytest.fixture
def small_config(tmp_path):
    """A config file for the whole job on a small stream; torch's global switches are put back afterwards."""
    pytest.importorskip("colossalai", reason="config files are read with colossalai, which is not installed here")
    path = tmp_path / "small.py"
    path.write_text(
        "SYNTHETIC = 'kaggle'\n"
        "SYNTHETIC_OPTIONS = dict(scale=0.001, num_train=1600, num_test=600)\n"
        "EMBEDDING_DIM, BATCH_SIZE = 8, 32\n"
        "BOTTOM_MLP, TOP_MLP = (16,), (16,)\n"
        "freq_cache = dict(cache_ratio=0.015, evict_strategy='dataset', optimizer='adagrad')\n"
    )
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    yield path
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.mark.colossalai
@pytest.mark.parametrize("dtype", job.TABLE_DTYPES)
def test_a_small_cache_gives_the_result_of_every_row_resident(small_config, dtype):
    """Also nearly that of plain float32 tables. Evictions do happen, and the cache never holds more than its share."""
    results = {}
    for options in (f"--table-dtype {dtype}", f"--cache-ratio 1.0 --table-dtype {dtype}", "--uncached"):
        arguments = job.parse_arguments(["--config", str(small_config), *options.split()])
        results[options] = job.run(arguments, job.read_settings(arguments))
    cached, resident, plain = results.values()
    assert cached["cache"]["evictions"] > 1000 and resident["cache"]["evictions"] == 0
    assert cached["cache"]["num_slots"] <= 0.015 * cached["cache"]["num_rows"]
    assert (cached["auroc"], cached["logloss"]) == (resident["auroc"], resident["logloss"])
    assert cached["auroc"] == pytest.approx(plain["auroc"], abs=0.002)
    assert cached["logloss"] == pytest.approx(plain["logloss"], abs=0.002)


@pytest.mark.colossalai
def test_the_last_line_is_the_result(small_config, monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("RANK", raising=False)
    results = tmp_path / "results.json"
    arguments = ["--config", str(small_config), "--uncached", "--steps", "3", "--json", str(results)]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    assert job.main() == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    fields = dict(field.split("=") for field in last.split())
    assert list(fields) == ["auroc", "baseline_auroc", "logloss", "hit_ratio", "samples_per_s"]
    assert 0 < float(fields["auroc"]) < 1 and results.read_text().startswith("{")


@pytest.mark.colossalai
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("BATCHSIZE = 3", "unknown BATCHSIZE; known are DATA"),
        ("BATCH_SIZE = 0", "BATCH_SIZE: expected at least 1, got 0"),
        ("TABLE_DTYPE = 'int8'", "TABLE_DTYPE: expected one of float32, bfloat16, float16, got 'int8'"),
    ],
)
def test_a_wrong_config_is_refused(small_config, text, message):
    small_config.write_text(text + "\n")
    with pytest.raises(job.SettingError, match=message):
        job.read_settings(job.parse_arguments(["--config", str(small_config)]))


def test_plain_tables_are_refused_on_more_than_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(job.SettingError, match="--uncached is one process on plain tables, got 2"):
        job.launch(job.DEFAULTS, uncached=True)


def test_shares_are_the_batch_cut_by_samples():
    """Every table's bags of the samples in a share, ragged ones too; the shares together are the batch."""
    ids = [torch.tensor([[0, 1], [2, 3], [4, 5]]), torch.tensor([[1], [0], [2]])]
    batch = pooled([[0.0], [1.0], [2.0]], [each.numpy() for each in ids], [0, 1, 0])
    first, second = (share_of(batch, rank, 2) for rank in range(2))
    assert first.values.tolist() == [0, 1, 1] and first.offsets.tolist() == [0, 2]
    assert second.values.tolist() == [2, 3, 4, 5, 0, 2] and second.offsets.tolist() == [0, 2, 4, 5]
    assert second.dense.tolist() == [[1.0], [2.0]] and second.labels.tolist() == [1, 0]
    assert share_of(batch, 0, 1) is batch
    empty = share_of(batch, 0, 4)
    assert empty.num_samples == 0 and empty.values.size == empty.offsets.size == 0
    assert sum(share_of(batch, rank, 4).values.size for rank in range(4)) == batch.values.size


def test_a_missing_data_file_ends_the_job_with_one_line():
    pytest.importorskip("colossalai", reason="config files are read with colossalai, which is not installed here")
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLE.parents[1])}
    environment.pop("RANK", None)
    command = [sys.executable, str(EXAMPLE / "train.py"), "--data", "nowhere.txt", "--uncached"]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert ended.returncode == 2
    assert "error: nowhere.txt: no such file or folder" in ended.stderr and "Traceback" not in ended.stderr
