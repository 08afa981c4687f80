"""`export` makes folders that ``transformers`` loads, with the weights of the checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, BertTokenizer

from lightning_mics import Topology, checkpoint, create_partition_groups, shard_model
from lightning_mics.checkpoint.export import main
from lightning_mics.checkpoint.origin import NETWORK_KEY, describe_network
from lightning_mics.checkpoint.storage.manifest import FileFacts, Manifest
from lightning_mics.checkpoint.whole_model import read_tensors
from tests.support.fits import whole_weights
from tests.support.forked import run_ranks
from tests.support.models import TinyLM, tokens
from tests.support.networks import BERT, GPT, NetworkModule, make, same_batches
from tests.support.trainers import loader, make_trainer, on_ranks

AUTO = {"gpt": AutoModelForCausalLM, "bert": AutoModelForMaskedLM}


TIED = {
    "gpt": {"lm_head.weight"},
    "bert": {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"},
}


SHARD_SIZE, SHARD_BYTES = "1KB", 1000


VOCAB_TXT = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d", "e", "f"])


def _train_and_save(folder: Path) -> dict[str, Any]:
    logits = {}
    for kind in AUTO:
        torch.manual_seed(1)
        trainer, module = make_trainer(folder, devices=2), NetworkModule(kind)
        trainer.fit(module, loader())
        trainer.save_checkpoint(folder / f"{kind}.ckpt")
        trainer = make_trainer(folder, devices=2, use_distributed_sampler=False)
        (logits[kind],) = trainer.predict(module, same_batches())
    return logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A GPT and a BERT after steps on 2 ranks in a partition group, and their logits there."""
    folder = tmp_path_factory.mktemp("saved")
    return {"folder": folder, "logits": on_ranks(_train_and_save, folder, world_size=2)[0]}


def exported(saved: dict[str, Any], out: Path, *options: str, kind: str = "gpt") -> Path:
    assert main([str(saved["folder"] / f"{kind}.ckpt"), str(out), *options]) == 0
    return out


def names_in(folder: Path) -> set[str]:
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as content:
            own = set(content.keys())
        assert not names & own
        names |= own
    return names


@pytest.mark.parametrize("kind", AUTO)
@pytest.mark.parametrize("options", [["--shard-size", SHARD_SIZE], []], ids=["several files", "one file"])
def test_transformers_computes_the_logits_of_the_sharded_model(
    saved: Any, kind: str, options: list[str], tmp_path: Path
) -> None:
    out = exported(saved, tmp_path / "out", *options, kind=kind)
    assert len(list(out.glob("model-*-of-*.safetensors"))) >= 5 if options else (out / "model.safetensors").is_file()
    network, report = AUTO[kind].from_pretrained(out, output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        logits = network(input_ids=tokens(4, seed=3)).logits
        untrained = make(kind, seed=1)(input_ids=tokens(4, seed=3)).logits
    assert (logits - saved["logits"][kind]).abs().max() < 1e-6
    assert (logits - untrained).abs().max() > 1e-3


@pytest.mark.parametrize("kind", AUTO)
def test_tied_weights_are_written_once_by_the_name_that_transformers_uses(
    saved: Any, kind: str, tmp_path: Path
) -> None:
    out = exported(saved, tmp_path / "out", "--shard-size", SHARD_SIZE, kind=kind)
    expected = make(kind)
    expected.save_pretrained(tmp_path / "theirs")
    assert names_in(out) == names_in(tmp_path / "theirs") == set(expected.state_dict()) - TIED[kind]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == names_in(out)
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in expected.parameters())


def test_the_config_is_the_one_that_transformers_would_write(saved: Any, tmp_path: Path) -> None:
    make("gpt").save_pretrained(tmp_path / "theirs")
    out = exported(saved, tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((out / name).read_text()) == json.loads((tmp_path / "theirs" / name).read_text())
    assert not (exported(saved, tmp_path / "bert", kind="bert") / "generation_config.json").exists()


def test_weights_are_converted_to_the_dtype_that_was_asked_for(saved: Any, tmp_path: Path) -> None:
    as_they_are = AutoModelForCausalLM.from_pretrained(exported(saved, tmp_path / "a"))
    halved = AutoModelForCausalLM.from_pretrained(exported(saved, tmp_path / "b", "--dtype", "bfloat16"))
    assert halved.dtype == torch.bfloat16 and as_they_are.dtype == torch.float32
    for name, value in as_they_are.state_dict().items():
        assert torch.equal(value.bfloat16(), halved.state_dict()[name])


class Saves(Callback):
    """Saves after the second step, and keeps the weights and their average."""

    def __init__(self, path: Path, average: EMAWeightAveraging) -> None:
        self.path, self.average = path, average
        self.kept: dict[str, dict[str, torch.Tensor]] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)
            self.kept["current"] = whole_weights(pl_module.network)
            self.kept["average"] = whole_weights(self.average._average_model.module.network)


def _average_and_save(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    average = EMAWeightAveraging(decay=0.5)
    saves = Saves(folder / "averaged.ckpt", average)
    make_trainer(folder, devices=2, max_steps=2, callbacks=[average, saves]).fit(NetworkModule("gpt"), loader())
    return saves.kept


def test_an_average_is_exported_or_the_weights_that_were_trained(saved: Any, tmp_path: Path, capsys: Any) -> None:
    kept = on_ranks(_average_and_save, tmp_path, world_size=2)[0]
    for kind, options in (("average", []), ("current", ["--current"])):
        assert main([str(tmp_path / "averaged.ckpt"), str(tmp_path / kind), *options]) == 0
        network = AutoModelForCausalLM.from_pretrained(tmp_path / kind)
        assert all(torch.equal(value, kept[kind][name]) for name, value in network.state_dict().items())
    assert not torch.equal(*(kept[kind]["transformer.wte.weight"] for kind in ("average", "current")))
    assert main([str(saved["folder"] / "gpt.ckpt"), str(tmp_path / "none"), "--current"]) == 2
    assert "holds no average of weights" in capsys.readouterr().err


def test_no_more_than_one_file_of_weights_is_in_memory(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_bytes = []

    def counting(*arguments: Any) -> Any:
        tensors = read_tensors(*arguments)
        read_bytes.append(sum(tensor.nbytes for tensor in tensors.values()))
        return tensors

    monkeypatch.setattr("lightning_mics.checkpoint.export.read_tensors", counting)
    out = exported(saved, tmp_path / "out", "--shard-size", SHARD_SIZE)
    assert len(read_bytes) == len(list(out.glob("*.safetensors"))) > 4
    assert max(read_bytes) <= SHARD_BYTES
    assert sum(read_bytes) == sum(parameter.numel() * 4 for parameter in make("gpt").parameters())


def tokenizer_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "vocab.txt").write_text(VOCAB_TXT)
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    (folder / "unrelated.txt").write_text("")
    return folder


def test_the_tokenizer_comes_along_from_where_it_is_said_to_be(saved: Any, tmp_path: Path, capsys: Any) -> None:
    folder = tokenizer_folder(tmp_path / "tokenizer")
    out = exported(saved, tmp_path / "out", "--tokenizer", str(folder), kind="bert")
    assert f"tokenizer from {folder}" in capsys.readouterr().out
    assert (
        AutoTokenizer.from_pretrained(out)("a d")["input_ids"]
        == AutoTokenizer.from_pretrained(folder)("a d")["input_ids"]
    )
    assert not (out / "unrelated.txt").exists()
    exported(saved, tmp_path / "without", kind="bert")
    assert "without a tokenizer; --tokenizer FOLDER adds one" in capsys.readouterr().out


def _copy(saved: dict[str, Any], path: Path, *, kind: str = "gpt", **meta: Any) -> Path:
    """A copy of a checkpoint with other entries in its ``meta.pt``, and a manifest that vouches for it."""
    shutil.copytree(saved["folder"] / f"{kind}.ckpt", path)
    content = torch.load(path / "meta.pt", weights_only=True) | meta
    torch.save({name: value for name, value in content.items() if value is not None}, path / "meta.pt")
    files = {name: FileFacts.of(path / name) for name in Manifest.read(path).files}
    Manifest.now(files, world_size=2).write(path)
    return path


def test_a_checkpoint_may_name_the_folder_of_its_tokenizer(saved: Any, tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path / "tokenizer")
    path = _copy(saved, tmp_path / "a.ckpt", kind="bert", tokenizer=str(folder))
    assert main([str(path), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    network = torch.load(path / "meta.pt")[NETWORK_KEY] | {"name_or_path": str(folder)}
    path = _copy(saved, tmp_path / "b.ckpt", kind="bert", **{NETWORK_KEY: network})
    assert main([str(path), str(tmp_path / "out of b")]) == 0
    assert (tmp_path / "out of b" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def _save_plain(folder: Path) -> None:
    groups = create_partition_groups(Topology(world_size=2, ranks_per_node=2, partition_size=2), device_type="cpu")
    both = torch.nn.Sequential(OrderedDict(a=make("gpt"), b=TinyLM()))
    for name, model in {"gpt": make("gpt"), "both": both}.items():
        shard_model(model, groups)
        checkpoint.save_sharded(folder / name, model_state=model.state_dict(), optimizer_states=[], meta={})


def test_a_config_and_a_prefix_can_stand_in_for_what_a_checkpoint_does_not_say(tmp_path: Path, capsys: Any) -> None:
    run_ranks(2, _save_plain, tmp_path)
    make("gpt").save_pretrained(tmp_path / "theirs")
    config = ["--config", str(tmp_path / "theirs")]
    assert main([str(tmp_path / "gpt"), str(tmp_path / "of gpt"), *config, "--prefix", ""]) == 0
    assert main([str(tmp_path / "both"), str(tmp_path / "of both"), *config]) == 2
    assert "begin with a, b; pass --prefix" in capsys.readouterr().err
    assert main([str(tmp_path / "both"), str(tmp_path / "of both"), *config, "--prefix", "a."]) == 0
    for out in ("of gpt", "of both"):
        network = AutoModelForCausalLM.from_pretrained(tmp_path / out)
        assert all(map(torch.equal, network.parameters(), make("gpt").parameters()))
        assert (tmp_path / out / "generation_config.json").is_file()


def test_a_prefix_is_found_if_all_names_have_it_and_the_config_alone_is_missing(saved: Any, tmp_path: Path) -> None:
    path = _copy(saved, tmp_path / "a.ckpt", **{NETWORK_KEY: None})
    make("gpt").config.save_pretrained(tmp_path / "config")
    assert main([str(path), str(tmp_path / "out"), "--config", str(tmp_path / "config" / "config.json")]) == 0
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        logits = network(input_ids=tokens(4, seed=3)).logits
    assert (logits - saved["logits"]["gpt"]).abs().max() < 1e-6


# -- refusals ---------------------------------------------------------------------------------------------------------


def _refusal(capsys: Any, *arguments: Any) -> tuple[int, str]:
    capsys.readouterr()
    status = main(list(map(str, arguments)))
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--dtype", "int8"], "--dtype int8 is not one of float32, bfloat16, float16, float64"),
        (["--shard-size", "5 loaves"], "5 loaves"),
        (["--config", "nowhere"], "No such file or directory: 'nowhere'"),
        (["--prefix", "net."], "none of the model's names begins with 'net.'; they begin with network"),
        (["--tokenizer", "."], "has no files of a tokenizer, such as tokenizer.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_option_that_does_not_fit_is_refused_and_nothing_is_left(
    saved: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, options: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    status, error = _refusal(capsys, saved["folder"] / "gpt.ckpt", tmp_path / "out", *options)
    assert status == 2 and said in error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_checkpoint_or_is_taken_is_refused(saved: Any, tmp_path: Path, capsys: Any) -> None:
    status, error = _refusal(capsys, tmp_path, tmp_path / "out")
    assert status == 2 and f"{tmp_path} is not a sharded checkpoint" in error
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    status, error = _refusal(capsys, saved["folder"] / "gpt.ckpt", tmp_path / "out")
    assert status == 2 and "exists already and is not an empty folder" in error
    assert (tmp_path / "out" / "mine").read_text() == "mine"
    (tmp_path / "out" / "mine").unlink()
    exported(saved, tmp_path / "out")


def test_a_checkpoint_without_a_config_is_refused_unless_one_is_given(saved: Any, tmp_path: Path, capsys: Any) -> None:
    for number, broken in enumerate([None, {"prefix": 5}, {}]):
        path = _copy(saved, tmp_path / f"{number}.ckpt", **{NETWORK_KEY: broken})
        status, error = _refusal(capsys, path, tmp_path / "out")
        assert status == 2 and "does not record the configuration of its network" in error and "pass --config" in error
    (tmp_path / "config.json").write_text("{}")
    status, error = _refusal(capsys, path, tmp_path / "out", "--config", tmp_path)
    assert status == 2 and "has no model_type" in error


def test_a_damaged_checkpoint_is_refused_by_the_name_of_the_file(saved: Any, tmp_path: Path, capsys: Any) -> None:
    path = _copy(saved, tmp_path / "a.ckpt")
    with (path / "__1_0.distcp").open("r+b") as file:
        file.seek(100)
        byte = file.read(1)
        file.seek(100)
        file.write(bytes([byte[0] ^ 1]))
    status, error = _refusal(capsys, path, tmp_path / "out")
    assert status == 1 and "is corrupted: __1_0.distcp was altered" in error
    (path / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="cannot be checked whether it is complete"):
        main([str(path), str(tmp_path / "out")])


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


def test_a_hostile_checkpoint_runs_nothing(saved: Any, tmp_path: Path, capsys: Any) -> None:
    path = _copy(saved, tmp_path / "a.ckpt", payload=Payload(tmp_path / "ran"))
    status, error = _refusal(capsys, path, tmp_path / "out")
    assert status == 1 and "mkdir, which is neither plain data nor a tensor" in error
    make("gpt").config.save_pretrained(tmp_path / "config")
    exported_with_config = main([str(path), str(tmp_path / "out"), "--config", str(tmp_path / "config")])
    assert exported_with_config == 0 and not (tmp_path / "ran").exists()


# -- what a checkpoint says of its network ----------------------------------------------------------------------------


def test_the_network_is_found_wherever_it_is_if_there_is_one() -> None:
    gpt = make("gpt")
    inside = torch.nn.ModuleDict({"a": torch.nn.ModuleDict({"b": gpt}), "c": TinyLM()})
    found = describe_network(inside)
    assert found is not None and (found.prefix, found.architecture) == ("a.b.", "GPT2LMHeadModel")
    assert found.left_out == ["lm_head.weight"]
    compiled = describe_network(torch.nn.ModuleDict({"a": torch.compile(gpt)}))
    assert compiled is not None and (compiled.prefix, compiled.left_out) == ("a.", ["lm_head.weight"])
    alone = describe_network(gpt)
    assert alone is not None and alone.prefix == ""
    assert describe_network(torch.nn.ModuleDict({"a": gpt, "b": make("bert")})) is None
    assert describe_network(TinyLM()) is None


def test_a_config_that_cannot_be_written_does_not_stop_a_run_from_saving(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any) -> str:
        raise TypeError("not JSON")

    monkeypatch.setattr(type(GPT), "to_json_string", fail)
    with pytest.warns(UserWarning, match="so an export will need --config: TypeError"):
        assert describe_network(make("gpt")) is None
    assert describe_network(make("bert")) is not None and BERT.model_type == "bert"


def test_the_command_runs(saved: Any, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "lightning_mics",
        "export",
        str(saved["folder"] / "gpt.ckpt"),
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "model.safetensors" in done.stdout and (tmp_path / "out" / "config.json").is_file()
