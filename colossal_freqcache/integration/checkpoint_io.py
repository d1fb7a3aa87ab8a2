"""Checkpoints through the Booster: tables by `colossal_freqcache.checkpoint`, all else by Colossal-AI's own io.

unsharded (one file)       what plain torch loads: the whole state_dict, tables assembled. Refused above 2 GiB.
sharded (a directory)      dense parameters and state as Colossal-AI writes them, and beside them a folder of
                           tables in the streamed format, which loads on any number of ranks.

Everything that gathers a table is entered by all ranks; only the master writes what Colossal-AI's io writes.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from colossalai.booster.plugin.torch_ddp_plugin import TorchDDPCheckpointIO
from colossalai.checkpoint_io import GeneralCheckpointIO
from colossalai.checkpoint_io.utils import save_state_dict
from torch import nn

from .. import checkpoint as tables_io
from ..step_hooks import bind_blocks
from .bags import cached_modules

__all__ = ["FreqCacheCheckpointIO", "load_optimizer_tables", "load_tables", "only_tables"]

# Apart, so that a model and its optimizer may be saved into one directory, as the host allows.
MODEL_TABLES, OPTIMIZER_TABLES = "model_tables", "optimizer_tables"


class FreqCacheCheckpointIO(TorchDDPCheckpointIO):
    """The checkpoint io of FreqCachePlugin; every rank calls each of its methods."""

    def save_unsharded_model(
        self, model: Any, checkpoint: str, gather_dtensor: bool, use_safetensors: bool, use_async: bool = False
    ) -> None:
        """One file with the whole state_dict, which plain torch loads.

        Raises:
            ValueError: a table passes its `max_state_dict_bytes`: save with shard=True instead.
        """
        _refuse_async(use_async)
        state_dict = model.unwrap().state_dict()  # a gather: not on the master only
        if self.coordinator.is_master():
            save_state_dict(state_dict, checkpoint, use_safetensors)
        dist.barrier()

    def save_unsharded_optimizer(
        self, optimizer: Any, checkpoint: str, gather_dtensor: bool, use_async: bool = False
    ) -> None:
        """One file with the whole state, tables' columns in id order: what the torch optimizer of the name loads."""
        _refuse_async(use_async)
        state_dict = optimizer.state_dict()
        if self.coordinator.is_master():
            save_state_dict(state_dict, checkpoint, use_safetensors=False)
        dist.barrier()

    def load_unsharded_optimizer(
        self, optimizer: Any, checkpoint: str, low_cpu_mem_mode: bool = True, num_threads: int = 1
    ) -> None:
        """What `save_unsharded_optimizer`, or plain torch, wrote; tables' columns go into the rows."""
        super().load_unsharded_optimizer(optimizer, checkpoint, low_cpu_mem_mode, num_threads)
        bind_blocks(optimizer.unwrap())

    def save_sharded_model(
        self,
        model: Any,
        checkpoint_path: str,
        gather_dtensor: bool = True,
        prefix: str | None = None,
        max_shard_size: int = 1024,
        use_safetensors: bool = False,
        use_async: bool = False,
    ) -> None:
        """A directory: dense parameters as Colossal-AI shards them, and the tables, streamed."""
        _refuse_async(use_async)
        module = model.unwrap()
        tables_io.save(Path(checkpoint_path) / MODEL_TABLES, only_tables(module))
        if self.coordinator.is_master():
            with _dense_only(module):
                GeneralCheckpointIO.save_sharded_model(
                    self, module, checkpoint_path, gather_dtensor, prefix, max_shard_size, use_safetensors
                )
        dist.barrier()

    def load_sharded_model(
        self,
        model: Any,
        checkpoint_index_file: str,
        strict: bool = False,
        use_safetensors: bool = False,
        load_sub_module: bool = True,
        low_cpu_mem_mode: bool = True,
        num_threads: int = 1,
    ) -> None:
        """What `save_sharded_model` wrote, on any number of ranks. If it raises, the model is as it was."""
        module = model.unwrap()
        folder = Path(checkpoint_index_file).parent
        with _dense_only(module):
            dense = {name: value.clone() for name, value in module.state_dict().items()}
            try:
                if dense:
                    GeneralCheckpointIO.load_sharded_model(
                        self,
                        module,
                        Path(checkpoint_index_file),
                        strict,
                        use_safetensors,
                        load_sub_module,
                        low_cpu_mem_mode=low_cpu_mem_mode,
                        num_threads=num_threads,
                    )
                load_tables(folder, module)
            except BaseException:
                module.load_state_dict(dense)
                raise

    def save_sharded_optimizer(
        self,
        optimizer: Any,
        checkpoint: str,
        gather_dtensor: bool = True,
        prefix: str | None = None,
        size_per_shard: int = 1024,
        use_async: bool = False,
    ) -> None:
        """A directory: settings and dense state as Colossal-AI writes them, and the tables' columns, streamed."""
        _refuse_async(use_async)
        tables_io.save(Path(checkpoint) / OPTIMIZER_TABLES, optimizer.model.unwrap(), optimizer.unwrap(), weights=False)
        if self.coordinator.is_master():
            with _dense_only(optimizer.model.unwrap()):
                GeneralCheckpointIO.save_sharded_optimizer(
                    self, optimizer.unwrap(), checkpoint, gather_dtensor, prefix, size_per_shard
                )
        dist.barrier()

    def load_sharded_optimizer(
        self,
        optimizer: Any,
        index_file_path: str,
        prefix: str | None = None,
        low_cpu_mem_mode: bool = True,
        num_threads: int = 1,
    ) -> None:
        """What `save_sharded_optimizer` wrote, on any number of ranks; damaged files are named, and nothing is loaded.

        Read from the folder of the tables, which has the dense state as well: the host's own reader of a sharded
        optimizer needs an accelerator.
        """
        load_optimizer_tables(Path(index_file_path).parent, optimizer.model.unwrap(), optimizer.unwrap())


def load_tables(folder: Path, module: nn.Module) -> None:
    """The tables that a sharded model's directory has.

    Raises:
        ValueError: there is no complete checkpoint of them; CheckpointError: it is damaged. Nothing was changed.
    """
    if tables_io.load_latest(folder / MODEL_TABLES, only_tables(module)) is None:
        raise ValueError(f"{folder / MODEL_TABLES}: no complete checkpoint of the tables")


def load_optimizer_tables(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The same for a sharded optimizer's directory: settings, dense state and the tables' columns."""
    if tables_io.load_latest(folder / OPTIMIZER_TABLES, module, optimizer, weights=False) is None:
        raise ValueError(f"{folder / OPTIMIZER_TABLES}: no complete checkpoint of the optimizer")


def _refuse_async(use_async: bool) -> None:
    if use_async:
        raise NotImplementedError("use_async=True: cached tables are saved synchronously; leave it out")


def only_tables(module: nn.Module) -> nn.Module:
    """A module with the cached tables of `module` alone, under the same names."""
    root = nn.Module()
    for name, cached in cached_modules(module).items():
        *path, last = name.split(".") if name else ["table"]
        parent = root
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        parent.add_module(last, cached)
    return root


@contextlib.contextmanager
def _dense_only(module: nn.Module) -> Iterator[None]:
    """While it holds, state_dicts of `module` and of its optimizer leave the cached tables out."""
    weights = [cached._cached_weight for cached in cached_modules(module).values()]
    for weight in weights:
        weight.in_state_dict = False
    try:
        yield
    finally:
        for weight in weights:
            weight.in_state_dict = True
