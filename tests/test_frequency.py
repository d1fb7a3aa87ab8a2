"""python -m pytest tests/test_frequency.py

Proves that IdFrequency counts what is there, whatever the container, file or split; that a saved file comes back as it
was or not at all; and that wrong input is refused in words that name the file, the place and what to do.
"""

import os
import re
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np

from colossal_freqcache import IdFrequency, frequency, id_files
from colossal_freqcache.frequency import as_counts

NUM_IDS = 12
id_lists = st.lists(st.integers(0, NUM_IDS - 1), max_size=30)
count_vectors = st.lists(st.integers(0, 1000), min_size=1, max_size=40)


def expected_counts(ids, num_embeddings=NUM_IDS) -> list[int]:
    ids = list(ids)
    return [ids.count(id_) for id_ in range(num_embeddings)]


# ---- construction


@pytest.mark.parametrize(
    "counts",
    [
        [3, 0, 2],
        np.array([3, 0, 2], dtype=np.uint8),
        np.array([3.0, 0.0, 2.0], dtype=np.float32),
        torch.tensor([3, 0, 2], dtype=torch.int32),
        torch.tensor([3.0, 0.0, 2.0], dtype=torch.bfloat16, requires_grad=True),
    ],
    ids=["list", "uint8", "float32", "tensor", "bfloat16"],
)
def test_integer_counts_of_any_container_become_int64(counts):
    frequency_ = IdFrequency(counts)
    assert frequency_.counts.dtype == np.int64
    assert frequency_.counts.tolist() == [3, 0, 2]
    assert (frequency_.num_embeddings, frequency_.total) == (3, 5)
    assert isinstance(frequency_.total, int)


def test_fractions_stay_float64():
    frequency_ = IdFrequency([0.5, 2.0])
    assert frequency_.counts.dtype == np.float64
    assert frequency_.total == 2.5


def test_counts_are_a_copy_that_cannot_be_written():
    mine = np.array([1, 2])
    frequency_ = IdFrequency(mine)
    mine[0] = -1
    assert frequency_.counts.tolist() == [1, 2]
    with pytest.raises(ValueError, match="read-only"):
        frequency_.counts[0] = 7


@pytest.mark.parametrize(
    ("counts", "error", "words"),
    [
        ([1, float("nan"), 2], ValueError, "counts has nan at index 1"),
        ([1, 2, float("inf")], ValueError, "counts has inf at index 2"),
        ([4, -3, -1], ValueError, r"counts has -3 at index 1 \(2 of 3 counts are wrong\)"),
        (torch.tensor([[1, 2], [3, 4]]), ValueError, r"2 dimensions, shape \(2, 2\)"),
        (5, ValueError, "0 dimensions"),
        ([], ValueError, "0 counts"),
        ([[1], [2, 3]], ValueError, "counts: .*inhomogeneous"),
        (["a", "b"], TypeError, "dtype <U1"),
        (None, TypeError, "None"),
        (np.array([True, False]), TypeError, "bool"),
        (torch.tensor([True]), TypeError, "bool"),
        ([2**62, 1], ValueError, "add up to 4.61e[+]18"),
        (np.array([2**64 - 1], dtype=np.uint64), ValueError, "add up to 1.84e[+]19"),
        ([1e308, 1e308], ValueError, "add up to inf"),
    ],
)
def test_bad_counts_are_refused(counts, error, words):
    with np.errstate(over="ignore"), pytest.raises(error, match=words):
        IdFrequency(counts)


# ---- counting a stream


def test_arrays_tensors_and_lists_of_any_shape_count_alike():
    arrays = [
        np.array([[0, 1], [1, 2]], dtype=np.uint16),
        torch.tensor([2, 2], dtype=torch.int32),
        [[3]],
        [],
        np.int8(4),
    ]
    assert IdFrequency.count(iter(arrays), 6).counts.tolist() == [1, 2, 3, 1, 1, 0]


def test_one_array_is_taken_as_one():
    assert IdFrequency.count(np.array([0, 1, 1]), 2).counts.tolist() == [1, 2]
    assert IdFrequency.count(torch.tensor([0, 1, 1]), 2).counts.tolist() == [1, 2]


@given(st.lists(id_lists, max_size=5), st.lists(id_lists, max_size=5))
def test_merged_shards_equal_the_whole(first, second):
    whole = IdFrequency.count(first + second, NUM_IDS)
    assert IdFrequency.count(first, NUM_IDS).merge(IdFrequency.count(second, NUM_IDS)) == whole
    assert whole.counts.tolist() == expected_counts(id_ for ids in first + second for id_ in ids)


def test_chunks_of_one_array_add_up(monkeypatch):
    monkeypatch.setattr(frequency, "CHUNK_IDS", 7)
    ids = np.random.default_rng(0).integers(0, NUM_IDS, 100)
    assert IdFrequency.count([ids], NUM_IDS).counts.tolist() == expected_counts(ids)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ([[0], [1, 12, 3]], "id 12 at position 1 of array 1: valid ids are 0..11"),
        ([np.array([[0, 1], [2, -4]])], r"id -4 at position \(1, 1\) of array 0: valid ids are 0..11"),
        ([np.array([2**63 + 1], dtype=np.uint64)], "id 9223372036854775809 at position 0"),
    ],
)
def test_an_id_out_of_range_is_named_with_its_place(arrays, words):
    with pytest.raises(ValueError, match=words):
        IdFrequency.count(arrays, NUM_IDS)


@pytest.mark.parametrize("ids", [[0.0, 1.0], np.zeros(0, np.float32), torch.ones(2), np.array([True]), ["a"]])
def test_ids_that_are_not_integers_are_refused(ids):
    with pytest.raises(TypeError, match="array 1"):
        IdFrequency.count([[1], ids], NUM_IDS)


@pytest.mark.parametrize("num_embeddings", [0, -1, 2.0, True, None])
def test_num_embeddings_is_a_positive_int(num_embeddings):
    with pytest.raises(ValueError, match=f"num_embeddings={num_embeddings}"):
        IdFrequency.count([[0]], num_embeddings)


def test_a_path_is_sent_to_count_files():
    with pytest.raises(TypeError, match="count_files"):
        IdFrequency.count("ids.npy", NUM_IDS)


def test_the_bar_is_drawn_on_standard_error_only_if_asked(capsys):
    IdFrequency.count([[0], [1]], 2, progress=False)
    IdFrequency.count([[0], [1]], 2, progress=None)  # no terminal here
    assert capsys.readouterr().err == ""
    IdFrequency.count(([i] for i in range(2)), 2, progress=True)
    captured = capsys.readouterr()
    assert "counting ids" in captured.err
    assert captured.out == ""


# ---- counting files


IDS = np.random.default_rng(1).integers(0, NUM_IDS, 50)


def arrow():
    """(pyarrow, pyarrow.parquet); the test is skipped where they are missing."""
    why = "parquet files need pyarrow"
    return pytest.importorskip("pyarrow", reason=why), pytest.importorskip("pyarrow.parquet", reason=why)


def write(path, ids=IDS):
    """`ids` in a file of the kind that its ending says, as column or array "item" beside another one."""
    if path.suffix == ".npy":
        np.save(path, ids)
    elif path.suffix == ".npz":
        np.savez_compressed(path, item=ids, user=ids * 0)
    elif path.suffix == ".parquet":
        pyarrow, parquet = arrow()
        parquet.write_table(pyarrow.table({"user": ids * 0, "item": ids}), path)
    else:
        path.write_text("user,item\n" + "".join(f'0,"{id_}"\n' for id_ in ids))
    return path


@pytest.fixture(params=[".npy", ".npz", ".parquet", ".csv"])
def path(request, tmp_path):
    return write(tmp_path / f"ids{request.param}")


@pytest.fixture
def tiny_chunks(monkeypatch):
    """So that every file here takes several chunks."""
    for module, name in ((frequency, "CHUNK_IDS"), (id_files, "CHUNK_IDS"), (id_files, "_CHUNK_LINES")):
        monkeypatch.setattr(module, name, 7)


def column_of(path):
    return None if path.suffix == ".npy" else "item"


def test_a_file_is_counted(path, tiny_chunks):
    counted = IdFrequency.count_files(path, NUM_IDS, column=column_of(path))
    assert counted.counts.tolist() == expected_counts(IDS)


def test_without_num_embeddings_the_largest_id_decides(path, tiny_chunks, monkeypatch):
    write(path, np.array([0, 5, 9, 5]))
    more = write(path.with_stem("more"), np.array([2, 30, 2]))
    counted = IdFrequency.count_files([path, str(more)], column=column_of(path), progress=True)
    assert counted.counts.tolist() == expected_counts([0, 5, 9, 5, 2, 30, 2], 31)


def test_a_file_id_out_of_range_is_named_with_its_place(path, tiny_chunks):
    ids = IDS.copy()
    ids[[23, 40]] = [-7, 99]
    write(path, ids)
    place = {".npy": "position 23 of", ".npz": "position 23 of array 'item' of", ".csv": "line 25 of"}.get(
        path.suffix, "row 23 of column 'item' of"
    )
    for num_embeddings, allowed in ((NUM_IDS, r"0\.\.11"), (None, "without num_embeddings")):
        with pytest.raises(ValueError, match=f"id -7 at {place} {re.escape(str(path))}: valid ids are .*{allowed}"):
            IdFrequency.count_files(path, num_embeddings, column=column_of(path))


def test_a_hash_is_not_taken_for_an_id(path):
    write(path, np.array([3, 2**40]))
    with pytest.raises(ValueError, match="id 1099511627776 at .*map hashed ids"):
        IdFrequency.count_files(path, column=column_of(path))


def test_float_ids_in_a_file_are_refused(path):
    write(path, IDS.astype(np.float64))
    error, words = (ValueError, "line 2: .* is not an integer") if path.suffix == ".csv" else (TypeError, "integers")
    with pytest.raises(error, match=words):
        IdFrequency.count_files(path, NUM_IDS, column=column_of(path))


def test_a_missing_column_lists_those_there_are(path):
    if path.suffix == ".npy":
        with pytest.warns(UserWarning, match="column='shop' is ignored"):
            IdFrequency.count_files(path, NUM_IDS, column="shop")
        return
    for column, words in (("shop", "no (column|array) 'shop'"), (None, "say which one")):
        with pytest.raises(ValueError, match=f"{words}.*'(item|user)', '(item|user)'"):
            IdFrequency.count_files(path, NUM_IDS, column=column)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("path", [".npy", ".npz", ".parquet"], indirect=True)  # a csv file cut off may be a csv file
def test_a_truncated_file_is_named(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        IdFrequency.count_files(path, NUM_IDS, column=column_of(path))


def test_a_damaged_compressed_array_is_named(tmp_path):
    path = write(tmp_path / "ids.npz", np.arange(10_000))
    data = bytearray(path.read_bytes())
    data[len(data) // 4] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"array 'item' of {re.escape(str(path))} is damaged"):
        IdFrequency.count_files(path, column="item")


@pytest.mark.parametrize(
    "ids", [IDS.reshape(5, 10), np.asfortranarray(IDS.reshape(5, 10)), IDS.astype(">i2"), IDS[:0], IDS[0]]
)
def test_npy_of_any_shape_order_and_byte_order(tmp_path, tiny_chunks, ids):
    path = write(tmp_path / "ids.npy", ids)
    assert IdFrequency.count_files(path, NUM_IDS).counts.tolist() == expected_counts(ids.reshape(-1))


def test_the_position_in_a_fortran_array_is_its_index(tmp_path):
    ids = np.zeros((4, 3), dtype=np.int64, order="F")
    ids[2, 1] = 99
    with pytest.raises(ValueError, match=r"id 99 at position \(2, 1\)"):
        IdFrequency.count_files(write(tmp_path / "ids.npy", ids), NUM_IDS)


def test_pickled_arrays_are_not_read(tmp_path):
    np.save(tmp_path / "ids.npy", np.array([1, None]), allow_pickle=True)
    with pytest.raises(TypeError, match="dtype object"):
        IdFrequency.count_files(tmp_path / "ids.npy", NUM_IDS)


@pytest.mark.parametrize("kind", ["list_", "large_list"])
def test_parquet_lists_are_flattened_and_their_rows_named(tmp_path, tiny_chunks, kind):
    pyarrow, parquet = arrow()
    bags = [[1, 2], [], None, [3]] * 5 + [[4, 4, 77]]
    kind = getattr(pyarrow, kind)(pyarrow.int32())
    path = tmp_path / "bags.parquet"
    parquet.write_table(pyarrow.table({"ids": pyarrow.array(bags, kind)}), path)
    counted = IdFrequency.count_files(path)
    assert counted.counts[:5].tolist() == [0, 5, 5, 5, 2]
    with pytest.raises(ValueError, match="id 77 at row 20 of column 'ids'"):
        IdFrequency.count_files(path, NUM_IDS)


def test_parquet_dictionary_columns_are_decoded(tmp_path):
    pyarrow, parquet = arrow()
    table = pyarrow.table({"ids": pyarrow.array([5, 3, 5]).dictionary_encode()})
    parquet.write_table(table, tmp_path / "ids.parquet")
    assert IdFrequency.count_files(tmp_path / "ids.parquet").counts.tolist() == [0, 0, 0, 1, 0, 2]


def test_a_parquet_null_is_refused_with_its_row(tmp_path, tiny_chunks):
    pyarrow, parquet = arrow()
    path = tmp_path / "ids.parquet"
    parquet.write_table(pyarrow.table({"ids": [1] * 9 + [None]}), path)
    with pytest.raises(ValueError, match="null.* at row 9 of column 'ids'"):
        IdFrequency.count_files(path, NUM_IDS)


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ("3\n1\n3\n", None),
        ("item\n3\n1\n3\n", None),
        ("\ufeffitem\n3\n\n\n\n\n\n\n\n\n1\n3\n\n", None),  # a byte order mark, and more blank lines than a chunk has
        ("0,3\r\n0,1\r\n0,3", 1),
        ('name,item\n"two\nlines",3\n"a,b",1\nc, +3 \n', "item"),
    ],
)
def test_csv_forms(tmp_path, tiny_chunks, text, column):
    path = tmp_path / "ids.csv"
    path.write_text(text, encoding="utf-8", newline="")
    assert IdFrequency.count_files(path, 4, column=column).counts.tolist() == [0, 1, 0, 2]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("x,", "'' is not an integer id"),
        ("x,1_000", "'1_000' is not an integer id"),
        ("x,1.0", "'1.0' is not an integer id"),
        ("x", "1 fields, expected 2"),
        ("x,1,2", "3 fields, expected 2"),
        ("x,99999999999999999999", "does not fit into 64 bits"),
        ("x,\ufffd", "is not an integer id"),
    ],
)
def test_a_bad_csv_line_is_named_by_its_number(tmp_path, tiny_chunks, bad, words):
    path = tmp_path / "ids.csv"
    # Line 1 is the header, lines 2 and 3 are one row, line 4 is blank; the bad row follows ten good ones.
    path.write_text('name,item\n"two\nlines",3\n\n' + "y,1\n" * 10 + f"{bad}\ny,1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}, line 15: .*{words}"):
        IdFrequency.count_files(path, NUM_IDS, column="item")


def test_a_csv_column_number_past_the_last_is_refused(tmp_path):
    (tmp_path / "ids.csv").write_text("1,2\n")
    with pytest.raises(ValueError, match="no column 2: it has 2, numbered from 0"):
        IdFrequency.count_files(tmp_path / "ids.csv", column=2)


def test_files_are_checked_before_any_is_read(tmp_path):
    bad = tmp_path / "bad.npy"
    bad.write_bytes(b"never looked at")
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "missing.csv"))):
        IdFrequency.count_files([bad, tmp_path / "missing.csv"])
    (tmp_path / "ids.txt").touch()
    with pytest.raises(ValueError, match=r"ends in '.txt': known endings are .npy, .npz, .parquet, .csv"):
        IdFrequency.count_files([bad, tmp_path / "ids.txt"])
    with pytest.raises(ValueError, match="is a folder"):
        IdFrequency.count_files([bad, tmp_path])
    with pytest.raises(ValueError, match="0 files"):
        IdFrequency.count_files([])


def test_no_ids_at_all_need_num_embeddings(tmp_path):
    (tmp_path / "ids.csv").write_text("item\n")
    (tmp_path / "nothing.csv").touch()
    with pytest.raises(ValueError, match="0 ids in 2 file"):
        IdFrequency.count_files([tmp_path / "ids.csv", tmp_path / "nothing.csv"])
    assert IdFrequency.count_files(tmp_path / "ids.csv", 2).counts.tolist() == [0, 0]


# ---- merge and decay


def test_merge_needs_equal_lengths_and_an_id_frequency():
    with pytest.raises(ValueError, match="3 and 2 ids"):
        IdFrequency([1, 2, 3]).merge(IdFrequency([1, 2]))
    with pytest.raises(TypeError, match="not list"):
        IdFrequency([1]).merge([1])


def test_merge_past_the_largest_total_is_refused_not_wrapped():
    half = IdFrequency([2**61])
    with pytest.raises(ValueError, match="add up to"):
        half.merge(half)


def test_decay_scales_and_leaves_the_original():
    original = IdFrequency([4, 1])
    assert original.decay(0.5).counts.tolist() == [2.0, 0.5]
    assert original.decay(0.5).merge(IdFrequency([0, 2])).counts.tolist() == [2.0, 2.5]
    assert original.decay(1) == original
    assert original.counts.tolist() == [4, 1]


@pytest.mark.parametrize("factor", [0, -0.5, 1.5, float("nan"), "half"])
def test_decay_factor_is_a_share(factor):
    with pytest.raises(ValueError, match=r"factor=.* in \(0, 1\]"):
        IdFrequency([1]).decay(factor)


# ---- save and load


@given(
    st_np.arrays(np.int64, st.integers(1, 30), elements=st.integers(0, 2**50))
    | st_np.arrays(np.float64, st.integers(1, 30), elements=st.floats(0, 1e15))
)
def test_what_was_saved_is_loaded_to_the_bit(tmp_path_factory, counts):
    path = tmp_path_factory.mktemp("saved") / "freq.npz"
    saved = IdFrequency(counts)
    saved.save(path)
    loaded = IdFrequency.load(str(path))
    assert loaded.counts.dtype == saved.counts.dtype
    assert loaded.counts.tobytes() == saved.counts.tobytes()
    assert not loaded.counts.flags.writeable


def test_no_changed_byte_and_no_cut_goes_unnoticed(tmp_path):
    """Each byte changed, and cuts at every seventh: the same counts come back, or an error that names the file."""
    path = tmp_path / "freq.npz"
    saved = IdFrequency([5, 0, 3])
    saved.save(path)
    data = path.read_bytes()
    damaged = [data[:length] for length in range(0, len(data), 7)]
    damaged += [data[:i] + bytes([data[i] ^ 0xFF]) + data[i + 1 :] for i in range(len(data))]
    num_refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            assert IdFrequency.load(path) == saved
        except ValueError as error:
            assert str(path) in str(error)
            num_refused += 1
    assert num_refused > len(damaged) / 2  # the rest are time stamps and the like


def test_counts_that_do_not_match_the_checksum_are_refused(tmp_path):
    """A zip file that is whole, with other counts in it."""
    path = tmp_path / "freq.npz"
    IdFrequency([5, 0, 3]).save(path)
    with np.load(path) as arrays:
        content = dict(arrays)
    np.savez(path, **{**content, "counts": np.array([5, 0, 4])})
    with pytest.raises(ValueError, match="checksum"):
        IdFrequency.load(path)
    np.savez(path, **{**content, "version": 2})
    with pytest.raises(ValueError, match="format version 2"):
        IdFrequency.load(path)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "freq.npz"
    np.savez(path, counts=np.arange(3))
    with pytest.raises(ValueError, match=r"holds the arrays \['counts'\], not an IdFrequency"):
        IdFrequency.load(path)
    with open(path, "wb") as file:
        np.save(file, np.arange(3))
    with pytest.raises(ValueError, match="freq.npz is damaged or not a frequency file"):
        IdFrequency.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("format.npy", b"\x80\x04N.")  # a pickle
        archive.writestr("version.npy", b"\x80\x04N.")
    with pytest.raises(ValueError, match=r"freq\.npz"):
        IdFrequency.load(path)
    with pytest.raises(FileNotFoundError, match=r"missing\.npz"):
        IdFrequency.load(tmp_path / "missing.npz")


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "freq.npz"
    old = IdFrequency([1, 2])
    old.save(path)

    def full(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        IdFrequency([3, 4]).save(path)
    assert IdFrequency.load(path) == old
    assert os.listdir(tmp_path) == ["freq.npz"]


# ---- coverage


def test_coverage_is_the_share_of_the_hottest_ids():
    frequency_ = IdFrequency([1, 6, 0, 3])
    assert frequency_.coverage(1) == 0.6
    assert isinstance(frequency_.coverage(1), float)
    np.testing.assert_array_equal(frequency_.coverage([0, 1, 2, 3, 4, 99]), [0.0, 0.6, 0.9, 1.0, 1.0, 1.0])
    assert frequency_.coverage(np.array([[1], [2]])).shape == (2, 1)


@given(count_vectors, st.integers(2, 50))
def test_coverage_never_falls_and_ends_at_one(counts, num_points):
    frequency_ = IdFrequency(counts)
    share = frequency_.coverage(np.arange(len(counts) + 1))
    assert (np.diff(share) >= 0).all()
    assert share[0] == 0 and share[-1] == (1 if sum(counts) else 0)
    best = np.cumsum(sorted(counts, reverse=True)) / max(1, sum(counts))
    np.testing.assert_allclose(share[1:], best, rtol=1e-12)
    rows, curve = frequency_.coverage_curve(num_points)
    assert rows[0] == 1 and rows[-1] == len(counts) and len(rows) <= num_points
    assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(curve, share[rows])


def test_coverage_refuses_what_is_no_number_of_rows():
    frequency_ = IdFrequency([1, 2])
    for num_rows in (0.5, True, [1.0]):
        with pytest.raises(TypeError, match="num_rows="):
            frequency_.coverage(num_rows)
    with pytest.raises(ValueError, match="num_rows=-1"):
        frequency_.coverage([2, -1])
    with pytest.raises(ValueError, match="num_points=1"):
        frequency_.coverage_curve(1)


# ---- as_counts


@pytest.mark.parametrize(
    "mapping",
    [
        [4, 0, 1, 2, 5],
        (4, 0, 1, 2, 5),
        np.array([4, 0, 1, 2, 5], dtype=np.int32),
        torch.tensor([4.0, 0.0, 1.0, 2.0, 5.0]),
        IdFrequency([4, 0, 1, 2, 5]),
        [[4, 0], [1, 2, 5]],
        [IdFrequency([4, 0]), torch.tensor([1, 2, 5])],
        (np.array([4, 0]), [1, 2, 5]),
    ],
)
def test_all_forms_of_a_mapping_give_one_vector(mapping):
    counts = as_counts(mapping, [2, 3])
    assert counts.dtype == np.int64
    assert counts.tolist() == [4, 0, 1, 2, 5]


def test_one_table_and_no_mapping():
    assert as_counts(None, [2, 3]) is None
    assert as_counts([1, 2], 2).tolist() == [1, 2]
    assert as_counts([[1, 2]], (2,)).tolist() == [1, 2]
    assert as_counts([[0.5, 1], [2]], [2, 1]).dtype == np.float64


@pytest.mark.parametrize(
    ("mapping", "error", "words"),
    [
        ([1, 2, 3], ValueError, r"3 counts for 5 ids in 2 table\(s\)"),
        (IdFrequency([1] * 6), ValueError, "6 counts for 5 ids"),
        ([], ValueError, "0 counts"),
        ([[1, 2]], ValueError, r"1 vectors for 2 table\(s\)"),
        ([[1, 2], [3, 4]], ValueError, "table 1 has 2 counts for 3 ids"),
        ([IdFrequency([1]), [1, 2, 3]], ValueError, "table 0 has 1 counts for 2 ids"),
        ([[1, 2], [3, float("nan"), 5]], ValueError, "table 1 has nan at index 1"),
        ([1, 2, -3, 4, 5], ValueError, "ids_freq_mapping has -3 at index 2"),
        ([[1, 2], None], TypeError, "table 1 is None"),
        ([None, [1, 2, 3]], TypeError, "table 0 is None"),
        ({0: 3}, TypeError, "ids_freq_mapping should be numbers"),
        (np.ones((2, 3)), ValueError, "2 dimensions"),
    ],
)
def test_a_wrong_mapping_is_refused(mapping, error, words):
    with pytest.raises(error, match=words):
        as_counts(mapping, [2, 3])
