"""Comparisons of cached weights on a device whose results arrive late: nothing waits for them but what must."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from lightning_mics.sharding.weight_cache import WeightCache
from lightning_mics.techniques.parameter_cache import ParameterCache


class Event:
    """An event of a device that finishes nothing before it is told to, or waited for."""

    done: ClassVar[bool]
    waits: ClassVar[int]

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return Event.done

    def synchronize(self) -> None:
        Event.waits += not Event.done
        Event.done = True


class Compared(ParameterCache):
    """A cache whose comparisons have the given results, one per window."""

    def __init__(self, *results: bool | None) -> None:
        super().__init__(tuple)
        self._results = iter(results)

    def take_differs(self) -> Tensor | None:
        result = next(self._results)
        return None if result is None else torch.tensor(result)


@pytest.fixture(autouse=True)
def events() -> Iterator[None]:
    Event.done, Event.waits = False, 0
    with patch.object(torch.cpu, "Event", Event):
        yield


def windows(cache: WeightCache, count: int) -> None:
    for _ in range(count):
        cache.check_unchanged()
        cache.follow_step()


def test_windows_do_not_wait_and_a_late_result_names_its_step():
    cache = WeightCache([Compared(False, None, True, False, False), Compared(None, False, False, False, False)])
    windows(cache, 4)
    assert Event.waits == 0
    Event.done = True
    with pytest.raises(RuntimeError, match=r"while they were cached, before optimizer step 3 \(counted since"):
        cache.check_unchanged()
    assert Event.waits == 0


def test_results_that_arrive_in_time_are_an_error_at_once():
    Event.done = True
    with pytest.raises(RuntimeError, match="before optimizer step 1 "):
        windows(WeightCache([Compared(True)]), 1)


def test_before_saving_and_at_the_end_every_result_is_waited_for():
    cache = WeightCache([Compared(False, True)])
    windows(cache, 2)
    with pytest.raises(RuntimeError, match="before optimizer step 2 "):
        cache.check_arrived(wait=True)
    assert Event.waits == 1
    cache.check_arrived(wait=True)  # it was told once


def test_the_end_of_an_evaluation_waits():
    cache = WeightCache([Compared(True)])
    cache.follow_step()
    with pytest.raises(RuntimeError, match="in an evaluation after optimizer step 1 "), cache.cached_weights():
        pass


def test_a_window_that_is_abandoned_is_not_compared():
    cache: Any = WeightCache([Compared(True, False)])
    cache.forget_comparisons()
    cache.check_unchanged()
    cache.check_arrived(wait=True)
