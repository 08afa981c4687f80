"""An error of a device that is out of memory names the options that would take less."""

from __future__ import annotations

import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lightning_mics import CommunicationOptions
from lightning_mics.policy.choice import ShardingJob, choose
from lightning_mics.policy.out_of_memory import BEGINNING, memory_advice
from tests.policy.test_start_report import SIZE
from tests.support.loops import network, sgd, start
from tests.support.models import TinyLM, TinyModule, loader_of_tokens, tokens
from tests.support.trainers import cases_on_ranks, make_trainer, mics

CASES = ("trainer", "fabric forward", "fabric backward")


class _Full(torch.autograd.Function):
    """A backward for which there is no memory."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")


class Large(TinyModule):
    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")


def _raise(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def run(case: str) -> str:
    try:
        if case == "trainer":
            options = CommunicationOptions.RANK.keywords()
            make_trainer(Path("."), strategy=mics(partition_size=2, **options)).fit(Large(), loader_of_tokens())
        fabric = start()
        model = network(kind=TinyLM)
        if case == "fabric forward":
            model.blocks[1].register_forward_pre_hook(_raise)
        wrapped, _ = fabric.setup(model, sgd(model))
        fabric.backward(_Full.apply(wrapped(tokens(2))))
    except torch.OutOfMemoryError as error:
        return "".join(traceback.format_exception(error))
    raise AssertionError("it did not raise")


def test_errors_of_the_trainer_and_fabric_name_options_to_change() -> None:
    seen = cases_on_ranks({case: _Run(case) for case in CASES})
    for case in CASES:
        for text in seen[case]:
            assert text.count(BEGINNING) == 1, case
            assert "activation_checkpointing=True; partition_size=4 in place of 2" in text
    assert 'cache_parameters="never" in place of "rank"' in seen["trainer"][0]
    assert 'accumulate_gradients="shard" in place of "rank"' in seen["trainer"][0]


class _Run:
    def __init__(self, case: str) -> None:
        self._case = case

    def __call__(self) -> str:
        return run(self._case)


def test_advice_begins_with_caches_and_leaves_out_what_is_done_already() -> None:
    def advice(partition_size: int, communication: CommunicationOptions, **done: Any) -> str:
        job = ShardingJob(
            size=SIZE, world_size=8, ranks_per_node=4, capacity_bytes=2**34, partition_size=partition_size,
            communication=communication,
        )  # fmt: skip
        return memory_advice(choose(job), **{"recomputes": False, **done}).removeprefix(BEGINNING)

    recomputed = advice(8, CommunicationOptions.PAPER, recomputes=True)
    assert recomputed.startswith("activation_offload=True, which takes host memory instead; offload=")
    offloaded = partial(advice, 8, CommunicationOptions.PAPER, recomputes=True, offloads=True)
    assert offloaded().startswith('offload="optimizer", which takes host memory instead; micro-batches of fewer')
    assert offloaded(states_on_host="optimizer").startswith("offload=True, which takes host memory instead; micro")
    assert offloaded(states_on_host=True).startswith("micro-batches of fewer samples")
    assert advice(8, CommunicationOptions(inter_node_prefetch=1)).startswith("inter_node_prefetch=0; ")
    assert advice(8, CommunicationOptions.RANK).startswith(
        'cache_parameters="node" in place of "rank" (caches take 3 GiB per rank); accumulate_gradients="node"'
    )
    on_nodes = 'cache_parameters="never" in place of "node"'
    moved = "cache_offload=True, which takes host memory instead (caches take 0.75 GiB per rank); "
    assert advice(8, CommunicationOptions.NODE).startswith(moved + on_nodes)
    assert advice(8, replace(CommunicationOptions.NODE, cache_offload=True)).startswith(on_nodes)
    assert advice(1, CommunicationOptions.RANK).startswith("activation_checkpointing=True; partition_size=2")
