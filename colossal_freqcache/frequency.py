"""IdFrequency: how often each id occurs in a data set. Knows nothing of rows, slots or caches.

One pass in bounded memory: besides the counts (8 bytes an id) only one chunk of ids is held. Nothing is sampled or hashed.
Shapes: R ids in the table (num_embeddings), N ids in an array of any shape.
Source: the id statistics of Fang et al. 2022 (arXiv:2208.05321), section 4; decay as in windowed counting.
"""

import contextlib
import csv
import hashlib
import itertools
import math
import operator
import os
import re
import sys
import uuid
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["IdFrequency", "as_counts"]

# Ids that are held at once while a file is read, and lines of a csv file.
_CHUNK_IDS = 1 << 20
_CHUNK_LINES = 1 << 15

# Without num_embeddings the counts grow to the largest id; from here on (16 GiB) that is rather a hash than an id.
_MAX_UNASKED_IDS = 1 << 31

_FORMAT = "colossal_freqcache.IdFrequency"
_FORMAT_VERSION = 1


class IdFrequency:
    """How often each of `num_embeddings` ids occurs in a data set.

    Attributes:
        counts: read-only, shape (R,), counts[id]; int64, or float64 where they are not all integers (after `decay`).
        num_embeddings: R, the number of ids.
        total: sum of the counts: an int for int64 counts, else a float.

    Args:
        counts: numpy array, torch tensor (any device) or list of numbers, shape (R,); it is copied.

    Raises:
        TypeError: counts that are not real numbers.
        ValueError: not 1-D, empty, NaN, infinite or negative (it names the index), or a total past int64.
    """

    counts: np.ndarray
    num_embeddings: int
    total: int | float

    def __init__(self, counts: Any) -> None:
        self._set(_validated(counts, "counts").copy())

    @classmethod
    def _of(cls, counts: np.ndarray) -> "IdFrequency":
        """Around counts that nobody else holds: no copy."""
        frequency = cls.__new__(cls)
        frequency._set(_validated(counts, "counts"))
        return frequency

    def _set(self, counts: np.ndarray) -> None:
        counts.flags.writeable = False
        self.counts = counts
        self.num_embeddings = len(counts)
        self.total = counts.sum().item()
        self._covered: np.ndarray | None = None  # made by the first `coverage`

    def __repr__(self) -> str:
        return f"IdFrequency(num_embeddings={self.num_embeddings}, total={self.total})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IdFrequency) and np.array_equal(self.counts, other.counts)

    __hash__ = None  # type: ignore[assignment]  # compares by value, over an array

    # ---- counting

    @classmethod
    def count(cls, id_arrays: Iterable[Any], num_embeddings: int, progress: bool | None = False) -> "IdFrequency":
        """Count the ids of a stream in one pass.

        Args:
            id_arrays: yields arrays of ids: numpy arrays, torch tensors or lists, of any shape and integer dtype. A single
                array or tensor is taken as one such array.
            num_embeddings: R; valid ids are 0..R-1.
            progress: draw a progress bar on standard error; None: if that is a terminal.

        Raises:
            TypeError: ids that are not integers.
            ValueError: an id outside 0..R-1; it names the id, the number of the array and the position in it.
        """
        if isinstance(id_arrays, (str, bytes, os.PathLike)):
            raise TypeError(f"{id_arrays!r} is a path: IdFrequency.count_files counts files")
        if isinstance(id_arrays, (np.ndarray, torch.Tensor)):
            id_arrays = [id_arrays]
        tally = _Tally(_checked_size(num_embeddings))
        num_arrays = len(id_arrays) if hasattr(id_arrays, "__len__") else None
        with _progress(progress, "counting ids", num_arrays) as advance:
            for number, values in enumerate(id_arrays):
                ids = _as_ids(values, f"array {number}")
                tally.add(ids.reshape(-1), lambda flat, n=number, s=ids.shape: f"array {n}, position {_position(flat, s)}")
                advance(1)
        return cls._of(tally.counts)

    @classmethod
    def count_files(
        cls,
        paths: str | os.PathLike | Iterable[str | os.PathLike],
        num_embeddings: int | None = None,
        column: str | int | None = None,
        progress: bool | None = None,
    ) -> "IdFrequency":
        """Count the ids of files in one pass, holding one chunk of one file at a time.

        Known endings: `.npy` (any shape), `.npz`, `.parquet` (integers, or lists of integers; needs pyarrow) and `.csv`
        (comma separated, a header where `column` is a name). Parquet reads some ten times faster than csv.

        Args:
            paths: one path or several.
            num_embeddings: R; None: the largest id + 1.
            column: the array of an .npz file, or the column (csv: name, or number from 0); None where a file has just one.
            progress: draw a progress bar on standard error; None: if that is a terminal.

        Raises:
            FileNotFoundError: names the file; before anything is read.
            ImportError: a parquet file without pyarrow.
            TypeError: ids that are not integers.
            ValueError: unknown ending, missing column (it lists the columns), a damaged file or a bad line (file and line
                number), an id outside the table (file and place), no ids at all while num_embeddings is None.
        """
        paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
        paths = [Path(path) for path in paths]
        if not paths:
            raise ValueError("0 files to count: give at least one path")
        for path in paths:
            if path.is_dir():
                raise ValueError(f"{path} is a folder: give the files in it, {_endings()}")
            if not path.exists():
                raise FileNotFoundError(f"no such file: {path}")
            if path.suffix not in _READERS:
                raise ValueError(f"{path} ends in {path.suffix!r}, which is not one of {_endings()}")
        tally = _Tally(None if num_embeddings is None else _checked_size(num_embeddings))
        with _progress(progress, "counting ids", sum(path.stat().st_size for path in paths)) as advance:
            for path in paths:
                size, done = path.stat().st_size, 0.0
                for ids, where, share_read in _READERS[path.suffix](path, column):
                    tally.add(ids, where)
                    advance((share_read - done) * size)
                    done = share_read
                advance((1.0 - done) * size)
        if num_embeddings is None and tally.num_seen == 0:
            raise ValueError(f"0 ids in {len(paths)} file(s), so the number of ids is unknown: pass num_embeddings")
        return cls._of(tally.counts[: tally.num_seen].copy() if num_embeddings is None else tally.counts)

    def merge(self, other: "IdFrequency") -> "IdFrequency":
        """A new IdFrequency of both data sets: the counts added up.

        Raises:
            TypeError: `other` is not an IdFrequency.
            ValueError: another number of ids.
        """
        if not isinstance(other, IdFrequency):
            raise TypeError(f"merge takes an IdFrequency, not {type(other).__name__}")
        if self.num_embeddings != other.num_embeddings:
            raise ValueError(
                f"{self.num_embeddings} and {other.num_embeddings} ids cannot be merged: "
                "count both with the same num_embeddings"
            )
        # In float64 first: two int64 counts may add up to more than int64 holds, which must not wrap silently.
        if float(self.total) + float(other.total) >= 2.0**63:
            raise ValueError(f"totals {self.total} and {other.total} add up to more than int64 holds: use decay first")
        return IdFrequency._of(self.counts + other.counts)

    def decay(self, factor: float) -> "IdFrequency":
        """A new IdFrequency with every count multiplied by `factor` in (0, 1]: ages old counts before newer are merged in.

        Raises:
            ValueError: factor outside (0, 1].
        """
        if not (isinstance(factor, (int, float)) and 0 < factor <= 1):
            raise ValueError(f"factor={factor!r} is not allowed: a number in (0, 1]")
        return IdFrequency._of(self.counts * float(factor))

    # ---- files

    def save(self, path: str | os.PathLike) -> None:
        """Write to one .npz file (no pickle; compressed, with a checksum), beside `path` first and then renamed into place.

        A process that is killed at any moment leaves the file that was at `path`, or the new one, never half a file.
        """
        path = Path(path)
        counts = self.counts.astype(self.counts.dtype.newbyteorder("<"), copy=False)
        beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        try:
            with open(beside, "xb") as file:
                np.savez_compressed(
                    file, format=_FORMAT, version=_FORMAT_VERSION, counts=counts, checksum=_checksum(counts)
                )
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike) -> "IdFrequency":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a damaged, truncated or foreign file, or a newer format; it names the file and what is wrong.
        """
        if not os.path.exists(path):
            raise FileNotFoundError(f"no such file: {path}")
        try:
            with _npz(path) as arrays:
                names = set(arrays.files)
                if not {"format", "version"} <= names or str(arrays["format"][()]) != _FORMAT:
                    raise ValueError(f"it holds the arrays {sorted(names)}, not an IdFrequency")
                version = int(arrays["version"][()])
                if version != _FORMAT_VERSION:
                    raise ValueError(f"format version {version}; this release reads version {_FORMAT_VERSION}")
                if not {"counts", "checksum"} <= names:
                    raise ValueError(f"it holds only the arrays {sorted(names)}")
                counts, checksum = arrays["counts"], str(arrays["checksum"][()])
            if _checksum(counts) != checksum:
                raise ValueError("the checksum does not match the counts")
            return cls._of(counts.astype(counts.dtype.newbyteorder("="), copy=False))
        except _DAMAGE as error:
            raise ValueError(
                f"{os.fspath(path)} is damaged or not a frequency file: {error}; count the data again and save it"
            ) from error

    # ---- coverage

    def coverage(self, num_rows: int | Sequence[int] | np.ndarray) -> float | np.ndarray:
        """Share (0..1) of all accesses that go to the `num_rows` most frequent ids: the hit ratio of a static cache.

        Args:
            num_rows: an int, or integers of any shape (then a float64 array of that shape comes back); past R is as R.

        Returns 0 where every count is 0. The first call sorts the counts.

        Raises:
            TypeError: num_rows is not an integer.
            ValueError: num_rows is negative.
        """
        rows = np.asarray(num_rows)
        if rows.dtype.kind not in "iu":
            raise TypeError(f"num_rows={num_rows!r} has dtype {rows.dtype}: give integers")
        if rows.size and rows.min() < 0:
            raise ValueError(f"num_rows={rows.min()} is negative: give 0 or more")
        if self._covered is None:
            # Ids that never occur add nothing: only those that do are sorted and kept.
            descending = -np.sort(-self.counts[self.counts > 0])
            covered = np.concatenate([[0.0], np.cumsum(descending, dtype=np.float64)])
            self._covered = covered / covered[-1] if len(covered) > 1 else covered
        share = self._covered[np.minimum(rows, len(self._covered) - 1)]
        return float(share) if rows.ndim == 0 else share

    def coverage_curve(self, num_points: int = 200) -> tuple[np.ndarray, np.ndarray]:
        """(rows, share): int64 row counts from 1 to R, log-spaced without repeats, and `coverage(rows)`; shape (<= P,) each.

        Raises:
            ValueError: num_points below 2.
        """
        if num_points < 2:
            raise ValueError(f"num_points={num_points} is too few for a curve: give at least 2")
        rows = np.unique(np.rint(np.geomspace(1, self.num_embeddings, num_points)).astype(np.int64))
        rows[-1] = self.num_embeddings
        return rows, self.coverage(rows)


def as_counts(mapping: Any, table_sizes: int | Sequence[int]) -> np.ndarray | None:
    """What users pass as `ids_freq_mapping`, as one vector over the ids of all tables, table after table.

    Args:
        mapping: None (unknown); or one vector over all tables, or a list or tuple with one vector per table. A vector is an
            IdFrequency, a numpy array, a torch tensor or a list of numbers.
        table_sizes: R of each table, in order; an int for a single table.

    Returns:
        int64 or float64 counts of shape (sum(table_sizes),), maybe read-only and shared with `mapping`; None for None.

    Raises:
        TypeError: something that is not a vector of numbers.
        ValueError: a wrong length (it gives both, and the table), NaN, infinite or negative counts (table and index).
    """
    if mapping is None:
        return None
    sizes = [int(table_sizes)] if isinstance(table_sizes, (int, np.integer)) else [int(size) for size in table_sizes]
    if not isinstance(mapping, (list, tuple)) or not any(_is_vector(part) or part is None for part in mapping):
        counts = mapping.counts if isinstance(mapping, IdFrequency) else _validated(mapping, "ids_freq_mapping")
        if len(counts) != sum(sizes):
            tables = f"the table has {sizes[0]} ids" if len(sizes) == 1 else f"the {len(sizes)} tables have {sum(sizes)}"
            raise ValueError(f"ids_freq_mapping has {len(counts)} counts, {tables}: give one count per id")
        return counts
    if len(mapping) != len(sizes):
        raise ValueError(
            f"ids_freq_mapping has {len(mapping)} vectors for {len(sizes)} table(s): give one vector per table"
        )
    per_table = []
    for table, (part, size) in enumerate(zip(mapping, sizes)):
        name = f"ids_freq_mapping of table {table}"
        if not _is_vector(part):
            raise TypeError(f"{name} is {part!r}: give every table a vector of counts, or None in place of the whole list")
        counts = part.counts if isinstance(part, IdFrequency) else _validated(part, name)
        if len(counts) != size:
            raise ValueError(f"{name} has {len(counts)} counts, the table has {size} ids: give one count per id")
        per_table.append(counts)
    return np.concatenate(per_table)


# ---- validation


def _is_vector(part: Any) -> bool:
    return isinstance(part, (IdFrequency, list, tuple)) or (isinstance(part, (np.ndarray, torch.Tensor)) and part.ndim > 0)


def _as_array(values: Any, name: str) -> np.ndarray:
    """A numpy array of numbers from an array, a tensor of any device, or nested lists."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    try:
        array = np.asarray(values)
    except ValueError as error:  # lists of unequal lengths
        raise ValueError(f"{name}: {error}") from error
    if array.dtype.kind not in "iuf":
        what = f"an array of dtype {array.dtype}" if array.ndim else f"{values!r} ({type(values).__name__})"
        raise TypeError(f"{name} should be numbers, not {what}")
    return array


def _validated(counts: Any, name: str) -> np.ndarray:
    """1-D int64 or float64 counts, each finite and >= 0, whose total int64 holds; not copied where they are that already."""
    counts = _as_array(counts, name)
    if counts.dtype.kind not in "iuf":
        raise TypeError(f"{name} should be numbers, not of dtype {counts.dtype}")
    if counts.ndim != 1:
        raise ValueError(f"{name} has {counts.ndim} dimensions, shape {counts.shape}: give one count per id, 1-D")
    if len(counts) == 0:
        raise ValueError(f"{name} has 0 counts: give one count per id")
    wrong = None
    if counts.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            wrong = ~(np.isfinite(counts) & (counts >= 0))
    elif counts.dtype.kind == "i" and counts.min() < 0:
        wrong = counts < 0
    if wrong is not None and wrong.any():
        index = int(wrong.argmax())
        raise ValueError(
            f"{name} has {counts[index]} at index {index} ({int(wrong.sum())} of {len(counts)} counts are wrong): "
            "a count is finite and at least 0"
        )
    total = counts.sum(dtype=np.float64)
    is_integer = counts.dtype.kind != "f" or bool((counts == np.floor(counts)).all())
    if not math.isfinite(total) or (counts.dtype.kind != "f" and total >= 2.0**63):
        raise ValueError(f"{name} add up to {total:.3g}, more than a total can hold: divide them")
    # Counts are in the order of their ids: the sort key of the table's rows. Integers keep ties exact.
    return np.ascontiguousarray(counts, dtype=np.int64 if is_integer and total < 2.0**63 else np.float64)


def _checked_size(num_embeddings: Any) -> int:
    if isinstance(num_embeddings, bool) or not isinstance(num_embeddings, (int, np.integer)) or num_embeddings < 1:
        raise ValueError(f"num_embeddings={num_embeddings!r} is not allowed: an int of at least 1")
    return int(num_embeddings)


def _as_ids(values: Any, name: str) -> np.ndarray:
    """An integer array of any shape; an empty list, which has no dtype of its own, counts as one."""
    ids = _as_array(values, name)
    if ids.size == 0 and isinstance(values, (list, tuple)):
        return ids.astype(np.int64)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"{name} has ids of dtype {ids.dtype}: ids are integers")
    return ids


def _position(flat: int, shape: tuple[int, ...]) -> int | tuple[int, ...]:
    return flat if len(shape) < 2 else tuple(int(index) for index in np.unravel_index(flat, shape))


class _Tally:
    """Counts that are being added to; they grow with the largest id where the size is not given."""

    def __init__(self, num_embeddings: int | None) -> None:
        self.num_embeddings = num_embeddings
        self.num_seen = 0  # largest id + 1
        self.counts = np.zeros(_CHUNK_IDS if num_embeddings is None else num_embeddings, dtype=np.int64)

    def add(self, ids: np.ndarray, where: Callable[[int], str]) -> None:
        """Add 1-D integer `ids` of any dtype; `where(index)` says in words where ids[index] comes from."""
        if len(ids) == 0:
            return
        # In the ids' own dtype: a uint64 past int64 must not turn into a negative number before it is seen.
        low, high = int(ids.min()), int(ids.max())
        limit = _MAX_UNASKED_IDS if self.num_embeddings is None else self.num_embeddings
        if low < 0 or high >= limit:
            wrong = int(((ids < 0) | (ids >= limit)).argmax())
            if self.num_embeddings is not None:
                allowed = f"valid ids are 0..{limit - 1} (num_embeddings={limit})"
            else:
                allowed = f"valid ids are 0..{limit - 1} without num_embeddings; map hashed ids to 0..R-1, or pass it"
            raise ValueError(f"id {int(ids[wrong])} at {where(wrong)}: {allowed}")
        self.num_seen = max(self.num_seen, high + 1)
        if high >= len(self.counts):
            grown = np.zeros(max(high + 1, 2 * len(self.counts)), dtype=np.int64)
            grown[: len(self.counts)] = self.counts
            self.counts = grown
        # One pass over the ids; np.bincount would pass over all R counts for every chunk.
        for start in range(0, len(ids), _CHUNK_IDS):
            np.add.at(self.counts, ids[start : start + _CHUNK_IDS].astype(np.int64, copy=False), 1)


# ---- reading files: each reader yields (1-D ids, where(index) in words, share of the file that is read: 0..1)

_Chunk = tuple[np.ndarray, Callable[[int], str], float]

# What numpy and zipfile raise over a file that is cut off, changed or something else altogether.
_DAMAGE = (
    ValueError,
    KeyError,
    EOFError,
    OSError,
    MemoryError,
    OverflowError,
    TypeError,
    NotImplementedError,
    RuntimeError,
    SyntaxError,
    zipfile.BadZipFile,
    zlib.error,
)


def _npz(path: str | os.PathLike) -> "np.lib.npyio.NpzFile":
    if not zipfile.is_zipfile(path):
        raise ValueError("it is no complete .npz (zip) file")
    return np.load(path, allow_pickle=False)


def _read_npy_stream(stream: Any, name: str) -> Iterator[_Chunk]:
    """The array of an opened .npy stream, chunk by chunk."""
    try:
        version = np.lib.format.read_magic(stream)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0}.get(version, np.lib.format.read_array_header_2_0)
        shape, fortran, dtype = read_header(stream)
    except _DAMAGE as error:
        raise ValueError(f"{name} is damaged or not an .npy array: {error}") from error
    if dtype.kind not in "iu":
        raise TypeError(f"{name} has ids of dtype {dtype}: ids are integers")
    num_ids = math.prod(shape)

    def where(flat: int) -> str:
        index = np.unravel_index(flat, shape, order="F" if fortran else "C") if len(shape) > 1 else (flat,)
        return f"position {int(index[0]) if len(shape) < 2 else tuple(int(i) for i in index)} of {name}"

    first = 0
    while first < num_ids:
        wanted = min(_CHUNK_IDS, num_ids - first) * dtype.itemsize
        try:
            data = stream.read(wanted)
        except _DAMAGE as error:
            raise ValueError(f"{name} is damaged after {first} of {num_ids} ids: {error}") from error
        if len(data) < wanted:
            raise ValueError(f"{name} is cut off after {first + len(data) // dtype.itemsize} of {num_ids} ids")
        ids = np.frombuffer(data, dtype=dtype)
        yield ids, lambda index, first=first: where(first + index), (first + len(ids)) / num_ids
        first += len(ids)


def _read_npy(path: Path, column: str | int | None) -> Iterator[_Chunk]:
    if column is not None:
        warnings.warn(f"column={column!r} is ignored for {path}: an .npy file has no columns", stacklevel=4)
    with open(path, "rb") as stream:
        yield from _read_npy_stream(stream, str(path))


def _read_npz(path: Path, column: str | int | None) -> Iterator[_Chunk]:
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
            yield from _read_npy_stream(stream, f"array {name!r} of {path}")


def _read_parquet(path: Path, column: str | int | None) -> Iterator[_Chunk]:
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
        is_list = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind)
        item = kind.value_type if is_list or pyarrow.types.is_dictionary(kind) else kind
        if not pyarrow.types.is_integer(item):
            raise TypeError(f"column {name!r} of {path} has type {kind}: ids are integers, or lists of them")
        first_row = 0
        batches = file.iter_batches(batch_size=_CHUNK_IDS, columns=[name])
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


def _read_csv(path: Path, column: str | int | None) -> Iterator[_Chunk]:
    size = max(1, path.stat().st_size)
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        first = next(csv.reader(file), None)
        if not first:
            if size > 1 and first is not None:
                raise ValueError(f"{path}, line 1: it is empty; a header or the first row is expected")
            return
        if isinstance(column, int):
            if not 0 <= column < len(first):
                raise ValueError(f"{path} has no column {column}: it has {len(first)}, from 0")
            index, has_header = column, not _is_integer(first[column])
        elif column is None and len(first) == 1:
            index, has_header = 0, not _is_integer(first[0])
        else:
            index, has_header = first.index(_chosen_column(path, "column", first, column)), True
        width = len(first)
        file.seek(0)
        reader = csv.reader(file)
        if has_header:
            next(reader)
        raw = file.buffer
        first_row = 0
        while True:
            try:
                rows = [row for row in itertools.islice(reader, _CHUNK_LINES) if row]
                if set(map(len, rows)) - {width}:
                    raise ValueError
                texts = list(map(operator.itemgetter(index), rows))
                if "_" in "".join(texts):  # int() takes 1_000 for a number
                    raise ValueError
                ids = np.fromiter(map(int, texts), dtype=np.int64, count=len(texts))
            except (ValueError, OverflowError, csv.Error) as error:
                raise ValueError(_bad_csv_line(path, index, width, has_header)) from error
            if len(ids) == 0:
                return
            yield ids, lambda flat, first=first_row: _csv_line(path, has_header, first + flat), raw.tell() / size
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


_READERS: dict[str, Callable[[Path, str | int | None], Iterator[_Chunk]]] = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}


def _endings() -> str:
    return ", ".join(_READERS)


def _chosen_column(path: Path, kind: str, names: Sequence[str], column: str | int | None) -> str:
    if column is None and len(names) == 1:
        return names[0]
    if column in names:
        return column
    listed = ", ".join(map(repr, names)) or "none"
    if column is None:
        raise ValueError(f"{path} has {len(names)} {kind}s: say which one with column=; it has {listed}")
    raise ValueError(f"{path} has no {kind} {column!r}: it has {listed}")


# ---- small parts


def _checksum(counts: np.ndarray) -> str:
    digest = hashlib.sha256(f"{counts.dtype.str} {counts.shape}".encode())
    digest.update(np.ascontiguousarray(counts))
    return digest.hexdigest()


@contextlib.contextmanager
def _progress(show: bool | None, description: str, total: float | None) -> Iterator[Callable[[float], None]]:
    """Yields advance(amount); a bar on standard error if `show`, or if it is None and standard error is a terminal."""
    if show is None:
        show = sys.stderr.isatty()
    if not show:
        yield lambda amount: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = [TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()]
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total)
        yield lambda amount: bar.advance(task, amount)
