from __future__ import annotations

import pytest
import torch

from recipes.data.window_loader import WindowLoader


def loader(num_workers: int) -> WindowLoader:
    return WindowLoader(
        torch.arange(8), num_workers=num_workers, multiprocessing_context="fork" if num_workers else None
    )


@pytest.mark.parametrize(("before", "after"), [(0, 1), (1, 0), (1, 2)])
def test_a_position_of_another_number_of_workers_is_refused(before: int, after: int) -> None:
    stopped = loader(before)
    next(iter(stopped))
    with pytest.raises(ValueError, match=rf"data\.num_workers={after}, but the run to resume had {before},"):
        loader(after).load_state_dict(stopped.state_dict())


@pytest.mark.parametrize("workers", [0, 1])
def test_the_same_number_goes_on(workers: int) -> None:
    stopped, resumed = loader(workers), loader(workers)
    next(iter(stopped))
    resumed.load_state_dict(stopped.state_dict())
    assert torch.cat(list(resumed)).tolist() == list(range(1, 8))
