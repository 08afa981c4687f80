"""What an average of the weights takes: its shards and buffers, in rehearsals and by the closed form of plans."""

from __future__ import annotations

import pytest

from lightning_mics.planning.rehearsal.rehearse import PARAMETERS
from tests.support.jobs import JOBS, measured, rehearsed

pytestmark = pytest.mark.rehearsal


@pytest.mark.parametrize("job", ["a node a group", "once per step everywhere"])
def test_the_peak_grows_by_the_shards_of_each_average(job: str) -> None:
    without, one, two = (rehearsed("bert", JOBS[job], averages=averages) for averages in (0, 1, 2))
    shards = without.states[PARAMETERS]
    assert one.states == {**without.states, PARAMETERS: 2 * shards}
    assert one.peak_bytes - without.peak_bytes == two.peak_bytes - one.peak_bytes == shards
    assert one.sent() == without.sent()


def test_plans_count_each_average_as_the_weights() -> None:
    sizes = [measured("bert", JOBS["a node a group"], averages=averages).size for averages in (0, 1, 2)]
    weights = sum(each.states_bytes for each in sizes[1:2]) - sizes[0].states_bytes
    assert weights == sizes[2].states_bytes - sizes[1].states_bytes > 0
    assert sizes[1].buffers_bytes == 2 * sizes[0].buffers_bytes
    assert sizes[1].gradients_bytes == sizes[0].gradients_bytes
