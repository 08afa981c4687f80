"""What ``model.name`` may be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config

from recipes.data.tokenizer import train_tokenizer
from recipes.models.from_hub import hf_model
from tests.support.configs import composed
from tests.support.networks import GPT


def made(name: str) -> Any:
    return hf_model(
        name=name,
        pretrained=True,
        objective="auto",
        causal={},
        optimizer=lambda module: torch.optim.SGD(module.parameters()),
    )


def save(config: GPT2Config, folder: Path, **changes: Any) -> None:
    config.save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "architectures": ["GPT2LMHeadModel"], **changes}))


def test_a_folder_may_be_in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save(GPT, tmp_path / "gpt")
    assert made("~/gpt").pretrained == str(tmp_path / "gpt")


def test_a_name_that_the_hub_cannot_have_is_refused() -> None:
    with pytest.raises(
        FileNotFoundError, match=r"model\.name=a/b/c is neither a folder here nor a name on the hub that"
    ):
        made("a/b/c")


@pytest.mark.parametrize(
    "changes", [{"model_type": "gpt9"}, {"model_type": "gpt9", "auto_map": {"AutoConfig": "its_code.Config"}}]
)
def test_an_architecture_that_transformers_does_not_bring_is_refused_and_its_code_not_run(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    save(GPT, tmp_path, **changes)
    (tmp_path / "its_code.py").write_text("raise RuntimeError('run')")
    with pytest.raises(ValueError, match="is of no architecture that transformers brings"):
        made(str(tmp_path))


@pytest.mark.parametrize("data", ["stdlib", "local", "hub"])
def test_a_model_of_transformers_brings_its_tokenizer(data: str, tmp_path: Path) -> None:
    train_tokenizer(["some text"], vocab_size=300).save_pretrained(tmp_path)
    config = composed("model=hf", f"model.name={tmp_path}", f"data={data}").data
    assert config.tokenizer == str(tmp_path)
    assert 256 < config.vocab_size <= 300
    assert composed("model=gpt-tiny", f"data={data}").data.tokenizer is None
