from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, GPT2Config

from lightning_mics.checkpoint.export import main as export
from recipes.models.causal_lm import CausalLM
from recipes.models.pretrained_folder import pretrained_folder
from tests.support.trainers import make_trainer, on_ranks

NETWORK = GPT2Config(
    vocab_size=300, n_positions=16, n_embd=8, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None
)


def sgd(module: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters())


def model(**options: Any) -> CausalLM:
    return CausalLM(network=NETWORK, optimizer=sgd, sample_tokens=5, **options)


def windows() -> DataLoader[Any]:
    return DataLoader(torch.randint(300, (8, 9), generator=torch.Generator().manual_seed(0)), batch_size=2)


def zero_model() -> CausalLM:
    lm = model()
    lm.configure_model()
    lm.to_empty(device="cpu")
    for parameter in lm.parameters():
        torch.nn.init.zeros_(parameter)
    return lm


def test_network_is_built_once_and_on_the_meta_device() -> None:
    lm = model()
    lm.trainer = make_trainer(".", devices=1, strategy="auto")
    lm.configure_model()
    network = lm.network
    lm.configure_model()
    assert lm.network is network
    assert all(parameter.is_meta for parameter in lm.parameters())


class Windows(L.LightningDataModule):
    """Random windows, and a tokenizer that is said to be somewhere."""

    tokenizer_folder = Path("somewhere")

    def train_dataloader(self) -> DataLoader[Any]:
        return windows()


def _fit(folder: Path) -> dict[str, torch.Tensor]:
    trainer, lm = make_trainer(folder), model(pretrained=str(folder / "theirs"))
    trainer.fit(lm, datamodule=Windows())
    trainer.save_checkpoint(folder / "a.ckpt")
    return {name: tensor.full_tensor() for name, tensor in lm.network.state_dict().items()}


def _adapt(folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    adapters = {"r": 4, "target_modules": "all-linear"}
    trainer, lm = make_trainer(folder), model(pretrained=str(folder / "theirs"), adapters=adapters)
    (before,) = trainer.validate(lm, windows(), verbose=False)
    trainer.fit(lm, datamodule=Windows())
    named = {name: p.full_tensor().detach() for name, p in lm.network.named_parameters() if "lora_" in name}
    return before["val_loss"], named


def test_adapters_start_from_a_folder_and_are_saved_alone(tmp_path: Path) -> None:
    theirs = AutoModelForCausalLM.from_config(NETWORK)
    theirs.save_pretrained(tmp_path / "theirs")
    before, trained = on_ranks(_adapt, tmp_path)[0]
    with torch.no_grad():
        losses = [float(model().loss_of(theirs.eval(), batch)) for batch in windows()]
    assert before == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    adapted = PeftModel.from_pretrained(theirs, str(tmp_path / "adapter"))
    found = {name: value for name, value in adapted.named_parameters() if "lora_" in name}
    assert found.keys() == trained.keys()
    assert all(torch.equal(value, trained[name]) for name, value in found.items())
    assert any(value.any() for name, value in found.items() if "lora_B" in name)


def test_it_starts_from_a_folder_and_comes_back_from_its_checkpoint_by_itself_and_exported(tmp_path: Path) -> None:
    theirs = AutoModelForCausalLM.from_config(NETWORK)
    theirs.save_pretrained(tmp_path / "theirs")
    trained = on_ranks(_fit, tmp_path)[0]
    assert 0 < max((trained[name] - value).abs().max() for name, value in theirs.state_dict().items()) < 0.01
    by_itself = CausalLM.load_from_checkpoint(tmp_path / "a.ckpt", network=NETWORK, optimizer=sgd)
    assert export([str(tmp_path / "a.ckpt"), str(tmp_path / "out")]) == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, value in trained.items():
        assert torch.equal(by_itself.network.state_dict()[name], value)
        assert torch.equal(exported.state_dict()[name], value)
    assert torch.load(tmp_path / "a.ckpt" / "meta.pt", weights_only=True)["tokenizer"] == "somewhere"


def test_what_is_no_folder_is_a_name_on_the_hub_and_only_what_is_needed_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("recipes.models.pretrained_folder.snapshot_download", download)
    assert pretrained_folder(str(tmp_path)) == tmp_path and asked == []
    assert pretrained_folder("someone/gpt") == tmp_path
    ((name, patterns),) = asked
    assert name == "someone/gpt" and "model*.safetensors" in patterns and "*.bin" not in patterns


def test_loss_is_that_of_the_next_token() -> None:
    every_token_equally_likely = torch.tensor(300.0).log()
    lm = zero_model()
    loss = lm.loss_of(lm.network, torch.randint(300, (2, 9)))
    torch.testing.assert_close(loss, every_token_equally_likely)


def test_sample_continues_the_prompt_by_a_fixed_number_of_tokens() -> None:
    prompt = torch.tensor([[3, 1, 4]])
    sample = zero_model().predict_step(prompt, 0)
    assert sample.shape == (1, 8)
    assert sample[:, :3].equal(prompt)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"vocab_size": 301, "sequence_length": 16}, "data.vocab_size=301 does not fit model.network.vocab_size=300"),
        ({"vocab_size": 300, "sequence_length": 17}, "data.sequence_length=17 is longer than the 16 positions"),
    ],
)
def test_data_that_the_network_cannot_take_are_refused(facts: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model().check_data(**facts)
