"""ParallelFreqAwareEmbeddingBag: the sharded bag as a ParallelModule, registered in Colossal-AI's tensor layout.

What is registered where. The module's one parameter, `weight`, is this rank's cache block, marked as a customized
distributed tensor: gathering it (`to_global_for_customized_distributed_tensor`, sharded checkpoints) gives the logical
table. The table itself is no parameter: `host_table` hands it out as a d_tensor with the layout [R, S(0)].
Operations on `weight` fire Colossal-AI's parameter hooks (`ColoParamOpHookManager`) by explicit calls: a ColoParameter
in its place would rewrite in-place optimizer updates.
"""

from typing import Any

import torch
import torch.distributed as dist
from colossalai.device.device_mesh import DeviceMesh
from colossalai.shardformer.layer import ParallelModule
from colossalai.tensor.d_tensor import init_as_dtensor
from colossalai.tensor.d_tensor.api import init_tensor_as_customization_distributed
from colossalai.tensor.d_tensor.sharding_spec import ShardingSpec
from colossalai.tensor.param_op_hook import ColoParamOpHookManager
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..block import plain_mode
from ..embedding import _CachedBags
from ..parallel import ShardedFreqAwareEmbeddingBag, ShardedFreqAwareEmbeddingBagCollection

__all__ = [
    "ParallelFreqAwareEmbeddingBag",
    "ParallelFreqAwareEmbeddingBagCollection",
    "cached_modules",
    "check_group",
    "ignore_in_ddp",
]


class _ParallelBags:
    """What both classes add to the sharded ones: the layout and the hooks."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._register()

    def _register(self) -> None:
        """Marks the block as a customized distributed tensor whose gather gives the logical table, in id order."""
        weight = self._cached_weight

        def shard(table: torch.Tensor) -> torch.Tensor:
            piece = weight.placement.piece(0, table.shape[0])
            return table[piece.places, piece.columns]

        def gather(block: torch.Tensor) -> torch.Tensor:
            return weight.logical("weight")

        init_tensor_as_customization_distributed(self.weight, shard, gather)

    def __deepcopy__(self, memo: dict) -> "_ParallelBags":
        copy = super().__deepcopy__(memo)
        copy._register()
        return copy

    def host_table(self) -> torch.Tensor:
        """This rank's columns of all rows in id order, newest values, (R, D/W), with the layout [R, S(0)]; a copy.

        `to_global` of it is the logical table. Registered without being a module parameter.

        Raises:
            ValueError: the layout cannot say it (rows or tables are sharded, or D is not a multiple of W); or the copy
                would pass `max_state_dict_bytes`.
        """
        placement, weight = self._placement, self._cached_weight
        if self.sharding != "column" or placement.dim % placement.world_size:
            raise ValueError(
                f"{placement.dim} columns sharded by {self.sharding!r} over {placement.world_size} ranks are no "
                f"d_tensor layout: it needs column sharding and equal widths. Gather bag.weight instead"
            )
        cache = weight.cache
        weight.check_bytes(cache.num_rows * cache.layout.dim * cache.layout.dtype.itemsize, "host_table()")
        with plain_mode():
            table = torch.empty(cache.num_rows, cache.layout.dim, dtype=cache.layout.dtype)
            for first, last in cache.id_chunks(0, cache.num_rows):
                table[first:last] = cache.read_ids(first, last)[:, cache.layout.columns("weight")]
        if self.process_group is None:
            return table
        mesh = DeviceMesh.from_process_group(self.process_group)
        spec = ShardingSpec(dim_size=2, dim_partition_dict={1: [0]})
        return init_as_dtensor(table, mesh, spec, torch.Size((placement.num_rows, placement.dim)))

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The sharded module's forward, with the four events of the parameter hooks around it and its backward."""
        if not ColoParamOpHookManager.has_hook():
            return super().forward(*args, **kwargs)
        (graph_input,) = ColoParamOpHookManager.pre_op([self.weight], self.weight)
        self.__dict__["_graph_input"] = graph_input  # no attribute: nn.Module would register it
        try:
            out = super().forward(*args, **kwargs)
        finally:
            del self.__dict__["_graph_input"]
        return ColoParamOpHookManager.post_op([self.weight], out)


class ParallelFreqAwareEmbeddingBag(_ParallelBags, ShardedFreqAwareEmbeddingBag, ParallelModule):
    """ShardedFreqAwareEmbeddingBag as a Colossal-AI ParallelModule: same arguments, same results.

    `weight` is this rank's cache block, marked as a customized distributed tensor whose gather is the logical table.
    Source: the idea and its first name are Colossal-AI's own (v0.1.9); after Fang et al. 2022 (arXiv:2208.05321).
    """

    @classmethod
    def from_native_module(
        cls,
        module: nn.EmbeddingBag,
        process_group: dist.ProcessGroup | list[dist.ProcessGroup] | None = None,
        *args: Any,
        **options: Any,
    ) -> "ParallelFreqAwareEmbeddingBag":
        """A cached, sharded bag in the place of `module`; its weight Parameter stays the same object.

        So an optimizer that was built over it stays valid. Its memory is released: the Parameter becomes the cache
        block. Every rank streams its part out of its own copy of the first rank's values.

        Args:
            module: the nn.EmbeddingBag.
            process_group: the ranks that share the table; a list of one is accepted.
            options: keywords of ParallelFreqAwareEmbeddingBag beyond those that `module` has.

        Raises:
            TypeError: `module` is none. RuntimeError: its weight has a gradient.
        """
        if args:
            raise TypeError(f"{len(args)} positional options: give them as keywords")
        if isinstance(process_group, list):
            if len(process_group) != 1:
                raise ValueError(f"{len(process_group)} process groups: a table is shared by the ranks of one")
            process_group = process_group[0]
        if not isinstance(module, nn.EmbeddingBag):
            raise TypeError(f"module is a {type(module).__name__}: give an nn.EmbeddingBag")
        parameter = module.weight
        if parameter.grad is not None:
            raise RuntimeError(
                f"the weight of {module} has a gradient: call zero_grad(), or step, before its table is cached"
            )
        options.setdefault("sparse", module.sparse)
        bag = cls(
            module.num_embeddings,
            module.embedding_dim,
            padding_idx=module.padding_idx,
            max_norm=module.max_norm,
            norm_type=module.norm_type,
            scale_grad_by_freq=module.scale_grad_by_freq,
            mode=module.mode,
            include_last_offset=module.include_last_offset,
            dtype=parameter.dtype,
            _weight=parameter.detach(),
            process_group=process_group,
            **options,
        )
        bag._cached_weight.adopt(parameter)
        bag.weight = parameter
        bag._register()
        bag.train(module.training)
        return bag


class ParallelFreqAwareEmbeddingBagCollection(_ParallelBags, ShardedFreqAwareEmbeddingBagCollection, ParallelModule):
    """ShardedFreqAwareEmbeddingBagCollection as a Colossal-AI ParallelModule: many tables, one cache a rank.

    Gathering `weight` gives all tables, one below the other.
    """

    @staticmethod
    def from_native_module(module: nn.Module, process_group: Any = None, **options: Any) -> nn.Module:
        """Refused: no torch module is a collection of tables behind one cache.

        Raises:
            TypeError: always; says what to build instead.
        """
        raise TypeError(
            f"a {type(module).__name__} does not become a collection: build ParallelFreqAwareEmbeddingBagCollection in "
            f"its place, or let FreqCachePolicy swap each nn.EmbeddingBag"
        )


def cached_modules(model: nn.Module) -> dict[str, _CachedBags]:
    """{name: module} of every cached table or collection in the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _CachedBags)}


def ignore_in_ddp(model: nn.Module) -> None:
    """Every cache block in the model is left out of DistributedDataParallel: its slots hold other rows on each rank."""
    names = [f"{name}.weight" if name else "weight" for name in cached_modules(model)]
    names += list(getattr(model, "_ddp_params_and_buffers_to_ignore", []))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(set(names)))


def check_group(name: str, module: _CachedBags, world_size: int, output: str) -> None:
    """Raises ValueError where a table that is in the model already is not shared as the rest of it is trained."""
    ranks, its_output = module._placement.world_size, getattr(module, "output", output)
    if ranks != world_size or (world_size > 1 and its_output != output):
        raise ValueError(
            f"{name} is a {type(module).__name__} shared by {ranks} of {world_size} ranks, output={its_output!r}, "
            f"which would train apart from the others: build Parallel{type(module).__name__.removeprefix('Parallel')} "
            f"over all of them, after the launch, with output={output!r}"
        )
