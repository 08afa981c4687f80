"""First weights on the meta device and off it, and the check that replicas agree."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_mics import Topology, create_partition_groups, shard_model
from lightning_mics.sharding.ranks.replicas import verify_replicas
from tests.support.models import TinyLM, tokens

TWO_REPLICAS = Topology(world_size=4, ranks_per_node=2, partition_size=2)


class Scaled(TinyLM):
    """Initializes as many models do: a method on the model, called for each of its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)


def test_a_model_on_meta_is_initialized_by_its_own_rules_and_stays_tied(run_shared):
    for facts in run_shared(4, _shard_on_meta):
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
    shard_model(model, create_partition_groups(TWO_REPLICAS, device_type="cpu"))
    return {
        "own random state kept": torch.equal(state, torch.get_rng_state()),
        "std of linear": float(model.blocks[0].up.weight.full_tensor().std()),
        "std of embedding": float(model.embed.weight.full_tensor().std()),
        "norm": float(model.norm.weight.full_tensor().mean()),
        "scale": float(model.blocks[0].scale[0]),
        "tied": model.head.weight is model.embed.weight,
        "loss": float(model(tokens(1)).detach()),
    }


def test_one_parameter_group_at_a_time_is_unsharded(run_shared):
    for counts in run_shared(2, _count_unsharded_parameters):
        assert counts == [4, 4, 3]  # a block's weights and biases; of the root, embedding and norm


def _count_unsharded_parameters() -> list[int]:
    """Numbers of unsharded parameters in memory just before each parameter group is sharded."""
    seen: list[weakref.ref[nn.Parameter]] = []
    alive = []

    def counting(module: nn.Module, **options: Any) -> Any:
        known = {id(reference()) for reference in seen}
        unsharded = [p for p in module.parameters() if not p.is_meta and not isinstance(p, DTensor)]
        seen.extend(weakref.ref(parameter) for parameter in unsharded if id(parameter) not in known)
        alive.append(sum(reference() is not None for reference in seen))
        del unsharded
        return fully_shard(module, **options)

    with torch.device("meta"):
        model = TinyLM()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_mics.sharding.shard_model.fully_shard", counting)
        shard_model(model, create_partition_groups(PAIR, device_type="cpu"))
    return alive


def test_weights_and_buffers_with_values_are_those_of_rank_0(run_shared):
    results = run_shared(4, _shard_built)
    for weights, buffer, own in results:
        assert torch.equal(weights, results[0][2])
        assert torch.equal(buffer, torch.zeros(7))
        assert own is results[0][2] or not torch.equal(own, weights)


def _shard_built() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(dist.get_rank())
    model = TinyLM()
    model.blocks[0].scale.fill_(dist.get_rank())
    own = model.blocks[0].up.weight.detach().clone()
    shard_model(model, create_partition_groups(TWO_REPLICAS, device_type="cpu"))
    return model.blocks[0].up.weight.full_tensor().detach(), model.blocks[0].scale, own


def test_replicas_that_differ_in_one_bit_are_found_on_every_rank(run_shared):
    for rank, message in enumerate(run_shared(4, _flip_one_bit)):
        assert message.startswith("the replicas of the model differ in ")
        assert ("'blocks.1.up.weight'" in message) == (rank in (0, 2))  # the ranks that hold the part


def _flip_one_bit() -> str:
    model = TinyLM()
    groups = create_partition_groups(TWO_REPLICAS, device_type="cpu")
    shard_model(model, groups)
    if dist.get_rank() == 2:
        bits = model.blocks[1].up.weight.to_local().detach().view(torch.int32)
        bits[0, 0] ^= 1
    with pytest.raises(RuntimeError, match="must be equal at all times") as caught:
        verify_replicas(model, groups)
    return str(caught.value)


class Parent(nn.Module):
    """Sets its child's weights, and replaces an integer buffer rather than filling it."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(3, 3)
        self.register_buffer("order", torch.arange(3))
        self.register_buffer("order_again", self.order)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.child.weight, 0.125)
        self.order = self.order_again = torch.arange(3)


def test_a_parent_may_set_the_weights_of_its_children(run_shared):
    for weight, order in run_shared(2, _shard_parents):
        assert torch.equal(weight, torch.full((3, 3), 0.125))
        assert order.tolist() == [0, 1, 2]


def _shard_parents() -> tuple[Tensor, Tensor]:
    with torch.device("meta"):
        model = nn.Sequential(Parent(), Parent())
    shard_model(model, create_partition_groups(PAIR, device_type="cpu"))
    return model[0].child.weight.full_tensor().detach(), model[1].order


PAIR = Topology(world_size=2, ranks_per_node=2, partition_size=2)


def test_gpt2_on_meta_has_the_distribution_of_one_built_on_the_cpu(run_shared):
    (built, on_meta), _ = run_shared(2, _spreads_of_gpt2)
    assert built.keys() == on_meta.keys()
    assert built["transformer.h.0.mlp.c_proj.weight"] < 0.6 * built["transformer.h.0.mlp.c_fc.weight"]  # scaled
    for name, spread in built.items():
        assert on_meta[name] == pytest.approx(spread, rel=0.1, abs=1e-9), name


def _spreads_of_gpt2() -> list[dict[str, float]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=199, n_positions=32, n_embd=48, n_layer=2, n_head=2)
    groups = create_partition_groups(PAIR, device_type="cpu")
    spreads = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        with torch.device(device):
            model = GPT2LMHeadModel(config)
        shard_model(model, groups)
        weights = {name: parameter.full_tensor() for name, parameter in model.named_parameters()}
        spreads.append({name: float(w.detach().std()) for name, w in weights.items() if w.ndim > 1})
    return spreads


class Forgetful(TinyLM):
    def __init__(self) -> None:
        super().__init__()
        self.mask = torch.ones(3)  # no buffer


def test_an_unregistered_tensor_on_meta_is_rejected(run_shared):
    for message in run_shared(2, _shard_forgetful):
        assert message.startswith("Forgetful.mask is a tensor on the meta device and neither a parameter nor a buffer")


def _shard_forgetful() -> str:
    with torch.device("meta"):
        model = Forgetful()
    with pytest.raises(TypeError, match="register it as a buffer") as caught:
        shard_model(model, create_partition_groups(PAIR, device_type="cpu"))
    return str(caught.value)


def test_buffers_of_any_dtype_are_sent(run_shared):
    for buffers in run_shared(2, _shard_odd_buffers):
        assert [buffer.tolist() for buffer in buffers] == [[1, 2], [True, False], 3.0, [1.0]]


def _shard_odd_buffers() -> list[Tensor]:
    model = TinyLM()
    first = dist.get_rank() == 0
    values = [
        torch.tensor([1, 2], dtype=torch.int16),
        torch.tensor([True, False]),
        torch.tensor(3.0, dtype=torch.float64),
        torch.tensor([1.0]).to(torch.float8_e4m3fn),
    ]
    for index, value in enumerate(values):
        model.register_buffer(f"odd_{index}", value if first else torch.zeros_like(value))
    shard_model(model, create_partition_groups(PAIR, device_type="cpu"))
    return [getattr(model, f"odd_{index}") for index in range(3)] + [model.odd_3.float()]
