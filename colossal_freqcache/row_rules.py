"""Row rules: what an optimizer does to the rows that have a gradient, and the state columns it keeps in their records.

A rule reads a torch param_group, so schedulers and hand-set hyper-parameters act. It never touches a row without a
gradient: settings under which torch's rule would (momentum, weight decay) are refused with the reason.
Sources: torch.optim.SGD, Adagrad and SparseAdam on sparse gradients; row-wise Adagrad: FBGEMM's EXACT_ROWWISE_ADAGRAD.
"""

import math
from typing import Any

import torch

from .row_layout import RowLayout

__all__ = ["RULES", "RowRule", "make_rule"]


class RowRule:
    """One optimizer's arithmetic over rows.

    Attributes:
        name: as in `optimizer=`.
        counts_steps: it keeps a step count per parameter, whatever the dtype of the rows.
        row_columns: state columns that hold one value for the whole row, not one per element.
    """

    name = ""
    counts_steps = True
    row_columns: tuple[str, ...] = ()
    refused: tuple[str, ...] = ("weight_decay",)  # settings that must be zero or False

    def layout(self, dim: int, dtype: torch.dtype, group: dict[str, Any]) -> RowLayout:
        """The record of this rule; initial values from the param_group where it has them."""
        return RowLayout(dim, dtype)

    def check(self, group: dict[str, Any]) -> None:
        """Raises ValueError for a setting under which rows without a gradient would move."""
        for name in self.refused:
            if group.get(name):
                raise ValueError(
                    f"{name}={group[name]!r} with {self.name}: it would move rows that have no gradient, at every "
                    f"step, which a cached (and any sparsely trained) table cannot do exactly; set it to 0 for this "
                    f"parameter, in a param_group of its own"
                )

    def numbers(self, group: dict[str, Any], step: int) -> tuple[float, ...]:
        """The hyper-parameters of step number `step`, in the order in which the kernels' updates take them."""
        raise NotImplementedError

    def update(
        self, kernels, records, layout: RowLayout, slots, grads, group: dict[str, Any], step: int, placement
    ) -> None:
        """Applies step number `step` (from 1) to `slots` (int32[U], unique) with `grads` (U, D).

        `kernels` round what they write, where they have to. `placement` sums over whole rows where a record holds only
        some of their columns.
        """
        raise NotImplementedError


class SGDRule(RowRule):
    """w -= lr * g"""

    name = "sgd"
    counts_steps = False
    refused = ("momentum", "weight_decay", "differentiable")

    def numbers(self, group, step):
        return (float(group["lr"]),)

    def update(self, kernels, records, layout, slots, grads, group, step, placement):
        kernels.update_sgd(records, layout.dim, slots, grads, *self.numbers(group, step))


class AdagradRule(RowRule):
    """s += g^2; w -= lr / (1 + (step - 1) lr_decay) * g / (sqrt(s) + eps), element by element"""

    name = "adagrad"
    refused = ("weight_decay", "differentiable")

    def layout(self, dim, dtype, group):
        return RowLayout(dim, dtype, (("sum", dim, float(group.get("initial_accumulator_value", 0.0))),))

    def numbers(self, group, step):
        return float(group["lr"]) / (1 + (step - 1) * group["lr_decay"]), group["eps"]

    def update(self, kernels, records, layout, slots, grads, group, step, placement):
        kernels.update_adagrad(records, layout.dim, slots, grads, *self.numbers(group, step))


class RowWiseAdagradRule(AdagradRule):
    """s += mean(g^2); w -= lr / (1 + (step - 1) lr_decay) / (sqrt(s) + eps) * g, one s a row"""

    name = "rowwise_adagrad"
    row_columns = ("sum",)

    def layout(self, dim, dtype, group):
        return RowLayout(dim, dtype, (("sum", 1, float(group.get("initial_accumulator_value", 0.0))),))

    def update(self, kernels, records, layout, slots, grads, group, step, placement):
        mean_squares = None
        if not getattr(kernels, "takes_means", False):  # else of rows that are whole, in the update's own pass
            mean_squares = placement.row_totals(kernels.square_sums(grads), slots) / placement.dim
        kernels.update_rowwise_adagrad(records, layout.dim, slots, grads, mean_squares, *self.numbers(group, step))


class AdamRule(RowRule):
    """Lazy Adam: m, v of a row move when it has a gradient; bias correction by the parameter's step count"""

    name = "adam"
    refused = ("weight_decay", "amsgrad", "differentiable")

    def layout(self, dim, dtype, group):
        return RowLayout(dim, dtype, (("exp_avg", dim, 0.0), ("exp_avg_sq", dim, 0.0)))

    def numbers(self, group, step):
        beta1, beta2 = (float(beta) for beta in group["betas"])
        return beta1, beta2, group["eps"], float(group["lr"]) * math.sqrt(1 - beta2**step) / (1 - beta1**step)

    def update(self, kernels, records, layout, slots, grads, group, step, placement):
        kernels.update_adam(records, layout.dim, slots, grads, *self.numbers(group, step))


RULES = {rule.name: rule for rule in (SGDRule, AdagradRule, RowWiseAdagradRule, AdamRule)}


def make_rule(name: str) -> RowRule:
    """The rule called `name`; ValueError lists the names."""
    if name not in RULES:
        raise ValueError(f"optimizer={name!r} is unknown: choose one of {', '.join(map(repr, RULES))}")
    return RULES[name]()
