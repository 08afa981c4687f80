"""What one rank or each does, and all ranks learn: its result, or its error.

Without it a rank whose disk is full raises, and the others wait for it until a timeout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

_Result = TypeVar("_Result")


def on_rank_0(action: Callable[[], _Result], *, group: dist.ProcessGroup | None = None) -> _Result:
    """Run ``action`` on rank 0; all ranks get what it returns, or raise if it fails.

    Args:
        action: What to do; the result must pickle.
        group: Of all ranks; None is the default group.
    """
    outcome: list[Any] = [_outcome_of(action) if dist.get_rank() == 0 else None]
    error = outcome[0].error if outcome[0] else None
    dist.broadcast_object_list(outcome, src=0, group=group)
    result: _Result = _results(outcome, own_error=error)[0]
    return result


def on_all_ranks(action: Callable[[], _Result], *, group: dist.ProcessGroup | None = None) -> list[_Result]:
    """Run ``action`` on every rank; all get what each returns, or raise if one fails; for the arguments see above."""
    own, outcomes = _outcome_of(action), [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, own, group=group)
    return _results(outcomes, own_error=own.error)


@dataclass(frozen=True)
class _Outcome:
    value: Any = None
    error: Exception | None = None

    def __reduce__(self) -> tuple[Any, ...]:  # what other ranks get: an error that pickles
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
