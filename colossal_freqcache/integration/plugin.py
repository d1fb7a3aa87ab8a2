"""FreqCachePlugin: a Booster plugin. Tables model-parallel over all ranks, the dense part data-parallel, by DDP.

That is the layout of Fang et al. 2022 (arXiv:2208.05321). The base is Colossal-AI's TorchDDPPlugin.
"""

import contextlib
import itertools
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from colossalai.booster.plugin.torch_ddp_plugin import TorchDDPModel, TorchDDPPlugin
from colossalai.checkpoint_io import CheckpointIO
from colossalai.interface import ModelWrapper, OptimizerWrapper
from colossalai.shardformer import ShardConfig, ShardFormer
from colossalai.tensor.param_op_hook import ColoParamOpHookManager
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .. import optim
from ..config import FreqCacheConfig
from ..lookahead import Lookahead
from ..row_rules import make_rule
from ..step_hooks import bind_blocks, check_optimizer, rule_name_of
from .bags import cached_modules, check_group, ignore_in_ddp
from .checkpoint_io import FreqCacheCheckpointIO
from .config_files import load_config
from .op_hook import FreqCacheOpHook
from .policy import FreqCachePolicy

__all__ = ["FreqCacheModel", "FreqCacheOptimizer", "FreqCachePlugin"]


class FreqCacheModel(TorchDDPModel):
    """The boosted model: DDP around the dense part, parameter hooks in use in forward and backward.

    Attributes:
        op_hooks: Colossal-AI parameter hooks; the first is the plugin's FreqCacheOpHook.
    """

    def __init__(self, module: nn.Module, hook: FreqCacheOpHook, **ddp_options: Any) -> None:
        ignored = set(getattr(module, "_ddp_params_and_buffers_to_ignore", []))
        if any(parameter.requires_grad for name, parameter in module.named_parameters() if name not in ignored):
            super().__init__(module, **ddp_options)
        else:  # tables alone are trained: nothing is left for DDP, which refuses that, but to start alike
            ModelWrapper.__init__(self, module)
            for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
                if name not in ignored:
                    dist.broadcast(tensor.data, 0)
        self.op_hooks = [hook]

    def unwrap(self, unwrap_peft: bool = True) -> nn.Module:
        """The model that was boosted, with its tables swapped."""
        return super().unwrap(unwrap_peft) if self._is_ddp else self.module

    @property
    def _is_ddp(self) -> bool:
        return isinstance(self.module, nn.parallel.DistributedDataParallel)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, with the hooks in use."""
        with self.hooks():
            return super().forward(*args, **kwargs)

    def hooks(self) -> contextlib.AbstractContextManager:
        """The context in which `op_hooks` fire."""
        return ColoParamOpHookManager.use_hooks(*self.op_hooks)

    def no_sync(self) -> contextlib.AbstractContextManager:
        """As DDP's: dense gradients stay local. Table gradients are exchanged in each backward and add up."""
        return self.module.no_sync() if self._is_ddp else contextlib.nullcontext()


class FreqCacheOptimizer(OptimizerWrapper):
    """The boosted optimizer: the user's own, which trains dense parameters by torch's rule and tables by row rules."""

    def __init__(self, optimizer: Optimizer, model: FreqCacheModel) -> None:
        super().__init__(optimizer)
        self.model = model

    def backward(self, loss: torch.Tensor, inputs=None, retain_graph: bool = False, **kwargs: Any) -> None:
        """loss.backward(), with the model's parameter hooks in use."""
        with self.model.hooks():
            super().backward(loss, inputs=inputs, retain_graph=retain_graph, **kwargs)

    def backward_by_grad(self, *args: Any, **kwargs: Any) -> None:
        """As the base's, with the model's parameter hooks in use."""
        with self.model.hooks():
            super().backward_by_grad(*args, **kwargs)

    def clip_grad_by_norm(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Scales all gradients so that their norm, over dense parameters and the tables of all ranks, is <= max_norm.

        Every rank must call it. Returns the norm before, the same on all ranks.
        """
        return optim.clip_grad_norm_(self.parameters, max_norm, norm_type, error_if_nonfinite)

    def clip_grad_by_value(self, clip_value: float, *args: Any, **kwargs: Any) -> None:
        """Clamps every element of all gradients to [-clip_value, clip_value], those of the tables' rows too."""
        optim.clip_grad_value_(self.parameters, clip_value)


def _default_timeout() -> Any:
    """How long the default group waits, if that is gloo's; None: torch's default."""
    try:
        return dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout
    except (AttributeError, RuntimeError):  # another backend, without host tensors
        return None


class FreqCachePlugin(TorchDDPPlugin):
    """Booster plugin for models with embedding tables that do not fit on the device.

    Every nn.EmbeddingBag of the model becomes a ParallelFreqAwareEmbeddingBag over all ranks (sharded by
    `config.sharding`); the rest is data-parallel. Each rank trains on its own share of the batch. Tables that the model
    already has as Parallel bags or collections are used as they are.

    Args:
        config: FreqCacheConfig, or what `load_config` takes.
        ids: fn(batch) -> what the forward of the model's one table module takes (a tensor or a tuple), or {module name:
            that}; the loader that is boosted is then a Lookahead of the config's window (64 by default) and depth (1).
            Without: it is left as it is, with one warning.
        pattern, min_rows, counts: as in FreqCachePolicy.
        ddp_options: keywords of TorchDDPPlugin.

    Raises:
        ValueError: at boost: an optimizer or a setting without an exact row rule, a model that cannot be swapped.
    """

    def __init__(
        self,
        config: FreqCacheConfig | Mapping[str, Any] | str | Path,
        ids: Callable[[Any], Any] | None = None,
        *,
        pattern: Any = None,
        min_rows: int = 0,
        counts: Mapping[str, Any] | None = None,
        **ddp_options: Any,
    ) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "no process group: call colossal_freqcache.integration.launch_from_torch() first, in a process that "
                "`colossalai run` or torchrun has started"
            )
        super().__init__(**ddp_options)
        self.config = load_config(config)
        self.ids = ids
        self.policy = FreqCachePolicy(self.config, pattern=pattern, min_rows=min_rows, counts=counts, output="share")
        # Of their own: exchanges of tables and DDP's reductions never wait for one another's order.
        self.group = dist.new_group(backend="gloo", timeout=_default_timeout())

    def configure(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        criterion: Callable | None = None,
        dataloader: Any = None,
        lr_scheduler: LRScheduler | None = None,
    ) -> tuple:
        """Swaps the tables, binds the optimizer, wraps model, optimizer and loader."""
        if isinstance(model, ModelWrapper):
            raise ValueError(f"the model is a {type(model).__name__} already: give the module itself")
        self._check_optimizer_fits(model, optimizer)
        if self.policy.tables(model) or not cached_modules(model):
            shard_config = ShardConfig(tensor_parallel_process_group=self.group)
            model, _ = ShardFormer(shard_config).optimize(model, policy=self.policy)
        self._check_tables(model)
        ignore_in_ddp(model)
        if optimizer is not None:
            bind_blocks(optimizer)
        hook = FreqCacheOpHook()
        model = FreqCacheModel(model, hook, **self.ddp_kwargs)
        if optimizer is not None:
            optimizer = FreqCacheOptimizer(optimizer, model)
        if dataloader is not None:
            dataloader = self._wrapped(dataloader, model)
        return model, optimizer, criterion, dataloader, lr_scheduler

    def _check_optimizer_fits(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        """Before anything is swapped: whether the optimizer has a row rule for the tables that it holds."""
        if optimizer is None:
            return
        if isinstance(optimizer, OptimizerWrapper):
            raise ValueError(f"the optimizer is a {type(optimizer).__name__} already: give the torch optimizer itself")
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        tables = [*self.policy.tables(model).values(), *cached_modules(model).values()]
        if any(table.weight.requires_grad and id(table.weight) in held for table in tables):
            check_optimizer(optimizer)
        weights = {id(table.weight) for table in tables if table.weight.requires_grad}
        for group in optimizer.param_groups:
            if any(id(parameter) in weights for parameter in group["params"]):
                make_rule(rule_name_of(optimizer)).check(group)

    def _check_tables(self, model: nn.Module) -> None:
        for name, module in cached_modules(model).items():
            check_group(name, module, self.world_size, "share")

    def _wrapped(self, dataloader: Any, model: FreqCacheModel) -> Any:
        window, depth = self.config.window_and_depth()
        if window == 0:
            return dataloader
        if self.ids is None:
            warnings.warn(
                "FreqCachePlugin has no `ids` function, so the coming batches' ids are not known to the cache; give "
                "ids=fn(batch) -> what the table's forward takes, or window=0 for none",
                stacklevel=2,
            )
            return dataloader
        return Lookahead(dataloader, model.unwrap(), self.ids, window, depth)

    def get_checkpoint_io(self) -> CheckpointIO:
        """Tables by colossal_freqcache.checkpoint, the dense part by Colossal-AI's own io."""
        return FreqCacheCheckpointIO()

    def no_sync(self, model: nn.Module, optimizer: OptimizerWrapper) -> contextlib.AbstractContextManager:
        """Accumulate without reducing dense gradients; tables exchange in each backward."""
        assert isinstance(model, FreqCacheModel), "the model was not boosted by FreqCachePlugin"
        return model.no_sync()

    def supported_devices(self) -> list[str]:
        """Host caches only, so far."""
        return ["cpu"]

    def supported_precisions(self) -> list[str]:
        """Rows are trained in float32."""
        return ["fp32"]

    def support_lora(self) -> bool:
        """No: LoRA is for dense layers of language models."""
        return False
