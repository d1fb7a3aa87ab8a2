"""Cached tables divided over the ranks of a process group: by columns, by rows, or by whole tables.

Every rank has a cache of its own over its part of the tables; the ranks exchange ids, pooled outputs and gradients.
Needs torch.distributed only. Placements say who holds what, the two classes at the end what a forward exchanges.

Two kinds of group (`output=`):
    share    every rank passes its own share of the batch, and gets the full width for it. Table gradients are averaged
             over the ranks, as DDP averages dense ones: W ranks with local mean losses are one process with their mean.
    gather   all ranks pass the same batch and get the same full output (a tensor-parallel group). Nothing is averaged.

A collective is entered by all ranks or by none: what one rank cannot do (a bad id, a cache too small) raises on all,
before rows travel. Decisions depend on ids, never on timing.

Shapes: W ranks, B bags of a rank (each table), G bags of all ranks, N ids of a rank, T tables, D width, n requests.
Source: the hybrid parallelism of Fang et al. 2022 (arXiv:2208.05321), where tables are divided by columns.
"""

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable

from .block import plain_mode
from .cache import CacheTooSmallError, RowCache
from .config import FreqCacheConfig
from .embedding import FreqAwareEmbeddingBag, FreqAwareEmbeddingBagCollection
from .embedding import _Batch as Batch
from .placement import Piece, Placement
from .rounding import HALVES

__all__ = [
    "SHARDINGS",
    "ShardedFreqAwareEmbeddingBag",
    "ShardedFreqAwareEmbeddingBagCollection",
    "balanced_plan",
]

SHARDINGS = ("column", "row", "table")
OUTPUTS = ("share", "gather")

# ---- exchanges ------------------------------------------------------------------------------------------------------


class Ranks:
    """The processes that share tables, and the exchanges among them. Host tensors.

    Attributes:
        group: their process group, None for one process. rank, size: this one's number, and how many there are.
        bytes_sent: what this rank has sent to others so far, in bytes, by kind ("ids", "rows", "numbers"); without
            the objects of set-up and errors.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        self.group = group
        self.rank, self.size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        self.bytes_sent = {"ids": 0, "rows": 0, "numbers": 0}
        if self.rank < 0:
            raise ValueError(
                f"this process, rank {dist.get_rank()} of {dist.get_world_size()}, is not in the process group: build "
                f"the module on the group's ranks only"
            )
        if self.size > 1 and "gloo" not in str(dist.get_backend(group)):
            raise NotImplementedError(
                f"a process group with the backend {dist.get_backend(group)!r} cannot move host tensors, and a cache "
                f"on an accelerator is planned, not built yet: use gloo"
            )

    def all_to_all(self, sent: torch.Tensor, send: list[int], receive: list[int], kind: str) -> torch.Tensor:
        """`sent` holds send[s] entries for each rank s, one after the other; what each rank sent here, likewise."""
        if self.size == 1:
            return sent
        others = sum(send) - send[self.rank]
        self.bytes_sent[kind] += others * sent.element_size()

        def exchange() -> torch.Tensor:
            received = torch.empty(sum(receive), dtype=sent.dtype)
            size = sent.element_size() if sent.dtype in HALVES else 1  # gloo has no bfloat16: as bytes
            parts = [received, sent.contiguous()]
            if size > 1:
                parts = [part.view(torch.uint8) for part in parts]
            counts = [[size * count for count in counts] for counts in (receive, send)]
            dist.all_to_all_single(*parts, *counts, group=self.group)
            return received

        return self._run(exchange)

    def all_gather(self, numbers: torch.Tensor, kind: str = "numbers") -> torch.Tensor:
        """(W, ...): `numbers`, of one shape on all ranks, in rank order."""
        if self.size == 1:
            return numbers.unsqueeze(0)
        # Not dist.all_gather: gloo's goes around a ring, W - 1 exchanges one after the other.
        counts = [numbers.numel()] * self.size
        gathered = self.all_to_all(numbers.reshape(-1).repeat(self.size), counts, counts, kind)
        return gathered.view(self.size, *numbers.shape)

    def broadcast(self, values: torch.Tensor) -> torch.Tensor:
        """`values` as the group's first rank has them; a copy."""
        if self.size == 1:
            return values

        def exchange() -> torch.Tensor:
            copy = values.clone(memory_format=torch.contiguous_format)
            bits = copy.view(torch.uint8) if copy.dtype in HALVES else copy
            dist.broadcast(bits, dist.get_global_rank(self.group, 0), group=self.group)
            return copy

        return self._run(exchange)

    def all_gather_objects(self, item: Any) -> list:
        """`item` of every rank, in rank order; for set-up and errors."""
        if self.size == 1:
            return [item]

        def exchange() -> list:
            items: list = [None] * self.size
            dist.all_gather_object(items, item, group=self.group)
            return items

        return self._run(exchange)

    def _run(self, exchange: Callable[[], Any]) -> Any:
        try:
            with plain_mode():  # the group fills tensors in a thread of its own, which inference tensors forbid
                return exchange()
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} of {self.size} could not exchange with the others that share its cached tables; one "
                f"of them has failed, or has left the training loop: {error}"
            ) from error

    def __deepcopy__(self, memo: dict) -> "Ranks":
        return self  # a process group is not copied


class _Exchange(torch.autograd.Function):
    """all_to_all of a flat tensor; the gradient travels back the same way."""

    @staticmethod
    def forward(ctx, sent: torch.Tensor, ranks: Ranks, send: list[int], receive: list[int]):
        ctx.ranks, ctx.send, ctx.receive = ranks, send, receive
        return ranks.all_to_all(sent, send, receive, "rows")

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        return ctx.ranks.all_to_all(grad, ctx.receive, ctx.send, "rows"), None, None, None


class _GatherSame(torch.autograd.Function):
    """Every rank's flat tensor on every rank. All then compute the same, so the own part's gradient is all of it."""

    @staticmethod
    def forward(ctx, own: torch.Tensor, ranks: Ranks, sizes: list[int]):
        start = sum(sizes[: ranks.rank])
        ctx.own = slice(start, start + sizes[ranks.rank])
        if ranks.size == 1:
            return own.clone()
        return ranks.all_to_all(own.repeat(ranks.size), [own.numel()] * ranks.size, sizes, "rows")

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        return grad[ctx.own], None, None


class SumOfRanks(torch.autograd.Function):
    """A tensor that is the same on all ranks, each of which uses it for its part; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, same: torch.Tensor, ranks: Ranks):
        ctx.ranks = ranks
        return same.view_as(same)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        return _added(ctx.ranks.all_gather(grad, "rows")), None


# ---- placements -----------------------------------------------------------------------------------------------------


class ShardedPlacement(Placement):
    """A part of the tables on each rank. What the three ways of dividing have in common.

    Attributes:
        settings: beside the configuration, what all ranks must have given alike, by name.
        disagreed: the exchange of a constructor has raised, or is about to: on all ranks.
    """

    disagreed = False

    def __init__(self, table_sizes: Sequence[int], dim: int, ranks: Ranks, averaged: bool) -> None:
        super().__init__(table_sizes, dim)
        self.ranks = ranks
        self.rank, self.world_size = ranks.rank, ranks.size
        self.divisor = ranks.size if averaged else 1
        self.settings: dict[str, Any] = {}

    def attach(self, cache: RowCache) -> None:
        super().attach(cache)
        used = sum(self._piece_rows(start, rows) for start, rows in self.table_ranges())
        if used < cache.num_rows:  # rows that nobody looks up, but a warm-up may fetch
            records = torch.zeros(cache.num_rows - used, cache.layout.width, dtype=cache.layout.dtype)
            cache.write_ids(used, records)

    def _piece_rows(self, start: int, rows: int) -> int:
        piece = self.piece(start, start + rows)
        return 0 if piece is None else piece.last - piece.first

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group."""
        return self.ranks.group

    def agree(self, config: FreqCacheConfig) -> FreqCacheConfig:
        """The smallest of the sizes that ranks gave; everything else must be the same on all ranks."""
        self.go_on()
        self.disagreed = True
        named = {}
        for field in dataclasses.fields(config):
            if field.name not in ("store", "sharding", "cache_ratio", "num_slots", "max_cache_bytes"):
                value = getattr(config, field.name)
                named[field.name] = value if isinstance(value, (int, float, type(None))) else str(value)
        mine = dict(tables=self.table_sizes, embedding_dim=self.dim, **self.settings, **named)
        sizes = {name: getattr(config, name) for name in ("cache_ratio", "num_slots", "max_cache_bytes")}
        everyone = self.ranks.all_gather_objects((mine, sizes))
        for rank, (theirs, _) in enumerate(everyone):
            for name, value in everyone[0][0].items():
                if theirs[name] != value:
                    raise ValueError(
                        f"{name} is {value!r} on rank 0 and {theirs[name]!r} on rank {rank}: all ranks that share a "
                        f"table must build it with the same settings"
                    )
        for name in sizes:
            given = [size[name] for _, size in everyone if size[name] is not None]
            sizes[name] = min(given, default=None)
        config = dataclasses.replace(config, **sizes)
        self.disagreed = False
        return config

    def go_on(self) -> None:
        """Where a constructor has come before it exchanges: the others have, too; or all raise what kept one back."""
        self.disagreed = True
        raise_if_any(self.ranks, None)
        self.disagreed = False

    def of_first_rank(self, values: torch.Tensor) -> torch.Tensor:
        return self.ranks.broadcast(values)

    def read(
        self, column: str, start: int, stop: int, split: bool = True, to: int | None = None
    ) -> torch.Tensor | None:
        width = self.dim if split else 1
        pieces = [self.piece(start, stop, rank) for rank in range(self.world_size)]
        sizes = [0 if piece is None else self._piece_numel(piece, width, split) for piece in pieces]
        own = pieces[self.rank]
        layout = self.cache.layout
        sent = torch.empty(0, dtype=layout.dtype)
        if own is not None:
            sent = self.cache.read_ids(own.first, own.last)[:, layout.columns(column)].reshape(-1)
        receivers = range(self.world_size) if to is None else [to]
        send = [sizes[self.rank] if rank in receivers else 0 for rank in range(self.world_size)]
        receive = sizes if self.rank in receivers else [0] * self.world_size
        received = self.ranks.all_to_all(sent.repeat(len(receivers)), send, receive, "rows").split(receive)
        if self.rank not in receivers:
            return None
        values = torch.empty(stop - start, width, dtype=layout.dtype)
        for piece, part in zip(pieces, received, strict=True):
            if piece is not None and part.numel():
                values[piece.places, piece.columns if split else slice(None)] = part.view(piece.last - piece.first, -1)
        return values

    @staticmethod
    def _piece_numel(piece: Piece, width: int, split: bool) -> int:
        columns = len(range(width)[piece.columns]) if split else width
        return (piece.last - piece.first) * columns

    def together(self, action: Callable[[], Any], undo: Callable[[Any], Any] | None = None) -> Any:
        result, error = None, None
        try:
            result = action()
        except Exception as raised:
            error = raised
        failed = self.ranks.all_gather(torch.tensor([error is not None]))
        if not failed.any():
            return result
        if error is None and undo is not None:
            undo(result)
        raise_together(self.ranks, error)

    def gather_norms(self, norm: torch.Tensor) -> torch.Tensor:
        return self.ranks.all_gather(norm.reshape(1))[:, 0]


def raise_if_any(ranks: Ranks, error: Exception | None) -> None:
    """Raises on every rank if one has an error, and returns on all if none has."""
    if ranks.all_gather(torch.tensor([error is not None])).any():
        raise_together(ranks, error)


def raise_together(ranks: Ranks, error: Exception | None) -> None:
    """Raises on every rank after one has failed: its own error where it happened, elsewhere one of the same kind."""
    messages = ranks.all_gather_objects(None if error is None else (type(error).__name__, str(error)))
    if error is not None:
        raise error
    rank, (kind, message) = next((rank, message) for rank, message in enumerate(messages) if message is not None)
    kinds = {cls.__name__: cls for cls in (CacheTooSmallError, ValueError, TypeError, NotImplementedError)}
    raise kinds.get(kind, RuntimeError)(f"rank {rank}: {message}")


class ColumnPlacement(ShardedPlacement):
    """Every rank has its columns of all rows: ceil(D / W) of them on the first ranks, one fewer on the others."""

    def __init__(self, table_sizes: Sequence[int], dim: int, ranks: Ranks, averaged: bool) -> None:
        super().__init__(table_sizes, dim, ranks, averaged)
        if dim < ranks.size:
            raise ValueError(
                f"{ranks.size} ranks for {dim} columns: column sharding needs at least one column a rank. Use at most "
                f'{dim} ranks, or sharding="row"'
            )
        self.widths = [dim // ranks.size + (rank < dim % ranks.size) for rank in range(ranks.size)]
        self.local_dim = self.widths[self.rank]
        self.first_column = self.columns(self.rank).start
        self.budget_dim = self.widths[0]

    def columns(self, rank: int) -> slice:
        """The columns that `rank` holds."""
        start = sum(self.widths[:rank])
        return slice(start, start + self.widths[rank])

    def piece(self, start: int, stop: int, rank: int | None = None) -> Piece | None:
        return Piece(slice(0, stop - start), start, stop, self.columns(self.rank if rank is None else rank))

    def read(
        self, column: str, start: int, stop: int, split: bool = True, to: int | None = None
    ) -> torch.Tensor | None:
        if not split:  # one value a row, the same on all ranks
            values = self.cache.read_ids(start, stop)[:, self.cache.layout.columns(column)]
            return values if to in (None, self.rank) else None
        return super().read(column, start, stop, split, to)

    def row_totals(self, parts: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Added in rank order, so all ranks get the same bits. Ranks meet by id: slots may differ among them."""
        order = torch.argsort(self.cache.slots.id_of_slot[slots.long()])
        totals = torch.empty_like(parts)
        totals[order] = _added(self.ranks.all_gather(parts[order]))
        return totals

    def renormalize(self, slots: torch.Tensor, max_norm: float, norm_type: float) -> torch.Tensor:
        records, dim = self.cache.records, self.cache.layout.dim
        slots = slots.long()
        values = records[slots, :dim].double().abs()
        if abs(norm_type) == float("inf"):
            extreme = torch.amax if norm_type > 0 else torch.amin
            norms = extreme(self.ranks.all_gather(extreme(values, 1)), 0)  # a batch numbers its rows alike on all ranks
        elif norm_type == 0:
            norms = _added(self.ranks.all_gather((values != 0).double().sum(1)))
        else:
            norms = _added(self.ranks.all_gather((values**norm_type).sum(1))) ** (1 / norm_type)
        changed = norms > max_norm
        scale = max_norm / (norms[changed] + 1e-7)
        if records.dtype in HALVES:  # multiplied in float32, rounded once
            scale = scale.float().unsqueeze(1)
            records[slots[changed], :dim] = (records[slots[changed], :dim].float() * scale).to(records.dtype)
        else:
            records[slots[changed], :dim] *= scale.to(records.dtype).unsqueeze(1)
        return changed


class RowPlacement(ShardedPlacement):
    """Id i of the whole lives on rank i % W, as id i // W of a single local table; each rank has room for the most.

    So frequent ids are spread whatever their order, and all ranks have as many slots. Rows travel at full width and
    are pooled on the rank whose bags they are in.
    """

    pools = False

    def __init__(self, table_sizes: Sequence[int], dim: int, ranks: Ranks, averaged: bool) -> None:
        super().__init__(table_sizes, dim, ranks, averaged)
        self.local_sizes = [-(-self.num_rows // ranks.size)]

    def ids_of_the_whole(self, ids: torch.Tensor) -> torch.Tensor:
        return ids * self.world_size + self.rank

    def local_padding(self, padding_ids: list[int]) -> list[int]:
        return [-1]  # left out by the rank that pools

    def local_counts(self, counts: np.ndarray | None) -> np.ndarray | None:
        if counts is None:
            return None
        own = np.zeros(self.local_sizes[0], counts.dtype)
        mine = counts[self.rank :: self.world_size]
        own[: mine.size] = mine
        return own

    def piece(self, start: int, stop: int, rank: int | None = None) -> Piece | None:
        rank = self.rank if rank is None else rank
        skipped = (rank - start) % self.world_size
        count = len(range(start + skipped, stop, self.world_size))
        first = (start + skipped) // self.world_size
        places = slice(skipped, None, self.world_size)
        return Piece(places, first, first + count, slice(0, self.dim)) if count else None


class TablePlacement(ShardedPlacement):
    """Whole tables, each on the rank that `plan` names. A rank without one keeps one row, which nobody looks up."""

    def __init__(self, table_sizes: Sequence[int], dim: int, ranks: Ranks, averaged: bool, plan: Sequence[int]) -> None:
        super().__init__(table_sizes, dim, ranks, averaged)
        self.plan = [int(rank) for rank in plan]
        if len(self.plan) != len(self.table_sizes) or not all(0 <= rank < ranks.size for rank in self.plan):
            raise ValueError(
                f"plan={list(plan)!r} must name a rank in 0..{ranks.size - 1} for each of the "
                f"{len(self.table_sizes)} tables"
            )
        self.tables_of = [[t for t, owner in enumerate(self.plan) if owner == rank] for rank in range(ranks.size)]
        self.own = self.tables_of[self.rank]
        self.local_sizes = [self.table_sizes[table] for table in self.own] or [1]
        self._local_start = dict(zip(self.own, np.cumsum([0, *self.local_sizes]).tolist(), strict=False))

    def ids_of_the_whole(self, ids: torch.Tensor) -> torch.Tensor:
        starts = torch.tensor([self._local_start[table] for table in self.own] or [0])
        shifts = torch.tensor([self.table_starts[table] for table in self.own] or [0]) - starts
        return ids + shifts[torch.searchsorted(starts, ids, right=True) - 1]

    def local_padding(self, padding_ids: list[int]) -> list[int]:
        return [padding_ids[table] for table in self.own] or [-1]

    def local_counts(self, counts: np.ndarray | None) -> np.ndarray | None:
        if counts is None:
            return None
        starts = self.table_starts
        parts = [counts[starts[table] : starts[table] + self.table_sizes[table]] for table in self.own]
        return np.concatenate(parts) if parts else np.zeros(1, counts.dtype)

    def piece(self, start: int, stop: int, rank: int | None = None) -> Piece | None:
        table = int(np.searchsorted(self.table_starts, start, side="right")) - 1
        if self.plan[table] != (self.rank if rank is None else rank):
            return None
        # Another rank's local ids are of no use here: only how many there are.
        first = start - self.table_starts[table] + self._local_start.get(table, 0)
        return Piece(slice(0, stop - start), first, first + stop - start, slice(0, self.dim))


def balanced_plan(table_sizes: Sequence[int], world_size: int, lookups: Sequence[float] | None = None) -> list[int]:
    """The rank of each table: greedy, the costliest first, each to the rank with the least so far (ties: the lower).

    A table's cost is its share of all rows (bytes) plus its share of all lookups (`lookups`; default: equal shares).
    """
    sizes = np.asarray(table_sizes, np.float64)
    used = np.ones(len(sizes)) if lookups is None or not np.sum(lookups) else np.asarray(lookups, np.float64)
    cost = sizes / sizes.sum() + used / used.sum()
    load = np.zeros(world_size)
    plan = [0] * len(sizes)
    for table in np.argsort(-cost, kind="stable").tolist():
        plan[table] = int(load.argmin())
        load[plan[table]] += cost[table]
    return plan


def _added(parts: torch.Tensor) -> torch.Tensor:
    """Sum over the first dimension, one after the other; of 16-bit parts in float32, rounded once."""
    total = parts[0].float() if parts.dtype in HALVES else parts[0].clone()
    for part in parts[1:]:
        total += part
    return total.to(parts.dtype)


# ---- the modules ----------------------------------------------------------------------------------------------------


# What every rank tells the others before a lookup: whether it may go on, and what must be the same on all of them.
_WEIGHTED, _WEIGHTS_NEED_GRADIENT, _RECORDED = 1, 2, 4


class _Sent(NamedTuple):
    """A rank's share, checked and sorted by the ranks it goes to.

    batch: the share. payload: integers for rank 0, for rank 1, ... counts: how many ids each of them gets.
    unique_of_position: int32[N], the request that answers a position, -1 for padding; row sharding only.
    """

    batch: Batch
    payload: list[torch.Tensor]
    counts: list[int]
    unique_of_position: torch.Tensor | None = None


class _Plan(NamedTuple):
    """What all ranks know of one lookup: bags int[W], counts int[W, W], the ids that rank r sends to rank s."""

    sent: _Sent
    bags: list[int]
    counts: list[list[int]]


class _Sharded:
    """Mixed into a cached bag or collection: its cache holds one rank's part, and a lookup exchanges with the others.

    column, table: ids go to the ranks that hold a part of their rows, bags are pooled there, pooled outputs come back.
    row: each distinct id goes to the rank that has its row, rows come back and are pooled here, in batch order.
    """

    shardings: tuple[str, ...] = ("column", "row")

    def _build(
        self,
        construct: Callable[..., None],
        options: dict[str, Any],
        process_group: dist.ProcessGroup | None,
        sharding: str,
        output: str,
        plan: Sequence[int] | None = None,
    ) -> None:
        """Runs the bag's constructor (it asks `_place`). What raises on one rank raises on all, and none is left alone.

        construct: the constructor, but for its keywords `options`.
        """
        nn.Module.__init__(self)
        self._ranks = Ranks(process_group)
        try:
            self._divide_by(sharding, output, plan)
            self._given = _described(options)
            construct(**options)
            error = None
        except Exception as raised:
            if "_placement" in self.__dict__ and self._placement.disagreed:
                raise  # and so do the others
            error = raised
        raise_if_any(self._ranks, error)

    def _divide_by(self, sharding: str, output: str, plan: Sequence[int] | None) -> None:
        if sharding not in self.shardings:
            hint = " for one table (whole tables are placed by the Collection)" if sharding == "table" else ""
            raise ValueError(
                f"sharding={sharding!r} is not allowed{hint}: choose one of {', '.join(map(repr, self.shardings))}"
            )
        if output not in OUTPUTS:
            raise ValueError(f"output={output!r} is unknown: choose one of {', '.join(map(repr, OUTPUTS))}")
        if plan is not None and sharding != "table":
            raise ValueError(f'plan is given with sharding={sharding!r}: it is for sharding="table"')
        self.sharding, self.output, self._plan = sharding, output, plan

    def _place(self, table_sizes: list[int], counts: np.ndarray | None) -> Placement:
        placement = self._make_placement(table_sizes, counts)
        names = ("sharding", "output", "mode", "max_norm", "norm_type", "scale_grad_by_freq")
        placement.settings = {**{name: getattr(self, name) for name in names}, **self._given}
        if self.sharding == "table":
            placement.settings["plan"] = placement.plan
        return placement

    def _make_placement(self, table_sizes: list[int], counts: np.ndarray | None) -> ShardedPlacement:
        arguments = (table_sizes, self.embedding_dim, self._ranks, self.output == "share")
        if self.sharding == "column":
            return ColumnPlacement(*arguments)
        if self.sharding == "row":
            return RowPlacement(*arguments)
        if self._plan is None:
            ends = np.cumsum(table_sizes)
            lookups = None if counts is None else [float(part.sum()) for part in np.split(counts, ends[:-1])]
            self._plan = balanced_plan(table_sizes, self._ranks.size, lookups)
        return TablePlacement(*arguments, self._plan)

    def _initialize(self, weights: Sequence[torch.Tensor] | None) -> None:
        self._placement.go_on()  # every rank has its cache
        super()._initialize(weights)

    def init_(self, fn: Callable[[torch.Tensor], Any]) -> None:
        """As in one process; every rank must call it."""
        self._placement.together(self._cached_weight.settle)  # what one rank must not overwrite, none does
        super().init_(fn)

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The group whose ranks share the tables; None for one process."""
        return self._ranks.group

    # ---- a forward ----------------------------------------------------------------------------------------------

    def _sharded_lookup(self, make_batch: Callable[[], Batch]) -> torch.Tensor:
        """(B, T, D) of the share that make_batch() gives, recorded by autograd where a gradient is wanted."""
        plan = self._agree_on(make_batch)
        if self._placement.pools:
            local = self._exchange_bags(plan)
            return self._return_pooled(plan, self._lookup(local))
        local = self._exchange_requests(plan)
        rows = self._return_rows(plan, self._lookup(local).squeeze(1))
        batch = plan.sent.batch
        divisors = self._occurrences(plan) if self.scale_grad_by_freq and self.mode != "max" else None
        pooling = _RowPooling(self._cache.kernels, self.mode, plan.sent, len(self._placement.table_sizes), divisors)
        return _PoolRows.apply(rows, batch.weights, pooling)

    def _ahead_batch(self, *arguments: torch.Tensor) -> Batch:
        plan = self._agree_on(lambda: super(_Sharded, self)._ahead_batch(*arguments))
        return self._exchange_bags(plan) if self._placement.pools else self._exchange_requests(plan)

    def _agree_on(self, make_batch: Callable[[], Batch]) -> _Plan:
        """Checks this rank's share and learns of the others'; raises on all ranks or on none."""
        ranks, error = self._ranks, None
        numbers = torch.zeros(4 + ranks.size, dtype=torch.int64)
        try:
            self._cached_weight.check_in_place(self.weight)
            batch = make_batch()
            with torch.no_grad():
                ids = self._ids_of_the_whole(batch)
                sent = self._by_table(batch) if self._placement.pools else self._by_row(batch, ids)
            num_bags = (batch.offsets.numel() - 1) // len(self._placement.table_sizes)
            checksum = self._checksum(batch) if self.output == "gather" else 0
            numbers = torch.tensor([0, self._flags(batch), num_bags, checksum, *sent.counts])
        except Exception as raised:
            error = raised
            numbers[0] = 1
        told = ranks.all_gather(numbers)
        if told[:, 0].any():
            raise_together(ranks, error)
        self._check_alike(told)
        return _Plan(sent, told[:, 2].tolist(), told[:, 4:].tolist())

    def _flags(self, batch: Batch) -> int:
        weighted = batch.weights is not None
        recorded = torch.is_grad_enabled()
        weights_need_gradient = weighted and batch.weights.requires_grad and recorded
        recorded = recorded and (self.weight.requires_grad or weights_need_gradient)
        return _WEIGHTED * weighted + _WEIGHTS_NEED_GRADIENT * weights_need_gradient + _RECORDED * recorded

    @staticmethod
    def _checksum(batch: Batch) -> int:
        checksum = zlib.crc32(batch.values.numpy(), zlib.crc32(batch.offsets.numpy()))
        return checksum if batch.weights is None else zlib.crc32(batch.weights.detach().numpy(), checksum)

    def _check_alike(self, told: torch.Tensor) -> None:
        flags = told[:, 1].tolist()
        for bit, what in (
            (_WEIGHTED, "pass per_sample_weights"),
            (_WEIGHTS_NEED_GRADIENT, "want the gradient of per_sample_weights"),
            (_RECORDED, "record a graph (grad mode on, and a trainable table)"),
        ):
            does = [bool(flag & bit) for flag in flags]
            if any(does) and not all(does):
                raise ValueError(
                    f"ranks {[rank for rank, yes in enumerate(does) if yes]} of {len(does)} {what} and the others do "
                    f"not: all ranks that share a table must call it alike, or their exchanges would not match"
                )
        if self.output == "gather" and not (told == told[0]).all():
            raise ValueError(
                'output="gather" is for ranks that all pass the same batch, and these differ '
                f'({told[:, 2].tolist()} bags): use output="share" where each rank has its own share'
            )

    def _ids_of_the_whole(self, batch: Batch) -> torch.Tensor:
        """int64[N], padding kept. Raises ValueError for an id outside its table."""
        sizes, starts = self._placement.table_sizes, self._placement.table_starts
        if len(sizes) == 1:
            bad = (batch.values < 0) | (batch.values >= sizes[0])
            ids = batch.values
        else:
            table = torch.repeat_interleave(torch.arange(len(sizes)), self._table_ends(batch).diff())
            bad = (batch.values < 0) | (batch.values >= torch.tensor(sizes)[table])
            ids = batch.values + torch.tensor(starts)[table]
        if bad.any():
            position = int(bad.nonzero()[0, 0])
            number = 0 if len(sizes) == 1 else int(table[position])
            raise ValueError(
                f"id {int(batch.values[position])} at position {position} is outside the valid range"
                f"{f' of table {number}' if len(sizes) > 1 else ''}: 0..{sizes[number] - 1}"
            )
        return ids

    def _table_ends(self, batch: Batch) -> torch.Tensor:
        """int64[T+1]: the ids of table t are values[ends[t]:ends[t+1]]."""
        num_tables = len(self._placement.table_sizes)
        bags = (batch.offsets.numel() - 1) // num_tables
        return batch.offsets[::bags] if bags else torch.zeros(num_tables + 1, dtype=torch.int64)

    def _padding_in(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor] | None:
        """As in one process; but where any rank's tables have padding, no rank leaves out what follows: an exchange."""
        found = super()._padding_in(batch)
        if found is None and self.sharding == "table" and max(self._table_padding) >= 0:
            nothing = torch.zeros(self._padding_ids.numel() + 1, dtype=torch.int64)
            return nothing[:0], nothing
        return found

    # ---- column, table: bags travel to the rows -----------------------------------------------------------------

    def _tables_of(self, rank: int) -> list[int]:
        """The tables of which `rank` holds columns."""
        placement = self._placement
        return placement.tables_of[rank] if self.sharding == "table" else list(range(len(placement.table_sizes)))

    def _by_table(self, batch: Batch) -> _Sent:
        """For each rank: the lengths of its tables' bags, then their ids."""
        ends = self._table_ends(batch).tolist()
        lengths = batch.offsets.diff().view(len(ends) - 1, -1)
        narrow = torch.int32 if max(self._placement.table_sizes) < 2**31 else torch.int64
        payload, counts = [], []
        for rank in range(self._ranks.size):
            if rank and self.sharding == "column":
                payload.append(payload[0])
                counts.append(counts[0])
                continue
            tables = self._tables_of(rank)
            parts = [batch.values[ends[table] : ends[table + 1]] for table in tables]
            counts.append(sum(part.numel() for part in parts))
            payload.append(torch.cat([lengths[tables].reshape(-1), *parts]).to(narrow))
        return _Sent(batch, payload, counts)

    def _exchange_bags(self, plan: _Plan) -> Batch:
        """The bags of all ranks over the tables that this rank has a part of, table-major, rank after rank."""
        ranks, me = self._ranks, self._ranks.rank
        tables = self._tables_of(me)
        sources = [me] if self.output == "gather" else range(ranks.size)
        if self.output == "gather":
            received = [plan.sent.payload[me]]
        else:
            send = [part.numel() for part in plan.sent.payload]
            receive = [len(tables) * plan.bags[rank] + plan.counts[rank][me] for rank in sources]
            received = ranks.all_to_all(torch.cat(plan.sent.payload), send, receive, "ids").split(receive)
        weights = self._exchange_weights(plan, tables)
        if not tables:  # the table of one row that this rank keeps gets an empty bag for each
            return Batch(torch.empty(0, dtype=torch.int64), torch.zeros(1 + sum(plan.bags), dtype=torch.int64), weights)
        num_lengths = [len(tables) * plan.bags[rank] for rank in sources]
        lengths = [part[:n].long().view(len(tables), -1) for part, n in zip(received, num_lengths, strict=True)]
        values = torch.cat([part[n:] for part, n in zip(received, num_lengths, strict=True)]).long()
        if len(tables) > 1 and len(lengths) > 1:
            order = _table_major_order(torch.stack([part.sum(1) for part in lengths]))
            values = values[order]
            weights = None if weights is None else weights[order]
        ends = torch.cat(lengths, 1).reshape(-1).cumsum(0)
        return Batch(values, torch.cat([ends.new_zeros(1), ends]), weights)

    def _exchange_weights(self, plan: _Plan, tables: list[int]) -> torch.Tensor | None:
        """per_sample_weights of the ids that come here, in the order of the ranks; differentiable."""
        batch, ranks = plan.sent.batch, self._ranks
        if batch.weights is None:
            return None
        weights = SumOfRanks.apply(batch.weights, ranks) if self.output == "gather" else batch.weights
        if self.sharding == "column":
            sent = weights.repeat(1 if self.output == "gather" else ranks.size)
        else:
            ends = self._table_ends(batch).tolist()
            by_table = [weights[start:end] for start, end in itertools.pairwise(ends)]
            to = [ranks.rank] if self.output == "gather" else range(ranks.size)
            sent = torch.cat([weights[:0], *(by_table[table] for rank in to for table in self._tables_of(rank))])
        if self.output == "gather":
            return sent
        receive = [plan.counts[rank][ranks.rank] for rank in range(ranks.size)]
        return _Exchange.apply(sent, ranks, plan.sent.counts, receive)

    def _return_pooled(self, plan: _Plan, out: torch.Tensor) -> torch.Tensor:
        """(B, T, D) from this rank's part of all bags, `out` (G, T', D')."""
        ranks, me = self._ranks, self._ranks.rank
        widths = self._placement.widths if self.sharding == "column" else [self.embedding_dim] * ranks.size
        tables = [len(self._tables_of(rank)) for rank in range(ranks.size)]
        shapes = [(plan.bags[me], tables[rank], widths[rank]) for rank in range(ranks.size)]
        receive = [bags * t * width for bags, t, width in shapes]
        flat = out[:, : tables[me]].reshape(-1)
        if self.output == "gather":
            flat = _GatherSame.apply(flat, ranks, receive)
        else:
            send = [plan.bags[rank] * tables[me] * widths[me] for rank in range(ranks.size)]
            flat = _Exchange.apply(flat, ranks, send, receive)
        parts = [part.view(shape) for part, shape in zip(flat.split(receive), shapes, strict=True)]
        if self.sharding == "column":
            return torch.cat(parts, 2)
        order = [table for rank in range(ranks.size) for table in self._tables_of(rank)]
        return torch.cat(parts, 1)[:, torch.argsort(torch.tensor(order))]

    # ---- row: rows travel to the bags ---------------------------------------------------------------------------

    def _by_row(self, batch: Batch, ids: torch.Tensor) -> _Sent:
        """For each rank: the distinct ids of the share that it has, ascending, as its local ids."""
        size, placement = self._ranks.size, self._placement
        starts = placement.table_starts
        padding = torch.tensor([start + i for start, i in zip(starts, self._table_padding, strict=True) if i >= 0])
        # With max_norm, nn.EmbeddingBag renormalises every row of the input, padding too: it is requested then.
        kept = ~torch.isin(ids, padding) if padding.numel() else torch.ones_like(ids, dtype=torch.bool)
        unique, number = torch.unique(ids if self.max_norm is not None else ids[kept], return_inverse=True)
        owner = unique % size
        order = torch.argsort(owner, stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(order.numel())
        unique_of_position = torch.full((ids.numel(),), -1, dtype=torch.int32)
        unique_of_position[kept] = place[number[kept] if self.max_norm is not None else number].int()
        counts = torch.bincount(owner, minlength=size).tolist()
        narrow = torch.int32 if placement.local_sizes[0] < 2**31 else torch.int64
        payload = list((unique // size)[order].to(narrow).split(counts))
        return _Sent(batch, payload, counts, unique_of_position)

    def _received_counts(self, plan: _Plan) -> list[int]:
        """How many requests come from each rank."""
        me = self._ranks.rank
        return [plan.counts[rank][me] for rank in range(self._ranks.size)]

    def _exchange_requests(self, plan: _Plan) -> Batch:
        """The requests of all ranks for this one's rows, each a bag of its own."""
        ranks = self._ranks
        if self.output == "gather":
            values = plan.sent.payload[ranks.rank]
        else:
            receive = self._received_counts(plan)
            values = ranks.all_to_all(torch.cat(plan.sent.payload), plan.sent.counts, receive, "ids")
        return Batch(values.long(), torch.arange(values.numel() + 1), None)

    def _return_rows(self, plan: _Plan, rows: torch.Tensor) -> torch.Tensor:
        """(U, D): the rows that this rank requested, from `rows` (n, D), those that others requested here."""
        ranks, dim = self._ranks, self.embedding_dim
        receive = [count * dim for count in plan.sent.counts]
        if self.output == "gather":
            flat = _GatherSame.apply(rows.reshape(-1), ranks, receive)
        else:
            send = [count * dim for count in self._received_counts(plan)]
            flat = _Exchange.apply(rows.reshape(-1), ranks, send, receive)
        return flat.view(-1, dim)

    def _occurrences(self, plan: _Plan) -> torch.Tensor:
        """int64[U]: how often each requested id occurs in the batch of all ranks."""
        ranks, sent = self._ranks, plan.sent
        used = sent.unique_of_position[sent.unique_of_position >= 0].long()
        own = torch.bincount(used, minlength=sum(sent.counts))
        if self.output == "gather" or ranks.size == 1:
            return own
        receive = self._received_counts(plan)
        requests = ranks.all_to_all(torch.cat(sent.payload), sent.counts, receive, "ids").long()
        counted = ranks.all_to_all(own, sent.counts, receive, "numbers")
        unique, number = torch.unique(requests, return_inverse=True)
        totals = torch.zeros(unique.numel(), dtype=torch.int64).index_add_(0, number, counted)
        return ranks.all_to_all(totals[number], receive, sent.counts, "numbers")


def _described(options: dict[str, Any]) -> dict[str, Any]:
    """Of a bag's keywords, what all ranks must give alike and its placement does not see; to be compared."""
    weights, dtype = options.get("_weight"), options.get("dtype")
    if dtype is None:
        dtype = torch.get_default_dtype() if weights is None or not len(weights) else weights[0].dtype
    given = None if weights is None else "given"
    return {"padding_idx": str(options.get("padding_idx")), "dtype": str(dtype), "_weight": given}


def _table_major_order(lengths: torch.Tensor) -> torch.Tensor:
    """int64[N]: where the ids stand, in the order table, rank, that come in the order rank, table; lengths (W, T)."""
    starts = (lengths.reshape(-1).cumsum(0) - lengths.reshape(-1)).view(lengths.shape).t().reshape(-1)
    lengths = lengths.t().reshape(-1)
    shifts = starts - (lengths.cumsum(0) - lengths)
    return torch.repeat_interleave(shifts, lengths) + torch.arange(int(lengths.sum()))


class _RowPooling:
    """Pools bags from the rows that came back, with the kernels that pool from the cache: the same sums and bits."""

    def __init__(self, kernels: Any, mode: str, sent: _Sent, num_tables: int, divisors: torch.Tensor | None) -> None:
        self.kernels, self.mode, self.num_tables, self.divisors = kernels, mode, num_tables, divisors
        self.offsets, self.unique_of_position = sent.batch.offsets, sent.unique_of_position
        self.place = torch.arange(sum(sent.counts), dtype=torch.int32)
        self.chosen: torch.Tensor | None = None
        # Padding ids that were requested for max_norm alone: no position adds to their gradient.
        self.unused = torch.ones(self.place.numel(), dtype=torch.bool)
        self.unused[self.unique_of_position[self.unique_of_position >= 0].long()] = False

    def forward(self, rows: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        """(B, T, D) from rows (U, D) and per_sample_weights (N,)."""
        common = (rows, rows.shape[1], self.place, self.unique_of_position, self.offsets)
        if self.mode == "max":
            out, self.chosen = self.kernels.pool_max(*common, self.num_tables)
            return out
        return self.kernels.pool(*common, weights, self.mode == "mean", self.num_tables)

    def rows_gradient(self, grad: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        """(U, D), each row's sum in batch order."""
        arguments = (grad, self.unique_of_position, self.offsets)
        places = (self.place, self.place.numel())
        if self.mode == "max":
            values = self.kernels.pool_max_backward(*arguments, self.chosen, *places)
        else:
            values = self.kernels.pool_backward(*arguments, weights, self.mode == "mean", False, *places)
        values[self.unused] = 0
        return values if self.divisors is None else values / self.divisors.clamp(min=1).unsqueeze(1)


class _PoolRows(torch.autograd.Function):
    """Records a _RowPooling as a function of the rows and of per_sample_weights."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor, weights: torch.Tensor | None, pooling: _RowPooling):
        ctx.pooling = pooling
        ctx.save_for_backward(rows, *([] if weights is None else [weights]))
        rows, weights = rows.detach().contiguous(), None if weights is None else weights.detach()
        return pooling.forward(rows, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        pooling = ctx.pooling
        rows, *saved = ctx.saved_tensors  # read once: checkpointing hands them out once
        weights = saved[0].detach() if saved else None
        rows_gradient = weights_gradient = None
        with plain_mode():
            if ctx.needs_input_grad[0]:
                rows_gradient = pooling.rows_gradient(grad, weights)
            if ctx.needs_input_grad[1]:
                weights_gradient = pooling.kernels.weight_gradient(
                    grad, rows.contiguous(), rows.shape[1], pooling.place, pooling.unique_of_position, pooling.offsets
                )
        return rows_gradient, weights_gradient, None


class ShardedFreqAwareEmbeddingBag(_Sharded, FreqAwareEmbeddingBag):
    """FreqAwareEmbeddingBag whose table is divided over the ranks of a process group.

    Args:
        num_embeddings, embedding_dim: of the whole table; all other keywords as in FreqAwareEmbeddingBag, the same on
            all ranks. Sizes (`cache_ratio`, `num_slots`, `max_cache_bytes`) hold for each rank's cache; the smallest
            that a rank gives is used.
        process_group: a gloo group; None: the default group, or one process where torch.distributed is not used.
        sharding: "column": a rank caches its columns of all rows. "row": it caches its share of the rows, whole.
        output: "share": each rank passes its own share of the batch, of any size, and gets that share's full width;
            table gradients are averaged over the ranks. "gather": all pass the same batch and get the same output.

    Whatever reads or writes the table (forwards and their backwards, `prefetch`, `state_dict`, `logical_weight`,
    `init_`, the optimizer's `step` and `state_dict`, `optim.clip_grad_norm_`) must be called by all ranks, in one
    order. `weight` is this rank's cache block; `state_dict()` is the whole table on every rank. Settings and seeds must
    be the same on all ranks; `_weight` is taken from the first; counts may be each rank's own, unless whole tables are
    placed by them.

    Raises:
        ValueError: more ranks than columns, settings that differ among ranks, and what FreqAwareEmbeddingBag raises.
        RuntimeError: an exchange failed, since another rank has died or left.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        process_group: dist.ProcessGroup | None = None,
        sharding: str = "column",
        output: str = "share",
        **options: Any,
    ) -> None:
        construct = functools.partial(super().__init__, num_embeddings, embedding_dim)
        self._build(construct, options, process_group, sharding, output)

    def forward(
        self,
        input: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Pooled rows (B, D) of this rank's B bags; arguments as in FreqAwareEmbeddingBag.forward."""
        return self._sharded_lookup(lambda: self._batch(input, offsets, per_sample_weights)).squeeze(1)

    def extra_repr(self) -> str:
        """As for the whole bag, and this rank's part."""
        return f"{super().extra_repr()}, sharding={self.sharding!r}, rank={self._ranks.rank} of {self._ranks.size}"


class ShardedFreqAwareEmbeddingBagCollection(_Sharded, FreqAwareEmbeddingBagCollection):
    """FreqAwareEmbeddingBagCollection whose tables are divided over the ranks of a process group.

    Args:
        As ShardedFreqAwareEmbeddingBag, and
        sharding: also "table": whole tables, each on one rank.
        plan: for "table": the rank of each table; None: greedy balance of bytes and lookups (`balanced_plan`).
    """

    shardings = SHARDINGS

    def __init__(
        self,
        table_sizes: Sequence[int],
        embedding_dim: int,
        *,
        process_group: dist.ProcessGroup | None = None,
        sharding: str = "column",
        plan: Sequence[int] | None = None,
        output: str = "share",
        **options: Any,
    ) -> None:
        construct = functools.partial(super().__init__, table_sizes, embedding_dim)
        self._build(construct, options, process_group, sharding, output, plan)

    def forward(
        self,
        values: torch.Tensor,
        offsets: torch.Tensor,
        per_sample_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Pooled rows (B, T, D) of this rank's bags; arguments as in FreqAwareEmbeddingBagCollection.forward."""
        return self._sharded_lookup(lambda: self._batch(values, offsets, per_sample_weights))

    def extra_repr(self) -> str:
        """As for the whole collection, and this rank's part."""
        return f"{super().extra_repr()}, sharding={self.sharding!r}, rank={self._ranks.rank} of {self._ranks.size}"
