"""What all language models do alike."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, PretrainedConfig, RobertaConfig

import train
from recipes.data.tokenizer import train_tokenizer
from recipes.models.causal_lm import CausalLM
from recipes.models.language_model import LanguageModel
from recipes.models.masked_lm import MaskedLM
from tests.support.configs import composed
from tests.support.networks import BERT, GPT
from tests.support.trainers import make_trainer

SHAPE = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def made(config: PretrainedConfig, **options: Any) -> LanguageModel:
    model = CausalLM if isinstance(config, GPT2Config) else MaskedLM
    return model(network=config, optimizer=lambda module: torch.optim.SGD(module.parameters()), **options)


def in_a_trainer(lm: LanguageModel, tokenizer: Any = None) -> LanguageModel:
    lm.trainer = make_trainer(".", devices=1, strategy="auto")
    lm.trainer.datamodule = SimpleNamespace(tokenizer=tokenizer)
    lm.configure_model()
    return lm


def test_adapters_are_trained_in_place_of_the_network_and_wrong_ones_are_refused() -> None:
    lm = in_a_trainer(made(GPT, adapters={"r": 2, "target_modules": "all-linear"}))
    trained = [name for name, parameter in lm.network.named_parameters() if parameter.requires_grad]
    assert len(trained) > 6 and all("lora_" in name for name in trained)
    assert all(parameter.is_meta for parameter in lm.parameters())
    for adapters, said in (({"rank": 2}, "rank"), ({"r": 2, "target_modules": ["nothing"]}, "nothing")):
        with pytest.raises(ValueError, match=said):
            in_a_trainer(made(GPT, adapters=adapters))


@pytest.mark.parametrize("listed", [True, False], ids=["listed by transformers", "not listed"])
@pytest.mark.parametrize(
    ("config", "head", "blocks"),
    [(GPT, GPT2LMHeadModel, "transformer.h"), (BERT, BertForMaskedLM, "bert.encoder.layer")],
    ids=["gpt", "bert"],
)
def test_what_is_compiled_is_each_block_and_nothing_else(
    config: PretrainedConfig, head: type, blocks: str, listed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lists = [owner for owner in head.__mro__ if vars(owner).get("_no_split_modules")]
    lists += [type(module) for module in head(config).modules() if vars(type(module)).get("_no_split_modules")]
    for owner in [] if listed else lists:
        monkeypatch.setattr(owner, "_no_split_modules", None)
    for wanted in (True, False):
        network = in_a_trainer(made(config, compile_blocks=wanted)).network
        compiled = {name for name, module in network.named_modules() if module._compiled_call_impl is not None}
        assert compiled == ({f"{blocks}.{index}" for index in range(3)} if wanted else set())


@pytest.mark.parametrize(("run", "checkpoint"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_weights_have_the_dtype_of_the_run_not_of_the_checkpoint(
    run: str, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = made(GPT2Config(**{**GPT.to_dict(), "dtype": checkpoint}))
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, run))
    try:
        network = lm.build_network()
    finally:
        torch.set_default_dtype(before)
    assert {parameter.dtype for parameter in network.parameters()} == {getattr(torch, run)}


def test_a_sample_ends_where_positions_do() -> None:
    lm = made(GPT, sample_tokens=5)
    lm.configure_model()
    assert lm.predict_step(torch.zeros(1, 2, dtype=torch.int64), 0).shape == (1, 7)
    assert lm.predict_step(torch.zeros(1, 6, dtype=torch.int64), 0).shape == (1, GPT.n_positions)


def test_a_model_that_takes_a_token_of_the_text_for_padding_is_refused() -> None:
    tokenizer = train_tokenizer(["some text"], vocab_size=300)
    message = (
        r"the model takes token 1 for padding, which is '<\|mask\|>' to the data's tokenizer, whose padding is token "
        "2; use model.network.pad_token_id=2"
    )
    with pytest.raises(ValueError, match=message):
        in_a_trainer(made(RobertaConfig(**SHAPE, pad_token_id=1)), tokenizer)
    for fitting in (RobertaConfig(**SHAPE, pad_token_id=2), BertConfig(**SHAPE, pad_token_id=None)):
        in_a_trainer(made(fitting), tokenizer)


@pytest.mark.parametrize("name", ["bert-tiny", "bert-10b", "roberta-20b"])
def test_masked_models_of_conf_learn_every_token_that_a_trained_tokenizer_puts_into_text(name: str) -> None:
    """An embedding whose token counts as padding gets no gradient, and RoBERTa gives it no position."""
    tokenizer = train_tokenizer(["some text"], vocab_size=300)
    config = train.make_model(composed(f"model={name}", "model.network.num_hidden_layers=1")).config
    assert config.pad_token_id in (None, tokenizer.pad_token_id)
    assert {tokenizer.mask_token_id, tokenizer.eos_token_id}.isdisjoint({config.pad_token_id})
