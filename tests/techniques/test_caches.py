"""How cached parameters are compared with their shards, and the memory of caches and sums between windows."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from lightning_mics._torch.fsdp import fsdp_modules, partial_sums
from lightning_mics.techniques.parameter_cache import _bits_differ
from tests.support.stream_order.jobs import Job, simulated_job

ON_NODES = ["node cache and sums", "one rank a node, node cache and sums", "node cache and sums, wire dtype"]


def held(job: Job) -> list[torch.Tensor]:
    """Memory of caches and sums now, each [any]."""
    return [*job.schedule.cache.tensors(), *job.schedule.window.tensors()]


@pytest.mark.parametrize("options", ON_NODES)
def test_caches_and_sums_have_the_same_memory_in_every_window(options: str) -> None:
    with simulated_job(options, "bf16-mixed") as job:
        seen = []
        for _ in range(3):
            job.micro_step()
            seen.append(held(job))
            job.micro_step(boundary=True)
            job.step()
        assert len(seen[0]) == 2 * len(fsdp_modules(job.model))
        for one, other in pairwise(seen):
            assert all(a is b for a, b in zip(one, other, strict=True))
        job.micro_step()
        job.schedule.window.abandon()
        assert held(job) == []


@pytest.mark.parametrize("options", ON_NODES)
def test_no_zeros_are_held_beside_the_sums_of_nodes(options: str) -> None:
    with simulated_job(options, "32-true") as job:
        for boundary in (False, False, True):
            job.micro_step(boundary=boundary)
            assert [tensor for unit in fsdp_modules(job.model).values() for tensor in partial_sums(unit)] == []
            assert all((parameter.grad is not None) == boundary for parameter in job.model.parameters())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("options", ["node cache", "rank cache"])
def test_a_change_in_raw_memory_raises_where_work_is_enqueued_on_streams(options: str, precision: str) -> None:
    with simulated_job(options, precision) as job:
        job.window()
        job.micro_step()
        last = list(job.blocks[2].parameters())[-1].detach().to_local().numpy()
        last[:] = np.where(last == 2, 3, 2)  # what the collectives of one process leave may be anything, also nan
        with pytest.raises(RuntimeError, match="in a way that torch does not record"):
            job.micro_step(boundary=True)


@pytest.mark.parametrize("options", ["node cache", "rank cache"])
def test_an_evaluation_in_inference_mode_may_use_what_a_window_has_cached(options: str) -> None:
    with simulated_job(options, "32-true") as job:
        job.micro_step()
        with torch.inference_mode():
            job.loss()
        job.model.reshard()
        job.micro_step(boundary=True)


DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.bool, torch.complex64)


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("dtypes", [DTYPES, *((dtype,) for dtype in DTYPES)], ids=str)
def test_tensors_of_any_dtypes_differ_if_one_bit_of_them_does(dtypes: tuple[torch.dtype, ...], count: int) -> None:
    ones = [torch.arange(5).to(dtype) for dtype in dtypes for _ in range(count)] + [torch.empty(0, dtype=dtypes[0])]
    others = [one.clone() for one in ones]
    assert not _bits_differ(list(zip(ones, others, strict=True)))
    for other in others[:-1]:
        memory = other.view(torch.uint8)
        memory[-1] ^= 1
        assert _bits_differ(list(zip(ones, others, strict=True)))
        memory[-1] ^= 1
    assert not _bits_differ(list(zip(ones, others, strict=True)))


def test_nan_equals_itself_and_zeros_of_either_sign_differ() -> None:
    nan = torch.full((3,), torch.nan)
    assert not _bits_differ([(nan, nan.clone())])
    assert _bits_differ([(torch.zeros(3), -torch.zeros(3))])
