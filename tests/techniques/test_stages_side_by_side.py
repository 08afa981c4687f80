"""Which stages wait for which: the streams of the two-stage collectives, as FSDP2 calls them on a device."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from lightning_mics._torch.streams import SideStream, current_stream, on_stream
from lightning_mics.techniques import parameter_cache
from lightning_mics.techniques.hierarchical import HierarchicalAllGather, HierarchicalReduceScatter
from lightning_mics.techniques.once_per_step import NodeCache, NodeReduceScatter
from lightning_mics.techniques.pending_gradients import PendingGradients

CPU = torch.device("cpu")
NODES, LOCAL_RANKS, SHARD = 2, 2, 3


class RecordedStream:
    """A stream that knows which operations are done when its next one begins."""

    def __init__(self, priority: int = 0) -> None:
        self.done: set[str] = set()

    def wait_stream(self, other: RecordedStream) -> None:
        self.done |= other.done

    def record_event(self) -> frozenset[str]:
        return frozenset(self.done)

    def wait_event(self, event: frozenset[str]) -> None:
        self.done |= event


class Enqueued(dist.Work):
    def __init__(self, stream: RecordedStream) -> None:
        super().__init__()
        self._event = stream.record_event()

    def wait(self, timeout=None) -> bool:
        current_stream(CPU).wait_event(self._event)
        return True


class Group:
    """A group of ranks in place of a :class:`CountedGroup`. An asynchronous call runs on a stream of its own."""

    def __init__(self, name: str, size: int, waited_for: dict[str, set[str]]) -> None:
        self.name, self.size, self.rank = name, size, 0
        self.unit = 0
        self._waited_for = waited_for
        self._own_stream = RecordedStream()

    def all_gather(self, output, shard, *, technique, async_op=False):
        return self._enqueue(async_op)

    def reduce_scatter(self, output, source, *, op, technique, wire_dtype=None, async_op=False):
        return self._enqueue(async_op)

    def _enqueue(self, async_op: bool) -> dist.Work | None:
        self.unit += 1
        stream = current_stream(CPU)
        if async_op:
            self._own_stream.wait_stream(stream)
            stream = self._own_stream
        enqueue(f"{self.name} {self.unit}", self._waited_for, stream)
        return Enqueued(stream) if async_op else None


def enqueue(operation: str, waited_for: dict[str, set[str]], stream: RecordedStream | None = None) -> None:
    stream = stream or current_stream(CPU)
    waited_for[operation] = set(stream.done)
    stream.done.add(operation)


@pytest.fixture
def waited_for(monkeypatch) -> dict[str, set[str]]:
    """For each operation the ones that it waits for, on recorded streams in place of a CPU's."""
    current = [RecordedStream()]

    @contextmanager
    def inside(stream):
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cpu, "Stream", RecordedStream)
    monkeypatch.setattr(torch.cpu, "current_stream", lambda device=None: current[-1])
    monkeypatch.setattr(torch.cpu, "stream", inside)
    monkeypatch.setattr(parameter_cache, "weights_version", lambda module: (0,))
    monkeypatch.setattr(parameter_cache, "trainable", lambda module: [True])
    return {}


def groups(waited_for, local_ranks: int = LOCAL_RANKS) -> dict:
    node = Group("node", local_ranks, waited_for) if local_ranks > 1 else None
    return {"rail": Group("rail", NODES, waited_for), "node": node}


def partition(local_ranks: int = LOCAL_RANKS) -> Group:
    group = Group("partition", NODES, {})
    group.size = lambda: NODES * local_ranks
    return group


def call(gather, *, local_ranks: int = LOCAL_RANKS, async_op: bool = False, fill=lambda: None) -> dist.Work | None:
    output = gather.allocate((NODES * local_ranks * SHARD,), dtype=torch.float32, device=CPU)
    fill()
    return gather(output, output[:SHARD], partition(local_ranks), async_op=async_op)


@pytest.mark.parametrize("cached", [False, True], ids=["gathered at each use", "cached on nodes"])
def test_the_rail_stage_of_a_unit_runs_beside_the_node_stage_of_the_unit_before(cached, waited_for):
    stages, shared = groups(waited_for), SideStream()
    copy_in, gathers = RecordedStream(), RecordedStream()
    for unit in (1, 2):
        gather = (
            NodeCache(**stages, module=None, first_stage=shared)
            if cached
            else (HierarchicalAllGather(**stages, first_stage=shared))
        )
        with on_stream(copy_in, CPU):
            output = gather.allocate((NODES * LOCAL_RANKS * SHARD,), dtype=torch.float32, device=CPU)
            enqueue(f"fill {unit}", waited_for)
        gathers.wait_stream(copy_in)
        with on_stream(gathers, CPU):
            assert gather(output, output[:SHARD], partition()) is None
    assert waited_for["rail 2"] == {"fill 1", "fill 2", "rail 1"}
    assert waited_for["node 2"] == {"fill 1", "fill 2", "rail 1", "rail 2", "node 1"}


@pytest.mark.parametrize("cached", [False, True], ids=["gathered at each use", "cached on nodes"])
@pytest.mark.parametrize("local_ranks", [1, LOCAL_RANKS])
def test_arithmetic_waits_for_no_stage_of_an_asynchronous_gather_before_its_work(cached, local_ranks, waited_for):
    stages = groups(waited_for, local_ranks)
    gather = NodeCache(**stages, module=None) if cached else HierarchicalAllGather(**stages)
    here = current_stream(CPU)
    work = call(gather, local_ranks=local_ranks, async_op=True, fill=lambda: enqueue("fill", waited_for))
    enqueue("arithmetic", waited_for)
    assert waited_for["arithmetic"] == {"fill"}
    assert waited_for["rail 1"] == {"fill"}
    work.wait()
    assert {"rail 1"} | ({"node 1"} if local_ranks > 1 else set()) < here.done


def test_a_later_use_of_cached_parameters_waits_for_their_gather(waited_for):
    cache, elsewhere = NodeCache(**groups(waited_for), module=None), RecordedStream()
    call(cache, async_op=True)
    with on_stream(elsewhere, CPU):
        call(cache)
    assert list(waited_for) == ["rail 1", "node 1", "node 2"]
    assert "rail 1" in waited_for["node 2"]


def reduce_two_units(dtype: torch.dtype, waited_for, reduce_scatter) -> None:
    """Two units of a backward with two input buffers, as FSDP2 does it."""
    stages, shared, reductions = groups(waited_for), SideStream(), RecordedStream()
    for unit in (1, 2):
        reduce = reduce_scatter(**stages, first_stage=shared)
        source = reduce.allocate((NODES * LOCAL_RANKS * SHARD,), dtype=dtype, device=CPU)
        enqueue(f"fill {unit}", waited_for)
        reductions.wait_stream(current_stream(CPU))
        with on_stream(reductions, CPU):
            output = reduce.allocate((SHARD,), dtype=dtype, device=CPU)
            enqueue(f"divide {unit}", waited_for)
            reduce(output, source.zero_(), partition(), dist.ReduceOp.SUM)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_node_stage_of_a_reduction_runs_beside_the_rail_stage_of_the_unit_before(dtype, waited_for):
    reduce_two_units(dtype, waited_for, HierarchicalReduceScatter)
    assert waited_for["node 2"] == {"fill 1", "fill 2", "node 1"}
    assert {"fill 2", "node 2", "rail 1"} < waited_for["rail 2"]


def test_gradients_that_fsdp2_divides_first_are_reduced_after_it(waited_for):
    reduce_two_units(torch.float16, waited_for, HierarchicalReduceScatter)
    assert {"divide 1", "divide 2"} < waited_for["node 2"]


def test_sums_on_nodes_are_added_up_after_the_node_stage(waited_for):
    class Pending(PendingGradients):
        def accumulate(self, part):
            enqueue("add up", waited_for)

    def reduce_scatter(**kwargs):
        pending = Pending(list)
        pending.at_boundary = False
        return NodeReduceScatter(**kwargs, pending_gradients=pending)

    reduce_two_units(torch.float32, waited_for, reduce_scatter)
    assert "node 2" in waited_for["add up"]
