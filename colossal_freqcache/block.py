"""CachedWeight: the one Parameter over a cache block, its gradient, and who still needs which rows.

Autograd sees a leaf of constant shape (ceiling, D) whose gradient is sparse over slots. Slots change their rows, so a
slot number that autograd holds is only good while its row is pinned. Tokens do that.

The life of a token (one forward that autograd recorded):
    HELD      from the forward on; its rows keep one pin each.
    SPENT     after its backward: the slots stand in `.grad` now: the rows stay until the gradient was used or cleared.
    RELEASED  the graph died unused; or, after SPENT, an optimizer stepped the block or its gradient was cleared.
A graph may die in any thread and inside any lock (garbage collection), so its finalizer only appends to a deque;
`settle` empties it, in the training thread, outside every backward (inside one, `.grad` may be None although it is
about to be accumulated).
"""

import threading
import weakref
from collections import deque

import torch
from torch import nn

from .autograd_exit import clear_queue_at_exit
from .cache import RowCache
from .placement import Placement
from .rounding import HALVES, Rounding, stream_of
from .row_layout import RowLayout
from .row_rules import RowRule

__all__ = ["CachedWeight", "Token", "cached_weight_of", "plain_mode"]

HELD, SPENT, RELEASED = "held", "spent", "released"


class plain_mode:
    """No gradients, and no inference tensors: what outlives a call must stay usable outside inference mode."""

    def __enter__(self) -> None:
        self._modes = [torch.inference_mode(False), torch.no_grad()] if torch.is_inference_mode_enabled() else []
        self._modes = self._modes or [torch.no_grad()]
        for mode in self._modes:
            mode.__enter__()

    def __exit__(self, *exception: object) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*exception)


def cached_weight_of(parameter: torch.Tensor) -> "CachedWeight | None":
    """The CachedWeight whose block `parameter` is, or None for any other tensor."""
    return getattr(parameter, "_freqcache_weight", None)


class Token:
    """Holds the rows in `slots` (int32[U], unique), one pin each."""

    __slots__ = ("slots", "state")

    def __init__(self, slots: torch.Tensor) -> None:
        self.slots = slots
        self.state = HELD


class CachedWeight:
    """Binds a RowCache to autograd and to an optimizer.

    Attributes:
        cache: the RowCache.
        placement: which part of the logical table that cache holds.
        parameter: nn.Parameter (ceiling, local D), a view of the block's weight columns; the same object for
            life, but for `adopt`.
        rule: the row rule whose state the records hold, or None.
        version: goes up whenever rows may be updated (a backward that needs the forward's values compares it).
        num_tokens: tokens not released.
        is_trained: whether a backward (fused=True) has trained the rows for the step to come.
        state_is_initial: every state column holds its initial value.
        max_state_dict_bytes: above this, the logical table is not handed out as one tensor; 2 GiB.
        in_state_dict: whether state_dicts of the module and of its optimizer hold the table (a checkpoint that streams
            it apart switches that off).
    """

    def __init__(self, cache: RowCache, rule: RowRule | None, placement: Placement) -> None:
        self.cache = cache
        self.rule = rule
        self.placement = placement
        self.version = 0
        self.num_tokens = 0
        self.max_state_dict_bytes = 2 << 30
        self.in_state_dict = True
        # `.data`: a version counter of its own, which goes up where users edit the Parameter, and not in our kernels.
        self._take(nn.Parameter(cache.records.data[:, : cache.layout.dim]))
        self.lock = threading.RLock()  # one lookup at a time; a backward beside another thread's forward is not covered
        self._dead: deque[Token] = deque()
        self._spent: list[Token] = []
        self._made_slots = (0, 0)  # address and number of the last gradient's
        self._adds_to_sorted = True  # `.grad` was absent or sorted when the last backward returned
        self._left_over: weakref.ref | None = None  # a gradient that was stepped by a step that then raised
        self._stash: torch.Tensor | None = None  # the gradient while a foreign optimizer steps
        self._stepped: weakref.ref | None = None  # the gradient that was stepped and not cleared since
        self._moves_at_step = self._moves_at_backward = 0
        self.is_trained = False  # a backward has trained the rows for the step to come
        self._owner: weakref.ref | None = None
        self._replaced: weakref.WeakSet = weakref.WeakSet()
        self.state_is_initial = True

    def _take(self, parameter: nn.Parameter) -> None:
        """`parameter`, whose data is the block, is the one that autograd and optimizers see."""
        self.parameter = parameter
        self._seen_version = parameter._version
        parameter._freqcache_weight = self
        weak_self = weakref.ref(self)  # torch's hooks hold what garbage collection cannot see: a cycle would never go

        def flag_coalesced(parameter: torch.Tensor) -> None:
            weight = weak_self()
            if weight is not None and parameter.grad is not None:
                weight._flag_coalesced(parameter)

        trained = parameter.requires_grad
        parameter.requires_grad_(True)  # torch takes the hook of no other; a frozen one may be trained later
        parameter.register_post_accumulate_grad_hook(flag_coalesced)
        parameter.requires_grad_(trained)

    def adopt(self, parameter: nn.Parameter) -> None:
        """Makes an existing Parameter (of an nn.EmbeddingBag) the block's: the same object, with other data.

        So an optimizer that was built over it stays valid. Its old data is released.

        Raises:
            RuntimeError: it has a gradient, or is the block of another cache.
        """
        if cached_weight_of(parameter) is not None:
            raise RuntimeError("the parameter is the block of a cached table already: build one table per parameter")
        if parameter.grad is not None:
            raise RuntimeError(
                f"the parameter has a gradient of shape {tuple(parameter.grad.shape)}, which would be one of another "
                f"table from here on: call zero_grad() (or step) before the table is cached"
            )
        self.require_quiescent("another Parameter for the block")
        del self.parameter._freqcache_weight
        parameter.data = self.cache.records.data[:, : self.cache.layout.dim]
        self._take(parameter)

    # ---- tokens -------------------------------------------------------------------------------------------------

    def hold(self, slots: torch.Tensor) -> Token:
        """A token that takes over the pin that `RowCache.prepare` put on each of `slots`."""
        self.num_tokens += 1
        return Token(slots)

    def watch(self, graph_node: object, token: Token) -> None:
        """Releases `token` after `graph_node` has died without a backward."""
        clear_queue_at_exit()
        weakref.finalize(graph_node, self._dead.append, token).atexit = False

    def release(self, token: Token) -> None:
        """Unpins the token's rows, once."""
        if token.state != RELEASED:
            token.state = RELEASED
            self.num_tokens -= 1
            self.cache.unpin(token.slots)

    def settle(self, between_batches: bool = False) -> None:
        """Releases what nobody needs any more; the training thread calls it as a forward, prefetch or flush starts.

        between_batches: no forward starts, a batch is handed out. A gradient that was taken out of `.grad` is good
            until the next forward, so its rows stay.
        """
        if torch._C._current_graph_task_id() != -1:  # a forward that is recomputed inside a backward
            return
        self._check_edits()
        self.cache.ahead.end_if_abandoned()
        if self._stash is not None:  # a step raised after the rows were trained
            if self.parameter.grad is None:
                self.after_step()
                self._left_over = weakref.ref(self.parameter.grad)
            self._stash = None  # else another graph's backward has put its own gradient there since
        while self._dead:
            token = self._dead.popleft()
            if token.state == HELD:
                self.release(token)
        if self._spent and not between_batches and self._is_cleared():
            self._release_spent()

    def _check_edits(self) -> None:
        """Refuses in-place edits of the block that are no update by a gradient: they reach the resident rows only."""
        version = self.parameter._version
        if version != self._seen_version:
            self._seen_version = version
            if not self._spent:
                raise RuntimeError(
                    "the block of a cached table was changed in place (by an initialiser, an average of weights, a "
                    "broadcast?): it holds slots, not the table. Use init_() or load_state_dict(), and "
                    "logical_weight() to read"
                )

    def check_in_place(self, parameter: torch.Tensor) -> None:
        """Refuses a lookup while something else stands in the block's place (it would not be looked at)."""
        if parameter is not self.parameter or parameter.data_ptr() != self.cache.records.data_ptr():
            raise RuntimeError(
                "bag.weight was replaced (by assignment, .data, functional_call, a parametrization?): it is the "
                "cache's own block. Use load_state_dict() or init_() to set the table"
            )

    def _has_gradient(self) -> bool:
        grad = self.parameter.grad
        return grad is not None and (not grad.is_sparse or grad._nnz() > 0)

    def _is_cleared(self) -> bool:
        """Whether the gradient of the spent tokens is gone. One without entries may be theirs: they may hold no rows.

        (A rank whose part of the table a batch does not touch has such tokens, and keeps them as long as the others.)
        """
        grad = self.parameter.grad
        return grad is None or (not self._has_gradient() and any(token.slots.numel() for token in self._spent))

    def _release_spent(self) -> None:
        for token in self._spent:
            self.release(token)
        self._spent.clear()

    # ---- backward -----------------------------------------------------------------------------------------------

    def before_backward(self, token: Token, needs_gradient: bool) -> None:
        """Refuses a backward whose slots may have changed their rows, or that would add to a used-up gradient.

        On all ranks that share the table: one whose part the batch does not touch would find nothing wrong.
        """
        self.placement.together(lambda: self._check_backward(token, needs_gradient))

    def _check_backward(self, token: Token, needs_gradient: bool) -> None:
        if token.state == RELEASED:
            raise RuntimeError(
                "backward through a lookup whose rows were released: an optimizer stepped, or the gradient was cleared,"
                " since its first backward (retain_graph across a step). Run the forward again"
            )
        if needs_gradient and self._left_over is not None:
            if self._left_over() is self.parameter.grad:  # its rows were trained by it: it must not count again
                self.parameter.grad = None
            self._left_over = None
        if needs_gradient and self._is_stepped():
            raise RuntimeError(
                "backward would add to a gradient that an optimizer has already stepped: call zero_grad() after step()"
            )
        if needs_gradient and self.is_fused:
            self._check_only_backward(token)

    def _check_only_backward(self, token: Token) -> None:
        """Refuses what a fused update cannot see in time: that another backward's gradient belongs to the same step."""
        if self.parameter._backward_hooks:
            raise RuntimeError(
                "fused=True trains the rows of a cached table inside the backward, before a hook of the parameter "
                "could change its gradient: remove the hooks, or build the optimizer without fused=True"
            )
        dead = sum(token.state == HELD for token in self._dead.copy())
        waiting = self.num_tokens - len(self._spent) - dead - (token.state == HELD)
        if self.is_trained or waiting or self._has_gradient():
            found = (
                f"{waiting} more forward(s) of it wait for theirs" if waiting else "it had one since its last step()"
            )
            raise RuntimeError(
                f"fused=True trains the rows of a cached table inside its one backward per step(), and {found}: "
                f"a sum of several gradients needs an optimizer without fused=True, and so does a step that is left "
                f"out. (Wrap evaluations in torch.no_grad().)"
            )

    def gradient(self, slots: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The sparse gradient of the block: `slots` int64[U] ascending, `values` (U, D); flagged coalesced."""
        self.cache.mark_dirty(slots)
        self._moves_at_backward = self.cache.moves
        grad = self.parameter.grad
        self._adds_to_sorted = grad is None or grad.is_coalesced()
        self._made_slots = slots.data_ptr(), slots.numel()
        if not slots.numel():
            # Accumulating into an empty sparse tensor resizes its storage, which torch forbids once numpy has seen it.
            slots, values = torch.empty_like(slots), torch.empty_like(values)
        return torch.sparse_coo_tensor(
            slots.unsqueeze(0), values, self.parameter.shape, is_coalesced=True, check_invariants=False
        )

    def _flag_coalesced(self, parameter: torch.Tensor) -> None:
        """torch drops the flag where a first gradient becomes `.grad`; without it, later sums would not be merges."""
        grad = parameter.grad
        if self._adds_to_sorted and grad.is_sparse and not grad.is_coalesced():
            slots = grad._indices()[0]
            if self.cache.on_device:
                # Whether they rise is known of the last backward's; asking the device would be waiting for it.
                if not slots.numel() or (slots.data_ptr(), slots.numel()) == self._made_slots:
                    grad._coalesced_(True)
                else:
                    parameter.grad = merged = _merged(grad)
                    self._made_slots = merged._indices()[0].data_ptr(), merged._nnz()
            elif (slots[1:] > slots[:-1]).all():
                grad._coalesced_(True)

    def after_backward(self, token: Token) -> None:
        """From here on the token's slots stand in a gradient."""
        if token.state == HELD:
            token.state = SPENT
            self._spent.append(token)

    # ---- optimizer ----------------------------------------------------------------------------------------------

    def fused_step(self) -> tuple[dict, int] | None:
        """(param_group, number of the coming step) where the bound optimizer is to train the rows in the backward."""
        return getattr(self.owner, "fused_step", lambda parameter: None)(self.parameter)

    @property
    def is_fused(self) -> bool:
        """Whether the next backward trains the rows, so that there is no gradient to see."""
        return self.fused_step() is not None

    def train_in_backward(self, slots: torch.Tensor, values: torch.Tensor, group: dict, step: int) -> torch.Tensor:
        """Applies the rule to `slots` (int32[U], unique) with gradients `values` (U, D); returns an empty gradient.

        Only `.grad` sees that one; a step() counts it, and has nothing left to train.
        """
        self._train(slots, values, group, step)
        return self._nothing_left(values)

    def trained_in_backward(self, values: torch.Tensor) -> torch.Tensor:
        """As `train_in_backward`, where the kernels have done it; `values`: any tensor (…, D) of the rows' dtype."""
        self.version += 1
        self.state_is_initial = False
        return self._nothing_left(values)

    def _nothing_left(self, values: torch.Tensor) -> torch.Tensor:
        self.is_trained = True
        none = values.new_empty((1, 0), dtype=torch.int64), values.new_empty(0, values.shape[-1])
        return torch.sparse_coo_tensor(*none, self.parameter.shape, is_coalesced=True, check_invariants=False)

    def bind(self, optimizer: torch.optim.Optimizer, rule: RowRule, group: dict, keep_slots: bool = False) -> None:
        """Makes `optimizer` the one that trains the rows by `rule`; its state starts at its initial values.

        With `keep_slots` (an optimizer bound at its first step, while gradients hold slots) the block keeps its shape.

        Raises:
            ValueError: another kind is bound or reserved, or the state does not fit into max_cache_bytes.
            RuntimeError: `optimizer` was replaced by a later one; or the block's shape would change while it is in use.
        """
        self.check_binding(optimizer, rule, group)
        if self.owner is optimizer:
            return
        layout = rule.layout(self.cache.layout.dim, self.cache.layout.dtype, group)
        with plain_mode():
            if [column[:2] for column in layout.state] != [column[:2] for column in self.cache.layout.state]:
                budget = rule.layout(self.placement.budget_dim, self.cache.layout.dtype, group)
                self._relayout(layout, keep_slots, budget.row_bytes)
            elif layout != self.cache.layout or not self.state_is_initial or self.cache.may_replay:
                self.cache.layout = layout
                self.cache.reset_state()
        self.state_is_initial = True
        if self.owner is not None:
            self._replaced.add(self.owner)
        self.rule = rule
        self._owner = weakref.ref(optimizer)

    def check_binding(self, optimizer: torch.optim.Optimizer, rule: RowRule, group: dict) -> None:
        """Raises what `bind` would raise for the optimizer's kind and settings; changes nothing."""
        rule.check(group)
        if self.rule is not None and self.rule.name != rule.name:
            raise ValueError(
                f"the rows carry the state of {self.rule.name!r}, so {type(optimizer).__name__} ({rule.name!r}) cannot "
                f"train them: use one optimizer, or call drop_optimizer_state() on the bag first"
            )
        if optimizer in self._replaced:
            raise RuntimeError(
                f"this {type(optimizer).__name__} was replaced by an optimizer that was bound to the same bag later, "
                f"and the rows carry that one's state: step only the latest"
            )

    @property
    def owner(self) -> torch.optim.Optimizer | None:
        """The optimizer that is bound and still alive."""
        return None if self._owner is None else self._owner()

    def drop_state(self) -> None:
        """Forgets the optimizer and removes its columns from the records."""
        layout = RowLayout(self.cache.layout.dim, self.cache.layout.dtype)
        if layout != self.cache.layout:
            with plain_mode():
                budget = RowLayout(self.placement.budget_dim, layout.dtype)
                self._relayout(layout, keep_slots=False, budget_row_bytes=budget.row_bytes)
        if self.owner is not None:
            self._replaced.add(self.owner)
        self.rule = self._owner = None
        self.state_is_initial = True

    def _relayout(self, layout: RowLayout, keep_slots: bool, budget_row_bytes: int) -> None:
        if not keep_slots:
            _, ceiling = self.cache.size_in_slots(budget_row_bytes)
            if ceiling != self.cache.ceiling:
                self.require_quiescent(f"changing the block from {self.cache.ceiling} to {ceiling} slots")
        self.cache.relayout(layout, keep_slots, budget_row_bytes)
        self.parameter.data = self.cache.records[:, : layout.dim]
        self._seen_version = self.parameter._version

    def require_quiescent(self, what: str) -> None:
        """Raises RuntimeError while a graph or a gradient still holds slots."""
        self.settle()
        self.cache.end_prefetch()
        if self.num_tokens or self.parameter.grad is not None:
            raise RuntimeError(
                f"{what} is not possible while {self.num_tokens} forward(s) wait for their backward or step and "
                f".grad is {'None' if self.parameter.grad is None else 'set'}: do it before training starts, or after "
                f"step() and zero_grad(), with no output of the bag alive"
            )

    def check_gradient(self) -> None:
        """Raises RuntimeError for a `.grad` that cannot be stepped: dense, unsorted, or of rows that have moved."""
        grad = self.parameter.grad
        if not grad.is_sparse or tuple(grad.shape) != tuple(self.parameter.shape):
            raise RuntimeError(
                f"the gradient of a cached table is sparse over its {self.cache.ceiling} slots; found a "
                f"{'sparse' if grad.is_sparse else 'dense'} one of shape {tuple(grad.shape)}"
            )
        slots = grad._indices()[0].clone()  # numpy() would make the storage of an empty gradient one that cannot grow
        again = self._is_stepped() and self._moves_at_step == self.cache.moves
        # A pin may be that of a batch that comes next, and of another row: without a token, nothing may have moved.
        held = not slots.numel() or bool(self._spent) or self.cache.moves == self._moves_at_backward
        if not again and (self._is_stepped(grad) or not held or not self._rows_stay(grad, slots)):
            raise RuntimeError(
                "this gradient was stepped, or taken out of .grad, before a later forward, and rows have moved since: "
                "its slots hold other rows now. Call zero_grad() after step(), and step before the next forward"
            )
        if not grad.is_coalesced() and not bool((slots[1:] > slots[:-1]).all()):
            raise RuntimeError(
                "the gradient of a cached table must stay coalesced (sorted, unique slots), or its sums would depend "
                "on where rows sit; scale it in place (grad.mul_) instead of adding sparse tensors to it"
            )

    def _rows_stay(self, grad: torch.Tensor, slots: torch.Tensor) -> bool:
        """Whether the rows that stood in the gradient's slots when it was made are still there."""
        if not grad._nnz() or (self.cache.on_device and (grad._indices().data_ptr(), grad._nnz()) == self._made_slots):
            return True  # it is the last backward's, whose rows are held; the device need not be asked
        return self.cache.rows_stay(slots, [token.slots for token in self._spent])

    def step(self, group: dict, step: int, scale: float = 1.0) -> None:
        """Applies the rule to the rows of the checked `.grad` divided by `scale`, as step number `step` (from 1)."""
        grad = self.parameter.grad
        slots = grad._indices()[0]
        with plain_mode():
            values = grad._values().detach().contiguous()
            if scale != 1.0:
                values = values / scale
            self._train(slots.int(), values, group, step)

    def _train(self, slots: torch.Tensor, values: torch.Tensor, group: dict, step: int) -> None:
        self.version += 1  # without rows of its own, too: ranks that share the table compare alike
        if not slots.numel():
            return
        if group.get("maximize"):
            values = -values
        cache = self.cache
        cache.mark_dirty(slots)
        kernels = cache.kernels
        if self.rounds:
            kernels = kernels.with_rounding(self._rounding(slots, step))
        self.rule.update(kernels, cache.records, cache.layout, slots, values, group, step, self.placement)
        self.state_is_initial = False

    @property
    def rounds(self) -> bool:
        """Whether updates of the rows are rounded stochastically, so that the bits depend on the number of the step."""
        return self.cache.layout.dtype in HALVES

    def _rounding(self, slots: torch.Tensor, step: int) -> Rounding:
        """What the update of `slots` as step number `step` is rounded by: the same wherever the rows are held."""
        columns, start = [], 0
        local = {"weight": self.cache.layout.dim, **{name: width for name, width, _ in self.cache.layout.state}}
        for name, width in self.column_widths().items():
            first = start + (self.placement.first_column if self._is_split(name) else 0)
            columns.append(torch.arange(first, first + local[name]))
            start += width
        ids = self.placement.ids_of_the_whole(self.cache.slots.id_of_slot[slots.long()].long())
        return Rounding(stream_of(self.cache.config.rounding_seed, step), ids, torch.cat(columns))

    def after_step(self) -> None:
        """The gradient was used: its rows may leave. Adding to it, or stepping it once rows have moved, is refused."""
        self.restore_stash()
        self._release_spent()
        self._left_over, self.is_trained = None, False
        if self._has_gradient():
            self._stepped = weakref.ref(self.parameter.grad)
            self._moves_at_step = self.cache.moves

    def _is_stepped(self, grad: torch.Tensor | None = None) -> bool:
        """Whether `.grad` was stepped and not cleared since, also by a scaled copy; or `grad` itself was."""
        if self._stepped is None or not self._has_gradient():
            self._stepped = None
            return False
        return grad is None or self._stepped() is grad

    def stash_gradient(self) -> None:
        """Hides `.grad` from a foreign optimizer's step, until `restore_stash`."""
        self._stash, self.parameter.grad = self.parameter.grad, None

    def restore_stash(self) -> None:
        """Puts a hidden gradient back; also after a step that raised."""
        if self._stash is not None:
            if self.parameter.grad is None:
                self.parameter.grad = self._stash
            self._stash = None

    # ---- logical table ------------------------------------------------------------------------------------------

    def column_widths(self) -> dict[str, int]:
        """Logical width of "weight" and of every state column, in the order of the record."""
        return {"weight": self.placement.dim, **{name: self._width(name) for name in self.cache.layout.state_names()}}

    def _width(self, column: str) -> int:
        return self.placement.dim if self._is_split(column) else 1

    def _is_split(self, column: str) -> bool:
        """Whether the column has an element for each of the D columns, not one for the whole row."""
        return self.rule is None or column not in self.rule.row_columns

    def logical(self, column: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Column `column` of ids start..stop-1 of the whole in id order, newest values: (n, width), a copy.

        Every rank that holds a part must call it, and gets all.

        Raises:
            ValueError: it would pass `max_state_dict_bytes`.
        """
        stop = self.placement.num_rows if stop is None else stop
        width = self._width(column)
        self.check_bytes((stop - start) * width * self.cache.layout.dtype.itemsize, f"column {column!r} as one tensor")
        with plain_mode():
            out = torch.empty(stop - start, width, dtype=self.cache.layout.dtype)
            for first, last in self.placement.chunks(start, stop):
                out[first - start : last - start] = self.logical_chunk(column, first, last)
        return out

    def logical_chunk(self, column: str, first: int, last: int, to: int | None = None) -> torch.Tensor | None:
        """The same for ids first..last-1 of one table, of any total size; with `to`, only that rank gets them."""
        self.placement.together(self._check_edits)
        with plain_mode():
            return self.placement.read(column, first, last, self._is_split(column), to)

    def set_logical(self, column: str, values: torch.Tensor, start: int = 0) -> None:
        """Writes `values` (n, width) into column `column` of ids start..; streamed, any device and float dtype.

        Every rank must call it, with the same values.
        """
        with plain_mode():
            for first, last in self.placement.chunks(start, start + values.shape[0]):
                self.placement.write(column, first, values[first - start : last - start], self._is_split(column))
        self.version += 1
        if column != "weight":
            self.state_is_initial = False

    def reset_state(self) -> None:
        """Every state column back to its initial value."""
        with plain_mode():
            self.cache.reset_state()
        self.state_is_initial = True

    def check_bytes(self, num_bytes: int, what: str) -> None:
        """ValueError where `num_bytes` pass `max_state_dict_bytes`."""
        if num_bytes > self.max_state_dict_bytes:
            raise ValueError(
                f"{what} takes {num_bytes} bytes, more than max_state_dict_bytes={self.max_state_dict_bytes}: raise "
                f"that attribute of the bag, or stream the table: colossal_freqcache.checkpoint.save"
            )


def _merged(grad: torch.Tensor) -> torch.Tensor:
    """A sum of sorted gradients that torch has only laid end to end, as it does on CUDA: sorted, unique, coalesced.

    A slot's values are added from left to right, whatever the slot numbers. Waits for the device.
    """
    slots, order = torch.sort(grad._indices()[0], stable=True)
    values = grad._values()[order]
    unique, number, counts = torch.unique_consecutive(slots, return_inverse=True, return_counts=True)
    starts = counts.cumsum(0) - counts
    turn = torch.arange(slots.numel(), device=slots.device) - starts[number]
    sums = values[starts]
    for k in range(1, int(counts.max()) if counts.numel() else 0):
        later = (turn == k).nonzero()[:, 0]
        sums[number[later]] = sums[number[later]] + values[later]
    return torch.sparse_coo_tensor(unique.unsqueeze(0), sums, grad.shape, is_coalesced=True, check_invariants=False)
