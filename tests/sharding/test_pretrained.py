"""Starting from a folder of ``transformers``: the same losses, each rank reads its own shards, and errors."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_mics import Topology, create_partition_groups, load_pretrained, shard_model
from tests.support.campaign import campaign
from tests.support.fits import Recorder, refusal, same, whole_weights
from tests.support.forked import run_ranks
from tests.support.models import VOCAB, tokens
from tests.support.networks import NETWORKS, NetworkModule, make
from tests.support.trainers import make_trainer, mics, on_ranks

FORMS = {"one file": "1GB", "several files": "1KB"}


KINDS = ("gpt", "bert")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``save_pretrained`` makes of networks whose weights are neither zero nor one anywhere."""
    root = tmp_path_factory.mktemp("folders")
    for kind in NETWORKS:
        network = make(kind)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.normal_(std=0.3)
        for form, size in FORMS.items():
            network.save_pretrained(root / f"{kind}, {form}", max_shard_size=size)
        network.save_pretrained(root / kind)
    return root


def data() -> DataLoader[Any]:
    """Two batches of the same 8 sequences on any number of ranks."""
    sampler: DistributedSampler[Any] = DistributedSampler(tokens(16), shuffle=False)
    return DataLoader(tokens(16), batch_size=8 // dist.get_world_size(), sampler=sampler)


def fit(folder: Path, module: NetworkModule, *, seed: int = 0, epochs: int = 1, ckpt_path: Any = None) -> Recorder:
    torch.manual_seed(seed)
    recorder = Recorder()
    options = {"callbacks": [recorder], "use_distributed_sampler": False, "max_epochs": epochs}
    make_trainer(folder, strategy=mics(partition_size=2), **options).fit(module, data(), ckpt_path=ckpt_path)
    return recorder


# -- the numbers of transformers --------------------------------------------------------------------------------------


STARTS = [("gpt", "several files"), ("bert", "one file")]  # how weights are stored is nothing that a kind knows


MORE_STARTS = [("gpt", "one file"), ("bert", "several files")]


def _first_steps(folders: Path, starts: list[tuple[str, str]]) -> dict[str, Any]:
    facts = {}
    for kind, form in starts:
        recorder = fit(folders, NetworkModule(kind, folder=folders / f"{kind}, {form}"))
        facts[f"{kind}, {form}"] = (recorder.losses, recorder.started)
    for kind in KINDS:
        facts[kind] = (fit(folders, NetworkModule(kind)).losses, {})
    return facts


@pytest.fixture(scope="module")
def first_steps(folders: Path, in_campaign: bool) -> dict[str, Any]:
    return on_ranks(_first_steps, folders, STARTS + MORE_STARTS if in_campaign else STARTS)[0]


@pytest.mark.parametrize(("kind", "form"), [*STARTS, *(campaign(*start) for start in MORE_STARTS)])
def test_the_losses_equal_those_of_transformers_in_one_process(
    folders: Path, first_steps: Any, kind: str, form: str
) -> None:
    losses, started = first_steps[f"{kind}, {form}"]
    network = NETWORKS[kind][0].from_pretrained(folders / kind).train()
    assert all(torch.equal(started[f"network.{name}"], value) for name, value in network.state_dict().items())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    expected = []
    for batch in torch.stack(list(torch.utils.data.Subset(tokens(16), range(16)))).split(8):
        loss = network(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, abs=1e-6)
    assert abs(losses[0] - first_steps[kind][0][0]) > 1e-3  # from the seed it would be another
    assert abs(losses[1] - losses[0]) > 1e-3


# -- each rank its own part -------------------------------------------------------------------------------------------


class Counting:
    """Counts what is read through ``safetensors.safe_open``, in bytes."""

    def __init__(self) -> None:
        self.reads: list[int] = []

    def install(self) -> None:
        counting, real = self, safetensors.safe_open

        class Opened:
            def __init__(self, *arguments: Any, **options: Any) -> None:
                self.real = real(*arguments, **options)

            def __enter__(self) -> Any:
                self.real.__enter__()
                return self

            def __exit__(self, *error: Any) -> None:
                self.real.__exit__(*error)

            def keys(self) -> Any:
                return self.real.keys()

            def metadata(self) -> Any:
                return self.real.metadata()

            def get_tensor(self, name: str) -> Tensor:
                return counting.count(self.real.get_tensor(name))

            def get_slice(self, name: str) -> Any:
                return Slice(self.real.get_slice(name))

        class Slice:
            def __init__(self, real: Any) -> None:
                self.real, self.get_shape, self.get_dtype = real, real.get_shape, real.get_dtype

            def __getitem__(self, place: Any) -> Tensor:
                return counting.count(self.real[place])

        safetensors.safe_open = Opened

    def count(self, tensor: Tensor) -> Tensor:
        self.reads.append(tensor.nbytes)
        return tensor


def _count_reads(folder: Path, partition_size: int) -> list[int]:
    counting = Counting()
    counting.install()
    network_class, config = NETWORKS["gpt"]
    with torch.device("meta"):
        network = network_class(config)
    load_pretrained(network, folder)
    topology = Topology(world_size=4, ranks_per_node=2, partition_size=partition_size)
    shard_model(network, create_partition_groups(topology, device_type="cpu"))
    return counting.reads


@pytest.mark.parametrize("partition_size", [1, 2, 4])
def test_each_rank_reads_its_part_and_a_partition_group_reads_each_byte_once(
    folders: Path, partition_size: int, run_shared: Callable[..., list[Any]]
) -> None:
    reads = run_shared(4, _count_reads, folders / "gpt, several files", partition_size)
    total = sum(parameter.nbytes for parameter in make("gpt").parameters())
    largest = max(parameter.nbytes for parameter in make("gpt").parameters())
    by_rank = [sum(of_rank) for of_rank in reads]
    rows = max(parameter.nbytes // len(parameter) for parameter in make("gpt").parameters())
    assert sum(by_rank) == total * 4 // partition_size
    assert max(max(of_rank) for of_rank in reads) <= largest / partition_size + rows
    assert max(by_rank) < total / partition_size * 1.3  # rows do not divide evenly in so small a network


WIDE = GPT2Config(vocab_size=VOCAB, n_positions=8, n_embd=96, n_layer=3, n_head=2)


def _memory_to_read(folder: Path) -> tuple[int, int]:
    """Bytes of all tensors allocated while weights are read, and bytes of this rank's shards."""
    network = GPT2LMHeadModel(WIDE)
    shard_model(
        network, create_partition_groups(Topology(world_size=2, ranks_per_node=2, partition_size=2), device_type="cpu")
    )
    with torch.profiler.profile(profile_memory=True) as profile:
        load_pretrained(network, folder)
    made = [event.self_cpu_memory_usage for event in profile.key_averages() if event.self_cpu_memory_usage > 0]
    return sum(made), sum(parameter.to_local().nbytes for parameter in network.parameters())


def test_reading_makes_no_copy_of_the_weights_in_memory(tmp_path: Path) -> None:
    GPT2LMHeadModel(WIDE).save_pretrained(tmp_path)
    for made, own_part in run_ranks(2, _memory_to_read, tmp_path):
        assert 0 < made < own_part / 20  # messages between ranks


# -- heads and bodies -------------------------------------------------------------------------------------------------


def _heads(folders: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for seed in (0, 1):
        module = NetworkModule("bert that classifies", folder=folders / "bert without head", strict=False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            facts[f"new head, seed {seed}"] = fit(folders, module, seed=seed).started
        facts["warnings"] = [str(entry.message) for entry in caught if "keep their values" in str(entry.message)]
    facts["from the seed alone"] = fit(folders, NetworkModule("bert that classifies")).started
    module = NetworkModule("bert that classifies", folder=folders / "bert without head")
    facts["strict"] = refusal(lambda: fit(folders, module))
    return facts


@pytest.fixture(scope="module")
def heads(folders: Path) -> list[dict[str, Any]]:
    return on_ranks(_heads, folders)


def test_a_new_head_keeps_its_initial_weights_and_the_body_is_read(folders: Path, heads: list[dict[str, Any]]) -> None:
    one, other, alone = (heads[0][name] for name in ("new head, seed 0", "new head, seed 1", "from the seed alone"))
    head = [name for name in one if "classifier.weight" in name]
    body = load_file(folders / "bert without head" / "model.safetensors")
    assert head and len(body) == len(one) - 2
    for name, value in body.items():
        assert torch.equal(one[f"network.bert.{name}"], value) and torch.equal(other[f"network.bert.{name}"], value)
        assert not torch.equal(alone[f"network.bert.{name}"], value)
    for name in head:
        assert torch.equal(one[name], alone[name]) and not torch.equal(other[name], one[name])
    assert all(same(of_rank["new head, seed 0"], one) for of_rank in heads)


def test_a_new_head_is_rejected_unless_strict_is_false_which_warns_on_rank_0(heads: list[dict[str, Any]]) -> None:
    for of_rank in heads:
        assert (
            of_rank["strict"].startswith("RuntimeError: ") and "2 are missing ['classifier.bias'" in of_rank["strict"]
        )
        assert "pass strict=False if the missing ones are new, such as a head" in of_rank["strict"]
    assert ["2 tensors are not in" in text for text in heads[0]["warnings"]] == [True]
    assert [of_rank["warnings"] for of_rank in heads[1:]] == [[]] * 3


def test_a_body_starts_from_a_network_with_a_head_and_a_tied_head_from_a_body(folders: Path) -> None:
    body = make("gpt without head", seed=1)
    loaded = load_pretrained(body, folders / "gpt")
    assert loaded.missing == [] and loaded.unused == []
    assert torch.equal(body.wte.weight, load_file(folders / "gpt" / "model.safetensors")["transformer.wte.weight"])
    tied = make("gpt", seed=1)
    assert load_pretrained(tied, folders / "gpt without head").missing == []
    assert torch.equal(tied.lm_head.weight, load_file(folders / "gpt without head" / "model.safetensors")["wte.weight"])
    body = make("bert without head", seed=1)
    loaded = load_pretrained(body, folders / "bert", strict=False)
    assert loaded.missing == ["pooler.dense.bias", "pooler.dense.weight"] and "cls.predictions.bias" in loaded.unused


def test_names_of_the_first_berts_are_translated(folders: Path, tmp_path: Path) -> None:
    weights = load_file(folders / "bert" / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in weights.items()
    }
    assert old.keys() != weights.keys()
    save_file(old, tmp_path / "model.safetensors")
    network = make("bert", seed=1)
    assert load_pretrained(network, tmp_path / "model.safetensors").missing == []
    assert all(torch.equal(network.state_dict()[name], value) for name, value in weights.items())


# -- checkpoints and stages -------------------------------------------------------------------------------------------


def _resume(folders: Path, folder: Path) -> dict[str, Any]:
    module = NetworkModule(folder=folders / "gpt")
    trainer = make_trainer(folder)
    trainer.fit(module, data())
    trainer.save_checkpoint(folder / "a.ckpt")
    facts = {"saved": whole_weights(module)}
    again = NetworkModule(folder=folders / "gpt")
    facts["resumed"] = fit(folder, again, ckpt_path=folder / "a.ckpt", epochs=2).started
    for ckpt_path in (None, folder / "a.ckpt"):
        module = NetworkModule(folder=folders / "gpt")
        make_trainer(folder).validate(module, data(), ckpt_path=ckpt_path, verbose=False)
        facts[f"validated {ckpt_path and ckpt_path.name}"] = whole_weights(module)
    return facts


def test_a_checkpoint_takes_precedence_over_the_folder_which_evaluation_alone_reads(
    folders: Path, tmp_path: Path
) -> None:
    facts = on_ranks(_resume, folders, tmp_path)[0]
    pretrained = {f"network.{name}": value for name, value in load_file(folders / "gpt" / "model.safetensors").items()}
    assert same(facts["resumed"], facts["saved"]) and same(facts["validated a.ckpt"], facts["saved"])
    validated = facts["validated None"]
    assert all(torch.equal(validated[name], value) for name, value in pretrained.items())
    assert not any(torch.equal(facts["saved"][name], value) for name, value in pretrained.items())


# -- errors -----------------------------------------------------------------------------------------------------------


def _broken(folders: Path, path: Path, problem: str) -> str:
    source = folders / "gpt, several files"
    shutil.copytree(source, path)
    first = sorted(path.glob("*.safetensors"))[0]
    if problem == "only a pickle":
        for file in path.glob("*.safetensors*"):
            file.unlink()
        torch.save({}, path / "pytorch_model.bin")
    elif problem == "no weights":
        for file in path.glob("*.safetensors*"):
            file.unlink()
    elif problem == "a file lost":
        first.unlink()
    elif problem == "a bad index":
        (path / "model.safetensors.index.json").write_text("[]")
    elif problem == "a file cut short":
        first.write_bytes(first.read_bytes()[:-1])
    elif problem == "quantized":
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    elif problem == "other names":
        (path / "model.safetensors.index.json").unlink()
        save_file({"x": torch.ones(2)}, path / "model.safetensors")
    elif problem == "another width":
        wider = {name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in load_file(first).items()}
        save_file(wider, first)
    return refusal(lambda: load_pretrained(make("gpt"), path))


@pytest.mark.parametrize(
    ("problem", "said"),
    {
        "only a pickle": "FileNotFoundError: .* holds its weights in pytorch_model.bin, a pickle, .* convert it once",
        "no weights": "FileNotFoundError: .* has no model.safetensors; pass a folder written by `save_pretrained`",
        "a file lost": "FileNotFoundError: .* has no model-00001-of-",
        "a bad index": "RuntimeError: .*model.safetensors.index.json is not an index of safetensors files: TypeError",
        "a file cut short": "RuntimeError: .*model-00001-of-.*.safetensors cannot be read: ",
        "quantized": "ValueError: .* are quantized .*config.json.; use the original weights",
        "other names": "RuntimeError: .* has 0 of the network's 41 tensors: 41 are missing .* 1 are unknown .*'x'.* "
        "if transformers renames them .* save_original_format=False",
        "another width": r"ValueError: .* another shape .* with \[\d+.*\] in the folder and \[\d+.*\] in the network; "
        "make the network from",
    }.items(),
)
def test_an_unreadable_folder_is_rejected_with_a_remedy(folders: Path, tmp_path: Path, problem: str, said: str) -> None:
    found = _broken(folders, tmp_path / "broken", problem)
    assert re.match(said, found), found


@pytest.mark.parametrize("kind", ["gpt", "gpt on the meta device"])
def test_a_folder_without_weights_is_rejected_before_anything_is_sharded(tmp_path: Path, kind: str) -> None:
    network = make("gpt").to("meta") if "meta" in kind else make("gpt")
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        load_pretrained(network, tmp_path)


def test_weights_are_loaded_after_sharding_if_a_part_is_on_the_meta_device_and_now_if_not(
    folders: Path,
) -> None:
    stored = load_file(folders / "gpt" / "model.safetensors")["transformer.wte.weight"]
    network = make("gpt", seed=1)
    network.transformer.h[0].to("meta")
    assert load_pretrained(network, folders / "gpt") is None
    assert not torch.equal(network.transformer.wte.weight, stored)
    network = make("gpt", seed=1)
    assert load_pretrained(network, folders / "gpt").missing == []
    assert torch.equal(network.transformer.wte.weight, stored)


def _one_rank_fails(folder: Path, own: Path) -> str:
    network = make("gpt")
    shard_model(
        network, create_partition_groups(Topology(world_size=2, ranks_per_node=2, partition_size=2), device_type="cpu")
    )
    mine = own / str(dist.get_rank())
    shutil.copytree(folder, mine)
    if dist.get_rank() == 1:
        (mine / "model.safetensors").unlink()
    return refusal(lambda: load_pretrained(network, mine))


def test_a_rank_that_cannot_read_makes_all_ranks_raise(folders: Path, tmp_path: Path) -> None:
    for error in run_ranks(2, _one_rank_fails, folders / "gpt", tmp_path):
        assert error.startswith("FileNotFoundError: ")
