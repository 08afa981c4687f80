"""Effects of ``shard_model`` other than placing and sharding a model."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_mics import Topology, create_partition_groups, shard_model
from tests.support.forked import run_ranks
from tests.support.models import TinyLM, tokens

PAIR = Topology(world_size=2, ranks_per_node=2, partition_size=2)


TWO_REPLICAS = Topology(world_size=2, ranks_per_node=1, partition_size=1)


def test_recomputed_blocks_of_transformers_do_not_extend_their_cache():
    """By default these models fill a cache of keys and values, which a second forward would fill again."""
    for plain, recomputed in run_ranks(2, _gradients_with_cache):
        assert plain > 0.1
        assert recomputed == pytest.approx(plain, rel=1e-6)


def _gradients_with_cache() -> list[float]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=11, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    groups = create_partition_groups(PAIR, device_type="cpu")
    norms = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
        assert model.config.use_cache
        shard_model(model, groups, activation_checkpointing=recompute)
        ids = tokens(2, length=8, seed=dist.get_rank())
        mask = torch.ones_like(ids)
        mask[0, :3] = 0  # padding
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor()))
    return norms


ARCHITECTURES = ("llama", "bert", "t5", "qwen2_moe")


@pytest.fixture(scope="module")
def norms_of_architectures():
    return run_ranks(2, _train_architectures)[0]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_models_of_transformers_train_from_the_meta_device_recomputed_or_not(norms_of_architectures, name):
    plain, recomputed = norms_of_architectures[name]
    assert plain > 0.1
    assert recomputed == pytest.approx(plain, rel=1e-5)


def _train_architectures() -> dict[str, list[float]]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    extra = {
        "t5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
        "qwen2_moe": {
            "num_key_value_heads": 2,
            "num_experts": 4,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
        },
    }
    heads = {"bert": AutoModelForMaskedLM, "t5": AutoModelForSeq2SeqLM}
    groups = create_partition_groups(PAIR, device_type="cpu")
    norms: dict[str, list[float]] = {}
    for name in ARCHITECTURES:
        options = extra[name] if name == "t5" else {**sizes, **extra.get(name, {})}
        config = AutoConfig.for_model(name, vocab_size=11, **options)
        for recompute in (False, True):
            torch.manual_seed(0)
            with torch.device("meta"):
                model = heads.get(name, AutoModelForCausalLM).from_config(config).eval()  # no dropout
            shard_model(model, groups, activation_checkpointing=recompute)
            ids = tokens(2, length=8, seed=dist.get_rank())
            model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            norms.setdefault(name, []).append(float(norm.full_tensor()))
    return norms


def test_losses_are_the_same_to_the_last_bit_whatever_share_of_the_blocks_is_recomputed():
    for none, half, everything in run_ranks(2, _losses_by_share):
        assert none[0] != none[-1]  # it learns
        assert half == none and everything == none


def _losses_by_share() -> list[list[float]]:
    groups = create_partition_groups(PAIR, device_type="cpu")
    losses = []
    for share in (0.0, 0.5, 1.0):
        torch.manual_seed(0)
        model = TinyLM(layers=4)
        shard_model(model, groups, activation_checkpointing=share)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses.append([])
        for step in range(3):
            loss = model(tokens(2, seed=step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    return losses


def test_evaluation_does_not_recompute():
    assert run_ranks(2, _count_checkpoints) == [(0, 3), (0, 3)]


def _count_checkpoints() -> tuple[int, int]:
    from lightning_mics.sharding import activation_checkpointing

    calls = []
    real = activation_checkpointing.checkpoint
    activation_checkpointing.checkpoint = lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs)
    model = TinyLM(layers=3)
    shard_model(model, create_partition_groups(PAIR, device_type="cpu"), activation_checkpointing=True)
    with torch.no_grad():
        model(tokens(1))
    in_evaluation = len(calls)
    model(tokens(1)).backward()
    return in_evaluation, len(calls)


class HalfUsed(TinyLM):
    """A block has a parameter that no forward uses."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[0].spare = nn.Parameter(torch.ones(3))


@pytest.mark.parametrize("micro_steps", [1, 2])
def test_an_unused_parameter_of_a_used_block_has_no_gradient_as_in_one_process(micro_steps):
    assert run_ranks(2, _unused_gradients, micro_steps) == [None, None]


def _unused_gradients(micro_steps: int) -> float | None:
    model = HalfUsed()
    schedule = shard_model(model, create_partition_groups(TWO_REPLICAS, device_type="cpu"))
    for index in range(micro_steps):
        with schedule.micro_step(boundary=index == micro_steps - 1):
            model(tokens(1, seed=index)).backward()
    assert model.blocks[0].up.weight.grad is not None
    gradient = model.blocks[0].spare.grad
    return None if gradient is None else float(gradient.full_tensor().abs().sum())
