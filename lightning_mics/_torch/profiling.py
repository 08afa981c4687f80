"""Named ranges in profilers: private names of torch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch.autograd import profiler

_NOTHING: AbstractContextManager[None] = nullcontext()


def named_range(name: Callable[[], str]) -> AbstractContextManager[object]:
    """A range that profilers show for what runs inside, with ``emit_nvtx`` Nsight too; nothing if no profiler runs.

    Args:
        name: Returns the name of the range; not called if no profiler runs.
    """
    return profiler.record_function(name()) if profiler._is_profiler_enabled else _NOTHING
