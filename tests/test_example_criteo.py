"""python -m pytest tests/test_example_criteo.py

Proves that the Criteo readers give what a plain Python reader gives, whatever the block and batch size, hold out the
end of the data, and name file and line (or row) of what is wrong.
"""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "dlrm"))

from batches import DataError
from data_criteo import KAGGLE_TABLE_SIZES, CriteoNpy, CriteoTsv, open_criteo

SIZES = [50] * 26


def made_up_line(generator):
    numbers = ["" if generator.random() < 0.2 else str(generator.integers(-3, 70_000)) for _ in range(13)]
    values = ["" if generator.random() < 0.2 else f"{generator.integers(0, 2**32):08x}" for _ in range(26)]
    return "\t".join([str(generator.integers(0, 2)), *numbers, *values])


def write_lines(path, lines, end="\n"):
    path.write_bytes(end.join(lines).encode() + end.encode())
    return path


@pytest.fixture
def lines():
    generator = np.random.default_rng(0)
    return [made_up_line(generator) for _ in range(200)]


def read_plainly(line, sizes):
    columns = line.split("\t")
    dense = [np.float32(np.log1p(max(0, int(c)))) if c else np.float32(0) for c in columns[1:14]]
    ids = [1 + int(c, 16) % (size - 1) if c else 0 for c, size in zip(columns[14:], sizes, strict=True)]
    return float(columns[0]), dense, ids


@pytest.mark.parametrize("block_bytes", [700, 10_000, 1 << 22])
@pytest.mark.parametrize("batch_size", [1, 32, 1000])
def test_tsv_gives_what_a_plain_reader_gives(tmp_path, lines, block_bytes, batch_size):
    data = CriteoTsv(write_lines(tmp_path / "train.txt", lines), SIZES, block_bytes)
    batches = [*data.train_batches(batch_size), *data.test_batches(batch_size)]
    expected = [read_plainly(line, SIZES) for line in lines]
    np.testing.assert_array_equal(np.concatenate([b.labels for b in batches]), [row[0] for row in expected])
    np.testing.assert_allclose(np.concatenate([b.dense for b in batches]), [row[1] for row in expected], rtol=1e-6)
    ids = np.concatenate([b.values.reshape(26, -1) for b in batches], axis=1)
    np.testing.assert_array_equal(ids.T, [row[2] for row in expected])


def test_tsv_holds_out_the_last_seventh(tmp_path, lines):
    data = CriteoTsv(write_lines(tmp_path / "train.txt", lines), SIZES)
    num_test = sum(batch.num_samples for batch in data.test_batches(64))
    assert sum(batch.num_samples for batch in data.train_batches(64)) + num_test == 200
    assert 20 <= num_test <= 36


def test_tsv_with_windows_line_ends_or_without_a_last_one_reads_the_same(tmp_path, lines):
    unix = CriteoTsv(write_lines(tmp_path / "unix.txt", lines), SIZES)
    windows = CriteoTsv(write_lines(tmp_path / "windows.txt", lines, "\r\n"), SIZES)
    (tmp_path / "open.txt").write_text("\n".join(lines))
    unended = CriteoTsv(tmp_path / "open.txt", SIZES)

    def values(data):
        return np.concatenate(
            [b.values.reshape(26, -1) for b in (*data.train_batches(9), *data.test_batches(9))], axis=1
        )

    np.testing.assert_array_equal(values(unix), values(windows))
    np.testing.assert_array_equal(values(unix), values(unended))


BAD_LINES = {
    "too few columns": (lambda line: line.rsplit("\t", 1)[0], "expected 40 tab-separated columns, found 39"),
    "too many columns": (lambda line: line + "\tff", "expected 40 tab-separated columns, found 41"),
    "blank": (lambda line: "", "expected 40 tab-separated columns, found 1"),
    "label": (lambda line: "2" + line[1:], "column 1: the label must be 0 or 1, found '2'"),
    "integer": (lambda line: "\t".join([line[0], "1.5", *line.split("\t")[2:]]), "column 2: expected an integer or"),
    "sign alone": (lambda line: "\t".join([line[0], "-", *line.split("\t")[2:]]), "column 2: expected an integer or"),
    "hex": (lambda line: "\t".join([*line.split("\t")[:-1], "12xy"]), "column 40: expected 1 to 8 hex digits"),
    "long hex": (
        lambda line: "\t".join([*line.split("\t")[:-1], "123456789"]),
        "column 40: expected 1 to 8 hex digits",
    ),
}


@pytest.mark.parametrize("kind", BAD_LINES)
@pytest.mark.parametrize("position", [0, 57, 199])
def test_a_bad_line_is_named_by_file_and_line(tmp_path, lines, kind, position):
    """Also in the held-out part, and when the file is read in many blocks."""
    spoil, reason = BAD_LINES[kind]
    lines[position] = spoil(lines[position])
    path = write_lines(tmp_path / "train.txt", lines)
    data = CriteoTsv(path, SIZES, block_bytes=5000)
    with pytest.raises(DataError) as error:
        for _ in (*data.train_batches(16), *data.test_batches(16)):
            pass
    assert str(error.value).startswith(f"{path}:{position + 1}: {reason}")


def test_a_missing_path_names_both_forms(tmp_path):
    with pytest.raises(
        DataError, match=r"nowhere: no such file or folder; expected Criteo's train.txt, or a folder of"
    ):
        open_criteo(tmp_path / "nowhere")


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "train.txt").touch()
    with pytest.raises(DataError, match="the file is empty"):
        open_criteo(tmp_path / "train.txt")


@pytest.mark.parametrize("sizes", [SIZES[:-1], [1, *SIZES[1:]]])
def test_table_sizes_must_be_26_of_two_rows_or_more(tmp_path, lines, sizes):
    with pytest.raises(DataError, match="table_sizes: expected 26 sizes of at least 2 rows"):
        CriteoTsv(write_lines(tmp_path / "train.txt", lines), sizes)


def write_day(folder, day, num_rows=100, **changes):
    generator = np.random.default_rng(day)
    arrays = dict(
        dense=generator.random((num_rows, 13), dtype=np.float32),
        sparse=generator.integers(0, 2**31 - 1, (num_rows, 26), dtype=np.int32),
        labels=generator.integers(0, 2, (num_rows, 1), dtype=np.int32),
    )
    arrays.update(changes)
    for part, array in arrays.items():
        np.save(folder / f"day_{day}_{part}.npy", array)
    return arrays


def test_npy_days_are_read_in_order_and_the_last_is_held_out(tmp_path):
    days = {day: write_day(tmp_path, day) for day in (2, 10, 9)}
    data = open_criteo(tmp_path)
    assert isinstance(data, CriteoNpy) and data.table_sizes == KAGGLE_TABLE_SIZES
    train, test = list(data.train_batches(33)), list(data.test_batches(33))
    for batches, parts in ((train, (2, 9)), (test, (10,))):
        for part, got in (
            ("dense", np.concatenate([b.dense for b in batches])),
            ("labels", np.concatenate([b.labels for b in batches])[:, None]),
            ("sparse", np.concatenate([b.values.reshape(26, -1) for b in batches], axis=1).T),
        ):
            expected = np.concatenate([days[day][part] for day in parts])
            np.testing.assert_array_equal(got, expected % KAGGLE_TABLE_SIZES if part == "sparse" else expected)


def test_of_a_single_npy_day_the_last_seventh_is_held_out(tmp_path):
    write_day(tmp_path, 0, num_rows=70)
    data = CriteoNpy(tmp_path)
    assert sum(b.num_samples for b in data.train_batches(16)) == 60
    assert sum(b.num_samples for b in data.test_batches(16)) == 10


def spoiled(array, row, value):
    array = array.copy()
    array[row] = value
    return array


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(dense=np.zeros((100, 12), np.float32)), r"day_0_dense.npy: expected shape \(100, 13\) and float"),
        (dict(sparse=np.zeros((100, 26), np.float32)), r"day_0_sparse.npy: expected shape \(100, 26\) and integer"),
        (dict(labels=np.zeros((99, 1), np.int32)), r"day_0_labels.npy: expected shape \(100,\)"),
        (dict(dense=spoiled(np.zeros((100, 13), np.float32), 41, np.nan)), "day_0_dense.npy: row 41: a dense value"),
        (dict(sparse=spoiled(np.zeros((100, 26), np.int32), 42, -1)), "day_0_sparse.npy: row 42: an id is negative"),
        (dict(labels=spoiled(np.zeros(100, np.int32), 43, 2)), "day_0_labels.npy: row 43: the label is neither"),
    ],
)
def test_a_bad_npy_file_is_named(tmp_path, change, message):
    write_day(tmp_path, 0, **change)
    with pytest.raises(DataError, match=message):
        for _ in CriteoNpy(tmp_path, block_rows=16).train_batches(10):
            pass


def test_a_truncated_or_missing_npy_file_is_named(tmp_path):
    write_day(tmp_path, 0)
    path = tmp_path / "day_0_dense.npy"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"day_0_dense.npy: not a readable .npy file"):
        CriteoNpy(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"day_0_dense.npy: no such file; day 0 needs all of dense, sparse, labels"):
        CriteoNpy(tmp_path)
