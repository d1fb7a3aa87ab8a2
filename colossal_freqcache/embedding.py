"""FreqAwareEmbeddingBag and FreqAwareEmbeddingBagCollection: nn.EmbeddingBag over a cached table, many over one cache.

Shapes: N ids in a batch (repeats), U unique rows, C slots, R rows, D embedding width, B bags (a table), T tables.
Source of the semantics: torch.nn.EmbeddingBag, argument by argument; `bag.weight` alone differs: it is the cache block.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from copy import copy as shallow_copy
from copy import deepcopy
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .block import CachedWeight, Token, plain_mode
from .cache import CHUNK_BYTES, Lookup, RowCache
from .config import FreqCacheConfig
from .device_cache import BadOffsetsError, DeviceCache
from .eviction import EvictionStrategy
from .frequency import as_counts
from .metrics import CacheStats
from .placement import Placement
from .rounding import HALVES
from .row_layout import RowLayout
from .row_rules import make_rule
from .step_hooks import install_step_hooks

__all__ = ["FreqAwareEmbeddingBag", "FreqAwareEmbeddingBagCollection"]

MODES = ("sum", "mean", "max")

MOST_SIZES = 8  # of 2-D inputs, whose offsets are kept


class _Batch(NamedTuple):
    """A forward's input: values int64[N], offsets int64[T*B+1] with both ends, weights (N,) or None."""

    values: torch.Tensor
    offsets: torch.Tensor
    weights: torch.Tensor | None
    num_offsets: int = 0  # of them, those that the caller gave
    given: tuple = ()  # values and offsets as the caller gave them, and whether the offsets have an end


class _CachedBags(nn.Module):
    """T tables of one width over one RowCache: what both public classes share. They differ in the shapes in and out."""

    _graph_input: torch.Tensor | None = None  # what autograd sees in the Parameter's place: hooks may stand between
    _last_ends: tuple = (lambda *given: False, None)  # which offsets were given last, and their copy on the device
    _looks_ahead: object = None  # the iteration of a Lookahead that says what comes next

    def __init__(
        self,
        table_sizes: Sequence[int],
        embedding_dim: int,
        padding_ids: Sequence[int],
        *,
        max_norm: float | None,
        norm_type: float,
        scale_grad_by_freq: bool,
        mode: str,
        sparse: bool,
        weights: Sequence[torch.Tensor] | None,
        include_last_offset: bool,
        device: Any,
        dtype: torch.dtype | None,
        ids_freq_mapping: Any,
        config: FreqCacheConfig,
    ) -> None:
        super().__init__()
        for number, rows in enumerate(table_sizes):
            if not isinstance(rows, Integral) or rows < 1:
                raise ValueError(f"table {number} has {rows!r} rows: give an int of at least 1")
        if not isinstance(embedding_dim, Integral) or embedding_dim < 1:
            raise ValueError(f"embedding_dim={embedding_dim!r} is not allowed: an int of at least 1")
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} is unknown: choose one of {', '.join(map(repr, MODES))}")
        if max_norm is not None and not max_norm >= 0:
            raise ValueError(f"max_norm={max_norm!r} is not allowed: a norm of at least 0, or None")
        device = _device_of(device)
        if dtype is None:
            dtype = torch.get_default_dtype() if weights is None else weights[0].dtype
        if dtype not in (torch.float32, torch.float64, *HALVES):
            raise ValueError(f"dtype={dtype} is not allowed: torch.float32, float64, bfloat16 or float16")
        table_sizes = [int(rows) for rows in table_sizes]
        self.embedding_dim = embedding_dim = int(embedding_dim)
        self.max_norm = max_norm
        self.norm_type = float(norm_type)
        self.scale_grad_by_freq = scale_grad_by_freq
        self.mode = mode
        self.sparse = sparse
        self.include_last_offset = include_last_offset
        counts = as_counts(ids_freq_mapping, list(table_sizes))
        rule = None if config.optimizer is None else make_rule(config.optimizer)
        self._placement = placement = self._place(table_sizes, counts)
        config = placement.agree(config)

        def layout_of(dim: int) -> RowLayout:
            return RowLayout(dim, dtype) if rule is None else rule.layout(dim, dtype, {})

        self._even: dict[tuple[int, int], torch.Tensor] = {}
        install_step_hooks()
        with plain_mode():
            self._table_padding = list(padding_ids)
            padding_ids = torch.tensor(placement.local_padding(self._table_padding), dtype=torch.int64)
            self._padding_ids = padding_ids.to(device)
            self._no_padding = torch.full_like(self._padding_ids, -1)
            arguments = (
                placement.local_sizes,
                layout_of(placement.local_dim),
                config,
                placement.local_counts(counts),
                layout_of(placement.budget_dim).row_bytes,
            )
            on_device = device.type != "cpu" or config.kernels == "cuda"
            if on_device and placement.world_size > 1:
                raise NotImplementedError(
                    f"device={str(device)!r}, kernels={config.kernels!r}: tables sharded over ranks are cached on the "
                    f"CPU only for now"
                )
            self._cache = DeviceCache(*arguments, device=device) if on_device else RowCache(*arguments)
            placement.attach(self._cache)
            self._initialize(weights)
            self._cache.warm_up()
            self._cached_weight = CachedWeight(self._cache, rule, placement)
        self.weight = self._cached_weight.parameter

    def _place(self, table_sizes: list[int], counts: np.ndarray | None) -> Placement:
        """Which part of the tables this module's cache holds: all of it, unless a subclass shards them."""
        return Placement(table_sizes, self.embedding_dim)

    # ---- initialisation -----------------------------------------------------------------------------------------

    def _initialize(self, weights: Sequence[torch.Tensor] | None) -> None:
        """Every row's first record: given weights, or what nn.EmbeddingBag draws table by table from the same seed.

        A second thread writes a large table while this one draws.
        """

        def write(first: int, values: torch.Tensor) -> None:
            with plain_mode():
                self._placement.initialise(first, values)

        chunks = self._first_weights(weights)
        if self._cache.num_rows * self._cache.layout.row_bytes <= CHUNK_BYTES:
            for first, values in chunks:
                write(first, values)
            return
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="freqcache-initialize") as writer:
            written: Future | None = None
            for first, values in chunks:
                if written is not None:
                    written.result()
                written = writer.submit(write, first, values)
            written.result()

    def _first_weights(self, weights: Sequence[torch.Tensor] | None) -> Iterator[tuple[int, torch.Tensor]]:
        """(first id, weights (n, D) of that and the next ids), table after table."""
        dtype = self._cache.layout.dtype
        for table, (start, rows) in enumerate(self._table_ranges()):
            padding = self._table_padding[table]
            for first, last in self._placement.chunks(start, start + rows):
                if weights is None:
                    values = torch.empty(last - first, self.embedding_dim, dtype=dtype).normal_()
                    if padding >= 0 and first <= start + padding < last:
                        values[start + padding - first] = 0
                else:
                    values = self._placement.of_first_rank(weights[table].detach()[first - start : last - start])
                yield first, values

    def init_(self, fn: Callable[[torch.Tensor], Any]) -> None:
        """Initialises the weights in place: fn(values) gets (n, D) tensors of consecutive ids, table after table.

        A table of up to 16 MiB comes in one call, a larger one in pieces of a multiple of 16 rows, so an elementwise
        draw (uniform_, normal_) gives the numbers of one call over the whole. Optimizer state stays. On several ranks
        each draws for itself and keeps its part: give all the same seed.
        """
        weight = self._cached_weight
        weight.settle()
        with plain_mode():
            for first, last in self._placement.chunks(0, self._placement.num_rows):
                values = weight.logical_chunk("weight", first, last).contiguous()
                fn(values)
                weight.set_logical("weight", values, first)

    def _table_ranges(self) -> list[tuple[int, int]]:
        """(first id of the whole, rows) of each table."""
        return self._placement.table_ranges()

    # ---- lookup -------------------------------------------------------------------------------------------------

    def _lookup(self, batch: _Batch) -> torch.Tensor:
        """(B, T, D): pooled rows, recorded by autograd where a gradient is wanted."""
        weight = self._cached_weight
        weight.check_in_place(self.weight)
        with weight.lock:
            return self._locked_lookup(batch, weight)

    def _locked_lookup(self, batch: _Batch, weight: CachedWeight) -> torch.Tensor:
        wants_graph = torch.is_grad_enabled() and (
            weight.parameter.requires_grad or (batch.weights is not None and batch.weights.requires_grad)
        )
        with plain_mode():
            if wants_graph and self._cache.is_capturing() and weight.parameter.requires_grad:
                _check_replayable(weight, weight.fused_step())
            lookup = self._prepare(batch)
        if not wants_graph:
            try:
                return self._pooling(lookup, None).forward(batch.weights)
            finally:
                self._cache.unpin(lookup.hold)
        token = weight.hold(lookup.hold)
        try:
            graph_input = weight.parameter if self._graph_input is None else self._graph_input
            return _PoolFunction.apply(graph_input, batch.weights, self._pooling(lookup, token))
        except BaseException:
            weight.release(token)
            raise

    def _pooling(self, lookup: Any, token: Token | None) -> "_Pooling":
        return (_DevicePooling if self._cache.on_device else _Pooling)(self, lookup, token)

    def _prepare(self, batch: _Batch) -> Lookup:
        """Resident, pinned and, with max_norm, renormalised rows."""
        cache = self._cache

        def prepare() -> Lookup:
            self._cached_weight.settle()
            return self._asked(cache.prepare, batch)

        if self.max_norm is not None and cache.is_capturing():
            raise NotImplementedError(
                f"max_norm={self.max_norm!r} in a CUDA graph: which rows are renormalised is decided by the host"
            )
        lookup = self._placement.together(prepare, lambda lookup: cache.unpin(lookup.hold))
        if self.max_norm is not None:
            try:
                padding = self._padding_in(batch)
                if padding is not None:  # nn.EmbeddingBag renormalises every row of the input, padding too
                    found = self._placement.together(
                        lambda: cache.prepare(*padding, self._no_padding, counted=False),
                        lambda found: cache.unpin(found.hold),
                    )
                    cache.unpin(found.hold)  # nothing evicts before the next prepare
                    self._renormalize(found.slot_of_unique)
                self._renormalize(lookup.slot_of_unique)
            except BaseException:
                cache.unpin(lookup.hold)
                raise
        return lookup

    def _asked(self, call: Callable[..., Any], batch: _Batch) -> Any:
        """call(batch) of the cache; where a device finds bad offsets, says what is wrong with them."""
        try:
            return call(batch.values, batch.offsets, self._padding_ids)
        except BadOffsetsError:
            self._check_offsets(batch.offsets.cpu(), batch.values.numel(), batch.num_offsets)
            raise

    def _renormalize(self, slots: torch.Tensor) -> None:
        changed = self._placement.renormalize(slots, self.max_norm, self.norm_type)
        self._cache.mark_dirty(slots[changed])
        self._cached_weight.version += int(changed.any())

    def _padding_in(self, batch: _Batch) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(values, offsets) of a batch that has, in one bag per table, the padding id where `batch` has it; or None."""
        if (self._padding_ids < 0).all() or not batch.values.numel():
            return None
        num_tables = self._padding_ids.numel()
        ends = batch.offsets[:: (batch.offsets.numel() - 1) // num_tables]
        table = torch.repeat_interleave(torch.arange(num_tables, device=ends.device), ends.diff())
        found = torch.bincount(table[batch.values == self._padding_ids[table]], minlength=num_tables) > 0
        return self._padding_ids[found], torch.cat([found.new_zeros(1, dtype=torch.int64), found.cumsum(0)])

    def _checked_batch(
        self,
        values: torch.Tensor,
        offsets: torch.Tensor,
        offsets_end: bool,
        weights: torch.Tensor | None,
    ) -> _Batch:
        """The batch as int64 host tensors; `offsets_end`: the last offset is the end of the last bag."""
        if torch.jit.is_tracing():
            raise RuntimeError("a cached table cannot be traced: which rows are resident changes with every batch")
        num_values = values.numel()
        num_offsets = offsets.numel()
        if offsets_end and num_offsets < 1:
            raise ValueError("offsets has 0 entries: with include_last_offset it holds one more than there are bags")
        if num_offsets == 0 and num_values:
            raise ValueError(f"offsets has 0 entries for {num_values} ids: every id must stand in a bag")
        if self._cache.on_device:
            return self._device_batch(values, offsets, offsets_end, self._checked_weights(values, weights))
        # A copy: the backward reads the offsets, and the caller may refill its buffer before that.
        offsets = offsets.detach().to("cpu", torch.int64).contiguous()
        offsets, is_rising = self._cache.kernels.copy_offsets(offsets, num_values, offsets_end)
        first, last = offsets.numpy()[[0, -1]].tolist()
        if (num_offsets and first != 0) or not is_rising or last != num_values:
            self._check_offsets(offsets, num_values, num_offsets)
        weights = self._checked_weights(values, weights)
        values = values.detach().to("cpu", torch.int64).reshape(-1).contiguous()
        return _Batch(values, offsets, weights)

    def _device_batch(
        self, values: torch.Tensor, offsets: torch.Tensor, offsets_end: bool, weights: torch.Tensor | None
    ) -> _Batch:
        """The batch on the cache's device, where it will be checked; the tensors of a batch that was announced."""
        device, num_offsets = self._cache.device, offsets.numel()
        if weights is not None:
            weights = weights.to(device)
        found = self._cache.ahead.find(values, offsets, offsets_end)
        if found is not None:
            return _Batch(*found, weights, num_offsets)
        last_offsets, ends = self._last_ends
        # numpy may have refilled those in host memory, and no version tells.
        # A captured graph reads the caller's own tensor: what was made of it before is not the graph's.
        is_capturing = self._cache.is_capturing()
        is_known = not is_capturing and offsets.device.type != "cpu"
        if not (is_known and last_offsets(offsets, offsets_end, values.numel())):
            ends = offsets.detach().to(device, torch.int64)
            if not offsets_end:
                ends = torch.cat([ends, ends.new_full((1,), values.numel())])
            elif ends.data_ptr() == offsets.data_ptr():
                ends = ends.clone()  # the backward reads them, and the caller may refill its buffer before that
            ends = ends.contiguous()
            if not is_capturing:
                self._last_ends = _Seen(offsets, offsets_end, values.numel()), ends
        if ends.numel() == 1:  # no bag
            self._check_offsets(ends.cpu(), values.numel(), num_offsets)
        ids = values.detach().to(device, torch.int64).reshape(-1).contiguous()
        return _Batch(ids, ends, weights, num_offsets, (values, offsets, offsets_end))

    def _check_offsets(self, offsets: torch.Tensor, num_values: int, num_given: int) -> None:
        """ValueError for offsets int64[T*B+1] that are no bounds of bags; the caller gave the first `num_given`."""
        first, last = int(offsets[0]), int(offsets[-1])
        if num_given and first != 0:
            raise ValueError(f"offsets[0] is {first}: the first bag must start at 0")
        falls = (offsets.diff() < 0).nonzero()
        if falls.numel():
            number = int(falls[0, 0]) + 1
            if number == num_given:  # the end that was appended
                raise ValueError(
                    f"offsets[{number - 1}] is {int(offsets[number - 1])}, past the end of {num_values} ids"
                )
            raise ValueError(
                f"offsets[{number}] is {int(offsets[number])} after {int(offsets[number - 1])}: "
                f"offsets must not decrease"
            )
        if last != num_values:
            where = "past the end of" if last > num_values else "not the end of"
            raise ValueError(f"offsets[{num_given - 1}] is {last}, {where} {num_values} ids")

    def _checked_weights(self, values: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor | None:
        if weights is not None:
            if self.mode != "sum":
                raise NotImplementedError(
                    f"per_sample_weights with mode={self.mode!r}: they are supported for mode='sum' only"
                )
            if weights.shape != values.shape:
                raise ValueError(
                    f"per_sample_weights has shape {tuple(weights.shape)}, input {tuple(values.shape)}: they must agree"
                )
            if weights.dtype != self._cache.layout.dtype:
                raise TypeError(
                    f"per_sample_weights is {weights.dtype}, the table {self._cache.layout.dtype}: they must agree"
                )
            weights = weights.reshape(-1).contiguous()
        return weights

    def _prefetch(self, batch: _Batch) -> None:
        def prefetch() -> None:
            self._cached_weight.settle()
            self._asked(self._cache.prefetch, batch)

        with self._cached_weight.lock, plain_mode():
            self._placement.together(prefetch)

    # ---- the batches to come: for Lookahead -----------------------------------------------------------------------

    def _ahead_batch(self, *arguments: torch.Tensor) -> _Batch:
        """What this module's cache will be asked for by a forward of these arguments (without per_sample_weights)."""
        raise NotImplementedError

    def _look_ahead(self, who: object) -> None:
        """From here on `who` says what comes next; whoever did before is refused."""

        def begin() -> None:
            self._cache.ahead.end()
            if self._cache.config.evict_strategy is None and self._cache.can_foresee and not self._cache.foresees:
                self._cache.renew_policy(EvictionStrategy.LOOKAHEAD)

        self._looks_ahead = None
        with self._cached_weight.lock, plain_mode():
            self._placement.together(begin)
        self._looks_ahead = who
        self._ahead_kernels = self._cache.kernels_of_thread()

    def _wanted_ids(self, arguments: Sequence[torch.Tensor], executor: Executor) -> Future:
        """The distinct ids of a later forward's arguments, as a WantedIds to come; no arguments: none."""
        with plain_mode():
            batch = self._ahead_batch(*arguments) if arguments else self._no_batch()
        if self._cache.on_device:  # which sorts them out itself
            wanted: Future = Future()
            batch.values._freqcache_seen = _Seen(*batch.given)
            wanted.set_result((batch.values, batch.offsets, self._padding_ids))
            return wanted
        return executor.submit(
            self._cache.wanted_ids, batch.values, batch.offsets, self._padding_ids, self._ahead_kernels
        )

    def _no_batch(self) -> _Batch:
        numbers = {"dtype": torch.int64, "device": self._cache.device}
        return _Batch(torch.zeros(0, **numbers), torch.zeros(self._padding_ids.numel() + 1, **numbers), None)

    def _announce(self, who: object, wanted: Future) -> None:
        self._check_looks_ahead(who)
        with self._cached_weight.lock, plain_mode():
            self._cache.ahead.announce(wanted.result())

    def _hand_out(self, who: object, depth: int) -> None:
        """The next announced batch is about to be trained on; the `depth` behind it are admitted."""
        self._check_looks_ahead(who)

        def hand_out() -> None:
            self._cached_weight.settle(between_batches=True)
            self._cache.ahead.hand_out(depth)

        with self._cached_weight.lock, plain_mode():
            self._placement.together(hand_out)

    def _end_look_ahead(self, who: object, collected: bool) -> None:
        """`who` says no more. collected: by the garbage collector, in any thread and inside anything: later, then."""
        if self._looks_ahead is who:
            self._looks_ahead = None
            if collected:
                self._cache.ahead.abandoned = True
                return
            with self._cached_weight.lock, plain_mode():
                self._cache.ahead.end()

    def _check_looks_ahead(self, who: object) -> None:
        if self._looks_ahead is not who:
            raise RuntimeError(
                "another Lookahead (or another iteration of this one) has begun to look ahead for the same tables: "
                "iterate over one at a time (an evaluation in between can take the bare loader)"
            )

    # ---- cache --------------------------------------------------------------------------------------------------

    @property
    def stats(self) -> CacheStats:
        """What the cache did so far."""
        return self._cache.stats

    @property
    def num_slots(self) -> int:
        """Rows that the cache holds at most, now; it may grow up to `weight.shape[0]`."""
        return self._cache.num_slots

    @property
    def max_state_dict_bytes(self) -> int:
        """The largest table, in bytes, that is handed out as one tensor (state_dict, logical_weight, deepcopy)."""
        return self._cached_weight.max_state_dict_bytes

    @max_state_dict_bytes.setter
    def max_state_dict_bytes(self, num_bytes: int) -> None:
        self._cached_weight.max_state_dict_bytes = num_bytes

    def device_bytes(self) -> dict[str, int]:
        """Bytes by part.

        cache: num_slots * row_bytes, weight and optimizer state. reserved: from there to the ceiling (on a CPU
        untouched address space). index: all per-slot maps and marks. workspace: what grows with the largest batch and
        with the batches announced ahead.
        Parts on the host that grow with the table have "host" in their name.
        """
        return self._cache.num_bytes()

    def flush(self) -> None:
        """Writes every dirty row back to the store; the cache stays warm."""
        with self._cached_weight.lock, plain_mode():
            self._cached_weight.settle()
            self._cache.flush()

    def drop_optimizer_state(self) -> None:
        """Removes the optimizer's columns from all rows, so that another kind of optimizer can be bound.

        Raises:
            RuntimeError: a graph or a gradient is alive and the number of slots would change.
        """
        self._cached_weight.drop_state()

    # ---- nn.Module ----------------------------------------------------------------------------------------------

    def _table_key(self, table: int) -> str:
        """Name of a table's logical weight in state_dict."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        weight = self._cached_weight
        if not weight.in_state_dict:
            return
        num_bytes = self._placement.num_rows * self.embedding_dim * self._cache.layout.dtype.itemsize
        weight.check_bytes(num_bytes, "state_dict()")
        for table, (start, rows) in enumerate(self._table_ranges()):
            destination[prefix + self._table_key(table)] = weight.logical("weight", start, start + rows)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        if not self._cached_weight.in_state_dict:
            return
        stacked = prefix + "weight"
        if stacked in state_dict and self._table_key(0) != "weight":  # all tables, one below the other: split it
            rows = [rows for _, rows in self._table_ranges()]
            if tuple(state_dict[stacked].shape) == (sum(rows), self.embedding_dim):
                parts = state_dict[stacked].split(rows)
                own = {prefix + self._table_key(table): part for table, part in enumerate(parts)}
                state_dict = {**{key: value for key, value in state_dict.items() if key != stacked}, **own}
        names = {}
        mismatches = []
        for table, (start, rows) in enumerate(self._table_ranges()):
            key = prefix + self._table_key(table)
            names[key] = start
            if key not in state_dict:
                if strict:
                    missing_keys.append(key)
                continue
            values = state_dict[key]
            if tuple(values.shape) != (rows, self.embedding_dim):
                mismatches.append(
                    f"size mismatch for {key}: found {tuple(values.shape)}, the table is {(rows, self.embedding_dim)}"
                )
        if mismatches:
            error_msgs += mismatches
            return
        for key, start in names.items():
            if key in state_dict:
                self._cached_weight.set_logical("weight", state_dict[key].detach(), start)
        if strict:
            for key in state_dict:
                if key.startswith(prefix) and key not in names and self._owns_key(key[len(prefix) :]):
                    unexpected_keys.append(key)

    def _owns_key(self, name: str) -> bool:
        """Whether `name` (below the module's prefix) can only be meant for this module."""
        return name.split(".")[0] not in self._modules

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """`.to()`, `.double()` and the like: only what leaves dtype and device alone."""
        probe = torch.empty(0, dtype=self._cache.layout.dtype, device=self._cache.device)
        moved = fn(probe)
        if moved.dtype != probe.dtype:
            raise TypeError(
                f"a cached table cannot be cast from {probe.dtype} to {moved.dtype}: build it with dtype={moved.dtype}"
            )
        if moved.device != probe.device:
            raise NotImplementedError(
                f"a cached table cannot be moved from {probe.device} to {moved.device}: build it with "
                f"device={str(moved.device)!r}"
            )
        if probe.device.type == "cpu" and moved.is_shared():
            raise NotImplementedError("a cached table cannot be moved to shared memory: load its state_dict instead")
        return self

    def __deepcopy__(self, memo: dict) -> "_CachedBags":
        """A bag of its own over a copy of the table. No optimizer is bound; the one that will be starts afresh."""
        weight = self._cached_weight
        weight.check_bytes(self._cache.num_rows * self._cache.layout.row_bytes, "deepcopy() of the table")
        copy = type(self).__new__(type(self))
        memo[id(self)] = copy
        nn.Module.__init__(copy)
        own = ("_cache", "_cached_weight", "_placement", "_parameters", "_looks_ahead", "_ahead_kernels", "_last_ends")
        copy.__dict__.update({name: deepcopy(value, memo) for name, value in self.__dict__.items() if name not in own})
        with plain_mode():
            weight.settle()
            copy._cache = self._cache.clone()
            copy._placement = shallow_copy(self._placement)
            copy._placement.attach(copy._cache)
            copy._cached_weight = CachedWeight(copy._cache, weight.rule, copy._placement)
            copy._cached_weight.max_state_dict_bytes = weight.max_state_dict_bytes
            copy._cached_weight.state_is_initial = weight.state_is_initial
        copy.weight = copy._cached_weight.parameter
        copy.weight.requires_grad_(self.weight.requires_grad)
        memo[id(self.weight)] = copy.weight
        return copy

    def __reduce_ex__(self, protocol: int) -> Any:
        raise TypeError(f"{type(self).__name__} is not pickled: save state_dict(), which is the logical table")


class FreqAwareEmbeddingBag(_CachedBags):
    """nn.EmbeddingBag whose table has only its hot rows on the training device.

    Outputs, gradients and trained weights are those of the uncached module. `weight` is the one Parameter: the cache
    block (slots at the ceiling, D); the table itself is `logical_weight()` and `state_dict()["weight"]`.

    Args:
        num_embeddings: R, rows of the table. embedding_dim: D.
        padding_idx, max_norm, norm_type, scale_grad_by_freq, mode, include_last_offset: as in nn.EmbeddingBag;
            `padding_idx` is an id.
        sparse: accepted for compatibility; rows are trained sparsely in any case.
        _weight: (R, D) initial weights in id order; copied.
        device: where the cache is: None or "cpu", or "cuda" (the table stays in host memory).
        dtype: torch.float32, float64, bfloat16 or float16; None: torch's default. Rows of 16 bits are computed in
            float32, and their updates rounded stochastically: see docs/architecture.md.
        cache_ratio, num_slots, max_cache_bytes, warmup_ratio, evict_strategy, optimizer, store, kernels, rounding_seed:
            as in FreqCacheConfig.
        ids_freq_mapping: accesses of each id (R,), tensor, array, list or IdFrequency; None where unknown. The policy
            is then "s3fifo" by default, else "dataset".

    Raises:
        ValueError, TypeError: an argument is not allowed; the message names it, its value and what is allowed.

    Source: Fang et al. 2022 (arXiv:2208.05321).
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = True,
        _weight: torch.Tensor | None = None,
        include_last_offset: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        cache_ratio: float | None = None,
        num_slots: int | None = None,
        max_cache_bytes: int | None = None,
        ids_freq_mapping: Any = None,
        warmup_ratio: float = 1.0,
        evict_strategy: Any = None,
        optimizer: str | None = None,
        store: Any = "ram",
        kernels: str = "auto",
        rounding_seed: int = 0,
    ) -> None:
        if _weight is not None and tuple(_weight.shape) != (num_embeddings, embedding_dim):
            raise ValueError(
                f"_weight has shape {tuple(_weight.shape)}; num_embeddings and embedding_dim say "
                f"{(num_embeddings, embedding_dim)}"
            )
        super().__init__(
            [num_embeddings],
            embedding_dim,
            [_padding_id("padding_idx", padding_idx, num_embeddings)],
            max_norm=max_norm,
            norm_type=norm_type,
            scale_grad_by_freq=scale_grad_by_freq,
            mode=mode,
            sparse=sparse,
            weights=None if _weight is None else [_weight],
            include_last_offset=include_last_offset,
            device=device,
            dtype=dtype,
            ids_freq_mapping=ids_freq_mapping,
            config=FreqCacheConfig(
                cache_ratio=cache_ratio,
                num_slots=num_slots,
                max_cache_bytes=max_cache_bytes,
                warmup_ratio=warmup_ratio,
                evict_strategy=evict_strategy,
                optimizer=optimizer,
                store=store,
                kernels=kernels,
                rounding_seed=rounding_seed,
            ),
        )
        self.num_embeddings = num_embeddings
        self.padding_idx = None if padding_idx is None else self._table_padding[0]

    @classmethod
    def from_pretrained(
        cls,
        embeddings: torch.Tensor,
        freeze: bool = True,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = True,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        **cache_options: Any,
    ) -> "FreqAwareEmbeddingBag":
        """A bag over a copy of `embeddings` (R, D), as nn.EmbeddingBag.from_pretrained; `freeze`: it is not trained."""
        if embeddings.dim() != 2:
            raise ValueError(f"embeddings has {embeddings.dim()} dimensions: give a (rows, width) tensor")
        bag = cls(
            embeddings.shape[0],
            embeddings.shape[1],
            _weight=embeddings,
            max_norm=max_norm,
            norm_type=norm_type,
            scale_grad_by_freq=scale_grad_by_freq,
            mode=mode,
            sparse=sparse,
            include_last_offset=include_last_offset,
            padding_idx=padding_idx,
            **cache_options,
        )
        bag.weight.requires_grad_(not freeze)
        return bag

    def forward(
        self,
        input: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Pooled rows (B, D) of B bags.

        Args:
            input: ids, int32 or int64, any device: (B, n), or (N,) with `offsets`.
            offsets: (B,) start of each bag in a 1-D input; (B+1,) with include_last_offset.
            per_sample_weights: as `input` in shape, the table's dtype; mode "sum" only.

        Raises:
            ValueError, TypeError: bad ids, offsets or weights, before anything was changed.
            CacheTooSmallError: the batch's rows and those still in use pass the ceiling; nothing was changed.
        """
        batch = self._batch(input, offsets, per_sample_weights)
        return self._lookup(batch).squeeze(1)

    def prefetch(self, input: torch.Tensor, offsets: torch.Tensor | None = None) -> None:
        """Makes the rows of a later batch resident now, and keeps them so until the next forward that uses them.

        Those of an earlier prefetch that no forward has used are given up. Takes what `forward` takes; a 1-D input
        needs no offsets. A miss is counted here, and not again in the forward.
        """
        self._prefetch(self._ahead_batch(input, offsets))

    def _ahead_batch(self, input: torch.Tensor, offsets: torch.Tensor | None = None) -> _Batch:
        _check_integers("input", input)
        if offsets is None and input.dim() == 1:
            offsets = torch.zeros(1 + self.include_last_offset, dtype=torch.int64)
            offsets[1:] = input.numel()
        return self._batch(input, offsets, None)

    def logical_weight(self) -> torch.Tensor:
        """The whole table (R, D) in id order, newest values; a copy."""
        return self._cached_weight.logical("weight")

    def _batch(
        self, input: torch.Tensor, offsets: torch.Tensor | None, per_sample_weights: torch.Tensor | None
    ) -> _Batch:
        _check_integers("input", input)
        if offsets is not None:
            _check_integers("offsets", offsets)
        if input.dim() == 2:
            if offsets is not None:
                raise ValueError("offsets must be None for a 2-D input: its rows are the bags")
            return self._checked_batch(input, self._even_offsets(*input.shape), True, per_sample_weights)
        if input.dim() != 1:
            raise ValueError(f"input has {input.dim()} dimensions: give 1 (with offsets) or 2")
        if offsets is None:
            raise ValueError("offsets is None: a 1-D input needs the start of each bag")
        if offsets.dim() != 1:
            raise ValueError(f"offsets has {offsets.dim()} dimensions: give 1")
        return self._checked_batch(input, offsets, self.include_last_offset, per_sample_weights)

    def _even_offsets(self, num_bags: int, size: int) -> torch.Tensor:
        """Where bags of one size start and end, int64[B+1]; the same tensor again for the same sizes."""
        is_capturing = self._cache.is_capturing()  # what a graph computes is there after a replay only, and its own
        offsets = None if is_capturing else self._even.get((num_bags, size))
        if offsets is None:
            with torch.inference_mode(False):
                offsets = torch.arange(num_bags + 1, device=self._cache.device) * size
            if is_capturing:
                return offsets
            if len(self._even) == MOST_SIZES:
                del self._even[next(iter(self._even))]
            self._even[num_bags, size] = offsets
        return offsets

    def _table_key(self, table: int) -> str:
        return "weight"

    def extra_repr(self) -> str:
        """Sizes, mode, slots and, where one is set, padding_idx: what `repr` shows between the parentheses."""
        text = f"{self.num_embeddings}, {self.embedding_dim}, mode={self.mode!r}, num_slots={self.num_slots}"
        return text if self.padding_idx is None else f"{text}, padding_idx={self.padding_idx}"


class FreqAwareEmbeddingBagCollection(_CachedBags):
    """T embedding tables of one width behind ONE cache and byte budget: frequent rows win slots, whatever their table.

    Args:
        table_sizes: rows of each table. embedding_dim: D of all.
        padding_idx: an id for every table, one per table (None for none), or None.
        ids_freq_mapping: one vector (or IdFrequency) per table, or their concatenation (sum of rows,).
        _weight: the tables' initial weights, one (rows, D) tensor per table.
        The others as in FreqAwareEmbeddingBag.

    Ids are local to their table. state_dict keys: tables.{i}.weight, as of an nn.ModuleList `tables` of
    nn.EmbeddingBag, in whose order the initial weights are drawn, too.
    """

    def __init__(
        self,
        table_sizes: Sequence[int],
        embedding_dim: int,
        *,
        padding_idx: int | Sequence[int | None] | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = True,
        _weight: Sequence[torch.Tensor] | None = None,
        include_last_offset: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        cache_ratio: float | None = None,
        num_slots: int | None = None,
        max_cache_bytes: int | None = None,
        ids_freq_mapping: Any = None,
        warmup_ratio: float = 1.0,
        evict_strategy: Any = None,
        optimizer: str | None = None,
        store: Any = "ram",
        kernels: str = "auto",
        rounding_seed: int = 0,
    ) -> None:
        table_sizes = list(table_sizes)
        if not table_sizes:
            raise ValueError("table_sizes is empty: give the rows of at least one table")
        if padding_idx is None or isinstance(padding_idx, Integral):
            padding_idx = [padding_idx] * len(table_sizes)
        if len(padding_idx) != len(table_sizes):
            raise ValueError(f"padding_idx has {len(padding_idx)} entries for {len(table_sizes)} tables")
        if _weight is not None:
            shapes = [tuple(weight.shape) for weight in _weight]
            if shapes != [(rows, embedding_dim) for rows in table_sizes]:
                raise ValueError(
                    f"_weight has shapes {shapes} for tables of {table_sizes} rows of width {embedding_dim}"
                )
        super().__init__(
            table_sizes,
            embedding_dim,
            [
                _padding_id(f"padding_idx[{table}]", padding, rows)
                for table, (padding, rows) in enumerate(zip(padding_idx, table_sizes, strict=True))
            ],
            max_norm=max_norm,
            norm_type=norm_type,
            scale_grad_by_freq=scale_grad_by_freq,
            mode=mode,
            sparse=sparse,
            weights=_weight,
            include_last_offset=include_last_offset,
            device=device,
            dtype=dtype,
            ids_freq_mapping=ids_freq_mapping,
            config=FreqCacheConfig(
                cache_ratio=cache_ratio,
                num_slots=num_slots,
                max_cache_bytes=max_cache_bytes,
                warmup_ratio=warmup_ratio,
                evict_strategy=evict_strategy,
                optimizer=optimizer,
                store=store,
                kernels=kernels,
                rounding_seed=rounding_seed,
            ),
        )
        self.table_sizes = table_sizes

    @property
    def num_tables(self) -> int:
        """T."""
        return len(self.table_sizes)

    def forward(
        self,
        values: torch.Tensor,
        offsets: torch.Tensor,
        per_sample_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Pooled rows (B, T, D).

        Args:
            values: (N,) int32 or int64 ids, local to their table, table-major: all bags of table 0, then of table 1, …
            offsets: (T*B,) start of each bag in `values`; (T*B+1,) with include_last_offset. As in a KeyedJaggedTensor.
            per_sample_weights: (N,), the tables' dtype; mode "sum" only.

        Raises:
            As FreqAwareEmbeddingBag.forward.
        """
        return self._lookup(self._batch(values, offsets, per_sample_weights))

    def prefetch(self, values: torch.Tensor, offsets: torch.Tensor) -> None:
        """As FreqAwareEmbeddingBag.prefetch; `values` and `offsets` as in `forward`."""
        self._prefetch(self._ahead_batch(values, offsets))

    def _ahead_batch(self, values: torch.Tensor, offsets: torch.Tensor) -> _Batch:
        return self._batch(values, offsets, None)

    def logical_weight(self, table: int) -> torch.Tensor:
        """Table `table` (rows, D) in id order, newest values; a copy."""
        start, rows = self._table_ranges()[table]
        return self._cached_weight.logical("weight", start, start + rows)

    def _batch(self, values: torch.Tensor, offsets: torch.Tensor, per_sample_weights: torch.Tensor | None) -> _Batch:
        _check_integers("values", values)
        _check_integers("offsets", offsets)
        if values.dim() != 1:
            raise ValueError(f"values has {values.dim()} dimensions: give 1, the bags table after table")
        if offsets.dim() != 1:
            raise ValueError(f"offsets has {offsets.dim()} dimensions: give a 1-D tensor, the starts of all bags")
        num_bags = offsets.numel() - int(self.include_last_offset)
        if num_bags % self.num_tables:
            raise ValueError(
                f"offsets gives {num_bags} bags for {self.num_tables} tables: every table needs the same number"
                + (" (and one last entry, the end)" if self.include_last_offset else "")
            )
        return self._checked_batch(values, offsets, self.include_last_offset, per_sample_weights)

    def _table_key(self, table: int) -> str:
        return f"tables.{table}.weight"

    def extra_repr(self) -> str:
        """Number of tables, rows of all, width, mode and slots: what `repr` shows between the parentheses."""
        return (
            f"{self.num_tables} tables, {sum(self.table_sizes)} rows, {self.embedding_dim}, mode={self.mode!r}, "
            f"num_slots={self.num_slots}"
        )


class _Pooling:
    """One forward's arithmetic and its adjoint, over pinned rows."""

    def __init__(self, bags: _CachedBags, lookup: Lookup, token: Token | None) -> None:
        self.weight = bags._cached_weight
        self.mode = bags.mode if self.weight.placement.pools else "sum"
        self.scale_by_freq = bags.scale_grad_by_freq and self.weight.placement.pools
        self.lookup = lookup
        self.token = token
        self.version = self.rows_version()
        self.chosen: torch.Tensor | None = None

    def rows_version(self) -> tuple[int, int]:
        """Changes whenever rows change: by our updates, or by hand through the Parameter."""
        return self.weight.version, self.weight.parameter._version

    def forward(self, weights: torch.Tensor | None) -> torch.Tensor:
        """(B, T, D); `weights`: per_sample_weights (N,) or None."""
        lookup, cache = self.lookup, self.weight.cache
        common = (cache.records, cache.layout.dim, lookup.slot_of_unique, lookup.unique_of_position, lookup.offsets)
        if self.mode == "max":
            out, self.chosen = cache.kernels.pool_max(*common, lookup.num_tables)
            return out
        return cache.kernels.pool(*common, weights, self.mode == "mean", lookup.num_tables)

    def backward(
        self, grad: torch.Tensor, weights: torch.Tensor | None, needs_rows: bool, needs_weights: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(sparse gradient of the block or None, gradient of per_sample_weights or None) from `grad` (B, T, D)."""
        weight = self.weight
        weight.before_backward(self.token, needs_rows)
        gradient = weights_gradient = None
        with plain_mode():
            if needs_weights:
                weights_gradient = self._weights_gradient(grad)
            if needs_rows:
                if weight.placement.divisor != 1:
                    grad = grad / weight.placement.divisor
                gradient = self._rows_gradient(grad, weights)
        weight.after_backward(self.token)
        return gradient, weights_gradient

    def _rows_gradient(self, grad: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        """Each row's sum, in batch order so that slots do not matter; sorted by slot, or trained at once."""
        weight, kernels, slots = self.weight, self.weight.cache.kernels, self.lookup.slot_of_unique
        fused = weight.fused_step()
        if fused is None:
            slots, place_of_unique = kernels.order_slots(slots)
        else:
            place_of_unique = torch.arange(slots.numel(), dtype=torch.int32)
        arguments = (grad, self.lookup.unique_of_position, self.lookup.offsets)
        places = (place_of_unique, slots.numel())
        if self.mode == "max":
            values = kernels.pool_max_backward(*arguments, self.chosen, *places)
        else:
            values = kernels.pool_backward(*arguments, weights, self.mode == "mean", self.scale_by_freq, *places)
        return weight.gradient(slots, values) if fused is None else weight.train_in_backward(slots, values, *fused)

    def _check_version(self) -> None:
        if self.version != self.rows_version():
            raise RuntimeError(
                "the gradient of per_sample_weights needs the rows as they were in the forward, and they were updated "
                "since (by a step, a load or max_norm): run backward before that"
            )

    def _weights_gradient(self, grad: torch.Tensor) -> torch.Tensor:
        self._check_version()
        lookup, cache = self.lookup, self.weight.cache
        return cache.kernels.weight_gradient(
            grad, cache.records, cache.layout.dim, lookup.slot_of_unique, lookup.unique_of_position, lookup.offsets
        )


class _DevicePooling(_Pooling):
    """The same where the maps are on the device: gradients are summed by the order of ids that the lookup has found."""

    def forward(self, weights: torch.Tensor | None) -> torch.Tensor:
        lookup, cache = self.lookup, self.weight.cache
        out, self.kept = cache.kernels.bags(
            cache.records,
            cache.layout.dim,
            lookup.slot_of_unique,
            lookup.plan,
            lookup.offsets,
            weights,
            self.mode,
            lookup.num_tables,
        )
        return out

    def _rows_gradient(self, grad: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        weight, lookup, cache = self.weight, self.lookup, self.weight.cache
        kernels, slots = cache.kernels, lookup.slot_of_unique
        arguments = (grad, lookup.plan, lookup.offsets, self.kept, weights, self.mode, self.scale_by_freq, slots)
        fused = weight.fused_step()
        if fused is None:
            slots, place_of_unique = kernels.order_slots(slots)
            return weight.gradient(slots, kernels.row_gradients(*arguments, place_of_unique, slots.numel()))
        group, step = fused
        rule = (weight.rule.name, weight.rule.numbers(group, step))
        if not group.get("maximize") and kernels.train_rows(
            *arguments, lookup.num_unique, cache.records, cache.slots.dirty, cache.layout.dim, rule
        ):
            return weight.trained_in_backward(grad)
        places = torch.arange(slots.numel(), dtype=torch.int32, device=slots.device)
        values = kernels.row_gradients(*arguments, places, slots.numel())
        return weight.train_in_backward(slots, values, group, step)

    def _weights_gradient(self, grad: torch.Tensor) -> torch.Tensor:
        self._check_version()
        lookup, cache = self.lookup, self.weight.cache
        return cache.kernels.weight_gradients(
            grad, cache.records, cache.layout.dim, lookup.slot_of_unique, lookup.plan, lookup.offsets
        )


def _check_replayable(weight: CachedWeight, fused: tuple[dict, int] | None) -> None:
    """Refuses to capture an update for which the host would have to know more than it does during a replay."""
    if fused is None:
        raise RuntimeError(
            "a captured CUDA graph trains the rows inside its backward: build the optimizer with fused=True, or look "
            "up under torch.no_grad()"
        )
    group, step = fused
    if weight.rule.numbers(group, step) != weight.rule.numbers(group, step + 1):
        raise RuntimeError(
            f"{weight.rule.name!r} with these settings has other numbers at every step, and a replay has those of the "
            f"capture: use SGD, or Adagrad without lr_decay"
        )
    if group.get("maximize") or weight.cache.layout.dtype != torch.float32:
        raise NotImplementedError(
            f"a captured CUDA graph trains float32 rows, without maximize; found {weight.cache.layout.dtype}, "
            f"maximize={bool(group.get('maximize'))}"
        )


class _PoolFunction(torch.autograd.Function):
    """Records a _Pooling as a function of the block and of per_sample_weights."""

    @staticmethod
    def forward(ctx, parameter: torch.Tensor, per_sample_weights: torch.Tensor | None, pooling: _Pooling):
        ctx.pooling = pooling
        ctx.set_materialize_grads(False)
        if per_sample_weights is not None:
            ctx.save_for_backward(per_sample_weights)  # torch raises if they were changed in place by the backward
        out = pooling.forward(per_sample_weights)
        pooling.weight.watch(ctx, pooling.token)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        if grad is None:  # nothing downstream depends on the output
            ctx.pooling.weight.after_backward(ctx.pooling.token)
            return None, None, None
        saved = ctx.saved_tensors
        weights = saved[0] if saved else None
        return (*ctx.pooling.backward(grad, weights, *ctx.needs_input_grad[:2]), None)


def _device_of(device: Any) -> torch.device:
    """The device that a user names, with its number; the CPU for None."""
    device = torch.device("cpu" if device is None else device)
    if device.type not in ("cpu", "cuda", "mps"):
        raise NotImplementedError(f"device={str(device)!r}: a cache lives on 'cpu' or on a GPU, 'cuda'")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError(f"device={str(device)!r}: torch finds no CUDA device")
        current = torch.cuda.current_device()
        if device.index not in (None, current):
            raise RuntimeError(
                f"device={str(device)!r}: kernels are launched on the current CUDA device, which is cuda:{current}; "
                f"call torch.cuda.set_device({device.index}) first, and leave it so"
            )
        device = torch.device("cuda", current)
    return device


class _Seen:
    """Remembers tensors (and other values), and says whether others are the same, with the same contents.

    In host memory, contents are compared with a copy; on a device, torch's count of changes is, since comparing would
    be waiting (what writes there past torch is not noticed). Holds the tensors, so that none else gets their memory.
    """

    def __init__(self, *given: Any) -> None:
        self._given = given
        self._keys = [_memory_of(one) for one in given]
        self._copies = [one.clone() if _is_on_host(one) else None for one in given]

    def __call__(self, *given: Any) -> bool:
        if len(given) != len(self._given) or [_memory_of(one) for one in given] != self._keys:
            return False
        return all(copy is None or torch.equal(copy, one) for copy, one in zip(self._copies, given, strict=True))


def _is_on_host(one: Any) -> bool:
    return isinstance(one, torch.Tensor) and one.device.type == "cpu"


def _memory_of(one: Any) -> Any:
    if not isinstance(one, torch.Tensor):
        return one
    key = (one.data_ptr(), tuple(one.shape), one.stride(), one.dtype, one.device)
    if one.device.type == "cpu":
        return key
    return (*key, object() if one.is_inference() else one._version)  # inference tensors have no count: never the same


def _check_integers(name: str, tensor: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor) or tensor.dtype not in (torch.int32, torch.int64):
        found = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise TypeError(f"{name} is {found}: give a tensor of torch.int32 or torch.int64")


def _padding_id(name: str, padding_idx: int | None, rows: int) -> int:
    """The id that is padding, -1 for none; negative ones count from the end, as in nn.EmbeddingBag."""
    if padding_idx is None:
        return -1
    if not isinstance(padding_idx, Integral) or not -rows <= padding_idx < rows:
        raise ValueError(f"{name}={padding_idx!r} is outside the valid range {-rows}..{rows - 1}")
    return int(padding_idx % rows)
