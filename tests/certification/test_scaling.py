"""Each kind of group of a job exists on the few ranks that certify it."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_mics.certification.scaling import scaled_jobs


def _kinds(topology: Any) -> tuple[bool, ...]:
    """Whether there are replicas, several replicas on a node, rails, groups on a node, and more than two replicas."""
    local = topology.local_ranks_per_partition_group
    return topology.replicas > 1, local < topology.ranks_per_node, topology.spans_nodes, local > 1


@pytest.mark.parametrize(
    ("shape", "size", "scaled"),
    [
        ((64, 8), 1, (3, 2, 1)),  # nodes, ranks per node, ranks of a partition group
        ((64, 8), 4, (2, 4, 2)),
        ((64, 8), 8, (3, 2, 2)),
        ((2, 8), 8, (2, 2, 2)),
        ((64, 8), 16, (4, 2, 4)),
        ((64, 8), 512, (2, 2, 4)),
        ((4, 1), 2, (4, 1, 2)),
        ((1, 8), 8, (1, 2, 2)),
    ],
)
def test_kinds_of_groups_are_those_of_the_job(shape: Any, size: int, scaled: Any) -> None:
    job, control = scaled_jobs({"partition_size": size}, job_shape=shape, shape=None)
    topology = job.topology
    assert (topology.nodes, topology.ranks_per_node, topology.partition_size) == scaled
    assert topology.world_size % control.topology.world_size == 0  # or their windows would not be the same
    from lightning_mics.topology import Topology

    of_job = Topology(world_size=shape[0] * shape[1], ranks_per_node=shape[1], partition_size=size)
    assert _kinds(topology) == _kinds(of_job)


def test_options_are_those_of_the_job_but_for_sizes_and_coarse_dtypes() -> None:
    options = {
        "partition_size": 16,
        "hierarchical": True,
        "cache_parameters": 0.25,
        "accumulate_gradients": "node",
        "inter_node_prefetch": 1,
        "inter_node_reduce_dtype": "bfloat16",
        "allow_unused": True,
    }
    job, _ = scaled_jobs(options, job_shape=(64, 8), shape=(2, 2))
    expected = {**options, "partition_size": 4, "ranks_per_node": 2, "cache_parameters": 0.5}
    assert job.options == {**expected, "inter_node_reduce_dtype": None}
    assert job.lifted == {"inter_node_reduce_dtype": "bfloat16"}
    assert "inter_node_reduce_dtype" not in str(job)


def test_auto_is_certified_over_nodes_and_inside_them() -> None:
    across, inside = scaled_jobs({}, job_shape=None, shape=None)
    assert (across.topology.partition_size, inside.topology.partition_size) == (4, 2)
    assert across.options["cache_parameters"] == "node"
    assert inside.options["cache_parameters"] == "rank"


def test_a_job_over_nodes_does_not_fit_one_node() -> None:
    with pytest.raises(ValueError, match=r"shape=\(1, 4\) has one node, and partition groups of the job span several"):
        scaled_jobs({"partition_size": 16}, job_shape=(64, 8), shape=(1, 4))


def test_a_partition_size_that_does_not_fit_the_job_is_rejected() -> None:
    with pytest.raises(ValueError, match="partition_size=12"):
        scaled_jobs({"partition_size": 12}, job_shape=(64, 8), shape=None)
