"""Checkpoints of whole models with cached tables: streamed, atomic, and independent of how the tables are held.

A checkpoint is the logical table in id order. It knows nothing of cache sizes, policies, row orders, stores or ranks,
so it loads under any of them. The files and what is promised: docs/checkpoints.md.

    directory/step-0000000100/manifest.json               what there is, and a checksum of every file
                              table-0000-00000.safetensors    consecutive ids of one table: weight and state columns
                              dense.safetensors               all other parameters and buffers
                              optimizer.safetensors           dense parameters' state, and step counts
    directory/.step-0000000100.partial     being written
    directory/.step-0000000100.replaced    the older one of the same step, while the new one takes its place

Shapes: R rows of a table, D width, n ids in one piece. An id of the whole is its table's start + the id.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .block import CachedWeight, cached_weight_of, plain_mode
from .embedding import _CachedBags
from .row_rules import make_rule
from .step_hooks import counts_steps, own_blocks, reset_forgotten_state, rule_name_of

__all__ = [
    "CheckpointError",
    "load",
    "load_latest",
    "read_optimizer_state_dict",
    "read_state_dict",
    "save",
    "verify",
]

FORMAT = "colossal_freqcache checkpoint"
FORMAT_VERSION = 1
SHARD_BYTES = 64 << 20  # of a table's file: all columns of consecutive ids
MANIFEST, DENSE, OPTIMIZER = "manifest.json", "dense.safetensors", "optimizer.safetensors"

# https://github.com/huggingface/safetensors#format
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}

Result = TypeVar("Result")


class CheckpointError(ValueError):
    """A checkpoint is damaged, or not one of this model; nothing was loaded or modified."""


# ---- what users call ------------------------------------------------------------------------------------------------


def save(
    directory: str | os.PathLike,
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    step: int = 0,
    *,
    weights: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes a checkpoint of `module`, and of `optimizer`, as `directory`/step-…; returns its path.

    A process that is killed at any instant leaves what was complete before, also an older checkpoint of the same step.
    Tables are streamed, in pieces of 16 MiB of weights. Where ranks share tables, each of them must call this, with the
    same directory and step; they write to one file system. Otherwise one process writes to a directory at a time.

    Args:
        optimizer: one of `colossal_freqcache.optim`, or torch's SGD, Adagrad or SparseAdam; None: weights only.
        step: at least 0; a checkpoint of the same step is replaced.
        weights: False: the optimizer's state alone, for weights that are kept elsewhere.
        shard_bytes: size of a table's files, about.

    Raises:
        ValueError: something that the format has no place for, named; nothing was written.
        OSError: a file could not be written; the checkpoints there are as they were. (RuntimeError on the other ranks.)
    """
    if not isinstance(step, Integral) or step < 0:
        raise ValueError(f"step={step!r} is not allowed: an int of at least 0")
    if not isinstance(shard_bytes, Integral) or shard_bytes < 1:
        raise ValueError(f"shard_bytes={shard_bytes!r} is not allowed: an int of at least 1")
    _check_weights(weights, optimizer)
    directory, optimizer = Path(directory), _unwrapped(optimizer)
    model = _Model(module)
    ranks = model.ranks
    name = f"step-{int(step):010d}"
    partial = directory / f".{name}.partial"

    def prepare() -> dict:
        model.settle()
        described = _describe(model, optimizer, int(step), weights)
        if ranks.rank == 0:
            directory.mkdir(parents=True, exist_ok=True)
            _tidy(directory)
            partial.mkdir()
        return described

    steps = ranks.gather(int(step))
    if len(set(steps)) > 1:
        raise ValueError(f"step is {steps} on ranks 0..{len(steps) - 1}: all ranks must save the same step")
    described = ranks.together(prepare)
    try:
        files = _write_tables(partial, model, described, shard_bytes)
        ranks.together(lambda: _finish(directory, name, described, files) if ranks.rank == 0 else None)
    except BaseException:
        if ranks.rank == 0:
            with contextlib.suppress(OSError):
                _tidy(directory)
        raise
    return directory / name


def load_latest(
    directory: str | os.PathLike,
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    weights: bool = True,
) -> int | None:
    """Loads the newest complete checkpoint of `directory`; returns its step, None where there is none.

    What a killed `save` left behind does not count. A damaged newest one raises: older ones are not taken silently,
    `load` takes them by name. The others as in `load`.
    """
    ranks = _Ranks(_cached_bags(_unwrapped(module)))
    found = _complete(Path(directory))
    newest = ranks.gather(max(found) if found else None)[0]
    if newest is None:
        return None
    return load(found.get(newest, Path(directory) / f"step-{newest:010d}"), module, optimizer, weights=weights)


def load(
    path: str | os.PathLike,
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    weights: bool = True,
) -> int:
    """Loads one checkpoint, the directory `path`, into `module` and `optimizer`; returns its step.

    First everything is checked: the manifest, names and shapes, every file's size and checksum. Then tables are
    streamed into place, and training goes on as if it had not been interrupted. Where ranks share tables, each of them
    must call this. With optimizer=None the weights alone are loaded, and optimizer state stays as it is, as with
    `module.load_state_dict`; with weights=False the optimizer's state alone.

    Raises:
        CheckpointError: a file is missing, damaged or of a newer format; the tables, parameters or the optimizer are
            not those of the checkpoint. Nothing was modified.
        ValueError, RuntimeError: the optimizer could not be bound to a table (see `CachedWeight.bind`).
        RuntimeError: a file changed after it was checked, and the model holds parts of it.
    """
    _check_weights(weights, optimizer)
    path, optimizer = Path(path), _unwrapped(optimizer)
    model = _Model(module)
    ranks = model.ranks

    def check() -> tuple[dict, "_Restored | None"]:
        model.settle()
        manifest = _read_manifest(path)
        _check_model(path, manifest, model, weights)
        restored = None if optimizer is None else _Restored(path, manifest, model, optimizer)
        _check_files(path, manifest, ranks.rank, ranks.size)
        return manifest, restored

    manifest, restored = ranks.together(check)

    def fill() -> None:
        try:
            with plain_mode():
                for name, table in model.tables.items():
                    _load_table(path, _table_entry(manifest, name), table, restored, weights)
                if weights:
                    _load_dense(path, manifest, model)
                if restored is not None:
                    restored.finish()
        except CheckpointError as error:
            raise RuntimeError(f"{path} has changed since it was checked, load another one: {error}") from error

    if restored is not None:
        ranks.together(restored.bind)
    ranks.together(fill)
    return manifest["step"]


def verify(path: str | os.PathLike) -> None:
    """Checks the manifest, and every file's size, checksum and contents by name and shape, of one checkpoint.

    Raises:
        CheckpointError: names the file that is missing or damaged.
    """
    path = Path(path)
    _check_files(path, _read_manifest(path))


def read_state_dict(path: str | os.PathLike, max_bytes: int = 2 << 30) -> dict[str, torch.Tensor]:
    """The model's state_dict as plain torch takes it: tables as whole tensors (R, D), under the keys of state_dict().

    A collection's tables are `tables.{i}.weight`, as of an nn.ModuleList `tables` of nn.EmbeddingBag.

    Raises:
        ValueError: it takes more than `max_bytes`. CheckpointError: as `verify`.
    """
    path = Path(path)
    manifest = _read_manifest(path)
    _check_has_weights(path, manifest)
    num_bytes = sum(table["rows"] * table["dim"] * _dtype(table["dtype"]).itemsize for table in manifest["tables"])
    num_bytes += sum(_num_bytes(spec) for spec in manifest["dense"].values())
    _check_bytes(path, num_bytes, max_bytes)
    _check_files(path, manifest)
    stored = {table["name"]: _whole_column(path, table, "weight") for table in manifest["tables"]}
    with _opened(path / DENSE) as file:
        stored.update({name: file.get_tensor(name) for name in manifest["dense"]})
    return {key: stored[manifest["aliases"].get(key, key)] for key in manifest["keys"]}


def read_optimizer_state_dict(path: str | os.PathLike, max_bytes: int = 2 << 30) -> dict:
    """The optimizer's state_dict as the torch optimizer of its name takes it; tables' state as (R, D) in id order.

    Each table of a collection is a parameter of its own, as in the plain torch model of `read_state_dict`. Row-wise
    Adagrad, which torch does not have, gives `sum` of shape (R,) for a table.

    Raises:
        ValueError: it takes more than `max_bytes`. CheckpointError: as `verify`; or it holds no optimizer.
    """
    path = Path(path)
    manifest = _read_manifest(path)
    saved = _saved_optimizer(path, manifest)
    num_bytes = sum(_num_bytes(spec) for spec in _tensors_of(saved).values())
    for entry in saved["parameters"]:
        for table in (_table_entry(manifest, name) for name in entry["tables"] if _has_state(entry)):
            layout = make_rule(saved["rule"]).layout(table["dim"], _dtype(table["dtype"]), {})
            num_bytes += table["rows"] * (layout.row_bytes - layout.dim * layout.dtype.itemsize)
    _check_bytes(path, num_bytes, max_bytes)
    _check_files(path, manifest)
    states: dict[int, dict] = {}
    groups = [{**_decoded_values(group["settings"]), "params": []} for group in saved["param_groups"]]
    number = 0
    for group, stored in zip(groups, saved["param_groups"], strict=True):
        for entry in (saved["parameters"][i] for i in stored["params"]):
            for table in [_table_entry(manifest, name) for name in entry["tables"]] or [None]:
                group["params"].append(number)
                state = _read_state(path, entry)
                if table is not None and _has_state(entry):
                    state.update(_table_state(path, table, saved["rule"], group))
                if state:
                    states[number] = state
                number += 1
    return {"state": states, "param_groups": groups}


# ---- ranks ----------------------------------------------------------------------------------------------------------


class _Ranks:
    """The processes that share the tables of `bags`, or this one alone. Each phase ends on all of them or on none.

    Attributes: rank: of this process. size: how many there are.
    """

    def __init__(self, bags: Iterable[_CachedBags]) -> None:
        placements = [bag._cached_weight.placement for bag in bags]
        shared = [placement for placement in placements if placement.world_size > 1]
        self.rank, self.size = (shared[0].rank, shared[0].world_size) if shared else (0, 1)
        self.group = shared[0].group if shared else None
        for placement in shared:
            if placement.group is not self.group:
                raise ValueError(
                    f"the model's tables are shared by different process groups (of {self.size} and "
                    f"{placement.world_size} ranks): a checkpoint is written by one; build them with the same group"
                )

    def gather(self, item: Any) -> list:
        """`item` of every rank, in rank order."""
        if self.size == 1:
            return [item]
        items: list = [None] * self.size
        torch.distributed.all_gather_object(items, item, group=self.group)
        return items

    def together(self, action: Callable[[], Result]) -> Result:
        """action(); where it raises on one rank, raises on all."""
        if self.size == 1:
            return action()
        result = error = None
        try:
            result = action()
        except BaseException as raised:
            error = raised
        outcomes = self.gather(None if error is None else (isinstance(error, CheckpointError), repr(error), str(error)))
        if error is not None:
            raise error
        for rank, outcome in enumerate(outcomes):
            if outcome is not None:
                is_ours, described, message = outcome
                if is_ours:
                    raise CheckpointError(f"rank {rank}: {message}")
                raise RuntimeError(f"rank {rank} failed: {described}")
        return result


# ---- what a model holds ---------------------------------------------------------------------------------------------


class _Table(NamedTuple):
    """One logical table of a module: ids start..start+rows-1 of the whole of `weight`."""

    weight: CachedWeight
    start: int
    rows: int

    def chunks(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Pieces of about 16 MiB of weights of its ids first..last-1, as ids of the whole."""
        return self.weight.placement.chunks(self.start + first, self.start + last)


class _Model:
    """The tensors of a module by their names in state_dict().

    Attributes:
        tables: cached tables. dense: all other parameters and persistent buffers. keys: every name, in order.
        aliases: name -> first name of the same tensor or table (tied weights).
        ranks: the processes that share the tables.
    """

    def __init__(self, module: nn.Module) -> None:
        module = _unwrapped(module)
        if isinstance(module, nn.parallel.DistributedDataParallel):
            module = module.module
        self.ranks = _Ranks(_cached_bags(module))
        self.tables: dict[str, _Table] = {}
        self.dense: dict[str, torch.Tensor] = {}
        self.keys: list[str] = []
        self.aliases: dict[str, str] = {}
        self._first_name: dict[Any, str] = {}
        self._tables_of_block: dict[int, list[str]] = {}
        for path, child in module.named_modules(remove_duplicate=False):
            prefix = f"{path}." if path else ""
            if isinstance(child, _CachedBags):
                self._add_tables(prefix, child)
            else:
                self._add_dense(path, prefix, child)

    def _add_tables(self, prefix: str, bags: _CachedBags) -> None:
        weight = bags._cached_weight
        for number, (start, rows) in enumerate(bags._table_ranges()):
            name = prefix + bags._table_key(number)
            if self._is_first(name, (id(weight), number)):
                self.tables[name] = _Table(weight, start, rows)
                self._tables_of_block.setdefault(id(weight.parameter), []).append(name)

    def _add_dense(self, path: str, prefix: str, module: nn.Module) -> None:
        kind = type(module)
        changed = kind._save_to_state_dict is not nn.Module._save_to_state_dict
        if changed or kind.get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(
                f"module {path!r} ({kind.__name__}) has {'a state_dict' if changed else 'an extra state'} of its own "
                f"making: a checkpoint holds tables, parameters and buffers only. Save that by other means, with the "
                f"module outside of the one that is passed here"
            )
        found: dict[str, torch.Tensor] = {}
        module._save_to_state_dict(found, prefix, keep_vars=True)
        for name, tensor in found.items():
            if self._is_first(name, id(tensor)):
                self.dense[name] = tensor

    def _is_first(self, name: str, what: Any) -> bool:
        self.keys.append(name)
        first = self._first_name.setdefault(what, name)
        if first != name:
            self.aliases[name] = first
        return first == name

    def settle(self) -> None:
        """Raises where a block was edited as if it were the table; else lets rows go that nobody needs."""
        for table in self.tables.values():
            table.weight.settle()

    def name_of(self, parameter: torch.Tensor) -> str | None:
        """Name of a dense parameter; None where the module does not have it."""
        return self._first_name.get(id(parameter))

    def tables_of(self, parameter: torch.Tensor) -> list[str]:
        """Names of the tables whose block `parameter` is; none for a dense parameter.

        Raises:
            ValueError: it is the block of a table of another module.
        """
        if cached_weight_of(parameter) is None:
            return []
        if id(parameter) not in self._tables_of_block:
            raise ValueError(
                "the optimizer trains a cached table that the module does not have: pass the module that holds all "
                "tables of the optimizer"
            )
        return self._tables_of_block[id(parameter)]


def _unwrapped(wrapper: Any) -> Any:
    """What a booster has wrapped: its models and optimizers have `unwrap`."""
    return wrapper.unwrap() if hasattr(wrapper, "unwrap") else wrapper


def _cached_bags(module: nn.Module) -> list[_CachedBags]:
    return [child for child in module.modules() if isinstance(child, _CachedBags)]


# ---- saving ---------------------------------------------------------------------------------------------------------


def _describe(model: _Model, optimizer: torch.optim.Optimizer | None, step: int, weights: bool) -> dict:
    """Everything but the files: manifest, dense tensors, optimizer tensors; where each table's columns come from.

    "sources": {table: {column: None, if the rows carry it, else a tensor over ids of the whole}}.
    """
    sources: dict[str, dict[str, torch.Tensor | None]] = {
        name: {"weight": None} if weights else {} for name in model.tables
    }
    dense = model.dense if weights else {}
    saved, tensors = None, {}
    if optimizer is not None:
        saved, tensors = _describe_optimizer(model, optimizer, sources)
        others = [name for name, table in model.tables.items() if table.weight.owner not in (None, optimizer)]
        if others:
            warnings.warn(
                f"{len(others)} cached tables{_some(others)} are trained by another optimizer than the "
                f"{type(optimizer).__name__} that is saved: their optimizer state is not in the checkpoint",
                stacklevel=5,
            )
    tables = []
    for name, table in model.tables.items():
        widths = table.weight.column_widths()
        dim = table.weight.placement.dim
        tables.append(
            {
                "name": name,
                "rows": table.rows,
                "dim": dim,
                "dtype": _dtype_name(table.weight.cache.layout.dtype),
                "columns": {column: widths.get(column, dim) for column in sources[name]},
            }
        )
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "package_version": _package_version(),
        "step": step,
        "keys": model.keys,
        "aliases": model.aliases,
        "tables": tables,
        "weights": weights,
        "dense": _specs(dense),
        "optimizer": saved,
    }
    return {"manifest": manifest, "dense": dense, "optimizer": tensors, "sources": sources}


def _describe_optimizer(
    model: _Model, optimizer: torch.optim.Optimizer, sources: dict[str, dict[str, torch.Tensor | None]]
) -> tuple[dict, dict[str, torch.Tensor]]:
    """(the manifest's entry, tensors by name); adds the tables' state columns to `sources`."""
    groups, parameters = [], []
    tensors: dict[str, torch.Tensor] = {}
    for group in optimizer.param_groups:
        first = len(parameters)
        for parameter in group["params"]:
            entry, own = _describe_parameter(model, optimizer, parameter, len(parameters), sources)
            parameters.append(entry)
            tensors.update(own)
        settings = {
            name: _encoded(value, f"{name!r} of the optimizer's param_group {len(groups)}")
            for name, value in group.items()
            if name != "params"
        }
        groups.append({"params": list(range(first, len(parameters))), "settings": settings})
    rule = rule_name_of(optimizer)
    saved = {"class": type(optimizer).__name__, "rule": rule, "param_groups": groups, "parameters": parameters}
    return saved, tensors


def _describe_parameter(
    model: _Model,
    optimizer: torch.optim.Optimizer,
    parameter: torch.Tensor,
    number: int,
    sources: dict[str, dict[str, torch.Tensor | None]],
) -> tuple[dict, dict[str, torch.Tensor]]:
    """The same for parameter `number`, in torch's numbering, of the optimizer."""
    tables = model.tables_of(parameter)
    state = dict(optimizer.state.get(parameter, {}))
    entry: dict[str, Any] = {"tables": tables}
    if tables:
        if rule_name_of(optimizer) is None:
            raise ValueError(
                f"{type(optimizer).__name__} holds {tables[0]!r}, a cached table, which it cannot train: use "
                f"colossal_freqcache.optim, or torch.optim.SGD, Adagrad or SparseAdam"
            )
        columns = _columns_of(optimizer, parameter, tables[0])
        for name in tables:
            sources[name].update(columns or {})
        state = {key: value for key, value in state.items() if key == "step"}
        entry["bound"] = columns is not None
    else:
        entry.update(name=model.name_of(parameter), shape=list(parameter.shape))
    tensors = {f"{number}.{key}": value for key, value in state.items() if isinstance(value, torch.Tensor)}
    entry["tensors"] = _specs(tensors)
    entry["scalars"] = {
        key: _encoded(value, f"the optimizer's state {key!r} of parameter {number}")
        for key, value in state.items()
        if not isinstance(value, torch.Tensor)
    }
    return entry, tensors


def _columns_of(
    optimizer: torch.optim.Optimizer, parameter: torch.Tensor, name: str
) -> dict[str, torch.Tensor | None] | None:
    """{state column: None, or the tensor that still holds it}; None where no state of the optimizer's exists yet."""
    weight = cached_weight_of(parameter)
    if weight.owner is optimizer and not weight.state_is_initial:
        reset_forgotten_state(optimizer, parameter, weight)
        if not optimizer.state[parameter]:
            del optimizer.state[parameter]
    state = optimizer.state.get(parameter, {})
    counted = float(state.get("step", 0))
    # A torch optimizer that has loaded a state_dict keeps the tensors until its next step.
    shape = (weight.placement.num_rows, weight.placement.dim)
    loaded = {key: value for key, value in state.items() if isinstance(value, torch.Tensor) and key != "step"}
    if counted and loaded and all(tuple(value.shape) == shape for value in loaded.values()):
        return dict(loaded)
    if weight.owner is optimizer:
        return dict.fromkeys(weight.cache.layout.state_names())
    if counted and make_rule(rule_name_of(optimizer)).counts_steps:
        raise ValueError(
            f"this {type(optimizer).__name__} has counted {counted:.0f} steps for {name!r}, whose rows do not carry its"
            f" state (a deep copy, or replaced by a later optimizer?): pass the optimizer that trains the table"
        )
    return None


class _File:
    """A safetensors file that is written piece by piece, and hashed on the way.

    An error is kept until `close`: other ranks may be in the middle of an exchange that this one must not leave.
    """

    def __init__(self, path: Path, specs: dict[str, dict]) -> None:
        self.path = path
        self.num_bytes = 0
        self._hash = hashlib.blake2b()
        self._error: Exception | None = None
        self._file: Any = None
        header: dict[str, dict] = {}
        end = 0
        for name, spec in specs.items():
            start, end = end, end + _num_bytes(spec)
            header[name] = {**spec, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._write(len(text).to_bytes(8, "little") + text)

    def write(self, values: torch.Tensor) -> None:
        """Appends a tensor's elements."""
        values = values.detach().cpu().contiguous().reshape(-1)
        self._write(memoryview(values.view(torch.uint8).numpy()))

    def _write(self, data: Any) -> None:
        if self._error is not None:
            return
        try:
            if self._file is None:
                self._file = open(self.path, "xb")
            self._file.write(data)
        except Exception as error:
            self._error = error
        self._hash.update(data)
        self.num_bytes += len(data)

    def close(self) -> dict:
        """The manifest's entry for the file, which is on the disk from here on.

        Raises:
            OSError: it could not be written.
        """
        with contextlib.ExitStack() as stack:
            if self._file is not None:
                stack.enter_context(self._file)
            if self._error is not None:
                raise self._error
            self._file.flush()
            os.fsync(self._file.fileno())
        return {"bytes": self.num_bytes, "blake2b": self._hash.hexdigest()}

    def abandon(self) -> None:
        """Closes it as it is."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()


def _write_tables(folder: Path, model: _Model, described: dict, shard_bytes: int) -> dict[str, dict]:
    """Writes all tables and adds their shards to the manifest; {file: entry} of the files of all ranks.

    Shard number k, over all tables, is written by rank k % ranks. In each round every rank has one, and they reach the
    disks at the same time.
    """
    ranks = model.ranks
    shards = []
    for number, entry in enumerate(described["manifest"]["tables"]):
        row_bytes = sum(entry["columns"].values()) * _dtype(entry["dtype"]).itemsize
        step = max(1, shard_bytes // max(1, row_bytes))
        starts = range(0, entry["rows"] if row_bytes else 0, step)
        entry["shards"] = [
            {
                "file": f"table-{number:04d}-{shard:05d}.safetensors",
                "first": first,
                "last": min(first + step, entry["rows"]) - 1,
            }
            for shard, first in enumerate(starts)
        ]
        shards += [(entry, shard) for shard in entry["shards"]]
    files: dict[str, dict] = {}
    for start in range(0, len(shards), ranks.size):
        opened: dict[str, _File] = {}
        try:
            for offset, (entry, shard) in enumerate(shards[start : start + ranks.size]):
                shared = model.tables[entry["name"]].weight.placement.world_size > 1
                writer = offset if shared else 0
                file = None
                if writer == ranks.rank:
                    file = opened[shard["file"]] = _File(folder / shard["file"], _shard_specs(entry, shard))
                _write_shard(file, model.tables[entry["name"]], described["sources"][entry["name"]], shard, writer)
            written = ranks.together(lambda opened=opened: {name: file.close() for name, file in opened.items()})
        finally:
            for file in opened.values():
                file.abandon()
        for part in ranks.gather(written):
            files.update(part)
    return files


def _write_shard(
    file: _File | None, table: _Table, sources: dict[str, torch.Tensor | None], shard: dict, writer: int
) -> None:
    """Streams one shard to rank `writer`, whose `file` it goes to. Every rank calls it."""
    for column, tensor in sources.items():
        for first, last in table.chunks(shard["first"], shard["last"] + 1):
            if tensor is None:
                values = table.weight.logical_chunk(column, first, last, to=writer)
            else:
                values = tensor[first:last].to(table.weight.cache.layout.dtype)
            if file is not None:
                file.write(values)


def _finish(directory: Path, name: str, described: dict, files: dict[str, dict]) -> None:
    """Writes what is not tables, the manifest last, and puts the directory in its place."""
    partial, final, replaced = directory / f".{name}.partial", directory / name, directory / f".{name}.replaced"
    files[DENSE] = _write_tensors(partial / DENSE, described["dense"])
    if described["manifest"]["optimizer"] is not None:
        files[OPTIMIZER] = _write_tensors(partial / OPTIMIZER, described["optimizer"])
    manifest = {**described["manifest"], "files": files}
    manifest["checksum"] = _checksum(manifest)
    with open(partial / MANIFEST, "x", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    _fsync_directory(partial)
    if final.exists():
        os.rename(final, replaced)
    os.rename(partial, final)
    _fsync_directory(directory)
    shutil.rmtree(replaced, ignore_errors=True)


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> dict:
    specs = _specs(tensors)
    file = _File(path, specs)
    try:
        for name in specs:
            file.write(tensors[name])
        return file.close()
    finally:
        file.abandon()


# ---- directories ----------------------------------------------------------------------------------------------------


def _complete(directory: Path) -> dict[int, Path]:
    """{step: path} of every complete checkpoint; one that was set aside counts while its place is empty."""
    found = {}
    for pattern in (r"\.step-(\d{10,})\.replaced", r"step-(\d{10,})"):
        for path in directory.iterdir() if directory.is_dir() else ():
            match = re.fullmatch(pattern, path.name)
            if match and (path / MANIFEST).is_file():
                found[int(match[1])] = path
    return found


def _tidy(directory: Path) -> None:
    """Removes what killed saves left, after putting back a checkpoint that was set aside and not replaced."""
    for path in list(directory.iterdir()):
        match = re.fullmatch(r"\.(step-\d{10,})\.(partial|replaced)", path.name)
        if match and match[2] == "replaced" and not (directory / match[1]).exists():
            os.rename(path, directory / match[1])
        elif match:
            shutil.rmtree(path)


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- loading --------------------------------------------------------------------------------------------------------


def _check_weights(weights: bool, optimizer: torch.optim.Optimizer | None) -> None:
    if not weights and optimizer is None:
        raise ValueError("weights=False with optimizer=None leaves nothing: give the optimizer")


def _check_has_weights(path: Path, manifest: dict) -> None:
    if not manifest["weights"]:
        raise CheckpointError(f"{path / MANIFEST}: it holds an optimizer's state alone: load it with weights=False")


def _check_model(path: Path, manifest: dict, model: _Model, weights: bool) -> None:
    """Raises CheckpointError where the checkpoint's tables, parameters or buffers are not the model's."""
    where = path / MANIFEST
    kinds: list[tuple[str, Iterable[str], Iterable[str]]]
    kinds = [("cached tables", [table["name"] for table in manifest["tables"]], model.tables)]
    if weights:
        _check_has_weights(path, manifest)
        kinds.append(("parameters and buffers", manifest["dense"], model.dense))
    for kind, theirs, ours in kinds:
        theirs, ours = _with_aliases(theirs, manifest["aliases"]), _with_aliases(ours, model.aliases)
        missing, extra = sorted(ours - theirs), sorted(theirs - ours)
        if missing or extra:
            raise CheckpointError(
                f"{where}: {len(missing)} {kind} of the model are not in it{_some(missing)}, and {len(extra)} in it "
                f"are not in the model{_some(extra)}: load it into the model that it was saved from"
            )
    for name, table in model.tables.items():
        entry = _table_entry(manifest, name)
        found, wanted = (entry["rows"], entry["dim"]), (table.rows, table.weight.placement.dim)
        if found != wanted:
            raise CheckpointError(f"{where}: table {name!r} is {found} in it, {wanted} in the model (rows, dim)")
    for name, tensor in model.dense.items() if weights else ():
        spec = manifest["dense"][manifest["aliases"].get(name, name)]
        if spec["shape"] != list(tensor.shape):
            raise CheckpointError(f"{where}: {name!r} is {spec['shape']} in it, {list(tensor.shape)} in the model")


def _with_aliases(names: Iterable[str], aliases: dict[str, str]) -> set[str]:
    names = set(names)
    return names | {alias for alias, name in aliases.items() if name in names}


def _some(names: list[str]) -> str:
    return f" ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})" if names else ""


class _Restored:
    """A saved optimizer's state on its way into `optimizer`. The constructor checks and changes nothing.

    Raises:
        CheckpointError: the checkpoint has no optimizer, one of another rule, or one of other parameters.
    """

    def __init__(self, path: Path, manifest: dict, model: _Model, optimizer: torch.optim.Optimizer) -> None:
        where = path / MANIFEST
        self.path, self.optimizer = path, optimizer
        self.saved = saved = _saved_optimizer(path, manifest)
        self.rule_name = rule = rule_name_of(optimizer)
        kind = type(optimizer).__name__
        if saved["rule"] != rule or (rule is None and saved["class"] != kind):
            raise CheckpointError(
                f"{where}: it holds the state of {saved['class']} (rule {saved['rule']!r}), and the optimizer given is "
                f"{kind} (rule {rule!r}): pass one of the same rule, or optimizer=None for the weights alone"
            )
        found = [len(group["params"]) for group in saved["param_groups"]]
        wanted = [len(group["params"]) for group in optimizer.param_groups]
        if found != wanted:
            raise CheckpointError(f"{where}: its param_groups have {found} parameters, those of the optimizer {wanted}")
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.groups: list[dict] = []
        self.tables: dict[int, tuple[torch.Tensor, dict, dict]] = {}  # by id(weight): block, manifest's entry, group
        for group, stored in zip(optimizer.param_groups, saved["param_groups"], strict=True):
            settings = {**optimizer.defaults, **_decoded_values(stored["settings"])}
            for name, value in group.items():  # a tensor is saved as its number, and stays a tensor here
                if isinstance(value, torch.Tensor) and isinstance(settings.get(name), Real):
                    settings[name] = torch.full_like(value, settings[name])
            settings["params"] = stored["params"]
            self.groups.append(settings)
            for number, parameter in zip(stored["params"], group["params"], strict=True):
                self._check_parameter(where, number, parameter, model, settings)

    def _check_parameter(
        self, where: Path, number: int, parameter: torch.Tensor, model: _Model, settings: dict
    ) -> None:
        entry = self.saved["parameters"][number]
        names = model.tables_of(parameter)
        found, wanted = (entry["tables"] or [entry["name"]])[0], (names or [model.name_of(parameter)])[0]
        if names != entry["tables"] or found != wanted:
            raise CheckpointError(
                f"{where}: parameter {number} of its optimizer is {found!r}, that of the one given {wanted!r}: give "
                f"the optimizer the parameters in the same order"
            )
        if not names and entry["shape"] != list(parameter.shape):
            raise CheckpointError(
                f"{where}: parameter {number} of its optimizer is {entry['shape']}, that of the one given "
                f"{list(parameter.shape)}"
            )
        if names:
            weight = cached_weight_of(parameter)
            try:
                weight.check_binding(self.optimizer, make_rule(self.rule_name), settings)
            except (ValueError, RuntimeError) as error:
                raise CheckpointError(f"{where}: its optimizer cannot train table {names[0]!r} here: {error}") from None
            self.tables[id(weight)] = (parameter, entry, settings)

    def bind(self) -> None:
        """Binds the optimizer to each table whose rows had its state."""
        rule = make_rule(self.rule_name) if self.tables else None
        for parameter, entry, group in self.tables.values():
            weight = cached_weight_of(parameter)
            if weight.owner is self.optimizer:  # what "initial" means is the saved group's from here on
                weight.cache.layout = rule.layout(weight.cache.layout.dim, weight.cache.layout.dtype, group)
            elif entry["bound"]:
                own_blocks(self.optimizer, rule, group, weight, keep_slots=False)

    def columns(self, weight: CachedWeight) -> dict[str, float]:
        """{state column that is to be filled: its initial value}; none where the optimizer does not train `weight`."""
        if id(weight) not in self.tables or weight.owner is not self.optimizer:
            return {}
        return {name: initial for name, _, initial in weight.cache.layout.state}

    def finish(self) -> None:
        """param_groups, dense parameters' state and step counts, once the tables are filled."""
        states = {
            number: _read_state(self.path, self.saved["parameters"][number])
            for number, parameter in enumerate(self.parameters)
            if cached_weight_of(parameter) is None
        }
        states = {number: state for number, state in states.items() if state}
        torch.optim.Optimizer.load_state_dict(self.optimizer, {"state": states, "param_groups": self.groups})
        for parameter, entry, _ in self.tables.values():
            steps = _read_state(self.path, entry).get("step")
            if steps is not None and counts_steps(parameter, make_rule(self.rule_name)):
                as_int = isinstance(self.optimizer, torch.optim.SparseAdam)
                step = int(steps) if as_int else torch.tensor(float(steps), dtype=torch.float32)
                self.optimizer.state[parameter] = {"step": step}


def _load_table(path: Path, entry: dict, table: _Table, restored: _Restored | None, weights: bool) -> None:
    """Streams one table's weights, if wanted, and the state columns that `restored` wants, into place."""
    weight = table.weight
    initials = {} if restored is None else restored.columns(weight)
    widths = weight.column_widths()
    for column in initials.keys() - entry["columns"].keys():  # the optimizer had not been bound to the table
        for first, last in table.chunks(0, table.rows):
            piece = torch.full((last - first, widths[column]), initials[column], dtype=weight.cache.layout.dtype)
            weight.set_logical(column, piece, first)
    wanted = [column for column in entry["columns"] if column in initials or (weights and column == "weight")]
    for shard in entry["shards"]:
        start = table.start + shard["first"]
        with _opened(path / shard["file"]) as file:
            for column in wanted:
                values = file.get_slice(column)
                for first, last in table.chunks(shard["first"], shard["last"] + 1):
                    weight.set_logical(column, values[first - start : last - start], first)


def _load_dense(path: Path, manifest: dict, model: _Model) -> None:
    with _opened(path / DENSE) as file:
        for name, tensor in model.dense.items():
            tensor.copy_(file.get_tensor(manifest["aliases"].get(name, name)))


def _saved_optimizer(path: Path, manifest: dict) -> dict:
    if manifest["optimizer"] is None:
        raise CheckpointError(f"{path / MANIFEST}: it holds no optimizer: load it with optimizer=None")
    return manifest["optimizer"]


def _read_state(path: Path, entry: dict) -> dict[str, Any]:
    """One parameter's state, but for columns of tables."""
    state = _decoded_values(entry["scalars"])
    with _opened(path / OPTIMIZER) as file:
        for name in entry["tensors"]:
            state[name.split(".", 1)[1]] = file.get_tensor(name)
    return state


def _has_state(entry: dict) -> bool:
    """Whether an optimizer of torch's has state for the parameter: Adam has none before its first step, SGD never."""
    return bool(entry["tensors"] or entry["scalars"])


def _whole_column(path: Path, entry: dict, column: str) -> torch.Tensor:
    """(R, width) of one table, assembled."""
    out = torch.empty(entry["rows"], entry["columns"][column], dtype=_dtype(entry["dtype"]))
    for shard in entry["shards"]:
        with _opened(path / shard["file"]) as file:
            out[shard["first"] : shard["last"] + 1] = file.get_tensor(column)
    return out


def _table_state(path: Path, entry: dict, rule_name: str, group: dict) -> dict[str, torch.Tensor]:
    """A table's state columns as the optimizer's class takes them; at their initial value where no step was taken."""
    rule = make_rule(rule_name)
    state = {}
    for column, width, initial in rule.layout(entry["dim"], _dtype(entry["dtype"]), group).state:
        if column in entry["columns"]:
            values = _whole_column(path, entry, column)
        else:
            values = torch.full((entry["rows"], width), initial, dtype=_dtype(entry["dtype"]))
        state[column] = values[:, 0] if column in rule.row_columns else values
    return state


# ---- manifest and files ---------------------------------------------------------------------------------------------


def _checksum(manifest: dict) -> str:
    """Of all of the manifest but its own checksum, however it is spaced and ordered."""
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.blake2b(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _read_manifest(path: Path) -> dict:
    where = path / MANIFEST
    if not where.is_file():
        raise CheckpointError(f"{where} is missing: {path} is not a complete checkpoint")
    try:
        manifest = json.loads(where.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{where} is damaged or truncated: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{where} is no manifest of a checkpoint of this package")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{where} has format version {version!r}, and this package reads {FORMAT_VERSION}: it was written by "
            f"version {manifest.get('package_version')} of the package; use that one"
        )
    if manifest.get("checksum") != _checksum(manifest):
        raise CheckpointError(f"{where} is damaged or was altered: its contents do not have its checksum")
    return manifest


def _check_files(path: Path, manifest: dict, rank: int = 0, num_ranks: int = 1) -> None:
    """Raises CheckpointError for a file that is not as the manifest says. Of n ranks, each reads every n-th file."""
    specs = {DENSE: manifest["dense"]}
    if manifest["optimizer"] is not None:
        specs[OPTIMIZER] = _tensors_of(manifest["optimizer"])
    for table in manifest["tables"]:
        following = 0
        for shard in table["shards"]:
            specs[shard["file"]] = _shard_specs(table, shard)
            if shard["first"] != following:
                raise CheckpointError(f"{path / shard['file']}: ids {following}.. of {table['name']!r} are missing")
            following = shard["last"] + 1
        if following != table["rows"] and table["columns"]:
            raise CheckpointError(f"{path / MANIFEST}: ids {following}.. of {table['name']!r} are missing")
    for name in sorted(specs.keys() | manifest["files"].keys()):
        if name not in specs or name not in manifest["files"] or Path(name).name != name:
            raise CheckpointError(f"{path / MANIFEST}: it contradicts itself about the file {name!r}")
    for name in specs:  # sizes of all first: a missing file is found without reading the others
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name} is missing")
        found, wanted = (path / name).stat().st_size, manifest["files"][name]["bytes"]
        if found != wanted:
            raise CheckpointError(f"{path / name} is damaged or truncated: it has {found} bytes, not {wanted}")
    for name in list(specs)[rank::num_ranks]:
        with open(path / name, "rb") as file:
            digest = hashlib.file_digest(file, "blake2b").hexdigest()
        if digest != manifest["files"][name]["blake2b"]:
            raise CheckpointError(f"{path / name} is damaged: its contents do not have the checksum of the manifest")
        with _opened(path / name) as file:
            found = {key: file.get_slice(key) for key in file.keys()}
            found = {key: {"dtype": part.get_dtype(), "shape": list(part.get_shape())} for key, part in found.items()}
        if found != specs[name]:
            raise CheckpointError(f"{path / name} holds {found}; the manifest says {specs[name]}")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The safetensors file, mapped: slices and tensors are read as they are asked for."""
    try:
        opened = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    try:
        with opened as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _specs(tensors: dict[str, torch.Tensor]) -> dict[str, dict]:
    """{name: dtype and shape}, in the order of a safetensors file: widest elements first, so that all are aligned."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES or tensor.layout is not torch.strided:
            raise ValueError(
                f"{name!r} is {tensor.dtype}, {tensor.layout}: a checkpoint holds strided tensors of "
                f"{', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}"
            )
    names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    return {name: {"dtype": DTYPES[tensors[name].dtype], "shape": list(tensors[name].shape)} for name in names}


def _shard_specs(entry: dict, shard: dict) -> dict[str, dict]:
    num_ids = shard["last"] + 1 - shard["first"]
    dtype = DTYPES[_dtype(entry["dtype"])]
    return {column: {"dtype": dtype, "shape": [num_ids, width]} for column, width in entry["columns"].items()}


def _tensors_of(saved: dict) -> dict[str, dict]:
    return {name: spec for entry in saved["parameters"] for name, spec in entry["tensors"].items()}


def _num_bytes(spec: dict) -> int:
    dtype = next(dtype for dtype, name in DTYPES.items() if name == spec["dtype"])
    return math.prod(spec["shape"]) * dtype.itemsize


def _check_bytes(path: Path, num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise ValueError(
            f"{path} takes {num_bytes} bytes of memory, more than max_bytes={max_bytes}: raise max_bytes, or "
            f"load() it into cached tables, which streams"
        )


def _table_entry(manifest: dict, name: str) -> dict:
    name = manifest["aliases"].get(name, name)
    return next(table for table in manifest["tables"] if table["name"] == name)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


def _package_version() -> str:
    try:
        return metadata.version("colossal_freqcache")
    except metadata.PackageNotFoundError:
        return "unknown"


def _encoded(value: Any, what: str) -> Any:
    """`value` as JSON; tuples, dicts and numbers that JSON lacks are marked. A tensor of one number is that number."""
    if isinstance(value, torch.Tensor) and value.dim() == 0:
        value = value.item()
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if isinstance(value, list):
        return [_encoded(item, what) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_encoded(item, what) for item in value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _encoded(item, f"{what}[{key!r}]") for key, item in value.items()}}
    raise ValueError(
        f"{what} is of type {type(value).__name__}, which a checkpoint cannot hold: it holds numbers, strings, None, "
        f"lists, tuples and dicts of them"
    )


def _decoded_values(values: dict[str, Any]) -> dict[str, Any]:
    return {key: _decoded(value) for key, value in values.items()}


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if isinstance(value, dict):
        (kind, inner), *_ = value.items()
        if kind == "float":
            return float(inner)
        if kind == "tuple":
            return tuple(_decoded(item) for item in inner)
        return _decoded_values(inner)
    return value
