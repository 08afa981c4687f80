"""The weight cache: the cached parameters of all parameter groups, when they are valid, dropped and compared.

[Note: When cached weights are dropped]

Parameters are cached by the all-gather that first needs them, and valid for as long as nothing could have changed the
weights. All ranks must come to the same decision, or their collectives would not match. So what drops a cache is an
event that every rank sees::

    event                                               dropped by                              what
    an accumulation window begins or ends               AccumulationWindow                      what trains
    `cached_weights()` begins or ends                   WeightCache                             what trains
    a forward begins outside of both                    AccumulationSchedule, a hook on root    what trains
    an optimizer of this model has stepped              OptimizerHooks                          what trains
    an in-place update that torch records               ParameterCache, by the weights' version the changed weight
    a window is abandoned, a checkpoint loaded          AccumulationWindow, Fabric              all
    `invalidate_cache()`                                the user                                all

Weights that require gradients may therefore change by any means between windows. Frozen ones are cached for the whole
job, so that they cross nodes once. Changes in raw memory are not recorded: those of a NumPy array, or by
``torch.distributed.checkpoint.load``. Against those, of frozen weights at any time and of others inside of a window,
every use in a forward compares this rank's part of the cache with its shard, without waiting for the device, and the
end of the window or of ``cached_weights()`` raises if one was outdated. Only ``invalidate_cache()`` makes such a change
legal there.

The end of a window does not wait for the device either: it begins to copy the result to the host, and raises for the
results that have arrived. On a GPU these are of earlier windows, so the error names the step. Before a checkpoint is
saved, and at the end of a fit and of an evaluation between windows, all results are waited for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_mics._torch.streams import HostCopy
from lightning_mics.techniques.parameter_cache import ParameterCache


class WeightCache:
    """The cached parameters of a model. See [Note: When cached weights are dropped].

    Args:
        caches: One cache per parameter group; empty where parameters are gathered at every use.
    """

    def __init__(self, caches: Sequence[ParameterCache] = ()) -> None:
        self._caches = tuple(caches)
        self._shared_by_forwards = False
        self._steps = 0  # of the optimizers of this model
        self._differ: deque[tuple[str, HostCopy]] = deque()  # results of comparisons, and where these were
        self._when_invalidated: list[Callable[[], None]] = []

    @property
    def enabled(self) -> bool:
        """Whether parameters are cached at all."""
        return bool(self._caches)

    @property
    def shared_by_forwards(self) -> bool:
        """Whether :meth:`cached_weights` is entered now, so that a forward may use what an earlier one has gathered."""
        return self._shared_by_forwards

    @contextmanager
    def cached_weights(self, *, wait: bool = True) -> Iterator[None]:
        """Share cached parameters between the forwards inside, whose weights do not change.

        Args:
            wait: Whether to wait for the results of comparisons at the end.

        Raises:
            RuntimeError: At the end, if weights did change in a way that torch does not record.
        """
        self.drop_trained()
        before, self._shared_by_forwards = self._shared_by_forwards, True
        try:
            yield
            self.check_unchanged(f"in an evaluation after optimizer step {self._steps}")
            self.check_arrived(wait=wait)
        finally:
            self._shared_by_forwards = before
            self.drop_trained()

    def drop_trained(self) -> None:
        """Drop the cached parameters that require gradients; every rank calls it. Frozen ones stay cached."""
        for cache in self._caches:
            cache.drop_trained()
        for action in self._when_invalidated:
            action()

    def invalidate(self) -> None:
        """Drop all cached parameters; every rank calls it. The next use gathers them again."""
        for cache in self._caches:
            cache.drop()
        for action in self._when_invalidated:
            action()

    def when_invalidated(self, action: Callable[[], None]) -> None:
        """Run ``action`` whenever cached parameters are dropped, or would be if there were any."""
        self._when_invalidated.append(action)

    def free(self) -> None:
        """Drop all cached parameters, and free their memory; every rank calls it."""
        for cache in self._caches:
            cache.free()

    def follow_step(self) -> None:
        """Drop what trains after an optimizer of this model has stepped."""
        self._steps += 1
        self.drop_trained()

    def check_unchanged(self, where: str | None = None) -> None:
        """Begin to check every comparison of a cache with its shard since the last call, and check what has arrived.

        Args:
            where: Place of these comparisons in the training, for the error; None is before the next optimizer step.

        Raises:
            RuntimeError: If a cache was used after the weights had changed, here or at an earlier call.
        """
        differ = [differs for cache in self._caches if (differs := cache.take_differs()) is not None]
        if differ:
            where = where or f"before optimizer step {self._steps + 1}"
            self._differ.append((where, HostCopy(torch.stack(differ).any())))
        self.check_arrived()

    def check_arrived(self, *, wait: bool = False) -> None:
        """Check the comparisons whose results have arrived on the host.

        Args:
            wait: Whether to wait for all of them.

        Raises:
            RuntimeError: If a cache was used after the weights had changed.
        """
        while self._differ and (wait or self._differ[0][1].has_arrived):
            where, differs = self._differ.popleft()
            if wait:
                differs.wait()
            if differs.values.numpy():
                self._differ.clear()
                raise RuntimeError(
                    "weights changed, in a way that torch does not record (in raw memory, as through NumPy or "
                    f"`torch.distributed.checkpoint.load`), while they were cached, {where} (counted since the model "
                    "was sharded); call `invalidate_cache()` after such a change, on all ranks, or make it between "
                    "optimizer steps, if the weights are not frozen"
                )

    def forget_comparisons(self) -> None:
        """Discard the comparisons since the last check, after results computed with the cache were discarded."""
        for cache in self._caches:
            cache.take_differs()

    def tensors(self) -> list[Tensor]:
        """Memory of cached parameters now, each [any]; node caches have theirs from one window to the next."""
        return [tensor for cache in self._caches for tensor in cache.tensors()]
