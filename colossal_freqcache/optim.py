"""SGD, Adagrad, RowWiseAdagrad and Adam for models with cached tables: rows by row rule, dense parameters by torch.

Each class is the torch optimizer of its name (constructor, param_groups, schedulers, zero_grad, closures) that treats
the blocks of cached tables apart: their state is columns of the rows' records, so it moves with the row.

With fused=True the rows are trained inside the backward, as FBGEMM does, with the settings of that moment, and no
gradient of the table is made: the same bits for the same gradients as without it, for training loops of one backward
per step. Refused are several backwards or lookups per step, a step left out, hooks of the parameter, clipping, a
GradScaler; what edits `.grad` by hand finds it empty. Dense parameters get torch's own fused step, whose rounding may
differ.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .block import CachedWeight, cached_weight_of, plain_mode
from .row_rules import RowRule, make_rule
from .step_hooks import (
    amp_scale,
    blocks_of,
    coming_step,
    counts_steps,
    make_state_dict_logical,
    next_step,
    reset_forgotten_state,
)

__all__ = ["SGD", "Adagrad", "Adam", "RowWiseAdagrad", "clip_grad_norm_", "clip_grad_value_", "to_sparse_adam"]


class _RowOptimizer:
    """Mixed into a torch optimizer: steps the blocks of cached tables by `rule_name`, and leaves the rest to torch."""

    steps_rows = True
    rule_name = ""

    def __init__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        # torch's constructors may fill state of a parameter's shape: it sees an empty stand-in for each block.
        stand_ins: dict[int, torch.Tensor] = {}
        groups = [_with_stand_ins(group, stand_ins) for group in _as_groups(params)]
        super().__init__(groups, *args, **kwargs)
        for group in self.param_groups:
            group["params"] = [stand_ins.get(id(parameter), parameter) for parameter in group["params"]]
        for parameter in [parameter for parameter in self.state if id(parameter) in stand_ins]:
            del self.state[parameter]
        self.register_state_dict_post_hook(make_state_dict_logical)
        blocks = list(blocks_of(self))
        for group, _, weight in blocks:
            weight.check_binding(self, self._rule(), group)
        for group, parameter, weight in blocks:
            if parameter.requires_grad:
                self._bind(group, parameter, weight)

    @classmethod
    def _rule(cls) -> RowRule:
        return make_rule(cls.rule_name)

    def _bind(self, group: dict, parameter: torch.Tensor, weight: CachedWeight, keep_slots: bool = False) -> None:
        weight.bind(self, self._rule(), group, keep_slots)
        if self.rule_name in ("adagrad", "rowwise_adagrad"):  # torch's Adagrad has its state from the constructor on
            self.state[parameter] = {"step": torch.tensor(0.0)}

    def _check_steps(self, parameter: torch.Tensor, weight: CachedWeight) -> None:
        """A table that is not bound yet (it was frozen) has no steps behind it; a deep copy of a bound one has."""
        counted = self.state.get(parameter, {}).get("step", 0) > 0
        if weight.owner is not self and counted and self._rule().counts_steps:
            raise RuntimeError(
                f"this {type(self).__name__} has counted steps for a table that does not carry its state (a deep copy?)"
                f": load its state_dict into an optimizer that is built for this table"
            )

    def add_param_group(self, param_group: dict) -> None:
        """As torch's; a cached table in it is bound to this optimizer."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for parameter in group["params"]:
                if cached_weight_of(parameter) is not None:
                    cached_weight_of(parameter).check_binding(self, self._rule(), group)
        except Exception:
            self.param_groups.pop()
            raise
        for parameter in group["params"]:
            weight = cached_weight_of(parameter)
            if weight is not None and parameter.requires_grad:
                self._bind(group, parameter, weight)

    def step(self, closure: Any = None) -> Any:
        """One step over every parameter with a gradient; `closure` as in torch. Returns the closure's loss or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with_gradient = [block for block in blocks_of(self) if block[1].grad is not None]
        for group, parameter, weight in with_gradient:
            weight.check_binding(self, self._rule(), group)
            weight.check_gradient()
            self._check_steps(parameter, weight)
        if hasattr(self, "found_inf") and self._trains_in_backward():
            raise RuntimeError(
                f"a GradScaler scales the loss of a {type(self).__name__} with fused=True, which has trained the rows "
                f"of its cached tables with the scaled gradients: build it without fused=True, and load an earlier "
                f"state"
            )
        scale = amp_scale(self)
        try:
            for group, parameter, weight in with_gradient:
                if weight.owner is not self:
                    self._bind(group, parameter, weight, keep_slots=True)
                if scale is not None:
                    if not weight.is_trained:
                        reset_forgotten_state(self, parameter, weight)
                    weight.step(group, next_step(self, parameter, weight.rule), scale)
                weight.stash_gradient()
            self._step_dense()
        finally:
            for _, _, weight in with_gradient:
                weight.restore_stash()
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by a GradScaler, which tells `step` of itself if so; torch's constructors may set it."""
        return self.__dict__.get("_step_supports_amp_scaling", False) or self._trains_in_backward()

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        self.__dict__["_step_supports_amp_scaling"] = value

    def _trains_in_backward(self) -> bool:
        return any(group.get("fused") for group, _, _ in blocks_of(self))

    def fused_step(self, parameter: torch.Tensor) -> tuple[dict, int] | None:
        """(param_group, number of the coming step) of a block that the backward is to train, else None."""
        group = next((group for group, block, _ in blocks_of(self) if block is parameter), None)
        if group is None or not group.get("fused"):
            return None
        weight, rule = cached_weight_of(parameter), self._rule()
        rule.check(group)
        if not weight.is_trained:
            reset_forgotten_state(self, parameter, weight)
        return group, coming_step(self, parameter, rule)

    def _step_dense(self) -> None:
        """torch's step of the class that this one extends, without the hooks that torch wraps around it (ours ran)."""
        torch_class = next(cls for cls in type(self).__mro__ if cls.__module__.startswith("torch.optim"))
        step = torch_class.step
        if getattr(step, "hooked", False):
            step = step.__wrapped__
        step(self)

    def load_state_dict(self, state_dict: dict) -> None:
        """Loads torch's form (tables: (R, width) tensors in id order), straight into the rows.

        Raises:
            ValueError: the state is not that of these parameters; nothing was changed.
        """
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        if len(numbers) != len(parameters):
            raise ValueError(f"the state has {len(numbers)} parameters, this optimizer {len(parameters)}")
        states = dict(state_dict["state"])
        # SparseAdam's groups lack what only dense parameters need.
        groups = [{**self.defaults, **group} for group in state_dict["param_groups"]]
        of_blocks = []
        for number, parameter in zip(numbers, parameters, strict=True):
            weight = cached_weight_of(parameter)
            if weight is not None:
                state = states.pop(number, {})
                self._check_block_state(weight, state)
                of_blocks.append((parameter, weight, state))
        super().load_state_dict({**state_dict, "state": states, "param_groups": groups})
        groups = {id(parameter): group for group, parameter, _ in blocks_of(self)}
        for parameter, weight, state in of_blocks:
            if weight.owner is not self:
                self._bind(groups[id(parameter)], parameter, weight)
            names = weight.cache.layout.state_names()
            if not any(name in state for name in names):
                weight.reset_state()
            for name in names:
                if name in state:
                    weight.set_logical(name, state[name].reshape(weight.placement.num_rows, -1))
            if "step" in state and counts_steps(parameter, self._rule()):
                self.state[parameter] = {"step": torch.as_tensor(state["step"], dtype=torch.float32).cpu().clone()}
            elif self.rule_name in ("adagrad", "rowwise_adagrad"):
                self.state[parameter] = {"step": torch.tensor(0.0)}

    def _check_block_state(self, weight: CachedWeight, state: dict) -> None:
        num_rows, dim = weight.placement.num_rows, weight.placement.dim
        for name, width, _ in self._rule().layout(dim, weight.cache.layout.dtype, self.defaults).state:
            shapes = [(num_rows, width)] + [(num_rows,)] * (width == 1)
            if state and (name not in state or tuple(state[name].shape) not in shapes):
                found = tuple(state[name].shape) if name in state else "missing"
                raise ValueError(f"the state of a cached table needs {name!r} of shape {shapes[-1]}; found {found}")


def _as_groups(params: Any) -> list[dict]:
    if isinstance(params, torch.Tensor):
        raise TypeError("params is a tensor: give an iterable of parameters or of param_groups")
    params = list(params)
    return params if params and isinstance(params[0], dict) else [{"params": params}]


def _with_stand_ins(group: dict, blocks: dict[int, torch.Tensor]) -> dict:
    """`group` with an empty parameter in the place of each block; `blocks`: id of the empty one -> the block."""

    def stand_in(entry: Any) -> Any:
        if isinstance(entry, tuple):  # (name, parameter), from torch 2.6 on
            return (entry[0], stand_in(entry[1]))
        if not isinstance(entry, torch.Tensor) or cached_weight_of(entry) is None:
            return entry
        if any(entry is block for block in blocks.values()):
            raise ValueError("a cached table appears more than once among the parameters")
        empty = nn.Parameter(torch.empty(0))
        blocks[id(empty)] = entry
        return empty

    params = group["params"]
    return {
        **group,
        "params": [stand_in(entry) for entry in ([params] if isinstance(params, torch.Tensor) else params)],
    }


class SGD(_RowOptimizer, torch.optim.SGD):
    """torch.optim.SGD; rows of cached tables: w -= lr * g for rows with a gradient.

    momentum and weight_decay are refused for a group that holds a cached table: torch's rules would move, at every
    step, rows that have no gradient. Give dense parameters a group of their own.
    """

    rule_name = "sgd"


class Adagrad(_RowOptimizer, torch.optim.Adagrad):
    """torch.optim.Adagrad; cached rows as it treats sparse gradients: s += g*g; w -= lr * g / (sqrt(s) + eps)."""

    rule_name = "adagrad"


class RowWiseAdagrad(_RowOptimizer, torch.optim.Adagrad):
    """Adagrad with one sum per row: s += mean(g*g); w -= lr / (sqrt(s) + eps) * g. Dense parameters follow Adagrad.

    state_dict(): `sum` of shape (R,) for a cached table. Source: FBGEMM's EXACT_ROWWISE_ADAGRAD.
    """

    rule_name = "rowwise_adagrad"


class Adam(_RowOptimizer, torch.optim.Adam):
    """torch.optim.Adam; rows of cached tables as torch.optim.SparseAdam treats them: only rows with a gradient move.

    state_dict() has Adam's form, `load_state_dict` takes SparseAdam's too, and `to_sparse_adam` makes it.
    """

    rule_name = "adam"


def to_sparse_adam(state_dict: dict) -> dict:
    """A state_dict of `Adam` in the form of torch.optim.SparseAdam, for the tables alone: lr, betas, eps, maximize."""
    groups = [
        {key: group[key] for key in ("lr", "betas", "eps", "maximize", "params") if key in group}
        for group in state_dict["param_groups"]
    ]
    states = {
        number: {name: int(value) if name == "step" else value for name, value in state.items()}
        for number, state in state_dict["state"].items()
    }
    return {"state": states, "param_groups": groups}


def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> torch.Tensor:
    """torch.nn.utils.clip_grad_norm_ for lists that mix dense parameters and cached tables; returns the total norm.

    The norm of a table's gradient is taken in row order, so it does not depend on where rows sit, and over all ranks
    that share the table: each of them must call this, and all get the same norm.

    Raises:
        RuntimeError: the norm is nan or inf and `error_if_nonfinite`; or a table's optimizer has fused=True.
    """
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    _check_not_fused(parameters)
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    if not parameters:
        return torch.tensor(0.0)
    with plain_mode():
        norms = []
        for parameter in parameters:
            values = _values_in_row_order(parameter)  # none on a rank whose part of the table the batch does not touch
            weight = cached_weight_of(parameter)
            if weight is not None and weight.rounds:
                values = values.float()
            norm = torch.linalg.vector_norm(values, norm_type) if values.numel() else values.new_zeros(())
            norms += [norm] if weight is None else weight.placement.gather_norms(norm).unbind()
        total = torch.linalg.vector_norm(torch.stack(norms), norm_type)
        if error_if_nonfinite and not torch.isfinite(total):
            raise RuntimeError(f"the total norm of the gradients is {float(total)}: it cannot be clipped")
        scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        for parameter in parameters:
            grad = parameter.grad
            (grad._values() if grad.is_sparse else grad).mul_(scale)
    return total


def clip_grad_value_(parameters: torch.Tensor | Iterable[torch.Tensor], clip_value: float) -> None:
    """torch.nn.utils.clip_grad_value_ for lists that mix dense parameters and cached tables: clamps every element."""
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    _check_not_fused(parameters)
    with plain_mode():
        for parameter in parameters:
            if parameter.grad is not None:
                grad = parameter.grad
                (grad._values() if grad.is_sparse else grad).clamp_(-clip_value, clip_value)


def _check_not_fused(parameters: list[torch.Tensor]) -> None:
    if any(weight.is_fused for weight in map(cached_weight_of, parameters) if weight is not None):
        raise RuntimeError(
            "gradients of a cached table cannot be clipped where its optimizer has fused=True: the backward has "
            "trained the rows already. Build the optimizer without fused=True"
        )


def _values_in_row_order(parameter: torch.Tensor) -> torch.Tensor:
    grad = parameter.grad
    if not grad.is_sparse:
        return grad
    weight = cached_weight_of(parameter)
    if weight is None:
        return grad.coalesce()._values()
    return grad._values()[torch.argsort(weight.cache.rows_in(grad._indices()[0]))]
