"""FreqCacheOpHook: what Colossal-AI's parameter hooks see of cached tables, and the next batch's rows.

Events of one lookup, in order: pre_forward, post_forward, pre_backward, post_backward. Rows whose gradient was used are
released by the lookup itself, after pre_forward (post_backward comes before the gradient is accumulated, so nothing can
be released there); a batch that was announced is admitted in post_forward, when the current one's rows are held by its
graph.
"""

import warnings
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import torch
from colossalai.tensor.param_op_hook import ColoParamOpHook

from ..block import CachedWeight, cached_weight_of
from ..cache import CacheTooSmallError

__all__ = ["FreqCacheOpHook"]


class FreqCacheOpHook(ColoParamOpHook):
    """Counts the four events of cached tables, keeps their statistics, and prefetches announced batches.

    Use: `boosted_model.op_hooks.append(FreqCacheOpHook())` under HybridParallelPlugin; FreqCachePlugin has one.
    Parameters that are no cached table's are ignored.

    Attributes:
        events: Counter of "pre_forward", "post_forward", "pre_backward", "post_backward", over all cached tables.
        lookups: the last 1,024 lookups, dicts with "hits" and "misses" (occurrences of this rank's cache).
        prefetches: batches that were admitted ahead.
    """

    def __init__(self) -> None:
        self.events: Counter[str] = Counter()
        self.lookups: deque[dict[str, int]] = deque(maxlen=1024)
        self.prefetches = 0
        self._before: dict[CachedWeight, tuple[int, int]] = {}
        self._announced: dict[CachedWeight, Callable[[], Any]] = {}
        self._too_small = False

    def pre_forward(self, params: list[torch.Tensor]) -> None:
        """Notes what the cache has counted so far."""
        for weight in self._count("pre_forward", params):
            self._before[weight] = (weight.cache.stats.hits, weight.cache.stats.misses)

    def post_forward(self, params: list[torch.Tensor]) -> None:
        """Notes hits and misses, and admits the batch that was announced."""
        for weight in self._count("post_forward", params):
            hits, misses = self._before.pop(weight, (0, 0))
            stats = weight.cache.stats
            self.lookups.append({"hits": stats.hits - hits, "misses": stats.misses - misses})
            prefetch = self._announced.pop(weight, None)
            if prefetch is not None and not self._too_small:
                self._prefetch(prefetch)

    def pre_backward(self, params: list[torch.Tensor]) -> None:
        """Counted."""
        self._count("pre_backward", params)

    def post_backward(self, params: list[torch.Tensor]) -> None:
        """Counted."""
        self._count("post_backward", params)

    def announce(self, weight: CachedWeight, prefetch: Callable[[], Any]) -> None:
        """After the next lookup of `weight`, prefetch() is called: it makes a later batch's rows resident."""
        self._announced[weight] = prefetch

    def _count(self, event: str, params: list[torch.Tensor]) -> list[CachedWeight]:
        weights = [weight for weight in map(cached_weight_of, params) if weight is not None]
        self.events[event] += len(weights)
        return weights

    def _prefetch(self, prefetch: Callable[[], Any]) -> None:
        try:
            prefetch()
            self.prefetches += 1
        except CacheTooSmallError as error:  # raised on all ranks alike: it depends on ids and maps alone
            self._too_small = True
            warnings.warn(
                f"the next batch's rows do not fit beside the current one's; none are prefetched from here on: {error}",
                stacklevel=2,
            )
