"""What a step on fake tensors is said to take is what the allocator gives out in a real one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig, GPT2Config

from lightning_mics.planning.rehearsal.activations import measure_activations
from lightning_mics.policy.activations import Activations
from lightning_mics.sharding.activation_checkpointing import inputs_on_host, recompute_in_backward
from lightning_mics.sharding.blocks import find_blocks

pytestmark = pytest.mark.rehearsal


NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


GPT = GPT2Config(vocab_size=1000, n_positions=64, n_embd=96, n_layer=3, n_head=4, **NO_DROPOUT)


WIDE = GPT2Config(vocab_size=300, n_positions=64, n_embd=160, n_layer=2, n_head=4, **NO_DROPOUT)


BERT = BertConfig(
    vocab_size=1000,
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


TOKENS = torch.zeros(5, 61, dtype=torch.int64)


def build(config: Any, *, recompute: bool, offload: bool = False) -> nn.Module:
    head = AutoModelForCausalLM if isinstance(config, GPT2Config) else AutoModelForMaskedLM
    model = head.from_config(config, attn_implementation="sdpa")
    if recompute:
        blocks = list(find_blocks(model).values())
        recompute_in_backward(blocks, on_host=inputs_on_host(blocks) if offload else None)
    return model


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(input_ids=batch).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.flatten())


def taken(config: Any, *, recompute: bool, dtype: torch.dtype) -> float:
    """Most bytes of activations, without gradients."""
    measured = measure_activations(
        lambda: build(config, recompute=recompute),
        TOKENS,
        samples=len(TOKENS),
        loss=loss,
        dtype=dtype,
        autocast_dtype=torch.bfloat16 if dtype == torch.bfloat16 else None,
    )
    return len(TOKENS) * max(line.per_sample for lines in measured.phases.values() for line in lines)


def really_allocated(model: nn.Module, dtype: torch.dtype) -> int:
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    mixed = dtype == torch.bfloat16
    model.to(dtype)
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled,
        torch.autocast("cpu", torch.bfloat16, enabled=mixed),
    ):
        loss(model, TOKENS).backward()
    live = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("config", [GPT, WIDE, BERT], ids=["gpt", "wide", "bert"])
def test_a_step_without_numbers_takes_what_a_real_one_does(config: Any, recompute: bool, dtype: torch.dtype) -> None:
    predicted = taken(config, recompute=recompute, dtype=dtype)
    with torch.random.fork_rng():
        real = really_allocated(build(config, recompute=recompute), dtype)
    largest_gradients = 2 * max(parameter.numel() for parameter in build(config, recompute=False).parameters())
    # 2 %: workspaces of kernels, which some processors need for bfloat16
    assert real - largest_gradients * dtype.itemsize * 1.1 <= predicted * 1.02
    assert predicted <= real * 1.05


def test_recomputed_blocks_keep_only_what_goes_into_them() -> None:
    eight, four = (
        taken(GPT2Config(**{**GPT.to_dict(), "n_layer": layers}), recompute=True, dtype=torch.bfloat16)
        for layers in (8, 4)
    )
    assert eight - four == pytest.approx(4 * TOKENS.numel() * GPT.n_embd * 2)


def test_memory_of_the_device_falls_by_exactly_what_goes_to_the_host() -> None:
    deep = BertConfig(**{**BERT.to_dict(), "num_hidden_layers": 8})

    def measured(*, offload: bool) -> Activations:
        return measure_activations(
            lambda: build(deep, recompute=True, offload=offload),
            TOKENS,
            samples=len(TOKENS),
            loss=loss,
            dtype=torch.float32,
        )

    on_device, on_host = measured(offload=False), measured(offload=True)
    inputs = 4 * TOKENS.shape[1] * deep.hidden_size  # bytes of a sample
    assert (on_device.on_host, on_host.on_host) == (0, 8 * inputs)
    assert on_device.saved - on_host.saved == pytest.approx(inputs)
    for phase, fewer in {"loss": 8, "head": 8, "last": 6, "blocks": 5}.items():
        most = [max(line.per_sample for line in measured.phases[phase]) for measured in (on_device, on_host)]
        assert most[0] - most[1] == pytest.approx(fewer * inputs), phase
