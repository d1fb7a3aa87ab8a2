"""PrefetchingLoader: a data loader that tells the cache the next batch while the current one is handed out."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ..embedding import _CachedBags
from .op_hook import FreqCacheOpHook

__all__ = ["PrefetchingLoader"]


class PrefetchingLoader:
    """Iterates over `loader` one batch ahead, and announces each batch's ids before the one before it is handed out.

    The rows are admitted in the training thread, after the current batch's lookup: its rows are held by then, so that
    the next batch's cannot push them out. Order and content of the batches are the loader's. Attributes that this class
    lacks (`dataset`, `sampler`, …) are the loader's.

    Args:
        loader: any iterable of batches, the same number on all ranks.
        modules: {name: cached module} that may be announced to.
        ids: fn(batch) -> what the forward of the one module takes (a tensor or a tuple of them), or {name: that}.
        hook: the one that fires after each lookup.
    """

    def __init__(
        self,
        loader: Any,
        modules: Mapping[str, _CachedBags],
        ids: Callable[[Any], Any],
        hook: FreqCacheOpHook,
    ) -> None:
        self.loader = loader
        self._modules = dict(modules)
        self._ids = ids
        self._hook = hook
        for module in self._modules.values():
            module._cache.prefetch_gives_way = True  # a hint must not make a lookup fail

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if "loader" not in self.__dict__:  # while it is copied
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        try:
            batch = next(batches)
        except StopIteration:
            return
        for following in batches:
            self._announce(following)
            yield batch
            batch = following
        yield batch

    def _announce(self, batch: Any) -> None:
        wanted = self._ids(batch)
        if not isinstance(wanted, Mapping):
            if len(self._modules) != 1:
                raise ValueError(
                    f"ids(batch) gave a {type(wanted).__name__}, and the model has {len(self._modules)} table modules: "
                    f"give a dict with some of {list(self._modules)}"
                )
            wanted = {next(iter(self._modules)): wanted}
        for name, arguments in wanted.items():
            if name not in self._modules:
                raise ValueError(f"ids(batch) names {name!r}; the table modules are {list(self._modules)}")
            arguments = (arguments,) if isinstance(arguments, torch.Tensor) else tuple(arguments)[:2]  # without weights
            module = self._modules[name]
            self._hook.announce(
                module._cached_weight, lambda module=module, arguments=arguments: module.prefetch(*arguments)
            )
