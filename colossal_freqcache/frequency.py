"""IdFrequency: how often each id occurs in a data set. Knows nothing of rows, slots or caches.

One pass in bounded memory: besides the counts (8 bytes an id) one chunk of ids is held. Nothing is sampled or hashed.
Shapes: R ids in the table (num_embeddings), N ids in an array of any shape.
Source: the id statistics of Fang et al. 2022 (arXiv:2208.05321).
"""

import contextlib
import hashlib
import os
import sys
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from .id_files import CHUNK_IDS, check_paths, read_ids

__all__ = ["IdFrequency", "as_counts"]

# Without num_embeddings the counts grow to the largest id; from here on (16 GiB) that is rather a hash than an id.
_MAX_UNASKED_IDS = 1 << 31

_FORMAT = "colossal_freqcache.IdFrequency"
_FORMAT_VERSION = 1

# Totals stay below this, so that two data sets can be added without wrapping around in int64.
_MAX_TOTAL = 2.0**62

# What numpy and zipfile raise over a file that is cut off, changed or something else altogether.
_DAMAGE = (
    ValueError,
    KeyError,
    EOFError,
    OSError,
    MemoryError,
    OverflowError,
    TypeError,
    RuntimeError,  # and NotImplementedError: encrypted, unknown compression
    SyntaxError,
    zipfile.BadZipFile,
    zlib.error,
)


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
        ValueError: not 1-D, empty, NaN, infinite or negative (it names the index), or a total of 2**62 or more.
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
            id_arrays: yields arrays of ids: numpy arrays, torch tensors or lists, of any shape and integer dtype. A
                single array or tensor is taken as one such array.
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

                def where(flat: int, number: int = number, shape: tuple[int, ...] = ids.shape) -> str:
                    return f"position {_position(flat, shape)} of array {number}"

                tally.add(ids.reshape(-1), where)
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
            column: the array of an .npz file, or the column (csv: name or number from 0); None where there is one only.
            progress: draw a progress bar on standard error; None: if that is a terminal.

        Raises:
            FileNotFoundError: names the file; before anything is read.
            ImportError: a parquet file without pyarrow.
            TypeError: ids that are not integers.
            ValueError: unknown ending, missing column (it lists the columns), a damaged file or a bad line (file and
                line number), an id outside the table (file and place), no ids at all while num_embeddings is None.
        """
        paths = check_paths(paths)
        tally = _Tally(None if num_embeddings is None else _checked_size(num_embeddings))
        with _progress(progress, "counting ids", sum(path.stat().st_size for path in paths)) as advance:
            for path in paths:
                size, done = path.stat().st_size, 0.0
                for ids, where, share_read in read_ids(path, column):
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
        return IdFrequency._of(self.counts + other.counts)

    def decay(self, factor: float) -> "IdFrequency":
        """A new IdFrequency with every count multiplied by `factor` in (0, 1]: ages old counts before a merge.

        Raises:
            ValueError: factor outside (0, 1].
        """
        if not (isinstance(factor, (int, float)) and 0 < factor <= 1):
            raise ValueError(f"factor={factor!r} is not allowed: a number in (0, 1]")
        return IdFrequency._of(self.counts * float(factor))

    # ---- files

    def save(self, path: str | os.PathLike) -> None:
        """Write one .npz file (no pickle; compressed, with a checksum): beside `path` first, then renamed into place.

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
        with open(path, "rb") as file:
            try:
                return cls._read(file)
            except _DAMAGE as error:
                raise ValueError(
                    f"{os.fspath(path)} is damaged or not a frequency file: {error}; count the data again and save it"
                ) from error

    @classmethod
    def _read(cls, file: BinaryIO) -> "IdFrequency":
        if not zipfile.is_zipfile(file):
            raise ValueError("it is no complete .npz (zip) file")
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
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
        """(rows, share): int64 numbers of rows from 1 to R, log-spaced without repeats, and `coverage(rows)`.

        Raises:
            ValueError: num_points below 2.
        """
        if num_points < 2:
            raise ValueError(f"num_points={num_points} is too few for a curve: give at least 2")
        rows = np.unique(np.rint(np.geomspace(1, self.num_embeddings, num_points)).astype(np.int64))
        return rows, self.coverage(rows)


def as_counts(mapping: Any, table_sizes: int | Sequence[int]) -> np.ndarray | None:
    """What users pass as `ids_freq_mapping`, as one vector over the ids of all tables, table after table.

    Args:
        mapping: None (unknown); or one vector over all tables, or a list or tuple with one vector per table. A vector
            is an IdFrequency, a numpy array, a torch tensor or a list of numbers.
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
    # The first element tells numbers from vectors: looking at each of 10^7 numbers would take seconds.
    is_per_table = isinstance(mapping, (list, tuple)) and mapping and (mapping[0] is None or _is_vector(mapping[0]))
    if not is_per_table:
        counts = mapping.counts if isinstance(mapping, IdFrequency) else _validated(mapping, "ids_freq_mapping")
        if len(counts) != sum(sizes):
            raise ValueError(
                f"ids_freq_mapping has {len(counts)} counts for {sum(sizes)} ids in {len(sizes)} table(s): "
                "give one count per id"
            )
        return counts
    if len(mapping) != len(sizes):
        raise ValueError(
            f"ids_freq_mapping has {len(mapping)} vectors for {len(sizes)} table(s): give one vector per table"
        )
    per_table = []
    for table, (part, size) in enumerate(zip(mapping, sizes)):
        name = f"ids_freq_mapping of table {table}"
        if not _is_vector(part):
            raise TypeError(f"{name} is {part!r}: give each table a vector of counts, or None in place of the list")
        counts = part.counts if isinstance(part, IdFrequency) else _validated(part, name)
        if len(counts) != size:
            raise ValueError(f"{name} has {len(counts)} counts for {size} ids: give one count per id")
        per_table.append(counts)
    return np.concatenate(per_table)


# ---- validation


def _is_vector(part: Any) -> bool:
    is_array = isinstance(part, (np.ndarray, torch.Tensor))
    return part.ndim > 0 if is_array else isinstance(part, (IdFrequency, list, tuple))


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
    """1-D int64 or float64 counts, each finite and >= 0, with a total that int64 holds; copied only to change dtype."""
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
    is_integer = counts.dtype.kind != "f" or bool((counts == np.floor(counts)).all())
    total = float(counts.sum(dtype=np.float64))
    if total >= _MAX_TOTAL:
        raise ValueError(f"{name} add up to {total:.3g}, more than {_MAX_TOTAL:.3g}: divide them by one number")
    return np.ascontiguousarray(counts, dtype=np.int64 if is_integer else np.float64)


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
        self.counts = np.zeros(CHUNK_IDS if num_embeddings is None else num_embeddings, dtype=np.int64)

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
        for start in range(0, len(ids), CHUNK_IDS):
            np.add.at(self.counts, ids[start : start + CHUNK_IDS].astype(np.int64, copy=False), 1)


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
    from rich.progress import Progress, TimeElapsedColumn

    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total)
        yield lambda amount: bar.advance(task, amount)
