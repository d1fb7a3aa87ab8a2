"""Reading ids out of files, chunk by chunk: .npy, .npz, .parquet and .csv. Knows nothing of what the ids are for.

A reader yields (ids, where, share_read): 1-D integer ids of any dtype, where(index) to say in words where ids[index]
comes from (file, and line, row or position), and the share of the file that has been read, 0..1. One chunk is held at a
time.
"""

import contextlib
import csv
import itertools
import math
import operator
import os
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["CHUNK_IDS", "array_shape", "check_paths", "read_ids"]

# Ids that are held at once, and lines of a csv file, each a list of strings while it is parsed.
CHUNK_IDS = 1 << 20
_CHUNK_LINES = 1 << 15

Chunk = tuple[np.ndarray, Callable[[int], str], float]

# What numpy and zipfile raise over a file that is cut off, changed or something else altogether.
_DAMAGE = (ValueError, KeyError, EOFError, OSError, RuntimeError, SyntaxError, zipfile.BadZipFile, zlib.error)


def check_paths(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Path]:
    """The paths as a list, each seen to be a file that `read_ids` knows: before hours are spent on the first of them.

    Raises:
        FileNotFoundError: names the file.
        ValueError: no path, a folder, or an ending that is not known (it lists those that are).
    """
    paths = [Path(path) for path in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]
    if not paths:
        raise ValueError("0 files to count: give at least one path")
    for path in paths:
        if path.is_dir():
            raise ValueError(f"{path} is a folder: give the files in it, {', '.join(_READERS)}")
        if not path.exists():
            raise FileNotFoundError(f"no such file: {path}")
        if path.suffix not in _READERS:
            raise ValueError(f"{path} ends in {path.suffix!r}: known endings are {', '.join(_READERS)}")
    return paths


def read_ids(path: Path, column: str | int | None = None) -> Iterator[Chunk]:
    """The ids of one file, in chunks of about a million.

    Args:
        path: what `check_paths` returned.
        column: name of the array (.npz) or column (.parquet, .csv), or a csv column's number from 0; None where the
            file has one only.

    Raises:
        ImportError: a parquet file without pyarrow.
        TypeError: ids that are not integers.
        ValueError: a column that the file lacks, damage, a bad line; each names the file and the place.
    """
    return _READERS[path.suffix](path, column)


def array_shape(path: Path, column: str | int | None = None) -> tuple[tuple[int, ...], bool] | None:
    """(shape, whether the ids are in Fortran order) of the array that `read_ids` reads flat; None if it is no array.

    Raises:
        ValueError: as `read_ids`.
    """
    if path.suffix == ".npy":
        with open(path, "rb") as stream:
            return _npy_header(stream, str(path))[:2]
    if path.suffix == ".npz":
        with _opened_npz(path, column) as (stream, name):
            return _npy_header(stream, name)[:2]
    return None


def _chosen_column(path: Path, kind: str, names: Sequence[str], column: str | int | None) -> str:
    if column is None and len(names) == 1:
        return names[0]
    if column in names:
        return column
    listed = ", ".join(map(repr, names)) or "none"
    if column is None:
        raise ValueError(f"{path} has {len(names)} {kind}s: say which one with column=; it has {listed}")
    raise ValueError(f"{path} has no {kind} {column!r}: it has {listed}")


def _npy_header(stream: Any, name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether it is in Fortran order, dtype) of an opened .npy stream; the data come next."""
    try:
        version = np.lib.format.read_magic(stream)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0}.get(version, np.lib.format.read_array_header_2_0)
        return read_header(stream)
    except _DAMAGE as error:
        raise ValueError(f"{name} is damaged or not an .npy array: {error}") from error


def _read_npy_stream(stream: Any, name: str) -> Iterator[Chunk]:
    """The array of an opened .npy stream, chunk by chunk."""
    shape, fortran, dtype = _npy_header(stream, name)
    if dtype.kind not in "iu":
        raise TypeError(f"{name} has ids of dtype {dtype}: ids are integers")
    num_ids = math.prod(shape)

    def where(flat: int) -> str:
        if len(shape) < 2:
            return f"position {flat} of {name}"
        index = np.unravel_index(flat, shape, order="F" if fortran else "C")
        return f"position {tuple(map(int, index))} of {name}"

    first = 0
    while first < num_ids:
        wanted = min(CHUNK_IDS, num_ids - first) * dtype.itemsize
        try:
            data = stream.read(wanted)
        except _DAMAGE as error:
            raise ValueError(f"{name} is damaged after {first} of {num_ids} ids: {error}") from error
        if len(data) < wanted:
            raise ValueError(f"{name} is cut off after {first + len(data) // dtype.itemsize} of {num_ids} ids")
        ids = np.frombuffer(data, dtype=dtype)
        yield ids, lambda index, first=first: where(first + index), (first + len(ids)) / num_ids
        first += len(ids)


def _read_npy(path: Path, column: str | int | None) -> Iterator[Chunk]:
    if column is not None:
        warnings.warn(f"column={column!r} is ignored for {path}: an .npy file has no columns", stacklevel=4)
    with open(path, "rb") as stream:
        yield from _read_npy_stream(stream, str(path))


@contextlib.contextmanager
def _opened_npz(path: Path, column: str | int | None) -> Iterator[tuple[Any, str]]:
    """(.npy stream, what to call it) of one array."""
    try:
        archive = zipfile.ZipFile(path)
    except _DAMAGE as error:
        raise ValueError(f"{path} is damaged or not an .npz file: {error}") from error
    with archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        name = _chosen_column(path, "array", names, column)
        try:
            stream = archive.open(f"{name}.npy")
        except _DAMAGE as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        with stream:
            yield stream, f"array {name!r} of {path}"


def _read_npz(path: Path, column: str | int | None) -> Iterator[Chunk]:
    with _opened_npz(path, column) as (stream, name):
        yield from _read_npy_stream(stream, name)


def _read_parquet(path: Path, column: str | int | None) -> Iterator[Chunk]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"{path} is a parquet file, and pyarrow is not installed: pip install pyarrow") from error
    damage = (pyarrow.ArrowException, OSError)
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except damage as error:
        raise ValueError(f"{path} is damaged or not a parquet file: {error}") from error
    with file:
        schema, num_rows = file.schema_arrow, file.metadata.num_rows
        name = _chosen_column(path, "column", schema.names, column)
        kind = schema.field(name).type
        is_list = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
        item = kind.value_type if is_list or pyarrow.types.is_dictionary(kind) else kind
        if not pyarrow.types.is_integer(item):
            raise TypeError(f"column {name!r} of {path} has type {kind}: ids are integers, or lists of them")
        first_row = 0
        batches = file.iter_batches(batch_size=CHUNK_IDS, columns=[name])
        while True:
            try:
                batch = next(batches, None)
            except damage as error:
                raise ValueError(f"{path} is damaged after row {first_row} of {num_rows}: {error}") from error
            if batch is None:
                return
            values = batch.column(0)
            if pyarrow.types.is_dictionary(kind):
                values = values.dictionary_decode()
            lengths = np.asarray(values.value_lengths().fill_null(0)) if is_list else None
            ids = values.flatten() if is_list else values

            def where(index: int, first_row: int = first_row, lengths: np.ndarray | None = lengths) -> str:
                row = index if lengths is None else int(np.searchsorted(np.cumsum(lengths), index, side="right"))
                return f"row {first_row + row} of column {name!r} of {path}"

            if ids.null_count:
                index = int(np.asarray(ids.is_null()).argmax())
                raise ValueError(f"no id (null) at {where(index)}: fill or drop such rows")
            first_row += batch.num_rows
            yield ids.to_numpy(zero_copy_only=False), where, first_row / max(1, num_rows)


_INTEGER = re.compile(r"\s*[+-]?[0-9]+\s*", re.ASCII)


def _is_integer(text: str) -> bool:
    return _INTEGER.fullmatch(text) is not None


def _read_csv(path: Path, column: str | int | None) -> Iterator[Chunk]:
    size = path.stat().st_size
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        try:
            first = next(csv.reader(file), None)
        except csv.Error as error:
            raise ValueError(f"{path}, line 1: {error}") from error
        if first is None:
            return
        if not first:
            raise ValueError(f"{path}, line 1: it is empty; a header or the first row is expected")
        if isinstance(column, int):
            if not 0 <= column < len(first):
                raise ValueError(f"{path} has no column {column}: it has {len(first)}, numbered from 0")
            index, has_header = column, not _is_integer(first[column])
        elif column is None and len(first) == 1:
            index, has_header = 0, not _is_integer(first[0])
        else:
            index, has_header = first.index(_chosen_column(path, "column", first, column)), True
        file.seek(0)
        reader = csv.reader(file)
        if has_header:
            next(reader)
        first_row = 0
        while True:
            try:
                lines = list(itertools.islice(reader, _CHUNK_LINES))
                rows = [row for row in lines if row]  # a blank line is no row
                if any(len(row) != len(first) for row in rows):
                    raise ValueError
                texts = list(map(operator.itemgetter(index), rows))
                if "_" in "".join(texts):  # int() takes 1_000 for a number
                    raise ValueError
                ids = np.fromiter(map(int, texts), dtype=np.int64, count=len(texts))
            except (ValueError, OverflowError, csv.Error) as error:
                raise ValueError(_bad_csv_line(path, index, len(first), has_header)) from error
            if not lines:
                return
            yield (
                ids,
                lambda flat, first=first_row: _csv_line(path, has_header, first + flat),
                file.buffer.tell() / size,
            )
            first_row += len(ids)


def _csv_rows(path: Path, has_header: bool) -> Iterator[tuple[int, list[str] | str]]:
    """(line number from 1, fields or what is wrong) of each row: the slow way, taken only to word an error."""
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.reader(file)
        while True:
            line = reader.line_num + 1
            try:
                row = next(reader, None)
            except csv.Error as error:
                yield reader.line_num, str(error)
                return
            if row is None:
                return
            if row and not (has_header and line == 1):
                yield line, row


def _bad_csv_line(path: Path, index: int, width: int, has_header: bool) -> str:
    for line, row in _csv_rows(path, has_header):
        if isinstance(row, str):
            return f"{path}, line {line}: {row}"
        if len(row) != width:
            return f"{path}, line {line}: {len(row)} fields, expected {width}"
        if not _is_integer(row[index]):
            return f"{path}, line {line}: {row[index]!r} is not an integer id"
        if not -(2**63) <= int(row[index]) < 2**63:
            return f"{path}, line {line}: {row[index]} does not fit into 64 bits"
    raise AssertionError(f"{path} changed while it was read")


def _csv_line(path: Path, has_header: bool, row_number: int) -> str:
    line, _ = next(itertools.islice(_csv_rows(path, has_header), row_number, None))
    return f"line {line} of {path}"


_READERS: dict[str, Callable[[Path, str | int | None], Iterator[Chunk]]] = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}
