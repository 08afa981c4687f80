"""First weights on the meta device and off it, and the check that replicas agree."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_mics import Topology, create_groups, shard_model
from lightning_mics.first_weights import verify_replicas
from tests.forked import run_ranks
from tests.models import TinyLM, tokens

TWO_REPLICAS = Topology(world_size=4, ranks_per_node=2, partition_size=2)


class Scaled(TinyLM):
    """Initialises as many models do: a method on the model, called for each of its modules."""

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)


def test_a_model_on_meta_is_initialised_by_its_own_rules_and_keeps_its_ties():
    for facts in run_ranks(4, _shard_on_meta):
        assert facts["std of linear"] == pytest.approx(0.01, rel=0.2)
        assert facts["std of embedding"] > 0.005  # tied to the head, which is a Linear
        assert facts["norm"] == 1.0
        assert facts["scale"] == pytest.approx(0.9)
        assert facts["tied"]
        assert math.isfinite(facts["loss"])
        assert facts["own random state kept"]


def _shard_on_meta() -> dict[str, Any]:
    torch.manual_seed(dist.get_rank())
    state = torch.get_rng_state()
    with torch.device("meta"):
        model = Scaled()
    shard_model(model, create_groups(TWO_REPLICAS, device_type="cpu"))
    return {
        "own random state kept": torch.equal(state, torch.get_rng_state()),
        "std of linear": float(model.blocks[0].up.weight.full_tensor().std()),
        "std of embedding": float(model.embed.weight.full_tensor().std()),
        "norm": float(model.norm.weight.full_tensor().mean()),
        "scale": float(model.blocks[0].scale[0]),
        "tied": model.head.weight is model.embed.weight,
        "loss": float(model(tokens(1)).detach()),
    }


def test_built_weights_are_those_of_rank_0_and_buffers_too():
    results = run_ranks(4, _shard_built)
    for weights, buffer, own in results:
        assert torch.equal(weights, results[0][2])
        assert torch.equal(buffer, torch.zeros(7))
        assert own is results[0][2] or not torch.equal(own, weights)


def _shard_built() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(dist.get_rank())
    model = TinyLM()
    model.blocks[0].scale.fill_(dist.get_rank())
    own = model.blocks[0].up.weight.detach().clone()
    shard_model(model, create_groups(TWO_REPLICAS, device_type="cpu"))
    return model.blocks[0].up.weight.full_tensor().detach(), model.blocks[0].scale, own


def test_replicas_that_differ_in_one_bit_are_found_on_every_rank():
    for rank, message in enumerate(run_ranks(4, _flip_one_bit)):
        assert message.startswith("the replicas of the model differ in ")
        assert ("'blocks.1.up.weight'" in message) == (rank in (0, 2))  # the ranks that hold the part


def _flip_one_bit() -> str:
    model = TinyLM()
    groups = create_groups(TWO_REPLICAS, device_type="cpu")
    shard_model(model, groups)
    if dist.get_rank() == 2:
        bits = model.blocks[1].up.weight.to_local().detach().view(torch.int32)
        bits[0, 0] ^= 1
    with pytest.raises(RuntimeError, match="must be equal at all times") as caught:
        verify_replicas(model, groups)
    return str(caught.value)
