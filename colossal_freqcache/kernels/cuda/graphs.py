"""GraphedPlans: a batch's plan as one CUDA graph, for batches of a shape that comes again.

A plan is a dozen small kernels, and launching them takes the host longer than the device takes to run them. A graph is
launched at once. It writes into memory of its own, so there are several of each shape, and one is used again when
nobody refers to the plan that it made last. The work that was launched on that plan has to come before: on one stream
it does. Where another stream plans ahead, it waits for what had been launched at its turn before (DeviceAhead), so a
graph is used again there only if its plan was dead by then: `turn` is that moment.
"""

import gc
import sys
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from ...device_slots import DeviceSlots
from ..device import DevicePlan, Tables

__all__ = ["GraphedPlans"]

SEEN_BEFORE = 3  # a shape that has come so often is worth a graph
MOST_OF_A_SHAPE = 12
MOST_SHAPES = 4

_left_over: list[Any] = []  # what was collected while the user captured a graph


class _Graph:
    """One captured plan, over copies of its inputs."""

    def __init__(self, plan: Callable, values: torch.Tensor, offsets: torch.Tensor, tables: Tables, slots: Any) -> None:
        self._inputs = values.clone(), offsets.clone()
        self._use = torch.zeros(1, dtype=torch.int32, device=values.device)
        self._offsets: torch.Tensor | None = None
        self._refers_to = tables, slots  # whose memory the graph reads
        self._plan: Callable[[], DevicePlan | None] = lambda: None
        self.was_free = False  # at the last turn
        self._graph = torch.cuda.CUDAGraph()
        # What garbage collection would free meanwhile (another graph, pinned pages) may not be freed during a capture.
        collects = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._result = plan(*self._inputs, tables, slots, self._use)
        finally:
            if collects:
                gc.enable()

    def __del__(self) -> None:
        """A graph that is collected while another is captured lives on until that is over."""
        if hasattr(self, "_graph") and not sys.is_finalizing() and torch.cuda.is_current_stream_capturing():
            _left_over.append((self._graph, self._inputs, self._use, getattr(self, "_result", None)))

    @property
    def is_free(self) -> bool:
        """Whether nobody refers to the plan that it made last."""
        return self._plan() is None

    def replay(self, values: torch.Tensor, offsets: torch.Tensor, use: int) -> DevicePlan:
        self._inputs[0].copy_(values)
        if self._offsets is not offsets:  # (nobody changes them: they are the bag's own)
            self._inputs[1].copy_(offsets)
            self._offsets = offsets
        self._use.fill_(use)
        self._graph.replay()
        self.was_free = False
        plan = self._result.again()
        self._plan = weakref.ref(plan)
        return plan


class GraphedPlans:
    """The graphs of one kernel set, a few for each of a few shapes; the least recently used shape makes room."""

    def __init__(self, plan: Callable[..., DevicePlan]) -> None:
        self._make = plan
        self._seen: Counter = Counter()
        self._graphs: OrderedDict[tuple, list[_Graph]] = OrderedDict()

    def turn(self) -> None:
        """From here on, `plan(ahead=True)` uses the graphs that are free now."""
        for graphs in self._graphs.values():
            for graph in graphs:
                graph.was_free = graph.is_free

    def plan(
        self, values: torch.Tensor, offsets: torch.Tensor, tables: Tables, slots: DeviceSlots, use: int, ahead: bool
    ) -> DevicePlan | None:
        """The plan, or None where it has to be made kernel by kernel."""
        if not values.is_cuda or not values.numel() or torch.cuda.is_current_stream_capturing():
            return None
        _left_over.clear()
        key = (values.numel(), offsets.numel(), id(slots), tables.padding.data_ptr())
        if len(self._seen) > 1000:
            self._seen.clear()
        self._seen[key] += 1
        if self._seen[key] <= SEEN_BEFORE:
            return None
        graphs = self._graphs.setdefault(key, [])
        self._graphs.move_to_end(key)
        if len(self._graphs) > MOST_SHAPES:
            self._graphs.popitem(last=False)
        graph = next((graph for graph in graphs if (graph.was_free if ahead else graph.is_free)), None)
        if graph is None:
            if len(graphs) == MOST_OF_A_SHAPE:
                return None
            graph = _Graph(self._make, values, offsets, tables, slots)
            graphs.append(graph)
        return graph.replay(values, offsets, use)
