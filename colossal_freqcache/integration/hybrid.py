"""What Colossal-AI's HybridParallelPlugin has to know of cached tables, taught to it once in a process.

The plugin makes its checkpoint io and its optimizer wrapper itself, so a policy cannot hand in others. It finds out how
state is sharded by comparing a parameter's shape before and after tensor parallelism, and takes norms of gradients as
if they were dense: a cache block has neither shape, and its gradient is sparse. For models and optimizers with blocks,
and only for them, a few of its methods are wrapped. Source: Colossal-AI 0.5.0, read.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from colossalai.booster.plugin.hybrid_parallel_plugin import HybridParallelNaiveOptimizer
from colossalai.checkpoint_io import HybridParallelCheckpointIO

from .. import optim
from ..block import cached_weight_of
from ..step_hooks import bind_blocks, blocks_of, load_logical_states, logical_state
from .checkpoint_io import MODEL_TABLES, OPTIMIZER_TABLES, load_optimizer_tables, load_tables

__all__ = ["teach_hybrid_plugin"]


def teach_hybrid_plugin() -> None:
    """Wraps the methods, once."""
    if not getattr(HybridParallelCheckpointIO, "_knows_cached_tables", False):
        HybridParallelCheckpointIO._knows_cached_tables = True
        _teach_checkpoint_io(HybridParallelCheckpointIO)
        _teach_optimizer(HybridParallelNaiveOptimizer)


def _teach_checkpoint_io(io: type) -> None:
    """Saving an optimizer hands out blocks' logical columns, loading puts them into rows; streamed tables are read."""
    gather, load_states = io.gather_from_sharded_optimizer_state, io.load_states_into_optimizer
    load_model, load_optimizer = io.load_sharded_model, io.load_sharded_optimizer

    @functools.wraps(gather)
    def gather_with_tables(state: dict, param: torch.Tensor, *args: Any, **kwargs: Any) -> dict:
        weight = cached_weight_of(param)
        return gather(state, param, *args, **kwargs) if weight is None else logical_state(state, weight)

    @functools.wraps(load_states)
    def load_states_with_tables(self: Any, optimizer: Any, state_dict: dict, id_map: dict) -> None:
        of_tables = {
            int(number): state
            for number, state in state_dict.items()
            if int(number) in id_map and cached_weight_of(id_map[int(number)]) is not None
        }
        rest = {number: state for number, state in state_dict.items() if int(number) not in of_tables}
        load_states(self, optimizer, rest, id_map)
        load_logical_states(optimizer.optim, {id_map[number]: state for number, state in of_tables.items()})

    @functools.wraps(load_model)
    def load_model_with_tables(self: Any, model: Any, index: Any, *args: Any, **kwargs: Any) -> Any:
        result = load_model(self, model, index, *args, **kwargs)
        if (Path(index).parent / MODEL_TABLES).is_dir():  # FreqCachePlugin has saved it
            load_tables(Path(index).parent, model.unwrap())
        return result

    @functools.wraps(load_optimizer)
    def load_optimizer_with_tables(self: Any, optimizer: Any, index: Any, *args: Any, **kwargs: Any) -> Any:
        if (Path(index).parent / OPTIMIZER_TABLES).is_dir():
            return load_optimizer_tables(Path(index).parent, optimizer.model.unwrap(), optimizer.unwrap())
        return load_optimizer(self, optimizer, index, *args, **kwargs)

    io.gather_from_sharded_optimizer_state = staticmethod(gather_with_tables)
    io.load_states_into_optimizer = load_states_with_tables
    io.load_sharded_model, io.load_sharded_optimizer = load_model_with_tables, load_optimizer_with_tables


def _teach_optimizer(wrapper: type) -> None:
    """Blocks are bound at boost, and clipped with the norm over the tables of all ranks and the dense parameters."""
    init, step = wrapper.__init__, wrapper.step

    @functools.wraps(init)
    def init_and_bind(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        bind_blocks(self.optim)

    @functools.wraps(step)
    def clip_and_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.max_norm or not any(True for _ in blocks_of(self.optim)):
            return step(self, *args, **kwargs)
        max_norm, self.max_norm = self.max_norm, 0
        try:
            self._current_grad_norm = float(optim.clip_grad_norm_(self.parameters, max_norm))
            return step(self, *args, **kwargs)
        finally:
            self.max_norm = max_norm

    def with_blocks(ours: Callable, theirs: Callable) -> Callable:
        @functools.wraps(theirs)
        def clip(self: Any, *args: Any, **kwargs: Any) -> Any:
            has_blocks = any(True for _ in blocks_of(self.optim))
            return ours(self.parameters, *args, **kwargs) if has_blocks else theirs(self, *args, **kwargs)

        return clip

    wrapper.__init__, wrapper.step = init_and_bind, clip_and_step
    wrapper.clip_grad_by_norm = with_blocks(optim.clip_grad_norm_, wrapper.clip_grad_by_norm)
    wrapper.clip_grad_by_value = with_blocks(optim.clip_grad_value_, wrapper.clip_grad_by_value)
