"""FreqCachePolicy: a shardformer policy that puts a cached, sharded bag in the place of every nn.EmbeddingBag."""

import fnmatch
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from colossalai.shardformer.policies.base_policy import Policy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..config import FreqCacheConfig
from ..frequency import as_counts
from ..row_layout import RowLayout
from ..row_rules import make_rule
from .bags import ParallelFreqAwareEmbeddingBag, cached_modules, check_group, ignore_in_ddp
from .config_files import load_config
from .hybrid import teach_hybrid_plugin

__all__ = ["FreqCachePolicy", "divide_slots"]


# Registered by users on the native module, and lost with it.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


class FreqCachePolicy(Policy):
    """Swaps each nn.EmbeddingBag of a model, however deep, for a ParallelFreqAwareEmbeddingBag.

    For `HybridParallelPlugin(tp_size=W, pp_size=1, precision="fp32", custom_policy=FreqCachePolicy(config))`, where all
    ranks of the tensor-parallel group see the same batch, and for `ShardFormer.optimize(model, policy)`.

    Args:
        config: FreqCacheConfig, or what `load_config` takes. Siblings keep separate caches, which divide
            `max_cache_bytes` and `num_slots` among them, in proportion to their counts (else to their rows).
        pattern: only modules whose name matches it, or one of several (as in fnmatch: "embeddings.*").
        min_rows: smaller tables stay as they are, a copy on each rank.
        counts: accesses of each id, {module name: (R,) counts or IdFrequency}; a name may be left out.
        output: "gather", all ranks pass the same batch; "share", each its own share, as FreqCachePlugin has it.

    Raises (when the model is sharded):
        ValueError: a layout whose caches would differ; a table that shares its Parameter with another module; a model
            already inside DDP; nothing to swap; counts for an unknown module.
    """

    def __init__(
        self,
        config: FreqCacheConfig | Mapping[str, Any] | str | Path,
        *,
        pattern: str | Sequence[str] | None = None,
        min_rows: int = 0,
        counts: Mapping[str, Any] | None = None,
        output: str = "gather",
    ) -> None:
        super().__init__()
        self.config = load_config(config)
        self.patterns = [pattern] if isinstance(pattern, str) else pattern
        self.min_rows = min_rows
        self.counts = dict(counts or {})
        self.output = output

    def config_sanity_check(self) -> None:
        """Refuses groups in which ranks with different batches would keep copies of one table."""
        if not dist.is_initialized() or self.output != "gather":
            return
        group, world_size = self.shard_config.tensor_parallel_process_group, dist.get_world_size()
        tp_size = dist.get_world_size(group)
        if tp_size != world_size:
            raise ValueError(
                f"tensor parallelism over {tp_size} of {world_size} ranks would give each of {world_size // tp_size} "
                f"groups a copy of the tables, trained on other batches: use tp_size={world_size}, or FreqCachePlugin, "
                f"which shards the tables over all ranks and keeps the dense part data-parallel"
            )

    def preprocess(self) -> nn.Module:
        """Looks at the whole model first, then swaps every table, under all names that it has."""
        self._check_model()
        tables = self.tables(self.model)
        group = self.shard_config.tensor_parallel_process_group
        options = self.options(tables, dist.get_world_size(group) if dist.is_initialized() else 1)
        places: dict[int, list[tuple[nn.Module, str]]] = {}
        for parent in self.model.modules():
            for name, child in parent._modules.items():
                places.setdefault(id(child), []).append((parent, name))
        for name, table in tables.items():
            bag = ParallelFreqAwareEmbeddingBag.from_native_module(table, group, **options[name])
            for parent, attribute in places[id(table)]:
                setattr(parent, attribute, bag)
        return self.model

    def module_policy(self) -> dict:
        """Nothing is left to replace. (The host would look for the names below every module of the root's class.)"""
        return {}

    def postprocess(self) -> nn.Module:
        """DDP is to leave the cache blocks alone; the host's hybrid plugin is taught about them."""
        ignore_in_ddp(self.model)
        teach_hybrid_plugin()
        return self.model

    # ---- which tables, and how large their caches ---------------------------------------------------------------

    def tables(self, model: nn.Module) -> dict[str, nn.EmbeddingBag]:
        """{name: module} of what is swapped, in the model's order."""
        return {
            name: module
            for name, module in model.named_modules()
            if type(module) is nn.EmbeddingBag
            and module.num_embeddings >= self.min_rows
            and (self.patterns is None or any(fnmatch.fnmatchcase(name, pattern) for pattern in self.patterns))
        }

    def _check_model(self) -> None:
        model, tables = self.model, self.tables(self.model)
        if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
            raise ValueError("the model is inside DistributedDataParallel already: swap tables before it is wrapped")
        if isinstance(model, nn.EmbeddingBag):
            raise ValueError("the model is a bare nn.EmbeddingBag, which cannot be swapped: put it into a module")
        there = cached_modules(model)
        for name, module in there.items() if dist.is_initialized() else ():
            group = self.shard_config.tensor_parallel_process_group
            check_group(name, module, dist.get_world_size(group), self.output)
        if not tables and not there:
            raise ValueError(
                f"no nn.EmbeddingBag{f' of at least {self.min_rows} rows' if self.min_rows else ''}"
                f"{'' if self.patterns is None else f' matching {self.patterns}'} in the model: nothing to cache"
            )
        if tables and self.config.sharding == "table":
            raise ValueError(
                'sharding="table" places the tables of a ParallelFreqAwareEmbeddingBagCollection; single '
                'nn.EmbeddingBags are divided by "column" or "row"'
            )
        unknown = sorted(set(self.counts) - set(tables))
        if unknown:
            raise ValueError(f"counts for {unknown}, but the tables are {list(tables)}")
        holders = Counter(
            id(parameter) for module in set(model.modules()) for parameter in module.parameters(recurse=False)
        )
        group = self.shard_config.tensor_parallel_process_group
        world_size = dist.get_world_size(group) if dist.is_initialized() else 1
        for name, table in tables.items():
            if type(table._parameters.get("weight")) is not nn.Parameter:
                raise ValueError(
                    f"{name}.weight is no plain Parameter (parametrized, or lazily made?): swap it before that"
                )
            if holders[id(table.weight)] > 1:
                raise ValueError(
                    f"{name}.weight is shared by {holders[id(table.weight)]} modules: a cached table cannot be tied"
                )
            if table.weight.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"{name} is {table.weight.dtype}: rows are float32 or float64 where a plugin swaps tables; for "
                    f"others build ParallelFreqAwareEmbeddingBag(..., dtype={table.weight.dtype}) in its place"
                )
            if table.weight.grad is not None:
                raise ValueError(f"{name}.weight has a gradient: call zero_grad(), or step, before its table is cached")
            if self.config.sharding in (None, "column") and table.embedding_dim < world_size:
                raise ValueError(
                    f"{name} has {table.embedding_dim} columns for {world_size} ranks: leave it out by `pattern`, or "
                    f'use sharding="row"'
                )
            hooks = [kind for kind in _HOOKS if getattr(table, kind, None)]
            if hooks:
                raise ValueError(
                    f"{name} has {', '.join(hooks)}, which the module in its place would not call: remove them"
                )

    def options(self, tables: Mapping[str, nn.EmbeddingBag], world_size: int) -> dict[str, dict[str, Any]]:
        """{name: keywords of the bag that takes its place}; budgets are divided among the tables."""
        config = self.config
        common = dict(config.bag_keywords(), sharding=config.sharding or "column", output=self.output)
        counts = {name: as_counts(self.counts.get(name), [table.num_embeddings]) for name, table in tables.items()}
        options = {name: dict(common, ids_freq_mapping=counts[name]) for name in tables}
        if len(tables) < 2 or (config.max_cache_bytes is None and config.num_slots is None):
            return options
        rows, weights, row_bytes = [], [], []
        all_counted = all(count is not None for count in counts.values())
        rule = None if config.optimizer is None else make_rule(config.optimizer)
        for name, table in tables.items():
            by_row = common["sharding"] == "row"
            dim = table.embedding_dim if by_row else -(-table.embedding_dim // world_size)
            rows.append(-(-table.num_embeddings // world_size) if by_row else table.num_embeddings)
            weights.append(float(counts[name].sum()) if all_counted else float(table.num_embeddings))
            layout = RowLayout(dim, table.weight.dtype)
            row_bytes.append((layout if rule is None else rule.layout(dim, table.weight.dtype, {})).row_bytes)
        for setting, unit in (("num_slots", [1] * len(rows)), ("max_cache_bytes", row_bytes)):
            if getattr(config, setting) is not None:
                shares = divide_slots(getattr(config, setting), rows, weights, unit)
                for name, slots, size in zip(tables, shares, unit, strict=True):
                    options[name][setting] = slots * size
        return options


def divide_slots(
    budget: int, rows: Sequence[int], weights: Sequence[float], slot_cost: Sequence[int] | None = None
) -> list[int]:
    """Slots of each table under one budget: in proportion to `weights`, at most `rows` each, at least one.

    What a small table cannot use goes to the others. slot_cost: what a slot of each table takes of the budget.

    Raises:
        ValueError: the budget does not give every table one slot.
    """
    cost = np.ones(len(rows)) if slot_cost is None else np.asarray(slot_cost, np.float64)
    weight = np.maximum(np.asarray(weights, np.float64), 1e-9)
    if cost.sum() > budget:
        raise ValueError(
            f"a budget of {budget} does not hold one row of each of {len(rows)} tables: give at least {int(cost.sum())}"
        )
    # One slot each; the rest is divided, in rounds: a table that cannot use its share is filled, and leaves the round.
    extra, most = np.zeros(len(rows)), np.asarray(rows, np.float64) - 1
    dividing = most > 0
    while dividing.any():
        left = budget - cost.sum() - (extra[~dividing] * cost[~dividing]).sum()
        share = left * weight / weight[dividing].sum() / cost
        full = dividing & (share >= most)
        if not full.any():
            extra[dividing] = np.floor(share[dividing] + 1e-6)  # a share that is whole but for rounding
            break
        extra[full] = most[full]
        dividing &= ~full
    return (1 + extra).astype(int).tolist()
