"""What the event simulation of a micro-step lets overlap, and what it does not."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest

from lightning_mics.cost.timeline import Link, Stage, UnitStages, micro_step_seconds

BLOCKS = 6


def stages(**seconds: float) -> tuple[Stage, ...]:
    links: dict[str, Link] = {
        "rail": "between", "flat": "between", "node": "inside", "fetch": "from host", "store": "to host"
    }  # fmt: skip
    return tuple(Stage(links[name], of_one) for name, of_one in seconds.items())


def seconds(
    unit: UnitStages,
    *,
    root: UnitStages | None = None,
    forward: float = 0.0,
    backward: float = 0.0,
    ahead: int = 0,
    host: float | None = None,
) -> float:
    """Seconds of a micro-step of equal blocks, whose arithmetic takes ``forward`` and ``backward`` per block."""
    shares = [0.0, *[1 / BLOCKS] * BLOCKS]
    units = [root or UnitStages(), *[unit] * BLOCKS]
    (found,) = micro_step_seconds(
        units,
        shares,
        forward=np.array([forward * BLOCKS]),
        backward=np.array([backward * BLOCKS]),
        units_ahead=ahead,
        host=None if host is None else np.array([host]),
    )
    return float(found)


def test_without_collectives_it_is_arithmetic() -> None:
    assert seconds(UnitStages(), forward=1, backward=2) == pytest.approx(3 * BLOCKS)


@pytest.mark.parametrize("second_hop", [(), stages(flat=4)], ids=["one replica", "replicas"])
def test_collectives_on_the_same_links_add_up_without_arithmetic(second_hop: Sequence[Stage]) -> None:
    unit = UnitStages(
        forward=stages(flat=1), backward=stages(flat=1), reduction=stages(flat=2), second_hop=tuple(second_hop)
    )
    root = UnitStages(forward=stages(flat=3), reduction=stages(flat=5))
    hop = 4 * BLOCKS if second_hop else 0
    assert seconds(unit, root=root) == pytest.approx(4 * BLOCKS + 8 + hop)


def test_short_collectives_hide_behind_arithmetic_but_for_the_first_gather_and_the_last_reduction() -> None:
    unit = UnitStages(forward=stages(flat=0.25), backward=stages(flat=0.25), reduction=stages(flat=0.5))
    root = UnitStages(reduction=stages(flat=0.125))
    # the gather before the first backward has no arithmetic of the head to hide behind
    assert seconds(unit, root=root, forward=1, backward=2) == pytest.approx(3 * BLOCKS + 0.25 + 0.25 + 0.5 + 0.125)


def test_arithmetic_waits_for_the_buffer_of_the_reduction_but_one_before() -> None:
    unit = UnitStages(reduction=stages(flat=3))
    # all reductions follow each other, and the first begins after the backward of the last block
    assert seconds(unit, forward=1, backward=1) == pytest.approx(BLOCKS + 1 + 3 * BLOCKS)
    # two gathers come before the first reduction, one of them beside arithmetic; each other before a further one
    both = UnitStages(backward=stages(flat=1), reduction=stages(flat=3))
    assert seconds(both, forward=1, backward=1) == pytest.approx(BLOCKS + 2 + 3 * BLOCKS + (BLOCKS - 2))


def test_the_stages_of_two_units_run_side_by_side_in_forward() -> None:
    """The rail stages take the network one after the other; the node stage of the last unit follows."""
    assert seconds(UnitStages(forward=stages(rail=2, node=1))) == pytest.approx(2 * BLOCKS + 1)
    assert seconds(UnitStages(forward=stages(rail=1, node=2))) == pytest.approx(1 + 2 * BLOCKS)


def test_prefetched_rail_stages_run_beside_node_stages_and_reductions_in_backward() -> None:
    unit = UnitStages(backward=stages(rail=2, node=1), reduction=stages(node=1, rail=2))
    alone = seconds(unit)
    one, two = (seconds(unit, ahead=ahead) for ahead in (1, 2))
    assert alone == pytest.approx(6 * BLOCKS)  # node and rail of the reduction wait for the gather's stages
    assert 4 * BLOCKS < min(one, two) <= max(one, two) < 5 * BLOCKS  # the network is busy with 4 seconds per unit


@pytest.mark.parametrize("ahead", [0, 1, 3, 100])
@pytest.mark.parametrize("seed", range(4))
def test_a_micro_step_lies_between_the_busiest_and_the_sum(seed: int, ahead: int) -> None:
    chance = np.random.default_rng(seed)

    def random_unit() -> UnitStages:
        return UnitStages(
            forward=stages(rail=chance.random(), node=chance.random()),
            backward=stages(node=chance.random()) if chance.random() < 0.5 else stages(flat=chance.random()),
            reduction=stages(node=chance.random(), rail=chance.random()),
            second_hop=stages(flat=chance.random()),
        )

    units = [random_unit() for _ in range(8)]
    shares = chance.dirichlet(np.ones(8)).tolist()
    compute = np.array([0.0, 1.0, 3.0, 10.0, 30.0, 100.0])
    host = compute / 40
    run = partial(micro_step_seconds, units, shares, units_ahead=ahead)
    found = run(forward=compute / 3, backward=2 * compute / 3)
    with_host = run(forward=compute / 3, backward=2 * compute / 3, host=host)
    assert (with_host >= found - 1e-9).all()
    busy = {"inside": 0.0, "between": 0.0}
    for unit in units:
        for stage in (*unit.forward, *unit.backward, *unit.reduction, *unit.second_hop):
            busy[stage.link] += stage.seconds
    if units[0].backward:  # the root stays unsharded
        for stage in units[0].backward:
            busy[stage.link] -= stage.seconds
    assert (found >= np.maximum(compute, max(busy.values())) - 1e-9).all()
    assert (found <= compute + sum(busy.values()) + 1e-9).all()
    for one in range(len(compute)):  # one by one, in floats
        only = slice(one, one + 1)
        alone = {"forward": compute[only] / 3, "backward": 2 * compute[only] / 3}
        assert run(**alone)[0] == pytest.approx(found[one])
        assert run(**alone, host=host[only])[0] == pytest.approx(with_host[one])


def test_inputs_on_the_host_travel_beside_arithmetic_as_long_as_they_are_faster() -> None:
    arithmetic = {"forward": 1.0, "backward": 3.0}
    assert seconds(UnitStages(), **arithmetic, host=0.0) == pytest.approx(4 * BLOCKS)
    # only the last input is not fetched ahead: its block waits for it
    assert seconds(UnitStages(), **arithmetic, host=0.75) == pytest.approx(4 * BLOCKS + 0.75)
    # links to the host slower than the backward: each fetch takes its time, after the last input has arrived
    assert seconds(UnitStages(), **arithmetic, host=5.0) == pytest.approx(2 * 5 * BLOCKS + 3)
    assert seconds(UnitStages(), host=2.0) == pytest.approx(2 * 2 * BLOCKS)


def test_slices_on_the_host_are_fetched_one_unit_ahead() -> None:
    unit = UnitStages(forward=stages(fetch=0.5, node=0.25), backward=stages(fetch=0.5, node=0.25))
    arithmetic = {"forward": 1.0, "backward": 2.0}
    # only the first slice of the forward and of the backward is waited for
    assert seconds(unit, **arithmetic) == pytest.approx(3 * BLOCKS + 0.25 + 0.75, abs=0.5)
    slow = UnitStages(forward=stages(fetch=4, node=0.25), backward=stages(fetch=4, node=0.25))
    found = seconds(slow, **arithmetic)
    assert 2 * 4 * BLOCKS <= found <= 2 * 4 * BLOCKS + 2 * (0.25 + 2) + 1e-9  # the link is always busy


def test_sums_on_the_host_travel_both_ways_beside_arithmetic() -> None:
    reduction = stages(node=0.25)
    plain = seconds(UnitStages(reduction=reduction), forward=1.0, backward=2.0)
    both = UnitStages(reduction=reduction, sum_before=stages(fetch=0.5), sum_after=stages(store=0.5))
    # the first sum is not fetched ahead, and the last goes back after the backward
    assert plain <= seconds(both, forward=1.0, backward=2.0) <= plain + 0.5 + 0.5 + 1e-9
    slow = UnitStages(reduction=reduction, sum_before=stages(fetch=5), sum_after=stages(store=5))
    assert seconds(slow, forward=1.0, backward=2.0) == pytest.approx(BLOCKS + 2 + 5 * (BLOCKS + 1), abs=0.5)


def test_everything_on_the_host_shares_its_links() -> None:
    """In backward inputs, slices and sums come from the host: three seconds for each block."""
    unit = UnitStages(
        backward=stages(fetch=1, node=0),
        reduction=stages(node=0),
        sum_before=stages(fetch=1),
        sum_after=stages(store=1),
    )
    assert seconds(unit, host=1.0) >= 3 * BLOCKS
    apart = (
        seconds(UnitStages(backward=stages(fetch=1, node=0))),
        seconds(UnitStages(), host=1.0),
        seconds(UnitStages(reduction=stages(node=0), sum_before=stages(fetch=1), sum_after=stages(store=1))),
    )
    assert max(apart) < 2.5 * BLOCKS


def test_a_cache_that_is_filled_goes_to_the_host_beside_the_gathers() -> None:
    rail, filled = stages(rail=1, node=0.25), stages(store=0.75)
    plain = seconds(UnitStages(forward=rail))
    assert seconds(UnitStages(forward=rail, filled=filled)) == pytest.approx(plain + 0.75 - 0.25, abs=0.3)
    assert seconds(UnitStages(forward=rail, filled=stages(store=3))) == pytest.approx(1.25 + 3 * BLOCKS, abs=0.3)
