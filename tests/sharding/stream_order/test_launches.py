"""How many operations this package adds to those of FSDP2."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tests.support.stream_order.jobs import OPTIONS, simulated_job

CASES = [name for name, (_, options) in OPTIONS.items() if options.inter_node_reduce_dtype is None]
OWNERS = ("package", "fsdp")  # FSDP2's functions cast for this package too


def launches(options: str, *, further: int) -> int:
    """Operations that this package launches in an accumulation window."""
    with simulated_job(options, "32-true", further_parameters=further) as job:
        job.window(micro_steps=2)
        job.simulation.launches.clear()
        job.window()
        return sum(count for (owner, _), count in job.simulation.launches.items() if owner == "package")


@pytest.mark.parametrize("options", CASES)
def test_launches_do_not_grow_with_the_parameters_of_a_block(options: str) -> None:
    few = launches(options, further=0)
    assert few > 0
    assert launches(options, further=6) == few


def test_rank_caches_of_mixed_precision_are_compared_in_as_many_launches_for_any_number_of_parameters() -> None:
    compared = {further: comparisons(further) for further in (0, 6)}
    units = 4  # three blocks and the root
    assert compared[0] == compared[6]
    assert compared[0]["aten._to_copy"] == 0
    assert compared[0]["aten._foreach_copy_"] == 2 * units  # one casts, the other puts them side by side
    assert compared[0]["aten.ne"] == compared[0]["aten.any"] == units


def comparisons(further: int) -> Counter[str]:
    """Operations of a forward with cached parameters, by name, without those of the model itself."""
    with simulated_job("rank cache", "bf16-mixed", further_parameters=further) as job:
        job.micro_step()
        job.simulation.launches.clear()
        with torch.no_grad():
            job.loss()
        launched: Counter[str] = Counter()
        for (owner, name), count in job.simulation.launches.items():
            launched[name] += count * (owner in OWNERS)
        job.window()
        return launched
