"""What happens around every optimizer's step, whoever wrote the optimizer: two global torch hooks.

torch.optim.SGD, Adagrad and SparseAdam are adapted: before their step our row rule is applied to the block with the
group's hyper-parameters, and the gradient is hidden so that torch's arithmetic never reaches the block. Our own
optimizers do that in their `step`. Any other optimizer that holds a block is refused: it would train slots, not rows.
After any step of an optimizer that holds a block, the rows of its gradient may leave the cache.
Beside them: binding an optimizer before its first step, and its state as logical tables, for those who build on it.
"""

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .block import CachedWeight, cached_weight_of
from .row_rules import RowRule, make_rule

__all__ = [
    "ADAPTED",
    "amp_scale",
    "bind_blocks",
    "blocks_of",
    "check_optimizer",
    "coming_step",
    "counts_steps",
    "install_step_hooks",
    "load_logical_states",
    "logical_state",
    "make_state_dict_logical",
    "next_step",
    "own_blocks",
    "reset_forgotten_state",
    "rule_name_of",
    "steps_rows",
]

ADAPTED = {torch.optim.SGD: "sgd", torch.optim.Adagrad: "adagrad", torch.optim.SparseAdam: "adam"}

_REPLACEMENTS = {"SGD": "SGD", "Adagrad": "Adagrad", "Adam": "Adam", "AdamW": "Adam", "SparseAdam": "Adam"}

_installed: list = []
_hooked: weakref.WeakSet = weakref.WeakSet()  # foreign optimizers that have our instance hooks


def install_step_hooks() -> None:
    """Installs the two hooks, once in a process."""
    if not _installed:
        _installed.append(register_optimizer_step_pre_hook(_before_step))
        _installed.append(register_optimizer_step_post_hook(_after_step))


def blocks_of(optimizer: torch.optim.Optimizer) -> Iterator[tuple[dict, torch.Tensor, CachedWeight]]:
    """(param_group, parameter, its CachedWeight) of each cache block that the optimizer holds."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            weight = cached_weight_of(parameter)
            if weight is not None:
                yield group, parameter, weight


def steps_rows(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is one of `colossal_freqcache.optim`."""
    return getattr(type(optimizer), "steps_rows", False)


def _before_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    blocks = list(blocks_of(optimizer))
    if not blocks:
        return None
    for _, _, weight in blocks:
        weight.restore_stash()
    if steps_rows(optimizer):
        return None
    if type(optimizer) not in ADAPTED:
        if not any(parameter.requires_grad for _, parameter, _ in blocks):
            return None
        raise RuntimeError(
            f"{type(optimizer).__name__} holds the block of a cached table and has no exact row rule: it would train "
            f"cache slots, whose rows change. {_advice(optimizer)}"
        )
    closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)

    def closure_then_rows() -> Any:
        """torch calls it inside its step: after all pre-hooks, and the user's closure has made the gradients."""
        loss = None if closure is None else closure()
        _apply_rows(optimizer, list(blocks_of(optimizer)))
        return loss

    if "closure" in kwargs:
        return args, {**kwargs, "closure": closure_then_rows}
    return (args[0], closure_then_rows, *args[2:]), kwargs


def amp_scale(optimizer: torch.optim.Optimizer) -> float | None:
    """By what a GradScaler wants a fused optimizer's gradients divided; None where it wants the step left out."""
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is not None and float(found_inf) > 0:
        return None
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else float(scale)


def _apply_rows(optimizer: torch.optim.Optimizer, blocks: list[tuple[dict, torch.Tensor, CachedWeight]]) -> None:
    rule = make_rule(rule_name_of(optimizer))
    with_gradient = [(group, parameter, weight) for group, parameter, weight in blocks if parameter.grad is not None]
    for group, parameter, weight in with_gradient:
        weight.check_binding(optimizer, rule, group)
        weight.check_gradient()
        _check_foreign_state(optimizer, optimizer.state[parameter], weight)
    scale = amp_scale(optimizer)
    for group, parameter, weight in with_gradient:
        own_blocks(optimizer, rule, group, weight, keep_slots=True)
        if scale is not None:
            _import_foreign_state(optimizer.state[parameter], weight)
            reset_forgotten_state(optimizer, parameter, weight)
            weight.step(group, next_step(optimizer, parameter, rule), scale)
        weight.stash_gradient()


def own_blocks(
    optimizer: torch.optim.Optimizer, rule: RowRule, group: dict, weight: CachedWeight, keep_slots: bool
) -> None:
    """Binds `optimizer` to the rows, if it is not yet, and gives it the hooks that a foreign one needs (once)."""
    if weight.owner is optimizer:
        return
    weight.bind(optimizer, rule, group, keep_slots)
    if not steps_rows(optimizer) and optimizer not in _hooked:
        _hooked.add(optimizer)
        optimizer.register_state_dict_post_hook(make_state_dict_logical)
        handle = optimizer.register_step_post_hook(_restore_gradients)
        optimizer._optimizer_step_post_hooks.move_to_end(handle.id, last=False)  # before the user's own


def _check_foreign_state(optimizer: torch.optim.Optimizer, state: dict, weight: CachedWeight) -> None:
    widths = weight.column_widths()
    tensors = {name: value for name, value in state.items() if name != "step" and torch.is_tensor(value)}
    if _steps(state) == 0:
        return
    if not tensors and weight.owner is not optimizer and make_rule(rule_name_of(optimizer)).counts_steps:
        raise RuntimeError(
            f"this {type(optimizer).__name__} has counted steps for a table without its state (a deep copy?):"
            f" load its state_dict into an optimizer that is built for this table"
        )
    for name, value in tensors.items():
        shape = (weight.placement.num_rows, widths.get(name, weight.placement.dim))
        if tuple(value.shape) != shape and not (shape[1] == 1 and tuple(value.shape) == shape[:1]):
            raise ValueError(
                f"the optimizer's {name!r} has shape {tuple(value.shape)}; the table's is {shape}: load a state that "
                f"was saved for this table"
            )


def _import_foreign_state(state: dict, weight: CachedWeight) -> None:
    """State tensors that torch made (constructor) or loaded leave the optimizer; loaded ones move into the records."""
    for name in [name for name in state if name != "step"]:
        value = state.pop(name)
        if _steps(state) > 0 and name in weight.cache.layout.state_names():
            weight.set_logical(name, value.reshape(weight.placement.num_rows, -1))


def reset_forgotten_state(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, weight: CachedWeight) -> None:
    """The optimizer's state was cleared, or rolled back to before its first step: the rows' state follows."""
    if weight.rule.counts_steps and _steps(optimizer.state[parameter]) == 0 and not weight.state_is_initial:
        weight.reset_state()


def _restore_gradients(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    for _, _, weight in blocks_of(optimizer):
        weight.restore_stash()


def _steps(state: dict) -> float:
    return float(state.get("step", 0))


def next_step(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, rule: RowRule) -> int:
    """Counts a step of `parameter` in the optimizer's state, in its torch class's form; returns its number from 1."""
    if not counts_steps(parameter, rule):
        return 1
    state = optimizer.state[parameter]
    if "step" not in state:
        state["step"] = 0 if isinstance(optimizer, torch.optim.SparseAdam) else torch.tensor(0.0)
    state["step"] += 1
    return int(state["step"])


def coming_step(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, rule: RowRule) -> int:
    """What `next_step` will return."""
    return int(_steps(optimizer.state.get(parameter, {}))) + 1 if counts_steps(parameter, rule) else 1


def counts_steps(parameter: torch.Tensor, rule: RowRule) -> bool:
    """Whether the optimizer's state of a block holds a step count: its rule needs one, or the rounding of its rows."""
    return rule.counts_steps or cached_weight_of(parameter).rounds


def _after_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    for _, _, weight in blocks_of(optimizer):
        weight.after_step()


def make_state_dict_logical(optimizer: torch.optim.Optimizer, state_dict: dict) -> dict:
    """A state_dict post-hook: blocks' state as (R, width) tensors in id order, under torch's names."""
    states = dict(state_dict["state"])
    numbers = iter(range(sum(len(group["params"]) for group in optimizer.param_groups)))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            number = next(numbers)
            weight = cached_weight_of(parameter)
            if weight is not None and number in states and weight.owner is optimizer and weight.in_state_dict:
                states[number] = logical_state(states[number], weight)
    return {**state_dict, "state": states}


def logical_state(state: dict, weight: CachedWeight) -> dict:
    """A block's state in an optimizer, with the rows' columns as (R, width) tensors in id order, (R,) for width 1.

    Every rank that holds a part of the table must call it.
    """
    names = weight.cache.layout.state_names()
    if weight.owner is None or any(name in state for name in names):
        return dict(state)  # not bound yet; or loaded, and not stepped since
    columns = {name: weight.logical(name) for name in names}
    per_row = weight.rule.row_columns
    return {**state, **{name: column[:, 0] if name in per_row else column for name, column in columns.items()}}


def load_logical_states(optimizer: torch.optim.Optimizer, states: dict[torch.Tensor, dict]) -> None:
    """Puts {block: its state as `logical_state` gives it} into the optimizer and the rows.

    Raises:
        ValueError: a state is of another shape; nothing was changed.
    """
    for parameter, state in states.items():
        _check_foreign_state(optimizer, state, cached_weight_of(parameter))
    for group, parameter, weight in list(blocks_of(optimizer)):
        if parameter in states:
            rule = make_rule(rule_name_of(optimizer))
            own_blocks(optimizer, rule, group, weight, keep_slots=False)
            optimizer.state[parameter] = dict(states[parameter])
            _import_foreign_state(optimizer.state[parameter], weight)


def rule_name_of(optimizer: torch.optim.Optimizer) -> str | None:
    """The name of the row rule by which `optimizer` trains cached tables; None where it has none."""
    return optimizer.rule_name if steps_rows(optimizer) else ADAPTED.get(type(optimizer))


def _advice(optimizer: torch.optim.Optimizer) -> str:
    ours = _REPLACEMENTS.get(type(optimizer).__name__, "SGD, Adagrad, RowWiseAdagrad or Adam")
    theirs = ", ".join(cls.__name__ for cls in ADAPTED)
    return f"Use colossal_freqcache.optim.{ours} (dense parameters are welcome there), or one of torch.optim.{theirs}"


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError for an optimizer that is to train cached tables and has no row rule; names those that have."""
    if rule_name_of(optimizer) is None:
        raise ValueError(
            f"{type(optimizer).__name__} has no exact row rule, and it holds cached tables. {_advice(optimizer)}"
        )


def bind_blocks(optimizer: torch.optim.Optimizer) -> None:
    """Binds an optimizer to the cached tables among its parameters now, instead of at its first step.

    For one that was built before its parameters became blocks. State of a table's shape that it has by then moves into
    the rows if it has counted steps; the tensors that a constructor filled are released.

    Raises:
        ValueError: the optimizer, or a setting, has no row rule; or its state is of another shape. Nothing was changed.
    """
    blocks = [block for block in blocks_of(optimizer) if block[1].requires_grad]
    if not blocks:
        return
    check_optimizer(optimizer)
    rule = make_rule(rule_name_of(optimizer))
    for group, parameter, weight in blocks:
        weight.check_binding(optimizer, rule, group)
        _check_foreign_state(optimizer, optimizer.state.get(parameter, {}), weight)
    for group, parameter, weight in blocks:
        own_blocks(optimizer, rule, group, weight, keep_slots=False)
        _import_foreign_state(optimizer.state[parameter], weight)
        if not optimizer.state[parameter]:
            del optimizer.state[parameter]
