"""Criteo click logs from the user's disk, in the two usual forms; streamed in batches with bounded memory.

- Kaggle's `train.txt` (and any day of the terabyte logs): 40 tab-separated columns a line: label, 13 integers, 26 hex
  values of up to 8 digits; a value may be missing. Seven days in order of time: the last seventh is held out.
- `day_N_{dense,sparse,labels}.npy`: (n, 13) float, (n, 26) int, (n,) or (n, 1) int; memory-mapped. The last day is held
  out; of a single day, its last seventh.

Both: missing integer -> 0, integer x -> log(1 + max(x, 0)) (the .npy form is already transformed and taken as it is);
missing categorical -> id 0; a hex value v -> 1 + v mod (size - 1); an .npy id i -> i mod size.

Shapes: B samples in a batch, L lines in a block, 13 dense features, 26 tables.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from batches import Batch, DataError, one_id_per_bag

from colossal_freqcache.synthetic import KAGGLE_TABLE_SIZES

__all__ = ["CriteoNpy", "CriteoTsv", "KAGGLE_TABLE_SIZES", "open_criteo"]

NUM_DENSE, NUM_TABLES = 13, 26
NUM_COLUMNS = 1 + NUM_DENSE + NUM_TABLES
HELD_OUT_SHARE = 1 / 7

_HEX_DIGIT = np.full(256, -1, dtype=np.int64)
for _digit, _characters in enumerate(zip(b"0123456789abcdef", b"0123456789ABCDEF")):
    _HEX_DIGIT[list(_characters)] = _digit
_DECIMAL_DIGIT = np.where(_HEX_DIGIT < 10, _HEX_DIGIT, -1)


class _Samples(NamedTuple):
    dense: np.ndarray  # (L, 13) float32
    ids: np.ndarray  # (26, L) int64
    labels: np.ndarray  # (L,) float32


class _BadLine(Exception):
    def __init__(self, line: int, reason: str):
        super().__init__(reason)
        self.line, self.reason = line, reason  # line counts from 0 within the block


def open_criteo(path: str | Path, table_sizes: Sequence[int] | None = None):
    """A TSV file -> CriteoTsv, a folder of day_N_*.npy -> CriteoNpy; anything else raises and names both forms."""
    path = Path(path)
    if path.is_dir():
        return CriteoNpy(path, table_sizes)
    if not path.exists():
        raise DataError(
            f"{path}: no such file or folder; expected Criteo's train.txt, "
            "or a folder of day_N_{dense,sparse,labels}.npy"
        )
    return CriteoTsv(path, table_sizes)


class _Criteo:
    """What both forms share: 26 single-id tables, 13 dense features, samples regrouped into batches."""

    num_dense = NUM_DENSE

    def __init__(self, table_sizes: Sequence[int] | None):
        self.table_names = [f"C{column + 1}" for column in range(NUM_TABLES)]
        self.table_sizes: list[int] = list(KAGGLE_TABLE_SIZES if table_sizes is None else table_sizes)
        if len(self.table_sizes) != NUM_TABLES or min(self.table_sizes) < 2:
            raise DataError(f"table_sizes: expected {NUM_TABLES} sizes of at least 2 rows, got {self.table_sizes}")

    def num_train_batches(self, batch_size: int) -> int | None:
        return None

    def train_batches(self, batch_size: int, epoch: int = 0) -> Iterator[Batch]:
        """In file order; every epoch is the same."""
        return _regrouped(self._train_samples(), batch_size)

    def test_batches(self, batch_size: int) -> Iterator[Batch]:
        return _regrouped(self._test_samples(), batch_size)


class CriteoTsv(_Criteo):
    """The Kaggle form. Reads blocks of `block_bytes`, never the whole file.

    Raises DataError "FILE:LINE: ..." at the first bad line (when it is reached): wrong number of columns, a label other
    than 0 or 1, a value that is no integer, or no hex of 1 to 8 digits."""

    def __init__(self, path: str | Path, table_sizes: Sequence[int] | None = None, block_bytes: int = 1 << 22):
        super().__init__(table_sizes)
        self.path, self.block_bytes = Path(path), block_bytes
        if not self.path.is_file():
            raise DataError(f"{self.path}: no such file")
        self.num_bytes = self.path.stat().st_size
        if self.num_bytes == 0:
            raise DataError(f"{self.path}: the file is empty")
        self.first_test_byte = self._line_start(int(self.num_bytes * (1 - HELD_OUT_SHARE)))

    def _line_start(self, byte: int) -> int:
        """The start of the first line that begins at or after `byte`."""
        if byte == 0:
            return 0
        with open(self.path, "rb") as file:
            file.seek(byte - 1)
            file.readline()
            return file.tell()

    def _train_samples(self) -> Iterator[_Samples]:
        return self._samples(0, self.first_test_byte)

    def _test_samples(self) -> Iterator[_Samples]:
        return self._samples(self.first_test_byte, self.num_bytes)

    def _samples(self, begin: int, end: int) -> Iterator[_Samples]:
        with open(self.path, "rb") as file:
            file.seek(begin)
            block_start, rest = begin, b""
            while begin < end:
                data = file.read(min(self.block_bytes, end - begin))
                if not data:
                    break
                begin += len(data)
                data = rest + data
                if begin >= end and not data.endswith(b"\n"):
                    data += b"\n"
                cut = data.rfind(b"\n") + 1
                lines, rest = data[:cut], data[cut:]
                if lines:
                    try:
                        yield _parse_lines(lines.replace(b"\r\n", b"\n"), self.table_sizes)
                    except _BadLine as bad:
                        line = _count_newlines(self.path, block_start) + bad.line + 1
                        raise DataError(f"{self.path}:{line}: {bad.reason}") from None
                block_start += len(lines)


def _count_newlines(path: Path, end: int) -> int:
    count = 0
    with open(path, "rb") as file:
        while end > 0:
            data = file.read(min(1 << 24, end))
            count += data.count(b"\n")
            end -= len(data)
    return count


def _parse_lines(lines: bytes, table_sizes: Sequence[int]) -> _Samples:
    """Whole lines, each ended by a newline, parsed column by column without a Python loop over lines."""
    text = np.frombuffer(lines, dtype=np.uint8)
    separators = np.flatnonzero((text == ord("\t")) | (text == ord("\n")))
    is_newline = text[separators] == ord("\n")
    columns = np.diff(np.flatnonzero(is_newline), prepend=-1)
    wrong = np.flatnonzero(columns != NUM_COLUMNS)
    if len(wrong):
        raise _BadLine(int(wrong[0]), f"expected {NUM_COLUMNS} tab-separated columns, found {columns[wrong[0]]}")
    end = separators.reshape(-1, NUM_COLUMNS)
    begin = np.append(0, separators[:-1] + 1).reshape(-1, NUM_COLUMNS)
    length = end - begin

    bad = (length[:, 0] != 1) | ((text[begin[:, 0]] != ord("0")) & (text[begin[:, 0]] != ord("1")))
    _refuse(bad[:, None], 0, lines, begin, end, "the label must be 0 or 1")
    labels = (text[begin[:, 0]] == ord("1")).astype(np.float32)

    first, last = 1, 1 + NUM_DENSE
    negative = (text[begin[:, first:last]] == ord("-")) & (length[:, first:last] > 0)
    numbers, bad = _digits(text, begin[:, first:last] + negative, length[:, first:last] - negative, 10, 15)
    _refuse(bad | (negative & (length[:, first:last] == 1)), first, lines, begin, end, "expected an integer or nothing")
    dense = np.log1p(np.where(negative, 0, numbers).astype(np.float64)).astype(np.float32)

    first, last = 1 + NUM_DENSE, NUM_COLUMNS
    values, bad = _digits(text, begin[:, first:last], length[:, first:last], 16, 8)
    _refuse(bad, first, lines, begin, end, "expected 1 to 8 hex digits or nothing")
    sizes = np.asarray(table_sizes, dtype=np.int64)
    ids = np.where(length[:, first:last] > 0, 1 + values % (sizes - 1), 0)
    return _Samples(dense, np.ascontiguousarray(ids.T), labels)


def _digits(
    text: np.ndarray, begin: np.ndarray, length: np.ndarray, base: int, max_digits: int
) -> tuple[np.ndarray, np.ndarray]:
    """Values and a mask of what is no number, both in the shape of `begin`; no digits at all give 0."""
    digit_of = _HEX_DIGIT if base == 16 else _DECIMAL_DIGIT
    value, bad = np.zeros(begin.shape, dtype=np.int64), length > max_digits
    for place in range(min(max_digits, int(length.max(initial=0)))):
        there = place < length
        digit = digit_of[text[np.minimum(begin + place, len(text) - 1)]]
        bad |= there & (digit < 0)
        value = np.where(there, value * base + np.maximum(digit, 0), value)
    return value, bad


def _refuse(bad: np.ndarray, first_column: int, lines: bytes, begin, end, expected: str) -> None:
    if bad.any():
        line, column = (int(i) for i in np.argwhere(bad)[0])
        column += first_column
        found = lines[begin[line, column] : min(end[line, column], begin[line, column] + 40)].decode("utf-8", "replace")
        raise _BadLine(line, f"column {column + 1}: {expected}, found {found!r}")


class CriteoNpy(_Criteo):
    """The preprocessed form, memory-mapped: a batch costs its own bytes only.

    Raises DataError naming the file (and row) for a missing or damaged file, a wrong shape, a negative id, a label
    other than 0 or 1, or a dense value that is not finite."""

    _PARTS = ("dense", "sparse", "labels")

    def __init__(self, folder: str | Path, table_sizes: Sequence[int] | None = None, block_rows: int = 1 << 14):
        super().__init__(table_sizes)
        self.folder, self.block_rows = Path(folder), block_rows
        days = sorted(
            int(match.group(1))
            for file in self.folder.glob("day_*_*.npy")
            if (match := re.fullmatch(r"day_(\d+)_(?:dense|sparse|labels)\.npy", file.name))
        )
        if not days:
            raise DataError(f"{self.folder}: no day_N_{{dense,sparse,labels}}.npy files in this folder")
        self.days = sorted(set(days))
        self.arrays = {day: self._open_day(day) for day in self.days}

    def _file(self, day: int, part: str) -> Path:
        return self.folder / f"day_{day}_{part}.npy"

    def _open_day(self, day: int):
        arrays = []
        for part in self._PARTS:
            file = self._file(day, part)
            if not file.is_file():
                raise DataError(f"{file}: no such file; day {day} needs all of {', '.join(self._PARTS)}")
            try:
                arrays.append(np.load(file, mmap_mode="r", allow_pickle=False))
            except (ValueError, EOFError, OSError) as error:
                raise DataError(f"{file}: not a readable .npy file ({error})") from None
        num_rows = len(arrays[1]) if arrays[1].ndim else 0
        for part, array, shapes, kind in zip(
            self._PARTS,
            arrays,
            ([(num_rows, NUM_DENSE)], [(num_rows, NUM_TABLES)], [(num_rows,), (num_rows, 1)]),
            ("f", "iu", "iuf"),
        ):
            if array.shape not in shapes or array.dtype.kind not in kind:
                raise DataError(
                    f"{self._file(day, part)}: expected shape {shapes[0]} and {'float' if kind == 'f' else 'integer'} "
                    f"values, found {array.shape} {array.dtype}"
                )
        return arrays

    def _train_samples(self) -> Iterator[_Samples]:
        if len(self.days) == 1:
            yield from self._samples(self.days[0], 0, self._first_test_row())
        for day in self.days[:-1]:
            yield from self._samples(day, 0, len(self.arrays[day][1]))

    def _test_samples(self) -> Iterator[_Samples]:
        first = self._first_test_row() if len(self.days) == 1 else 0
        return self._samples(self.days[-1], first, len(self.arrays[self.days[-1]][1]))

    def _first_test_row(self) -> int:
        return int(len(self.arrays[self.days[0]][1]) * (1 - HELD_OUT_SHARE))

    def _samples(self, day: int, begin: int, end: int) -> Iterator[_Samples]:
        dense, sparse, labels = self.arrays[day]
        sizes = np.asarray(self.table_sizes, dtype=np.int64)[:, None]
        for start in range(begin, end, self.block_rows):
            part = slice(start, min(start + self.block_rows, end))
            block = _Samples(
                np.asarray(dense[part], dtype=np.float32),
                np.ascontiguousarray(sparse[part].T).astype(np.int64),
                np.asarray(labels[part], dtype=np.float32).reshape(-1),
            )
            for name, bad, expected in (
                ("dense", ~np.isfinite(block.dense).all(axis=1), "a dense value is not finite"),
                ("sparse", (block.ids < 0).any(axis=0), "an id is negative"),
                ("labels", (block.labels != 0) & (block.labels != 1), "the label is neither 0 nor 1"),
            ):
                if bad.any():
                    raise DataError(f"{self._file(day, name)}: row {start + int(np.argmax(bad))}: {expected}")
            yield block._replace(ids=block.ids % sizes)


def _regrouped(blocks: Iterator[_Samples], batch_size: int) -> Iterator[Batch]:
    """Blocks of any length -> batches of `batch_size` samples (the last may be shorter)."""
    held: list[_Samples] = []
    num_held = 0
    for block in blocks:
        held.append(block)
        num_held += len(block.labels)
        if num_held < batch_size:
            continue
        joined = _joined(held)
        whole = num_held - num_held % batch_size
        for start in range(0, whole, batch_size):
            part = slice(start, start + batch_size)
            yield one_id_per_bag(joined.dense[part], joined.ids[:, part], joined.labels[part])
        held = [_Samples(joined.dense[whole:], joined.ids[:, whole:], joined.labels[whole:])]
        num_held -= whole
    if num_held:
        joined = _joined(held)
        yield one_id_per_bag(joined.dense, joined.ids, joined.labels)


def _joined(blocks: list[_Samples]) -> _Samples:
    return _Samples(
        np.concatenate([block.dense for block in blocks]),
        np.concatenate([block.ids for block in blocks], axis=1),
        np.concatenate([block.labels for block in blocks]),
    )
