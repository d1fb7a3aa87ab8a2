"""Lookahead: a data loader whose next batches the cache knows, and whose rows are there before training asks.

    for batch in Lookahead(loader, model, ids=lambda batch: batch["ids"]):
        ...                                         # as without it, and with the same bits

Two numbers, because they cost differently. `window` batches are pulled ahead and their ids announced: that takes host
memory and no slots, and lets the policy "lookahead" keep what is needed soonest. `depth` of them are admitted while the
current one trains: that takes slots, and hides the time of the fetches.

The loader is iterated, and every decision taken, in the thread that iterates here; one thread finds the distinct ids of
pulled batches, one per cache moves records. Ids decide, timing never does (see `ahead`).
"""

import contextlib
import gc
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from numbers import Integral
from typing import Any

import torch
from torch import nn

from .embedding import _CachedBags

__all__ = ["Lookahead"]

_collecting: set[int] = set()  # threads in which the garbage collector runs now


def _note_collection(phase: str, info: dict) -> None:
    if phase == "start":
        _collecting.add(threading.get_ident())
    else:
        _collecting.discard(threading.get_ident())


def _is_collected() -> bool:
    """Whether the caller is being finalized by the garbage collector: in any thread, in the middle of anything."""
    return threading.get_ident() in _collecting


def _shut_down(executor: ThreadPoolExecutor) -> None:
    executor.shutdown(wait=not _is_collected(), cancel_futures=True)


def _end(module: _CachedBags, who: object) -> None:
    if not sys.is_finalizing():  # nothing can be imported or compiled any more, and nothing is left to hold rows for
        module._end_look_ahead(who, _is_collected())


class Lookahead:
    """Iterates over `loader`: the same batches in the same order.

    Args:
        loader: any iterable of batches; iterated anew by each `iter()`. Where ranks share tables, every rank iterates
            one, of the same number of batches.
        model: a cached bag or collection, or a module with some inside. Those whose eviction strategy was left open are
            given "lookahead", and keep it.
        ids: fn(batch) -> what the forward of the one cached module takes (a tensor, or a tuple whose first two are
            used: ids and offsets), or {module path: that}; a module that is left out is not looked ahead for. Default:
            the batch itself. Called once per batch, when it is pulled.
        window: batches whose ids are known ahead, at least `depth` and 1.
        depth: batches whose rows are admitted ahead, as far as they fit; 0: none.

    A batch that was admitted ahead keeps its rows until the next one is asked for, however many forwards it is cut into
    (unless a forward needs the room), and its forward looks them up like any other. Leaving the loop, by `break` or an
    exception, ends what runs ahead.

    Batches are pulled up to window + 1 steps before they are handed out (the newest's ids are still being sorted out).
    So a loader may not refill the tensors that it has handed over; and a data set that draws from torch's global
    generator in this thread draws earlier than it would, between other draws of the training: give it a generator of
    its own (or worker processes) where the run has to be that without Lookahead, digit for digit.

    Attributes that this class lacks (`dataset`, `sampler`, …) are the loader's.

    Raises:
        ValueError: a number is not allowed, or the model has no cached table; while iterating: what `ids` gave.
        RuntimeError: while iterating: another Lookahead has begun to look ahead for the same tables.
        What the loader or `ids` raises, and a bad id, after the batches before it (at once where ranks share tables).
        What a store raises, as a batch is asked for.
    """

    def __init__(
        self,
        loader: Iterable,
        model: nn.Module,
        ids: Callable[[Any], Any] | None = None,
        window: int = 64,
        depth: int = 1,
    ) -> None:
        for name, number, least in (("window", window, 1), ("depth", depth, 0)):
            if not isinstance(number, Integral) or isinstance(number, bool) or number < least:
                raise ValueError(f"{name}={number!r} is not allowed: a number of batches, at least {least}")
        if depth > window:
            raise ValueError(f"depth={depth} is not allowed: at most window={window}, whose ids are known")
        if _note_collection not in gc.callbacks:
            gc.callbacks.append(_note_collection)
        self.loader = loader
        self.window, self.depth = int(window), int(depth)
        self._ids = ids or (lambda batch: batch)
        self._modules = {name: module for name, module in model.named_modules() if isinstance(module, _CachedBags)}
        if not self._modules:
            raise ValueError(
                f"model is a {type(model).__name__} without a cached table: give a bag, or a model with one"
            )

        self._is_shared = any(module._placement.world_size > 1 for module in self._modules.values())

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if "loader" not in self.__dict__:  # while it is copied
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        who = object()
        failure = None  # raised after the batches before it, as without Lookahead
        pulled: deque[Any] = deque()
        waiting: deque[dict[str, Future]] = deque()  # of the newest pulled
        with contextlib.ExitStack() as stack:
            distinct = ThreadPoolExecutor(max_workers=1, thread_name_prefix="freqcache-ids")
            stack.callback(_shut_down, distinct)
            for module in self._modules.values():
                module._look_ahead(who)
                stack.callback(_end, module, who)
            more = True
            while True:
                while more and len(pulled) <= self.window + 1:  # the one to hand out, the window, and the newest
                    try:
                        batch = next(batches)
                        waiting.append(self._wanted(batch, distinct))
                        pulled.append(batch)
                    except StopIteration:
                        more = False
                    except Exception as error:
                        if self._is_shared:  # the other ranks go on exchanging, and may not be answered out of turn
                            raise
                        more, failure = False, error
                # The newest's ids stay with the thread, unless they are needed now.
                needed = 0 if not more or len(pulled) <= self.depth + 1 else 1
                while len(waiting) > needed:
                    try:
                        self._announce(who, waiting[0])
                    except (ValueError, TypeError) as error:  # a bad id
                        more, failure = False, error
                        while waiting:
                            waiting.popleft()
                            pulled.pop()
                        break
                    waiting.popleft()
                if not pulled:
                    break
                batch = pulled.popleft()
                for module in self._modules.values():
                    module._hand_out(who, self.depth)
                yield batch
                del batch
            if failure is not None:
                try:
                    raise failure
                finally:
                    failure = None  # its traceback holds this frame

    def _wanted(self, batch: Any, distinct: ThreadPoolExecutor) -> dict[str, Future]:
        """The distinct ids of each module's part of a batch, as they are found."""
        inputs = self._ids(batch)
        if not isinstance(inputs, Mapping):
            if len(self._modules) != 1:
                raise ValueError(
                    f"ids(batch) gave a {type(inputs).__name__}, and the model has {len(self._modules)} table modules: "
                    f"give a dict with some of {list(self._modules)}"
                )
            inputs = {next(iter(self._modules)): inputs}
        for name in inputs:
            if name not in self._modules:
                raise ValueError(f"ids(batch) names {name!r}; the table modules are {list(self._modules)}")
        found = {}
        for name, module in self._modules.items():  # in this order on every rank
            arguments = inputs.get(name, ())
            if not isinstance(arguments, (torch.Tensor, tuple, list)):
                raise TypeError(
                    f"ids(batch) gave a {type(arguments).__name__} for {name or type(module).__name__!r}: give what "
                    f"its forward takes, a tensor or a tuple of them"
                )
            arguments = (arguments,) if isinstance(arguments, torch.Tensor) else tuple(arguments)[:2]  # without weights
            found[name] = module._wanted_ids(arguments, distinct)
        return found

    def _announce(self, who: object, found: dict[str, Future]) -> None:
        for name, wanted in found.items():
            self._modules[name]._announce(who, wanted)
