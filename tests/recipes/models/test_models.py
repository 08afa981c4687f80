"""The models of ``conf/model`` are those of the papers they name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate

import train
from recipes.models.language_model import LanguageModel
from tests.support.configs import CONF, composed

# parameters in billions: MiCS table 1; for the others as published, but for the 100B shape, of which only the name is
PUBLISHED = {
    "bert-10b": 10.08,
    "bert-15b": 15.03,
    "bert-20b": 20.30,
    "bert-50b": 50.20,
    "roberta-20b": 19.77,
    "gpt-20b": 19.77,
    "gpt-1.5b": 1.5576,  # GPT-2 XL, with 1024 positions; the paper rounds to 1.5
    "gpt-10b": 10.08,
    "gpt-100b": 100,
    "gpt-175b": 175,
    "gpt2": 0.124439808,
    "bert-base": 0.110,
    "bert-large": 0.336,
    "llama-8b": 8.03,
    "llama-70b": 70.6,
}


def built(name: str, *overrides: str) -> LanguageModel:
    return train.make_model(composed(f"model={name}", *overrides))


@pytest.mark.parametrize("path", sorted(CONF.glob("model/*.yaml")), ids=lambda path: path.stem)
def test_every_model_has_the_parameters_that_are_published(path: Path) -> None:
    if path.stem == "hf":
        pytest.skip("stands for any model")
    with torch.device("meta"):
        network = built(path.stem).build_network()
    billions = sum(parameter.numel() for parameter in network.parameters()) / 1e9
    expected = PUBLISHED.get(path.stem)
    if expected is None:
        assert path.stem.endswith("-tiny")
        assert 1e-3 < billions < 5e-3
    else:
        assert billions == pytest.approx(expected, rel=0.01)
    assert network.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("path", sorted(CONF.glob("model/*.yaml")), ids=lambda path: path.stem)
def test_every_model_says_how_it_is_trained(path: Path) -> None:
    config = composed(f"model={path.stem}")
    assert set(config.model.training) == {
        "sequence_length",
        "global_batch_size",
        "lr",
        "warmup_steps",
        "max_steps",
        "activation_checkpointing",
    }
    assert config.optimizer.lr == config.model.training.lr
    assert config.data.sequence_length == config.model.training.sequence_length
    assert config.model.training.warmup_steps < config.trainer.max_steps


def test_roberta_takes_two_positions_fewer_than_it_has() -> None:
    roberta = built("roberta-20b")
    roberta.check_data(vocab_size=50265, sequence_length=512)
    with pytest.raises(ValueError, match=r"data\.sequence_length=513 is longer than the 512 positions"):
        roberta.check_data(vocab_size=50265, sequence_length=513)


def test_what_multiplies_activations_is_decayed_and_nothing_else() -> None:
    """Also where an embedding is tied to the head, which multiplies activations."""
    config = composed("model=gpt2", "model.network.n_layer=1", "model.network.n_embd=24")
    network = train.make_model(config).build_network()
    groups = instantiate(config.optimizer)(network)["optimizer"].param_groups
    decayed = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    names = {name for name, parameter in network.named_parameters() if id(parameter) in decayed}
    assert names == {
        "transformer.wte.weight",
        "transformer.h.0.attn.c_attn.weight",
        "transformer.h.0.attn.c_proj.weight",
        "transformer.h.0.mlp.c_fc.weight",
        "transformer.h.0.mlp.c_proj.weight",
    }
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))
