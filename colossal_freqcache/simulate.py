"""What would each eviction policy miss, at each cache size? A trace of id batches is replayed through them, maps only.

The policies are the package's own (`eviction`), and so are the maps (`slots`). There is no store, no record and no
gradient, and whatever pins rows in training beyond what is written here is left out: a cache that grows, a prefetch,
a graph that lives longer than its batch.

One batch, in the order of `cache` and `ahead`: its rows are looked up; those resident are touched; the policy chooses
victims among the slots that are not in use; the missing rows are admitted. Then, for the policies that look ahead,

    known      when a batch is current, the ids of `window` more are announced
    admitted   the rows of the `depth` batches behind the current one hold slots beside its own: so batch b is admitted
               while b - depth .. b - 1 are in use

All rows of a batch have to be resident at once. So the optimum, "belady", is that for batches: a batch's missing rows
push out the rows whose next batch is farthest, and never one of its own.

Shapes: N ids, B batches, T tables, U uses (the distinct rows of each batch, over all batches), R distinct rows of the
trace, n distinct rows of one batch, C slots.
Source: Belady 1966, "A study of replacement algorithms for a virtual-storage computer" (doi.org/10.1147/sj.52.0078).
"""

import csv
import dataclasses
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from .eviction import EvictionPolicy, PolicyIndex, make_policy
from .frequency import IdFrequency, _progress
from .id_files import array_shape, check_paths, read_ids
from .row_order import RowOrder
from .slots import SlotTable
from .synthetic import PRESETS, TableStream

__all__ = ["POLICIES", "SIZES", "Replay", "Trace", "draw", "simulate", "write_csv"]

POLICIES = ("dataset", "lfu", "lru", "s3fifo", "lookahead", "belady")
SIZES = (0.005, 0.015, 0.03, 0.1)
BATCH_SIZE = 2048
_DRAWN_SAMPLES = 1 << 16  # samples that a synthetic stream draws at once; a stream is cut into batches after that


# ---- the trace ------------------------------------------------------------------------------------------------------


class _Column(NamedTuple):
    """The ids of one table: int64, and bounds int64 (B + 1,): batch b has ids[bounds[b] : bounds[b + 1]]."""

    ids: np.ndarray
    bounds: np.ndarray


class Trace:
    """Batches of rows: what the policies and their judges want to know of a stream of ids.

    Rows are the ids that occur, ordered by their count in the trace; ties go by table, then by id. Any integer is an
    id. A batch of several tables is looked up table after table, as a FreqAwareEmbeddingBagCollection does.

    Attributes:
        name: what it is, in words.
        num_ids, num_tables, num_batches, num_rows: N, T, B, R.
        rows: int64 (U,), the distinct rows of each batch by first occurrence, batch after batch.
        counts: int32 (U,), how often the batch has the row.
        is_first: bool (U,), no batch before has the row.
        ends: int64 (B + 1,), batch b has the uses ends[b] : ends[b + 1].
        counts_of_row: int64 (R,), descending. id_of_row, table_of_row: int64 (R,), int32 (R,).
    """

    def __init__(self, columns: Sequence[_Column], name: str) -> None:
        """Use a `from_...` method."""
        self.name = name
        self.num_tables = len(columns)
        self.num_ids = sum(column.ids.size for column in columns)
        self.num_batches = len(columns[0].bounds) - 1
        if not self.num_ids:
            raise ValueError(f"{name} has 0 ids: a trace needs at least one")
        rows_of_column = self._number_rows(columns)
        bounds = sum(column.bounds for column in columns)
        rows = rows_of_column[0]
        if self.num_tables > 1:
            pieces = [np.split(rows, column.bounds[1:-1]) for rows, column in zip(rows_of_column, columns)]
            rows = np.concatenate([piece for batch in zip(*pieces) for piece in batch])
        uses = np.empty(rows.size, np.int64), np.empty(rows.size, np.int32), np.empty(rows.size, bool)
        self.ends = np.zeros(self.num_batches + 1, np.int64)
        _find_uses(rows, bounds, np.full(self.num_rows, -1), *uses, self.ends)
        self.rows, self.counts, self.is_first = (array[: self.ends[-1]].copy() for array in uses)

    def _number_rows(self, columns: Sequence[_Column]) -> list[np.ndarray]:
        """Sets what is known of each row; the row of each id, int64, column by column."""
        found = [np.unique(column.ids, return_inverse=True, return_counts=True) for column in columns]
        ids, counts = (np.concatenate([part[kind] for part in found]) for kind in (0, 2))
        table = np.repeat(np.arange(len(found), dtype=np.int32), [part[0].size for part in found])
        order = np.argsort(-counts, kind="stable")
        self.num_rows = ids.size
        self.id_of_row, self.table_of_row, self.counts_of_row = ids[order], table[order], counts[order]
        row = np.empty(ids.size, np.int64)
        row[order] = np.arange(ids.size)
        first = np.cumsum([0, *(part[0].size for part in found)])
        return [row[first[number] + part[1]] for number, part in enumerate(found)]

    def __repr__(self) -> str:
        return f"Trace({self.name}: {self.num_ids} ids, {self.num_batches} batches, {self.num_rows} rows)"

    @property
    def num_uses(self) -> int:
        """U: the distinct rows of each batch, added up."""
        return self.rows.size

    def slots_needed(self, depth: int = 0) -> int:
        """The most distinct rows that a batch and the `depth` before it have: no cache can have fewer slots."""
        return int(_most_at_once(self.rows, self.ends, np.full(self.num_rows, -1), depth))

    @classmethod
    def from_ids(cls, ids: Any, batch_size: int = BATCH_SIZE, name: str = "ids") -> "Trace":
        """A stream of ids, cut into batches.

        Args:
            ids: integers (N,), ids of one table; or (N, T), a sample a row, ids local to the T tables. An array, a
                tensor, a list of numbers, or an iterable of such pieces, which are joined.
            batch_size: ids (N,) or samples (N, T) of one batch; the last one may have fewer.

        Raises:
            TypeError: ids that are not integers.
            ValueError: no id, another shape, or a batch_size below 1.
        """
        _check_number("batch_size", batch_size, 1, "ids, or samples of several tables")
        joined = _joined(_pieces(ids), name)
        return cls(_columns(joined, np.append(np.arange(0, len(joined), batch_size), len(joined))), name)

    @classmethod
    def from_batches(cls, batches: Iterable[Any], name: str = "batches") -> "Trace":
        """Batches of ids as they are: each (n,), or (n, T) with ids local to the T tables. Raises as `from_ids`."""
        pieces = _pieces(list(batches))
        return cls(_columns(_joined(pieces, name), np.cumsum([0, *map(len, pieces)])), name)

    @classmethod
    def from_files(
        cls,
        paths: str | os.PathLike | Iterable[str | os.PathLike],
        columns: Sequence[str | int] = (),
        batch_size: int = BATCH_SIZE,
        progress: bool | None = None,
    ) -> "Trace":
        """The ids of files, one file after the other: .npy, .npz, .parquet or .csv, as in `IdFrequency.count_files`.

        Args:
            columns: names of arrays (.npz) or columns (.parquet, .csv; or a csv column's number from 0), one table
                each. Empty: the only one that a file has.
            batch_size: as in `from_ids`. An array (N, T) is T tables, too; lists of a parquet column are joined.
            progress: draw a progress bar on standard error; None: if that is a terminal.

        Raises as `IdFrequency.count_files` and `from_ids`; ValueError where columns have different numbers of ids.
        """
        paths = check_paths(paths)
        names = list(columns) or [None]
        with _progress(progress, "reading ids", len(names) * sum(path.stat().st_size for path in paths)) as advance:
            per_file = [[_read(path, name, advance) for name in names] for path in paths]
        for path, arrays in zip(paths, per_file):
            if len(arrays) > 1 and ({array.ndim for array in arrays} != {1} or len({*map(len, arrays)}) > 1):
                shapes = ", ".join(f"{name!r} {array.shape}" for name, array in zip(names, arrays))
                raise ValueError(f"{path}: tables need one id a sample each, and the columns have the shapes {shapes}")
        joined = [arrays[0] if len(arrays) == 1 else np.stack(arrays, axis=1) for arrays in per_file]
        name = paths[0].name if len(paths) == 1 else f"{paths[0].name} and {len(paths) - 1} more"
        return cls.from_ids(joined, batch_size, name)

    @classmethod
    def synthetic(
        cls,
        preset: str,
        num_ids: int = 1_000_000,
        batch_size: int = BATCH_SIZE,
        tables: Sequence[int] = (),
        max_rows: int | None = None,
        drift: float = 0.0,
        burst: float = 0.0,
        seed: int = 0,
    ) -> "Trace":
        """A calibrated synthetic stream (`colossal_freqcache.synthetic`).

        Args:
            preset: a name in PRESETS.
            num_ids: at least; whole samples are drawn.
            batch_size: samples of one batch; each has the preset's number of ids for each table.
            tables: numbers of the preset's tables, from 0; none: all of them. Small tables hit by themselves: look at
                the big ones apart.
            max_rows: larger tables get this many rows; None: as many as the preset says.
            drift, burst, seed: see TableStream.

        Raises:
            ValueError: a setting that is not allowed.
        """
        if preset not in PRESETS:
            raise ValueError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
        chosen, num_tables = PRESETS[preset], len(PRESETS[preset].table_sizes)
        for table in tables:
            if not 0 <= table < num_tables:
                raise ValueError(f"preset {preset!r} has no table {table}: it has {num_tables}, numbered from 0")
        for what, number in (("num_ids", num_ids), ("batch_size", batch_size), ("max_rows", max_rows or 1)):
            _check_number(what, number, 1, what.removeprefix("num_").removeprefix("max_"))
        name = preset + (f" table {', '.join(map(str, tables))}" if tables else "")
        tables = list(tables) or list(range(num_tables))
        lengths = [chosen.pooling[table] if chosen.pooling else 1 for table in tables]
        num_samples = -(-num_ids // sum(lengths))
        bounds = np.append(np.arange(0, num_samples, batch_size), num_samples)
        columns = []
        for table, length in zip(tables, lengths):
            num_rows = min(chosen.table_sizes[table], max_rows or chosen.table_sizes[table])
            stream = TableStream(num_rows, chosen.fit(table), seed=seed, salt=table, drift=drift, burst=burst)
            starts = range(0, num_samples, _DRAWN_SAMPLES)
            drawn = [stream.draw(min(_DRAWN_SAMPLES, num_samples - start) * length) for start in starts]
            columns.append(_Column(np.concatenate(drawn), bounds * length))
        return cls(columns, f"synthetic {name}")


@njit(cache=True, nogil=True)
def _find_uses(rows_of_ids, bounds, use_of_row, rows, counts, is_first, ends):
    """Fill the uses from the rows of all ids; use_of_row int64 (R,), -1 at first: number of the row's last use."""
    end = 0
    for batch in range(bounds.size - 1):
        start = end
        for i in range(bounds[batch], bounds[batch + 1]):
            row = rows_of_ids[i]
            use = use_of_row[row]
            if use >= start:
                counts[use] += 1
            else:
                rows[end] = row
                counts[end] = 1
                is_first[end] = use < 0
                use_of_row[row] = end
                end += 1
        ends[batch + 1] = end


@njit(cache=True, nogil=True)
def _most_at_once(rows, ends, last_batch, depth):
    """The most distinct rows in depth + 1 consecutive batches; last_batch int64 (R,), -1 at first: the row's last."""
    most, present = 0, 0
    for batch in range(ends.size - 1):
        leaving = batch - depth - 1
        if leaving >= 0:
            for row in rows[ends[leaving] : ends[leaving + 1]]:
                present -= last_batch[row] == leaving
        for row in rows[ends[batch] : ends[batch + 1]]:
            present += last_batch[row] < max(batch - depth, 0)
            last_batch[row] = batch
        most = max(most, present)
    return most


def _pieces(ids: Any) -> list[np.ndarray]:
    """Integer arrays from one array, tensor or list of numbers, or from an iterable of them; at least one."""
    if not hasattr(ids, "__array__"):
        ids = list(ids)
        if ids and not isinstance(ids[0], Real):
            return [_as_ids(piece) for piece in ids]
    return [_as_ids(ids)]


def _as_ids(values: Any) -> np.ndarray:
    """int64; ids from 2**63 on become negative ones, which are as good."""
    ids = np.asarray(values)
    if ids.size and ids.dtype.kind not in "iu":
        raise TypeError(f"ids have dtype {ids.dtype}: ids are integers")
    return ids.astype(np.int64, copy=False)


def _joined(pieces: list[np.ndarray], name: str) -> np.ndarray:
    if any(piece.ndim not in (1, 2) or piece.shape[1:] == (0,) for piece in pieces) or (
        len({piece.shape[1:] for piece in pieces if len(piece)}) > 1
    ):
        listed = ", ".join(sorted({str(piece.shape) for piece in pieces})[:3])
        raise ValueError(f"{name} has ids of shape {listed}: give (N,), or (N, T) for T tables, and all pieces alike")
    return np.concatenate([piece for piece in pieces if len(piece)] or pieces[:1])


def _columns(ids: np.ndarray, bounds: np.ndarray) -> list[_Column]:
    return [_Column(ids, bounds)] if ids.ndim == 1 else [_Column(column, bounds) for column in ids.T]


def _read(path: Path, column: str | int | None, advance: Callable[[float], None]) -> np.ndarray:
    """The ids of one column of a file, int64, in the shape that an array has there."""
    size, done, pieces = path.stat().st_size, 0.0, [np.empty(0, np.int64)]
    for ids, _, share_read in read_ids(path, column):
        pieces.append(_as_ids(ids))
        advance((share_read - done) * size)
        done = share_read
    advance((1.0 - done) * size)
    ids = np.concatenate(pieces)
    shape, fortran = array_shape(path, column) or (ids.shape, False)
    return ids if len(shape) < 2 else ids.reshape(shape, order="F" if fortran else "C")


def _check_number(name: str, number: Any, least: int, what: str) -> None:
    if not isinstance(number, Integral) or isinstance(number, bool) or number < least:
        raise ValueError(f"{name}={number!r} is not allowed: a number of {what}, at least {least}")


# ---- the replay -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Replay:
    """What one policy did with a cache of one size. The numbers are None where the trace does not fit; `note` says why.

    policy: name, as in POLICIES. num_slots: C. share: C over the R rows of the trace.
    slots_needed: the most rows that have to be resident at once, for this policy.
    misses: occurrences of rows that were not resident when their batch came, over the N ids: miss_ratio.
    misses_unique: the same of distinct rows of a batch, over the U uses: miss_ratio_unique. This is what is fetched.
    misses_first_touch: those of misses_unique that are the row's first use: a cold cache has them with any policy.
    evictions: rows that left.
    """

    policy: str
    num_slots: int
    share: float
    slots_needed: int
    misses: int | None = None
    misses_unique: int | None = None
    misses_first_touch: int | None = None
    evictions: int | None = None
    miss_ratio: float | None = None
    miss_ratio_unique: float | None = None
    note: str = ""


class _Foresight(NamedTuple):
    """strategy: of `make_policy`. window: batches whose ids are known; 0: it is told nothing. depth: see above."""

    strategy: str
    window: int = 0
    depth: int = 0


class _Numbering(NamedTuple):
    """Rows as the policies see them. rows: int64 (U,). num_rows. counts: of each row, descending, where known."""

    rows: np.ndarray
    num_rows: int
    counts: np.ndarray | None


def simulate(
    trace: Trace,
    policies: Sequence[str] = POLICIES,
    sizes: Sequence[int | float] = SIZES,
    window: int = 64,
    depth: int = 1,
    warm: bool = False,
    counts: Any = None,
    progress: bool | None = False,
) -> list[Replay]:
    """Replays the trace once for each size and policy: [Replay], by size, then in the order of the policies.

    Args:
        policies: "dataset", "lfu", "lru", "s3fifo" look at the past only, batch by batch. "lookahead" knows `window`
            batches and admits `depth` of them ahead; "lookahead-0" is the same policy without either. "belady" knows
            the whole trace: the fewest `misses_unique` that are possible, from the same beginning.
        sizes: slots (int), or shares of the trace's rows in (0, 1] (float).
        warm: start with the first rows of the order resident, instead of with an empty cache.
        counts: what is known of the ids beforehand. It orders the rows for "dataset" and `warm`, and the policy
            "lookahead" is given it. None: nothing is known, and the order is, in hindsight, that of the trace's own
            counts; "trace": these are known to "lookahead" as well; else an IdFrequency or a vector with a count for
            each id of the table, or a list with one for each table: then rows are those of all these ids.
        progress: draw a progress bar on standard error; None: if that is a terminal.

    A size with fewer slots than have to be in use at once is not replayed: its Replay has a note.

    Raises:
        ValueError: an unknown policy, a size, window or depth that is not allowed, counts that do not cover the ids.
    """
    _check_number("window", window, 1, "batches")
    _check_number("depth", depth, 0, "batches")
    if depth > window:
        raise ValueError(f"depth={depth} is not allowed: at most window={window}, whose ids are known")
    policies = [policies] if isinstance(policies, str) else policies
    foresights = {name: _foresight(name, int(window), int(depth), trace.num_batches) for name in policies}
    all_slots = sorted({_in_slots(size, trace.num_rows) for size in sizes})
    needed = {plan.depth: trace.slots_needed(plan.depth) for plan in foresights.values()}
    numbering = _numbered(trace, counts)
    batches = np.split(numbering.rows, trace.ends[1:-1])
    replays = []
    with _progress(progress, "replaying", len(all_slots) * len(foresights) * len(batches)) as advance:
        for num_slots in all_slots:
            for name, foresight in foresights.items():
                replay = Replay(name, num_slots, num_slots / trace.num_rows, needed[foresight.depth])
                if num_slots < replay.slots_needed:
                    replays.append(dataclasses.replace(replay, note=_too_small(foresight.depth, replay.slots_needed)))
                    advance(len(batches))
                    continue
                missed, evictions = _replay(batches, numbering, foresight, num_slots, warm, advance)
                replays.append(dataclasses.replace(replay, evictions=evictions, **_counted(trace, missed)))
    return replays


def _foresight(name: str, window: int, depth: int, num_batches: int) -> _Foresight:
    special = {
        "lookahead": _Foresight("lookahead", window, depth),
        "lookahead-0": _Foresight("lookahead"),
        "belady": _Foresight("lookahead", num_batches),
    }
    if name not in special and name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}: choose some of {', '.join(POLICIES)}, lookahead-0")
    return special.get(name, _Foresight(name))


def _in_slots(size: Any, num_rows: int) -> int:
    if isinstance(size, Integral) and not isinstance(size, bool) and size >= 1:
        return int(size)
    if isinstance(size, Real) and not isinstance(size, Integral) and 0 < size <= 1:
        return max(1, int(num_rows * size))  # as FreqCacheConfig does it
    raise ValueError(f"size {size!r} is not allowed: slots (an int, at least 1), or a share of the rows in (0, 1]")


def _too_small(depth: int, needed: int) -> str:
    together = f"{depth + 1} batches together need" if depth else "a batch needs"
    return f"too small: {together} up to {needed} slots"


def _numbered(trace: Trace, counts: Any) -> _Numbering:
    if counts is None:
        return _Numbering(trace.rows, trace.num_rows, None)
    if isinstance(counts, str) and counts == "trace":
        return _Numbering(trace.rows, trace.num_rows, trace.counts_of_row)
    is_per_table = isinstance(counts, (list, tuple)) and counts and not isinstance(counts[0], Real)
    vectors = [
        part.counts if isinstance(part, IdFrequency) else IdFrequency(part).counts
        for part in (counts if is_per_table else [counts])
    ]
    if len(vectors) != trace.num_tables:
        raise ValueError(f"{len(vectors)} vector(s) of counts for {trace.num_tables} table(s): give one for each table")
    sizes = np.array([vector.size for vector in vectors])
    outside = (trace.id_of_row < 0) | (trace.id_of_row >= sizes[trace.table_of_row])
    if outside.any():
        row = int(outside.argmax())
        table = int(trace.table_of_row[row])
        where = f" of table {table}" if trace.num_tables > 1 else ""
        raise ValueError(f"id {trace.id_of_row[row]}{where} has no count: they are of ids 0..{sizes[table] - 1}")
    whole = np.concatenate(vectors)
    order = RowOrder.from_counts(whole, whole.size)
    ids_of_whole = (np.cumsum(sizes) - sizes)[trace.table_of_row] + trace.id_of_row
    return _Numbering(order.rows(ids_of_whole)[trace.rows], whole.size, whole[order.id_of_row])


def _replay(
    batches: list[np.ndarray],
    numbering: _Numbering,
    foresight: _Foresight,
    num_slots: int,
    warm: bool,
    advance: Callable[[float], None],
) -> tuple[np.ndarray, int]:
    """(which uses missed, bool (U,); rows that left) of one policy in one cache."""
    table = SlotTable(num_slots, numbering.num_rows, rows_are_ids=True)
    slot_of_row = table.slot_of_id.numpy()  # + 1
    maps = PolicyIndex(np.zeros(num_slots, np.int32), table.row_of_slot.numpy(), slot_of_row)
    policy = make_policy(foresight.strategy, num_slots, numbering.num_rows, numbering.counts)
    if warm:
        _admit(table, policy, np.arange(min(num_slots, numbering.num_rows))[::-1].copy())
    held: deque[np.ndarray] = deque()  # slots of the batches that are in use, oldest first
    missed, evictions, num_announced = [], 0, 0
    for number, rows in enumerate(batches):
        if foresight.window:
            num_known = max(number - foresight.depth, 0) + foresight.window + 1
            for coming in batches[num_announced:num_known]:
                policy.announce(coming, slot_of_row[coming] - 1)
            num_announced = num_known
        slots = slot_of_row[rows] - 1
        if foresight.window:
            policy.advance(slots)
        absent = slots < 0
        missed.append(absent)
        resident = slots[~absent]
        maps.in_use[resident] += 1
        policy.touch(resident)
        missing = rows[absent]
        if missing.size:
            evictions += _make_room(table, policy, maps, missing.size)
            slots[absent] = taken = _admit(table, policy, missing)
            maps.in_use[taken] += 1
        held.append(slots)
        if len(held) > foresight.depth:
            maps.in_use[held.popleft()] -= 1
        advance(1)
    return np.concatenate(missed), evictions


def _make_room(table: SlotTable, policy: EvictionPolicy, maps: PolicyIndex, num_missing: int) -> int:
    """Frees as many slots as are short; returns how many."""
    short = num_missing - table.num_free
    if short <= 0:
        return 0
    table.evict(policy.evict(short, maps))
    return short


def _admit(table: SlotTable, policy: EvictionPolicy, rows: np.ndarray) -> np.ndarray:
    """The slots, int32 (n,), that rows int64 (n,) are in from now on."""
    taken = table.take_free(rows.size)
    table.admit(rows, rows, taken)
    policy.admit(taken, rows)
    return taken


def _counted(trace: Trace, missed: np.ndarray) -> dict[str, Any]:
    misses, misses_unique = int(trace.counts[missed].sum()), int(missed.sum())
    return {
        "misses": misses,
        "misses_unique": misses_unique,
        "misses_first_touch": int((missed & trace.is_first).sum()),
        "miss_ratio": misses / trace.num_ids,
        "miss_ratio_unique": misses_unique / trace.num_uses,
    }


# ---- what comes out -------------------------------------------------------------------------------------------------


def write_csv(replays: Sequence[Replay], path: str | os.PathLike) -> None:
    """One line for each Replay under a header of its fields; empty where a number is None."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in dataclasses.fields(Replay))
        writer.writerows(dataclasses.astuple(replay) for replay in replays)


def draw(replays: Sequence[Replay], path: str | os.PathLike, title: str = "") -> None:
    """A picture (the ending of `path` says which kind): miss ratios against slots, of distinct rows and of occurrences.

    Raises:
        ImportError: matplotlib is not installed; it says how to install it.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter
    except ImportError as error:
        raise ImportError(
            "matplotlib draws the picture and is not installed: pip install 'colossal_freqcache[plot]'"
        ) from error
    figure = Figure(figsize=(12, 5), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, field, what in zip(panels, ("miss_ratio_unique", "miss_ratio"), ("distinct rows of a batch", "ids")):
        for policy in dict.fromkeys(replay.policy for replay in replays):
            points = [(r.num_slots, getattr(r, field)) for r in replays if r.policy == policy and not r.note]
            style = {"color": "black", "linestyle": "--"} if policy == "belady" else {}
            axes.plot(*zip(*points, strict=True) if points else ([], []), marker="o", label=policy, **style)
        axes.set_xscale("log")
        sizes = sorted({replay.num_slots for replay in replays})
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=30)
        axes.set_xticks([], minor=True)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("slots (rows that the cache holds)")
        axes.set_ylabel(f"missed, of the {what}")
        axes.grid(alpha=0.3)
    panels[0].legend()
    figure.suptitle(title, parse_math=False)  # a file's name may have a $
    figure.savefig(path, dpi=120)
