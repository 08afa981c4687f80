"""Agreement of all ranks on the result or the error of an action that one of them or each of them runs.

Otherwise a rank whose disk is full raises, and the others wait for it until a timeout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from lightning_mics.collectives.control_plane import control_plane

_Result = TypeVar("_Result")


def on_rank_0(action: Callable[[], _Result], *, group: dist.ProcessGroup | None = None) -> _Result:
    """Run ``action`` on rank 0; every rank calls this, and returns the result or raises the error.

    Args:
        action: Function to run, whose result must pickle.
        group: Process group of all ranks; None is the control plane's.

    Raises:
        OSError: On all ranks, if the action raises it.
        RuntimeError: On the other ranks, for any other error that is not marked by ``raised_by_all_ranks = True``.
    """
    outcome: list[Any] = [_outcome_of(action) if dist.get_rank() == 0 else None]
    error = outcome[0].error if outcome[0] else None
    dist.broadcast_object_list(outcome, src=0, group=group or control_plane().group)
    result: _Result = _results(outcome, own_error=error)[0]
    return result


def on_all_ranks(action: Callable[[], _Result], *, group: dist.ProcessGroup | None = None) -> list[_Result]:
    """Run ``action`` on every rank; every rank returns all results, or raises if one of the actions fails.

    Args:
        action: Function to run, whose result must pickle.
        group: Process group of all ranks; None is the control plane's.

    Returns:
        The results in the order of ranks.

    Raises:
        OSError: On all ranks, if one of the actions raises it.
        RuntimeError: On the other ranks, for any other error that is not marked by ``raised_by_all_ranks = True``.
    """
    own, outcomes = _outcome_of(action), [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, own, group=group or control_plane().group)
    return _results(outcomes, own_error=own.error)


@dataclass(frozen=True)
class _Outcome:
    value: Any = None
    error: Exception | None = None

    def __reduce__(self) -> tuple[Any, ...]:  # other ranks get an error that pickles
        raised_by_all = isinstance(self.error, OSError) or getattr(self.error, "raised_by_all_ranks", False)
        error = (
            self.error
            if self.error is None or raised_by_all
            else RuntimeError(f"on rank {dist.get_rank()}: {self.error!r}")
        )
        return _Outcome, (self.value, error)


def _outcome_of(action: Callable[[], Any]) -> _Outcome:
    try:
        return _Outcome(value=action())
    except Exception as error:
        return _Outcome(error=error)


def _results(outcomes: list[Any], *, own_error: Exception | None) -> list[Any]:
    error = own_error or next((outcome.error for outcome in outcomes if outcome.error is not None), None)
    if error is not None:
        raise error
    return [outcome.value for outcome in outcomes]
