"""FreqCacheOpHook: what Colossal-AI's parameter hooks see of cached tables.

Events of one lookup, in order: pre_forward, post_forward, pre_backward, post_backward. Between the first two the rows
of a batch that was admitted ahead are taken over, others are admitted, and rows whose gradient was used are released
(post_backward comes before the gradient is accumulated, so nothing can be released there).
"""

from collections import Counter, deque

import torch
from colossalai.tensor.param_op_hook import ColoParamOpHook

from ..block import CachedWeight, cached_weight_of

__all__ = ["FreqCacheOpHook"]


class FreqCacheOpHook(ColoParamOpHook):
    """Counts the four events of cached tables and keeps their statistics.

    Use: `boosted_model.op_hooks.append(FreqCacheOpHook())` under HybridParallelPlugin; FreqCachePlugin has one.
    Parameters that are no cached table's are ignored.

    Attributes:
        events: Counter of "pre_forward", "post_forward", "pre_backward", "post_backward", over all cached tables.
        lookups: the last 1,024 lookups, dicts with "hits" and "misses" (occurrences of this rank's cache).
    """

    def __init__(self) -> None:
        self.events: Counter[str] = Counter()
        self.lookups: deque[dict[str, int]] = deque(maxlen=1024)
        self._before: dict[CachedWeight, tuple[int, int]] = {}

    def pre_forward(self, params: list[torch.Tensor]) -> None:
        """Notes what the cache has counted so far."""
        for weight in self._count("pre_forward", params):
            self._before[weight] = (weight.cache.stats.hits, weight.cache.stats.misses)

    def post_forward(self, params: list[torch.Tensor]) -> None:
        """Notes hits and misses."""
        for weight in self._count("post_forward", params):
            hits, misses = self._before.pop(weight, (0, 0))
            stats = weight.cache.stats
            self.lookups.append({"hits": stats.hits - hits, "misses": stats.misses - misses})

    def pre_backward(self, params: list[torch.Tensor]) -> None:
        """Counted."""
        self._count("pre_backward", params)

    def post_backward(self, params: list[torch.Tensor]) -> None:
        """Counted."""
        self._count("post_backward", params)

    def _count(self, event: str, params: list[torch.Tensor]) -> list[CachedWeight]:
        weights = [weight for weight in map(cached_weight_of, params) if weight is not None]
        self.events[event] += len(weights)
        return weights
