"""The names and keywords of Colossal-AI's earlier embedding cache, around this package's classes.

An example written for `colossalai.legacy.nn.parallel.layers.cache_embedding` moves by changing that import to this
module. Each module here holds one of ours as `.bag`, where everything new is found, and translates calls; there is no
cache in this file. docs/migrating.md tells what each old keyword and attribute means now.

Shapes: N ids in a batch, G bags of the batch that all ranks pass, B bags of this rank's share, T tables, W ranks,
R rows, D embedding width, D' and T' this rank's columns and tables, C slots.
Source: the names of colossalai 0.5.0, legacy; what a call gives is that of torch.nn.EmbeddingBag over the whole table.
"""

import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import nn

from .block import plain_mode
from .embedding import FreqAwareEmbeddingBag, FreqAwareEmbeddingBagCollection, _Batch, _check_integers
from .parallel import (
    Ranks,
    ShardedFreqAwareEmbeddingBag,
    ShardedFreqAwareEmbeddingBagCollection,
    SumOfRanks,
    _Exchange,
)

__all__ = [
    "CachedEmbeddingBag",
    "CachedParamMgr",
    "EvictionStrategy",
    "ParallelCachedEmbeddingBag",
    "ParallelCachedEmbeddingBagTablewise",
    "TablewiseEmbeddingBagConfig",
]

# Entries that each history keeps, the newest: the old lists grew for ever.
HISTORY_LENGTH = 10_000

NO_ID = -1


class EvictionStrategy(Enum):
    """The two old policies. Wherever one is taken, this package's names ("s3fifo", ...) are too."""

    LFU = 1
    DATASET = 2


def _policy(strategy: Any) -> Any:
    return strategy.name.lower() if isinstance(strategy, EvictionStrategy) else strategy


def _warn_of_ignored(device: Any, pin_weight: Any, buffer_size: Any, default_buffer_size: int) -> None:
    """One warning for the keywords that the user has set and that have no meaning any more."""
    ignored = {}
    if device is not None and torch.device(device).type != "cpu":
        ignored["device"] = device
    if pin_weight:
        ignored["pin_weight"] = pin_weight
    if buffer_size != default_buffer_size:
        ignored["buffer_size"] = buffer_size
    if ignored:
        given = ", ".join(f"{name}={value!r}" for name, value in ignored.items())
        warnings.warn(
            f"{given}: ignored. Rows are moved without a buffer, and the table lies in host memory, or where the "
            f"keyword store= says",
            stacklevel=3,
        )


@njit(cache=True, nogil=True)
def _count_rows(ids, padding_ids, slot_of_id, stamps, stamp):
    """How many slots int64 ids (N,) sit in, those of padding_ids left out; `stamp` is not in stamps int64 (C,) yet."""
    found = 0
    for id_ in ids:
        slot = slot_of_id[id_] - 1
        if stamps[slot] == stamp:
            continue
        is_padding = False
        for padding in padding_ids:
            is_padding |= id_ == padding
        if not is_padding:
            stamps[slot] = stamp
            found += 1
    return found


# ---- the manager ----------------------------------------------------------------------------------------------------


class CachedParamMgr:
    """What old code finds as `.cache_weight_mgr`: a view of a bag's cache, and what it did, call by call.

    On several ranks it shows this rank's part: its columns (D'), or its tables one after the other.

    Args:
        bag: of which this is a view. num_embeddings: rows of this rank's tables; None: all of the bag's cache.

    Attributes:
        num_embeddings: R, rows of this rank's tables.
        num_hits_history, num_miss_history, num_write_back_history: deques of ints, one entry a forward or prepare_ids
            (not with set_cache_op(False)): distinct rows that were resident, distinct rows that had to be fetched, rows
            written back to make room. The newest HISTORY_LENGTH entries.
    """

    def __init__(
        self, bag: FreqAwareEmbeddingBag | FreqAwareEmbeddingBagCollection, num_embeddings: int | None = None
    ) -> None:
        if not isinstance(bag, FreqAwareEmbeddingBag | FreqAwareEmbeddingBagCollection):
            raise TypeError(
                f"CachedParamMgr got {type(bag).__name__}: it is a view of a bag, and no longer built from a weight. "
                f"Use CachedEmbeddingBag(..., _weight=weight).cache_weight_mgr"
            )
        self._bag = bag
        self.num_embeddings = bag._cache.num_rows if num_embeddings is None else num_embeddings
        self.num_hits_history: deque[int] = deque(maxlen=HISTORY_LENGTH)
        self.num_miss_history: deque[int] = deque(maxlen=HISTORY_LENGTH)
        self.num_write_back_history: deque[int] = deque(maxlen=HISTORY_LENGTH)
        self._seconds = 0.0
        # By place (slot + 1; 0 for padding, which gets no slot): the id that the last prepare_ids found there.
        self._id_of_place = np.empty(0, np.int64)
        self._prepared_places = np.empty(0, np.int32)
        self._stamps, self._last_stamp = np.empty(0, np.int64), 0  # by slot: the last count that saw it

    # ---- rows ---------------------------------------------------------------------------------------------------

    @property
    def weight(self) -> torch.Tensor:
        """The host table (R, D') in id order, newest values; a copy, for small tables: writing into it has no effect.

        Raises:
            ValueError: it is larger than `bag.max_state_dict_bytes`.
        """
        cache = self._bag._cache
        columns = cache.layout.columns("weight")
        num_bytes = self.num_embeddings * self.embedding_dim * self.elem_size_in_byte
        self._bag._cached_weight.check_bytes(num_bytes, ".weight as one tensor")
        with plain_mode():
            weight = torch.empty(self.num_embeddings, self.embedding_dim, dtype=cache.layout.dtype)
            for first, last in cache.id_chunks(0, self.num_embeddings):
                weight[first:last] = cache.read_ids(first, last)[:, columns]
        return weight

    def cpu_weight_data(self, row_idx: int) -> torch.Tensor:
        """Row `row_idx` of `weight` (1, D'), so the row of that id; a copy."""
        if not 0 <= row_idx < self.num_embeddings:
            raise ValueError(f"row {row_idx} is outside the valid range 0..{self.num_embeddings - 1}")
        cache = self._bag._cache
        with plain_mode():
            return cache.read_ids(int(row_idx), int(row_idx) + 1)[:, cache.layout.columns("weight")]

    @property
    def cuda_cached_weight(self) -> nn.Parameter:
        """The cache block (C at the ceiling, D'), the Parameter that optimizers train. It lies where the bag's does."""
        return self._bag.weight

    @torch.no_grad()
    def prepare_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """Makes the rows of `ids` resident, and returns in which slots they sit: int64, in the shape of `ids`.

        The slots are what the forwards of a module with set_cache_op(False) take, until the next prepare_ids. The rows
        stay until those forwards have used them; should other batches push one out after that, it is fetched again.
        Padding needs no row: where it is not resident its slot is -1. On several ranks all call it.

        Args:
            ids: int32 or int64, any shape and device; on the table-wise module, ids of this rank's tables, put one
                after the other.

        Raises:
            ValueError, TypeError: bad ids. CacheTooSmallError: the rows do not fit. Nothing was changed.
        """
        bag = self._bag
        with self.recorded(ids):
            bag._prefetch(bag._placement.together(lambda: self._single_bags(ids)))
        ids_of_positions = ids.detach().reshape(-1).to("cpu", torch.int64).numpy()
        places = bag._cache.slots.slot_of_id.numpy()[ids_of_positions]
        self._id_of_place[self._prepared_places] = NO_ID
        if self._id_of_place.size <= self.cuda_row_num:
            grown = np.full(self.cuda_row_num + 1, NO_ID, np.int64)
            grown[: self._id_of_place.size] = self._id_of_place
            self._id_of_place = grown
        self._id_of_place[places] = ids_of_positions
        self._prepared_places = places
        return torch.from_numpy(places.astype(np.int64) - 1).reshape(ids.shape).to(ids.device)

    def ids_of(self, slots: torch.Tensor) -> torch.Tensor:
        """The ids, int64 on the host and in the shape of `slots`, for which the last prepare_ids returned those slots.

        Raises:
            ValueError: it returned no such slot; so ids that were not prepared are not taken for slots.
        """
        _check_integers("input", slots)
        places = slots.detach().reshape(-1).to("cpu", torch.int64).numpy() + 1
        known = (places >= 0) & (places < self._id_of_place.size)
        ids = np.full(places.size, NO_ID, np.int64)
        ids[known] = self._id_of_place[places[known]]
        if (ids == NO_ID).any():
            position = int(np.argmax(ids == NO_ID))
            raise ValueError(
                f"slot {places[position] - 1} at position {position} is not among the {self._prepared_places.size} "
                f"that the last prepare_ids returned: after set_cache_op(False) the input is what it returned, in "
                f"batches. For ids, call set_cache_op(True)"
            )
        return torch.from_numpy(ids).reshape(slots.shape)

    def flush(self) -> None:
        """Writes every changed row back to the host table. The rows stay resident and the counters go on."""
        self._bag.flush()

    def _single_bags(self, ids: torch.Tensor) -> _Batch:
        """`ids` of the local tables, one after the other, as one bag for each of them."""
        _check_integers("ids", ids)
        cache = self._bag._cache
        ids = ids.detach().reshape(-1).to("cpu", torch.int64)
        bad = (ids < 0) | (ids >= self.num_embeddings)
        if bad.any():
            position = int(bad.nonzero()[0, 0])
            raise ValueError(
                f"id {int(ids[position])} at position {position} is outside the valid range: "
                f"0..{self.num_embeddings - 1}"
            )
        num_tables = cache.table_rows.numel()
        if num_tables == 1:
            return _Batch(ids.contiguous(), torch.tensor([0, ids.numel()]), None)
        table = torch.searchsorted(cache.table_starts, ids, right=True) - 1
        order = torch.argsort(table, stable=True)
        offsets = torch.cat([table.new_zeros(1), torch.bincount(table, minlength=num_tables).cumsum(0)])
        return _Batch((ids - cache.table_starts[table])[order], offsets, None)

    # ---- what was counted ---------------------------------------------------------------------------------------

    @contextmanager
    def recorded(self, ids: torch.Tensor) -> Iterator[None]:
        """Adds an entry to the histories for the lookup of `ids` (local ids) that is made inside; none if it raises."""
        stats = self._bag.stats
        misses, written_back = stats.misses_unique, stats.rows_written_back
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start
        misses = stats.misses_unique - misses
        self.num_hits_history.append(self._num_rows(ids) - misses)
        self.num_miss_history.append(misses)
        self.num_write_back_history.append(stats.rows_written_back - written_back)

    def _num_rows(self, ids: torch.Tensor) -> int:
        """Distinct rows of `ids`, padding left out; all are resident. O(N)."""
        cache, padding = self._bag._cache, self._bag._padding_ids
        padding_ids = (cache.table_starts + padding)[padding >= 0].numpy()
        if self._stamps.size < self.cuda_row_num:
            self._stamps = np.zeros(self.cuda_row_num, np.int64)
        self._last_stamp += 1
        ids = ids.detach().reshape(-1).to("cpu", torch.int64).numpy()
        return _count_rows(ids, padding_ids, cache.slots.slot_of_id.numpy(), self._stamps, self._last_stamp)

    @property
    def swap_in_bandwidth(self) -> float:
        """MB/s of rows fetched, over all the time spent in forwards and prepare_ids; 0.0 before the first."""
        return self._bag.stats.bytes_fetched / 1e6 / self._seconds if self._seconds else 0.0

    @property
    def swap_out_bandwidth(self) -> float:
        """MB/s of rows written back, over all the time spent in forwards and prepare_ids; 0.0 before the first."""
        return self._bag.stats.bytes_written_back / 1e6 / self._seconds if self._seconds else 0.0

    def print_comm_stats(self) -> None:
        """Prints what moved and how many ids missed; at any time."""
        stats = self._bag.stats
        looked_up = stats.hits + stats.misses
        print(f"host->cache {stats.rows_fetched} rows, {stats.bytes_fetched / 1e6} MB, {self.swap_in_bandwidth} MB/s")
        print(
            f"cache->host {stats.rows_written_back} rows, {stats.bytes_written_back / 1e6} MB, "
            f"{self.swap_out_bandwidth} MB/s"
        )
        print(f"cache_op: {self._seconds} sec")
        print(f"cache miss ratio {stats.misses / looked_up if looked_up else 0.0} ({stats.misses} of {looked_up} ids)")

    # ---- sizes and maps -----------------------------------------------------------------------------------------

    @property
    def embedding_dim(self) -> int:
        """D', the columns that this rank has."""
        return self._bag._cache.layout.dim

    @property
    def elem_size_in_byte(self) -> int:
        """Bytes of one element of the table."""
        return self._bag._cache.layout.dtype.itemsize

    @property
    def cuda_row_num(self) -> int:
        """C, the slots of the cache now."""
        return self._bag.num_slots

    @property
    def cuda_available_row_num(self) -> int:
        """Slots that hold no row."""
        return self._bag._cache.slots.num_free

    @property
    def idx_map(self) -> torch.Tensor:
        """int64[R]: the row of each id, row 0 being the most frequent id's; a copy."""
        return torch.from_numpy(self._bag._cache.order.rows(np.arange(self.num_embeddings)).astype(np.int64))

    @property
    def cached_idx_map(self) -> torch.Tensor:
        """int64[C]: the row in each slot, -1 in a free one; a copy."""
        return self._bag._cache.slots.row_of_slot.to(torch.int64, copy=True)

    @property
    def inverted_cached_idx(self) -> torch.Tensor:
        """int64[R]: the slot of each row, -1 where it is not resident; a copy."""
        slot_of_row = torch.empty(self.num_embeddings, dtype=torch.int64)
        slot_of_row[self.idx_map] = self._bag._cache.slots.slot_of_id[: self.num_embeddings].long() - 1
        return slot_of_row


# ---- modules --------------------------------------------------------------------------------------------------------


class _OldBag(nn.Module):
    """Holds one of our bags: the old names, and state_dict keys without the holder.

    Attributes: bag; cache_weight_mgr, the CachedParamMgr of it; cache_op, whether forwards take ids.
    """

    def _hold(self, bag: FreqAwareEmbeddingBag | FreqAwareEmbeddingBagCollection, evict_strategy: Any) -> None:
        """To be called once, at the end of the constructor."""
        self.bag = bag
        self.cache_weight_mgr = CachedParamMgr(bag)
        self.cache_op = True
        self.evict_strategy = evict_strategy
        self.embedding_dim = bag.embedding_dim
        self.max_norm, self.norm_type = bag.max_norm, bag.norm_type
        self.scale_grad_by_freq, self.sparse = bag.scale_grad_by_freq, bag.sparse
        self.mode, self.include_last_offset = bag.mode, bag.include_last_offset
        self._loading: tuple[str, list[str]] = ("", [])
        self.register_state_dict_post_hook(_without_holder)
        self.register_load_state_dict_post_hook(_without_holder_in_errors)

    @property
    def weight(self) -> torch.Tensor:
        """The host table in id order, as CachedParamMgr.weight: a copy. What is trained is `parameters()`."""
        return self.cache_weight_mgr.weight

    def set_cache_op(self, cache_op: bool = True) -> None:
        """False: the next forwards take slots, as cache_weight_mgr.prepare_ids returned them. True: ids."""
        self.cache_op = cache_op

    def set_cache_mgr_async_copy(self, flag: bool) -> None:
        """Accepted; rows are copied in the forward in any case."""
        if flag:
            warnings.warn("async_copy=True: ignored. Rows are moved inside forward and prepare_ids", stacklevel=2)

    def print_comm_stats_(self) -> None:
        """As CachedParamMgr.print_comm_stats."""
        self.cache_weight_mgr.print_comm_stats()

    def element_size(self) -> int:
        """Bytes of one element of the table."""
        return self.cache_weight_mgr.elem_size_in_byte

    @property
    def num_hits_history(self) -> deque[int]:
        """As CachedParamMgr.num_hits_history."""
        return self.cache_weight_mgr.num_hits_history

    @property
    def num_miss_history(self) -> deque[int]:
        """As CachedParamMgr.num_miss_history."""
        return self.cache_weight_mgr.num_miss_history

    @property
    def num_write_back_history(self) -> deque[int]:
        """As CachedParamMgr.num_write_back_history."""
        return self.cache_weight_mgr.num_write_back_history

    @property
    def swap_in_bandwidth(self) -> float:
        """As CachedParamMgr.swap_in_bandwidth."""
        return self.cache_weight_mgr.swap_in_bandwidth

    @property
    def swap_out_bandwidth(self) -> float:
        """As CachedParamMgr.swap_out_bandwidth."""
        return self.cache_weight_mgr.swap_out_bandwidth

    def _ids_of(self, input: torch.Tensor) -> torch.Tensor:
        """The ids that a forward's input stands for."""
        return input if self.cache_op else self.cache_weight_mgr.ids_of(input)

    def _recorded(self, input: torch.Tensor) -> AbstractContextManager[None]:
        """Around the lookup of a forward's input: recorded, unless prepare_ids has recorded it before."""
        return self.cache_weight_mgr.recorded(input) if self.cache_op else nullcontext()

    # ---- nn.Module ----------------------------------------------------------------------------------------------

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The one Parameter, the cache block, as "weight". (A module around this one names it "….bag.weight".)"""
        start = f"{prefix}." if prefix else ""
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            yield start + name.removeprefix(f"{start}bag."), parameter

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        holder = f"{prefix}bag."
        for key in [key for key in state_dict if key.startswith(prefix) and not key.startswith(holder)]:
            state_dict[holder + key[len(prefix) :]] = state_dict.pop(key)
        self._loading = prefix, error_msgs
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _without_holder(module: nn.Module, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    """Hook: "weight" (or "tables.0.weight") as the key instead of "bag.weight"."""
    holder = f"{prefix}bag."
    for key in [key for key in state_dict if key.startswith(holder)]:
        state_dict[prefix + key[len(holder) :]] = state_dict.pop(key)


def _without_holder_in_errors(module: _OldBag, incompatible_keys: Any) -> None:
    """Hook: keys that are missing or wrong are reported as the user knows them."""
    prefix, error_msgs = module._loading
    module._loading = ("", [])
    holder = f"{prefix}bag."
    for keys in (incompatible_keys.missing_keys, incompatible_keys.unexpected_keys):
        keys[:] = [prefix + key[len(holder) :] if key.startswith(holder) else key for key in keys]
    error_msgs[:] = [message.replace(f" for {holder}", f" for {prefix}") for message in error_msgs]


def _without_draws() -> AbstractContextManager[None]:
    """Around the building of a bag whose first weights are replaced: the numbers that it draws are not used up."""
    return torch.random.fork_rng(devices=[])


def _set_first_weights(
    bag: FreqAwareEmbeddingBag | FreqAwareEmbeddingBagCollection,
    given: Sequence[torch.Tensor | None],
    bounds: Sequence[float],
) -> None:
    """Each table's first weights: `given` (rows, D), or as before uniform in -bound..bound, zero for padding.

    Each rank sets its part and no other. Of a table divided by columns it draws whole rows and keeps its columns: from
    equal seeds, the table is that of one process.
    """
    placement = bag._placement
    for table, (start, rows) in enumerate(bag._table_ranges()):
        padding = bag._table_padding[table]
        for first, last in placement.chunks(start, start + rows):
            if placement.piece(first, last) is None:
                continue
            if given[table] is None:
                values = torch.empty(last - first, bag.embedding_dim, dtype=bag._cache.layout.dtype)
                values.uniform_(-bounds[table], bounds[table])
                if padding >= 0 and first <= start + padding < last:
                    values[start + padding - first] = 0
            else:
                values = given[table].detach()[first - start : last - start]
            with plain_mode():
                placement.initialise(first, values)


class CachedEmbeddingBag(_OldBag):
    """FreqAwareEmbeddingBag under its old name: one process.

    Args:
        num_embeddings: R. embedding_dim: D.
        padding_idx, max_norm, norm_type, scale_grad_by_freq, mode, include_last_offset: as in nn.EmbeddingBag;
            padding_idx is an id.
        sparse: accepted; rows are trained sparsely in any case.
        _weight: (R, D) first weights in id order; copied. None: uniform in -1/R..1/R, padding zero.
        dtype: of the table; None: that of _weight, or torch's default.
        cache_ratio: share of the rows that get a slot, in (0, 1]; one slot at least.
        ids_freq_mapping: how often each id occurs, (R,).
        warmup_ratio: share of the slots that is filled at the start, where ids_freq_mapping is given.
        evict_strategy: an EvictionStrategy, or a name that FreqAwareEmbeddingBag knows.
        device, buffer_size, pin_weight: ignored, with a warning where they are set.
        cache_options: max_cache_bytes, optimizer, store, kernels, num_slots (instead of cache_ratio): as in
            FreqAwareEmbeddingBag.

    Raises:
        ValueError, TypeError: as FreqAwareEmbeddingBag.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: torch.Tensor | None = None,
        mode: str = "mean",
        include_last_offset: bool = False,
        dtype: torch.dtype | None = None,
        device: Any = None,
        cache_ratio: float = 0.01,
        ids_freq_mapping: Any = None,
        warmup_ratio: float = 0.7,
        buffer_size: int = 0,
        pin_weight: bool = False,
        evict_strategy: Any = EvictionStrategy.LFU,
        **cache_options: Any,
    ) -> None:
        super().__init__()
        _warn_of_ignored(device, pin_weight, buffer_size, self._default_buffer_size)
        if "num_slots" not in cache_options:
            cache_options["cache_ratio"] = cache_ratio
        with _without_draws():
            bag = self._make_bag(
                num_embeddings,
                embedding_dim,
                padding_idx=padding_idx,
                max_norm=max_norm,
                norm_type=norm_type,
                scale_grad_by_freq=scale_grad_by_freq,
                sparse=sparse,
                _weight=_weight,
                mode=mode,
                include_last_offset=include_last_offset,
                dtype=dtype,
                ids_freq_mapping=ids_freq_mapping,
                warmup_ratio=warmup_ratio,
                evict_strategy=_policy(evict_strategy),
                **cache_options,
            )
        if _weight is None:
            _set_first_weights(bag, [None], [1 / num_embeddings])
        self._hold(bag, evict_strategy)
        self.num_embeddings, self.padding_idx = bag.num_embeddings, bag.padding_idx

    _default_buffer_size = 0

    def _make_bag(self, num_embeddings: int, embedding_dim: int, **options: Any) -> FreqAwareEmbeddingBag:
        return FreqAwareEmbeddingBag(num_embeddings, embedding_dim, **options)

    @classmethod
    def from_pretrained(
        cls,
        embedding: torch.Tensor,
        freeze: bool = True,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        mode: str = "mean",
        include_last_offset: bool = False,
        cuda_row_num: int = 100_000,
        ids_freq_mapping: Any = None,
        warmup_ratio: float = 0.7,
        buffer_size: int = 0,
        **options: Any,
    ) -> "CachedEmbeddingBag":
        """A module over a copy of `embedding` (R, D), the whole table on every rank; `freeze`: it is not trained.

        cuda_row_num: slots, at most R; `cache_ratio=` among the options, which are the constructor's, replaces it.
        """
        if embedding.dim() != 2:
            raise ValueError(f"embedding has {embedding.dim()} dimensions: give a (rows, width) tensor")
        if "cache_ratio" not in options:
            options.setdefault("num_slots", cuda_row_num)
        if buffer_size:
            options["buffer_size"] = buffer_size
        module = cls(
            *embedding.shape,
            padding_idx=padding_idx,
            max_norm=max_norm,
            norm_type=norm_type,
            scale_grad_by_freq=scale_grad_by_freq,
            sparse=sparse,
            _weight=embedding,
            mode=mode,
            include_last_offset=include_last_offset,
            ids_freq_mapping=ids_freq_mapping,
            warmup_ratio=warmup_ratio,
            **options,
        )
        module.bag.weight.requires_grad_(not freeze)
        return module

    def forward(
        self,
        input: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
        shape_hook: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Pooled rows (B, D), or what `shape_hook` makes of them; the other arguments as in nn.EmbeddingBag.

        `input` holds ids; after set_cache_op(False), slots as prepare_ids returned them.
        """
        with self._recorded(input):
            embeddings = self.bag(self._ids_of(input), offsets, per_sample_weights)
        return embeddings if shape_hook is None else shape_hook(embeddings)


class ParallelCachedEmbeddingBag(CachedEmbeddingBag):
    """CachedEmbeddingBag whose table is divided by columns over the ranks of a process group.

    All ranks pass the same batch, and each gets its contiguous share of the result at full width. The table's gradient
    is the sum over all ranks' losses. Every method that looks rows up, and state_dict(), is called by all ranks.

    Args:
        As CachedEmbeddingBag; `_weight` is the whole table (R, D) on every rank. cache_options also takes
        process_group: None for the default group, or for one process where torch.distributed is not used.

    Attributes:
        rank, world_size; partition_start_index, partition_end_index, embedding_dim_per_partition: this rank's columns.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: torch.Tensor | None = None,
        mode: str = "mean",
        include_last_offset: bool = False,
        dtype: torch.dtype | None = None,
        device: Any = None,
        cache_ratio: float = 0.01,
        ids_freq_mapping: Any = None,
        warmup_ratio: float = 0.7,
        buffer_size: int = 50_000,
        pin_weight: bool = False,
        evict_strategy: Any = EvictionStrategy.DATASET,
        **cache_options: Any,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx=padding_idx,
            max_norm=max_norm,
            norm_type=norm_type,
            scale_grad_by_freq=scale_grad_by_freq,
            sparse=sparse,
            _weight=_weight,
            mode=mode,
            include_last_offset=include_last_offset,
            dtype=dtype,
            device=device,
            cache_ratio=cache_ratio,
            ids_freq_mapping=ids_freq_mapping,
            warmup_ratio=warmup_ratio,
            buffer_size=buffer_size,
            pin_weight=pin_weight,
            evict_strategy=evict_strategy,
            **cache_options,
        )
        columns = self.bag._placement.columns(self.rank)
        self.partition_start_index, self.partition_end_index = columns.start, columns.stop
        self.embedding_dim_per_partition = columns.stop - columns.start

    _default_buffer_size = 50_000

    def _make_bag(self, num_embeddings: int, embedding_dim: int, **options: Any) -> ShardedFreqAwareEmbeddingBag:
        # "gather": all ranks pass one batch, and gradients are not averaged. `forward` exchanges the results itself.
        bag = ShardedFreqAwareEmbeddingBag(num_embeddings, embedding_dim, sharding="column", output="gather", **options)
        self.rank, self.world_size = bag._ranks.rank, bag._ranks.size
        return bag

    def forward(
        self,
        indices: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
        shape_hook: Callable[[torch.Tensor], torch.Tensor] | None = None,
        scatter_dim: int = 0,
        gather_dim: int = -1,
    ) -> torch.Tensor:
        """This rank's share of the pooled rows, (B, D); B = G / W, one more on the first ranks where that is uneven.

        Args:
            indices, offsets, per_sample_weights: the batch, the same on all ranks; as in nn.EmbeddingBag. After
                set_cache_op(False), `indices` holds the slots that this rank's prepare_ids returned.
            shape_hook: applied to all bags of this rank's columns (G, D') before they are exchanged; with bags that
                stand table after table it brings the batch to the front: `lambda x: x.view(T, -1, x.shape[1])
                .transpose(0, 1)` gives every rank (G/T/W, T, D).
            scatter_dim: the dimension of the (hooked) output of which a rank gets its share.
            gather_dim: the one along which the ranks' columns are put together.
        """
        bag = self.bag
        with self._recorded(indices):
            batch = bag._placement.together(lambda: bag._batch(self._ids_of(indices), offsets, per_sample_weights))
            if batch.weights is not None:
                batch = batch._replace(weights=SumOfRanks.apply(batch.weights, bag._ranks))
            self._check_same(batch)
            columns = bag._lookup(batch).squeeze(1)
        if shape_hook is not None:
            columns = shape_hook(columns)
        return _exchange_shares(columns, bag._ranks, scatter_dim, gather_dim)

    def _check_same(self, batch: _Batch) -> None:
        """Raises on all ranks where one has another batch than the others: their columns would not belong together."""
        if self.world_size > 1:
            told = self.bag._ranks.all_gather(torch.tensor([batch.offsets.numel() - 1, self.bag._checksum(batch)]))
            if not (told == told[0]).all():
                raise ValueError(
                    f"the ranks pass different batches ({told[:, 0].tolist()} bags): all pass the same one, and each "
                    f"gets its share of the result"
                )


def _exchange_shares(part: torch.Tensor, ranks: Ranks, scatter_dim: int, gather_dim: int) -> torch.Tensor:
    """Every rank's parts of this rank's share: `part` cut along scatter_dim, what comes here joined along gather_dim.

    `part` may differ among ranks in the size of gather_dim alone; a share is as torch.tensor_split cuts it.
    """
    if ranks.size == 1:
        return part
    scatter_dim, gather_dim = scatter_dim % part.dim(), gather_dim % part.dim()
    if scatter_dim == gather_dim:
        raise ValueError(f"scatter_dim and gather_dim are both {scatter_dim}: shares of one, columns of the other")
    shapes = ranks.all_gather(torch.tensor(part.shape)).tolist()
    if len({(*shape[:gather_dim], *shape[gather_dim + 1 :]) for shape in shapes}) > 1:
        raise ValueError(f"the ranks' outputs have the shapes {shapes}: they may differ in dimension {gather_dim} only")
    shares = [share.contiguous() for share in part.tensor_split(ranks.size, scatter_dim)]
    received_shapes = []
    for shape in shapes:
        received_shapes.append(list(shares[ranks.rank].shape))
        received_shapes[-1][gather_dim] = shape[gather_dim]
    receive = [int(np.prod(shape)) for shape in received_shapes]
    flat = torch.cat([share.reshape(-1) for share in shares])
    flat = _Exchange.apply(flat, ranks, [share.numel() for share in shares], receive)
    pieces = flat.split(receive)
    return torch.cat([piece.view(shape) for piece, shape in zip(pieces, received_shapes, strict=True)], gather_dim)


# ---- whole tables on each rank --------------------------------------------------------------------------------------


class TablewiseEmbeddingBagConfig:
    """One table of a ParallelCachedEmbeddingBagTablewise.

    Args:
        num_embeddings: its rows.
        cuda_row_num, buffer_size: ignored, as they were; all tables of a rank share its cache.
        assigned_rank: the rank that holds it.
        ids_freq_mapping: how often each of its ids occurs, (num_embeddings,).
        initial_weight: (num_embeddings, D) first weights.
        name: for the user.
    """

    def __init__(
        self,
        num_embeddings: int,
        cuda_row_num: int,
        assigned_rank: int = 0,
        buffer_size: int = 50_000,
        ids_freq_mapping: Any = None,
        initial_weight: torch.Tensor | None = None,
        name: str = "",
    ) -> None:
        self.num_embeddings = num_embeddings
        self.cuda_row_num = cuda_row_num
        self.assigned_rank = assigned_rank
        self.buffer_size = buffer_size
        self.ids_freq_mapping = ids_freq_mapping
        self.initial_weight = initial_weight
        self.name = name


class ParallelCachedEmbeddingBagTablewise(_OldBag):
    """Whole tables of one width on the ranks that their configs name; one cache on each rank.

    Every rank passes all G bags of its own tables, and gets its contiguous share of the batch for all tables. The
    gradient of a table is the sum over all ranks' losses. Every method that looks rows up, and state_dict(), is called
    by all ranks; the keys are tables.{i}.weight, i counting the configs.

    Args:
        embedding_bag_config_list: the tables, the same on all ranks.
        padding_idx: an id of a rank's tables put one after the other, on each rank that has tables.
        _weight: (rows of this rank's tables, D) first weights; None: each config's initial_weight, else uniform in
            -1/n..1/n with n the rows of its rank's tables.
        The others as in ParallelCachedEmbeddingBag. Counts are used where every config has them.

    Attributes:
        rank, world_size, rank_of_tables, global_tables_num, global_table_num_embeddings_list.
        num_embeddings: rows of this rank's tables. assigned_table_list: their numbers.
    """

    def __init__(
        self,
        embedding_bag_config_list: Sequence[TablewiseEmbeddingBagConfig],
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: torch.Tensor | None = None,
        mode: str = "mean",
        include_last_offset: bool = False,
        dtype: torch.dtype | None = None,
        device: Any = None,
        cache_ratio: float = 0.01,
        warmup_ratio: float = 0.7,
        buffer_size: int = 50_000,
        pin_weight: bool = False,
        evict_strategy: Any = EvictionStrategy.LFU,
        **cache_options: Any,
    ) -> None:
        super().__init__()
        _warn_of_ignored(device, pin_weight, buffer_size, 50_000)
        configs = list(embedding_bag_config_list)
        if not configs:
            raise ValueError("embedding_bag_config_list is empty: give the config of at least one table")
        if "num_slots" not in cache_options:
            cache_options["cache_ratio"] = cache_ratio
        self.rank_of_tables = [config.assigned_rank for config in configs]
        self.global_table_num_embeddings_list = [config.num_embeddings for config in configs]
        self.global_tables_num = len(configs)
        ranks = Ranks(cache_options.get("process_group"))
        self.rank, self.world_size = ranks.rank, ranks.size
        self.assigned_table_list = [i for i, rank in enumerate(self.rank_of_tables) if rank == self.rank]
        self.num_embeddings = sum(self.global_table_num_embeddings_list[i] for i in self.assigned_table_list)
        given = self._given_weights([config.initial_weight for config in configs], _weight, embedding_dim)
        if dtype is None:
            dtype = next((weight.dtype for weight in given if weight is not None), None)
        counts = [config.ids_freq_mapping for config in configs]
        with _without_draws():
            bag = ShardedFreqAwareEmbeddingBagCollection(
                self.global_table_num_embeddings_list,
                embedding_dim,
                padding_idx=self._padding_of_tables(padding_idx),
                max_norm=max_norm,
                norm_type=norm_type,
                scale_grad_by_freq=scale_grad_by_freq,
                sparse=sparse,
                mode=mode,
                include_last_offset=include_last_offset,
                dtype=dtype,
                ids_freq_mapping=None if any(part is None for part in counts) else counts,
                warmup_ratio=warmup_ratio,
                evict_strategy=_policy(evict_strategy),
                sharding="table",
                plan=self.rank_of_tables,
                output="gather",  # gradients are not averaged; the results are exchanged in forward
                **cache_options,
            )
        _set_first_weights(bag, given, [1 / self._rows_of_rank(rank) for rank in self.rank_of_tables])
        self._hold(bag, evict_strategy)
        self.cache_weight_mgr = CachedParamMgr(bag, self.num_embeddings)
        self.padding_idx = padding_idx

    def _rows_of_rank(self, rank: int) -> int:
        """Rows of the tables that `rank` holds."""
        sizes = zip(self.rank_of_tables, self.global_table_num_embeddings_list, strict=True)
        return sum(rows for owner, rows in sizes if owner == rank)

    def _given_weights(
        self, initial: list[torch.Tensor | None], weight: torch.Tensor | None, embedding_dim: int
    ) -> list[torch.Tensor | None]:
        """First weights (rows, D) of each table, or None: those of the configs, or this rank's tables from `weight`."""
        sizes = self.global_table_num_embeddings_list
        if weight is not None:
            if tuple(weight.shape) != (self.num_embeddings, embedding_dim):
                raise ValueError(
                    f"_weight has shape {tuple(weight.shape)}; the tables {self.assigned_table_list} of rank "
                    f"{self.rank} have {(self.num_embeddings, embedding_dim)}"
                )
            own = weight.split([sizes[table] for table in self.assigned_table_list])
            initial = [None] * self.global_tables_num
            for table, values in zip(self.assigned_table_list, own, strict=True):
                initial[table] = values
        for table, values in enumerate(initial):
            if values is not None and tuple(values.shape) != (sizes[table], embedding_dim):
                raise ValueError(
                    f"initial_weight of table {table} has shape {tuple(values.shape)}; the table has "
                    f"{(sizes[table], embedding_dim)}"
                )
        return initial

    def _padding_of_tables(self, padding_idx: int | None) -> list[int | None]:
        """The padding id of each table, from that of each rank's tables put one after the other."""
        padding: list[int | None] = [None] * self.global_tables_num
        if padding_idx is None:
            return padding
        start_of_rank: dict[int, int] = {}
        for table, (rank, rows) in enumerate(
            zip(self.rank_of_tables, self.global_table_num_embeddings_list, strict=True)
        ):
            rows_of_rank = self._rows_of_rank(rank)
            if not -rows_of_rank <= padding_idx < rows_of_rank:
                raise ValueError(
                    f"padding_idx={padding_idx} is outside the valid range {-rows_of_rank}..{rows_of_rank - 1} of the "
                    f"tables of rank {rank}, put one after the other"
                )
            local = padding_idx % rows_of_rank - start_of_rank.get(rank, 0)
            start_of_rank[rank] = start_of_rank.get(rank, 0) + rows
            if 0 <= local < rows:
                padding[table] = local
        return padding

    # ---- lookup -------------------------------------------------------------------------------------------------

    def forward(
        self,
        indices: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
        shape_hook: Callable[[torch.Tensor], torch.Tensor] | None = None,
        already_split_along_rank: bool = True,
    ) -> torch.Tensor:
        """This rank's share of the batch for all tables, (B, T * D): those of rank 0 in their order, then of rank 1 …

        Args:
            indices: (N,) this rank's tables, all G bags of one after those of the other; ids of those tables put one
                after the other. After set_cache_op(False), slots as prepare_ids returned them.
            offsets: (T' * G,) start of each bag; one more, the end, with include_last_offset.
            per_sample_weights: (N,).
            shape_hook: applied to the result.
            already_split_along_rank: False: the three hold all T tables, the same on all ranks, with ids of all tables
                put one after the other; `split_along_rank` cuts this rank's part out.
        """
        bag, ranks = self.bag, self.bag._ranks
        if not already_split_along_rank:
            if per_sample_weights is not None:
                per_sample_weights = SumOfRanks.apply(per_sample_weights, ranks)
            indices, offsets, per_sample_weights = bag._placement.together(
                lambda: self._split(indices, offsets, per_sample_weights)
            )
        with self._recorded(indices):
            batch, num_bags = bag._placement.together(lambda: self._own_batch(indices, offsets, per_sample_weights))
            told = ranks.all_gather(torch.tensor([num_bags]))[:, 0]
            num_bags = int(told.max())
            if ((told != num_bags) & (told >= 0)).any():
                raise ValueError(
                    f"the ranks pass {told.tolist()} bags of each of their tables (-1: a rank without one)"
                )
            if not self.assigned_table_list:  # the bag keeps a table of one row there
                batch = batch._replace(offsets=torch.zeros(num_bags + 1, dtype=torch.int64))
            out = bag._lookup(batch)
        out = out[:, : len(self.assigned_table_list)].reshape(num_bags, -1)
        out = _exchange_shares(out, ranks, 0, 1)
        return out if shape_hook is None else shape_hook(out)

    def split_along_rank(
        self,
        batch_size: int,
        indices: torch.Tensor,
        offsets: torch.Tensor,
        per_sample_weights: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """This rank's part of a batch of all tables: (indices, offsets, per_sample_weights) as `forward` takes them.

        Args:
            batch_size: G, bags of each table. indices: (N,) ids of all tables put one after the other, table-major.
            offsets: (T * G,) start of each bag; one more with include_last_offset.
        """
        num_offsets = self.global_tables_num * batch_size + self.include_last_offset
        if offsets.numel() != num_offsets:
            raise ValueError(
                f"offsets has {offsets.numel()} entries; {self.global_tables_num} tables with {batch_size} bags each "
                f"have {num_offsets}"
            )
        ends = offsets if self.include_last_offset else torch.cat([offsets, offsets.new_tensor([indices.numel()])])
        table_starts = self.bag._placement.table_starts
        ids, starts, weights = [indices[:0]], [offsets[:0]], []
        local_start = num_ids = 0
        for table in self.assigned_table_list:
            bags = ends[batch_size * table : batch_size * (table + 1) + 1]
            first, last = int(bags[0]), int(bags[-1])
            ids.append(indices[first:last] - (table_starts[table] - local_start))
            starts.append(bags[:-1] - first + num_ids)
            weights.append(slice(first, last))
            local_start += self.global_table_num_embeddings_list[table]
            num_ids += last - first
        if self.include_last_offset:
            starts.append(offsets.new_tensor([num_ids]))
        if per_sample_weights is not None:
            per_sample_weights = torch.cat([per_sample_weights[:0], *(per_sample_weights[part] for part in weights)])
        return torch.cat(ids), torch.cat(starts), per_sample_weights

    def _split(
        self, indices: torch.Tensor, offsets: torch.Tensor | None, weights: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        if not self.cache_op:
            raise ValueError(
                "already_split_along_rank=False after set_cache_op(False): slots are those of this rank's tables alone"
            )
        self._check_bags(indices, offsets, self.global_tables_num)
        num_bags = (offsets.numel() - self.include_last_offset) // self.global_tables_num
        return self.split_along_rank(num_bags, indices, offsets, weights)

    def _check_bags(self, indices: torch.Tensor, offsets: torch.Tensor | None, num_tables: int) -> None:
        _check_integers("indices", indices)
        _check_integers("offsets", offsets)
        if indices.dim() != 1 or offsets.dim() != 1:
            raise ValueError(f"indices and offsets have {indices.dim()} and {offsets.dim()} dimensions: give 1 each")
        if num_tables and (offsets.numel() - self.include_last_offset) % num_tables:
            raise ValueError(
                f"offsets has {offsets.numel()} entries for {num_tables} tables: every table needs the same number of "
                f"bags" + (", and the end of the last" if self.include_last_offset else "")
            )

    def _own_batch(
        self, indices: torch.Tensor, offsets: torch.Tensor | None, weights: torch.Tensor | None
    ) -> tuple[_Batch, int]:
        """(this rank's batch, G); without a table of its own, an empty batch and -1."""
        num_tables = len(self.assigned_table_list)
        if not num_tables:
            if indices.numel():
                raise ValueError(
                    f"{indices.numel()} ids on rank {self.rank}, which holds no table: give an empty tensor"
                )
            return _Batch(torch.empty(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), weights), -1
        self._check_bags(indices, offsets, num_tables)
        batch = self.bag._checked_batch(self._ids_of(indices), offsets, self.include_last_offset, weights)
        num_bags = (batch.offsets.numel() - 1) // num_tables
        if not num_bags:
            return batch, 0
        cache = self.bag._cache
        table = torch.repeat_interleave(torch.arange(num_tables), batch.offsets[::num_bags].diff())
        values = batch.values - cache.table_starts[table]
        bad = (values < 0) | (values >= cache.table_rows[table])
        if bad.any():
            position = int(bad.nonzero()[0, 0])
            number = int(table[position])
            start = int(cache.table_starts[number])
            raise ValueError(
                f"id {int(batch.values[position])} at position {position} is outside the ids {start}.."
                f"{start + int(cache.table_rows[number]) - 1} of table {self.assigned_table_list[number]}, counted "
                f"over the tables of rank {self.rank}"
            )
        return batch._replace(values=values), num_bags
