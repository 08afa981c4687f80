"""``certify_every_n_steps``: replicas that drift apart stop the job, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mics import MiCSStrategy, Topology, create_partition_groups, shard_model
from lightning_mics.sharding.ranks import replicas
from tests.support.forked import run_cases
from tests.support.models import TinyLM, TinyModule, loader_of_tokens, tokens
from tests.support.trainers import cases_on_ranks, make_trainer, mics

STEPS = 5  # the last one reads the comparison after the fourth


def _train(change: Callable[[Any, int], None], *, every: int | None = 2, size: int = 2) -> tuple[str, int]:
    """The error, and the steps that were made."""
    torch.manual_seed(0)
    model = TinyLM()
    groups = create_partition_groups(Topology(world_size=4, ranks_per_node=2, partition_size=size), device_type="cpu")
    shard_model(model, groups, certify_every_n_steps=every)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(STEPS):
        model(tokens(2)).backward()
        try:
            optimizer.step()
        except RuntimeError as error:
            return str(error), step
        optimizer.zero_grad()
        with torch.no_grad():
            change(model, step)
    return "", STEPS


def _nothing(model: Any, step: int) -> None:
    """Leave everything as it is."""


def _one_bit_of_a_replica(model: Any, step: int) -> None:
    if step == 2 and dist.get_rank() == 3:
        shard = model.blocks[1].up.weight.to_local()
        shard.view(torch.int32)[0, 0] ^= 1


CASES: dict[str, Callable[[], tuple[str, int]]] = {
    "equal": partial(_train, _nothing),
    "apart": partial(_train, _one_bit_of_a_replica),
    "apart, not compared": partial(_train, _one_bit_of_a_replica, every=None),
    "apart, without replicas": partial(_train, _one_bit_of_a_replica, size=4),
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[tuple[str, int]]]:
    return run_cases(4, CASES)


@pytest.mark.parametrize("case", ["equal", "apart, not compared", "apart, without replicas"])
def test_training_goes_on_where_nothing_is_compared_or_differs(case: str, outcomes: Any) -> None:
    assert outcomes[case] == [("", STEPS)] * 4


def test_one_bit_of_one_replica_stops_the_ranks_that_hold_these_rows_and_names_the_parameter(outcomes: Any) -> None:
    for rank in (1, 3):  # of one replication group
        assert "after optimizer step 4: the replicas of the model differ in 1 of" in outcomes["apart"][rank][0]
        assert "blocks.1.up.weight" in outcomes["apart"][rank][0]


# -- the Trainer -------------------------------------------------------------------------------------------------------

FIT_STEPS = 6


class Drifts(TinyModule):
    """A module one of whose replicas changes by itself after its third step."""

    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_step == 3 and self.global_rank == 2:
            with torch.no_grad():
                self.net.blocks[0].up.weight.to_local().mul_(1.0001)


def _fit(folder: Path, module: type[TinyModule], every: int) -> tuple[str, int, list[str]]:
    saving = ModelCheckpoint(folder / f"{module.__name__} {every}", every_n_train_steps=2, save_top_k=-1)
    trainer = make_trainer(
        folder,
        strategy=mics(partition_size=2, certify_every_n_steps=every),
        callbacks=[saving],
        enable_checkpointing=True,
    )
    try:
        trainer.fit(module(), loader_of_tokens(FIT_STEPS * 8))
    except RuntimeError as error:
        return str(error), trainer.global_step, sorted(path.name for path in Path(str(saving.dirpath)).iterdir())
    return "", trainer.global_step, sorted(path.name for path in Path(str(saving.dirpath)).iterdir())


@pytest.fixture(scope="module")
def fits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[str, int, list[str]]]]:
    folder = tmp_path_factory.mktemp("fits")
    cases = {"equal": (TinyModule, 2), "drifts": (Drifts, 2), "drifts, compared late": (Drifts, 100)}
    return {case: cases_on_ranks({case: partial(_fit, folder, *options)})[case] for case, options in cases.items()}


def test_all_ranks_of_a_trainer_stop_with_the_parameters_name(fits: Any) -> None:
    for said, _, saved in fits["drifts"]:
        assert "the replicas of the model differ" in said
        assert "net.blocks.0.up.weight" in said
        assert saved == ["epoch=0-step=2"] or saved == ["epoch=0-step=2.ckpt"]


def test_no_checkpoint_is_saved_of_replicas_that_differ_whenever_they_are_compared(fits: Any) -> None:
    for said, _, saved in fits["drifts, compared late"]:
        assert "the replicas of the model differ" in said
        assert len(saved) == 1


def test_a_trainer_whose_replicas_agree_trains_to_its_end(fits: Any) -> None:
    for said, steps, saved in fits["equal"]:
        assert (said, steps, len(saved)) == ("", FIT_STEPS, FIT_STEPS // 2)


@pytest.mark.parametrize("given", [0, -1, 1.5, True, "often"])
def test_other_intervals_are_rejected_by_the_constructor(given: Any) -> None:
    with pytest.raises(ValueError, match=r"certify_every_n_steps=.* is neither None nor a positive number"):
        MiCSStrategy(certify_every_n_steps=given)


def test_checksums_see_each_bit_and_each_swap() -> None:
    values = torch.arange(10.0)
    changed, swapped = values.clone(), values.clone()
    changed.view(torch.int32)[7] ^= 1
    swapped[[2, 3]] = values[[3, 2]]
    sums = [int(replicas.checksum(each)) for each in (values, changed, swapped, values.clone())]
    assert len(set(sums)) == 3
    assert sums[0] == sums[3]
