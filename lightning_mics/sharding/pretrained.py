"""Loading weights saved by ``transformers``: each rank reads its own shards only.

::

    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    load_pretrained(network, folder)        # read when the network, or a model around it, is sharded
    shard_model(network, groups)            # or Trainer(strategy="mics")

Files are read by torch's ``HuggingFaceStorageReader``, one reader per file: the reader of a folder reads every
safetensors file in it, listed in the index or not (``read_metadata`` in torch's ``hf_storage.py``), and its errors do
not name the file. Names and shapes are matched here, before anything is written to a parameter.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from lightning_mics.collectives.agreement import on_all_ranks

ONE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # names of the first BERTs
_SOURCE = "_deferred_weights"
_BASE = "base_layer"  # of a layer with adapters


@dataclass(frozen=True)
class Loaded:
    """The names without a counterpart in a load.

    Attributes:
        missing: FQNs of the network that the folder lacks; these tensors keep their values.
        unused: FQNs of the folder that the network lacks.
    """

    missing: list[str]
    unused: list[str]


@dataclass(frozen=True)
class _Source:
    folder: Path
    strict: bool


def load_pretrained(network: nn.Module, folder: str | Path, *, strict: bool = True) -> Loaded | None:
    """Load weights of ``transformers`` into ``network``: now, or when it is sharded if it is on the meta device.

    Every rank calls it, before the first forward. Each rank reads its own shards of sharded parameters. A checkpoint
    that is loaded later, as by ``ckpt_path``, replaces the weights. FQNs with and without the network's
    ``base_model_prefix`` are the same, so a network with a head can load weights without one, and vice versa.

    Args:
        network: The complete network, sharded or not. If any of its parameters is on the meta device, the weights are
            read when it, or a model around it, is sharded.
        folder: Folder of ``save_pretrained``, with ``model.safetensors`` or several files and their index; or one file.
        strict: Whether the folder must have all the network's parameters. Otherwise those that it lacks keep their
            values, and rank 0 warns.

    Returns:
        The names without a counterpart; None if the weights are read later.

    Raises:
        FileNotFoundError: If ``folder`` holds no weights in safetensors files.
        ValueError: If the weights are quantized, or have other shapes than the network's.
        RuntimeError: If names are missing and ``strict``, if none fits, or if a file cannot be read. If weights are
            read later, errors about their content are raised then.
    """
    source = _Source(Path(folder), strict)
    base_model: Any = getattr(network, "get_base_model", None)
    network = network if base_model is None else base_model()  # of `peft`
    if any(parameter.is_meta for parameter in network.parameters()):
        _files(source.folder)
        setattr(network, _SOURCE, source)
        return None
    return _load_on_all_ranks(network, source)


def load_sources(model: nn.Module) -> set[str]:
    """Load the weights that :func:`load_pretrained` has deferred until ``model`` is sharded; every rank calls it.

    Returns:
        FQNs of the parameters that were read.
    """
    read: set[str] = set()
    for prefix, module in list(model.named_modules()):
        source = vars(module).pop(_SOURCE, None)
        if source is not None:
            missing = set(_load_on_all_ranks(module, source).missing)
            names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
            found = [name for name in names if name.replace(f".{_BASE}", "").replace("_orig_mod.", "") not in missing]
            read.update(f"{prefix}.{name}".lstrip(".").replace("_orig_mod.", "") for name in found)
    return read


@torch.no_grad()
def _load_on_all_ranks(network: nn.Module, source: _Source) -> Loaded:
    load = partial(_load, network, source.folder, strict=source.strict)
    if not dist.is_initialized():
        return load()
    return on_all_ranks(load)[dist.get_rank()]  # so that all ranks raise if one cannot read a file


def _load(network: nn.Module, folder: Path, *, strict: bool) -> Loaded:
    _check_not_quantized(folder)
    files = [_StoredFile.open(file) for file in _files(folder)]
    shapes = {name: shape for file in files for name, shape in file.shapes().items()}
    tensors = _tensors(network)
    source_of, unused = _match(tensors, shapes, base=getattr(network, "base_model_prefix", ""))
    missing = sorted(tensors.keys() - source_of.keys())
    _check_names(folder, missing, unused, found=len(source_of), strict=strict)
    _check_shapes(folder, tensors, source_of, shapes)
    _read(tensors, source_of, files)
    if missing and _rank() == 0:
        warnings.warn(f"{len(missing)} tensors are not in {folder} and keep their values: {missing[:3]}", stacklevel=2)
    return Loaded(missing=missing, unused=unused)


# -- the folder -------------------------------------------------------------------------------------------------------


def _files(folder: Path) -> list[Path]:
    files = _listed(folder)
    absent = [file.name for file in files if not file.is_file()]
    if not absent:
        return files
    pickled = sorted(file.name for file in folder.glob("*.bin"))
    if pickled and absent == [ONE_FILE]:
        raise FileNotFoundError(
            f"{folder} holds its weights in {pickled[0]}, a pickle, which may run code and cannot be read in parts; "
            "convert it once, with the model's own class of transformers: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    raise FileNotFoundError(f"{folder} has no {absent[0]}; pass a folder written by `save_pretrained` of transformers")


def _listed(folder: Path) -> list[Path]:
    if folder.suffix == ".safetensors":
        return [folder]
    if not (folder / INDEX_FILE).is_file():
        return [folder / ONE_FILE]
    try:
        names = set(json.loads((folder / INDEX_FILE).read_text())["weight_map"].values())
        return [folder / Path(name).name for name in sorted(names)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RuntimeError(f"{folder / INDEX_FILE} is not an index of safetensors files: {error!r}") from None


def _check_not_quantized(folder: Path) -> None:
    config = folder / "config.json"
    if config.is_file() and json.loads(config.read_text()).get("quantization_config"):
        raise ValueError(f"the weights in {folder} are quantized (see its config.json); use the original weights")


# -- names and shapes -------------------------------------------------------------------------------------------------


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """The network's persistent tensors by FQN; tied tensors under each of their FQNs.

    Layers with adapters of ``peft`` have the tensors of their base layers, under the names that these had before.
    """
    persistent = network.state_dict().keys()
    every = chain(network.named_parameters(remove_duplicate=False), network.named_buffers(remove_duplicate=False))
    found = {name.replace("_orig_mod.", ""): tensor for name, tensor in every if name in persistent}
    with_adapters = [f"{name}." for name, module in network.named_modules() if _BASE in module._modules]
    if not with_adapters:
        return found
    bases = {f"{name.replace('_orig_mod.', '')}{_BASE}." for name in with_adapters}
    adapters = tuple(name.removesuffix(f"{_BASE}.") for name in bases)
    renamed = {}
    for name, tensor in found.items():
        before, base, rest = name.rpartition(f"{_BASE}.")
        if base and before + base in bases:
            renamed[before + rest] = tensor
        elif not name.startswith(adapters):
            renamed[name] = tensor
    return renamed


def _match(tensors: Mapping[str, Tensor], stored: Iterable[str], *, base: str) -> tuple[dict[str, str], list[str]]:
    """The folder's FQN for each FQN of the network, and the folder's FQNs that the network does not have."""
    source_of: dict[str, str] = {}
    unused = []
    for source in stored:
        name = _current_name(source)
        candidates = (name, name.removeprefix(f"{base}."), f"{base}.{name}")
        target = next((candidate for candidate in candidates if candidate in tensors), None)
        if target is None:
            unused.append(source)
        else:
            source_of[target] = source
    by_tensor = {tensors[name]: source for name, source in source_of.items()}  # tied: one of the names is enough
    return {name: by_tensor[tensor] for name, tensor in tensors.items() if tensor in by_tensor}, sorted(unused)


def _current_name(name: str) -> str:
    for old, new in OLD_NAMES.items():
        name = name.replace(old, new)
    return name


def _check_names(folder: Path, missing: list[str], unused: list[str], *, found: int, strict: bool) -> None:
    if found and (not missing or not strict):
        return
    raise RuntimeError(
        f"{folder} has {found} of the network's {found + len(missing)} tensors: {len(missing)} are missing "
        f"{missing[:3]}, {len(unused)} are unknown to the network {unused[:3]}; pass strict=False if the "
        "missing ones are new, such as a head, and may keep their initial values; if transformers renames them when "
        "loading, load and save_pretrained them once in transformers, with save_original_format=False"
    )


def _check_shapes(
    folder: Path, tensors: Mapping[str, Tensor], source_of: Mapping[str, str], shapes: Mapping[str, list[int]]
) -> None:
    other = [name for name, source in source_of.items() if list(tensors[name].shape) != shapes[source]]
    if other:
        name = min(other)
        raise ValueError(
            f"{len(other)} tensors have another shape in {folder} than in the network, for instance {name!r} with "
            f"{shapes[source_of[name]]} in the folder and {list(tensors[name].shape)} in the network; make the network "
            "from the folder's config.json"
        )


# -- reading ----------------------------------------------------------------------------------------------------------


class _OneFile(FileSystem):
    """File system for a reader of one file."""

    def ls(self, path: Any) -> list[str]:
        """The file itself, in place of the files of a folder."""
        return [str(path)]


@dataclass(frozen=True)
class _StoredFile:
    """One safetensors file.

    Attributes:
        reader: DCP's reader of the file.
        metadata: Shape and dtype of each tensor, from the file's header.
    """

    reader: HuggingFaceStorageReader
    metadata: Metadata

    @classmethod
    def open(cls, file: Path) -> _StoredFile:
        """Read the header of ``file``."""
        from safetensors import SafetensorError  # imported here: nothing else needs the package

        reader = HuggingFaceStorageReader(str(file))
        reader.fs = _OneFile()
        try:
            return cls(reader, reader.read_metadata())
        except (SafetensorError, KeyError) as error:  # a KeyError for a dtype that torch does not have
            raise RuntimeError(f"{file} cannot be read: {error!r}") from error

    def shapes(self) -> dict[str, list[int]]:
        """The shape of each tensor, by name."""
        entries = self.metadata.state_dict_metadata.items()
        return {name: list(entry.size) for name, entry in entries if isinstance(entry, TensorStorageMetadata)}

    def read_into(self, targets: Mapping[str, Tensor]) -> None:
        """Read this rank's part of some tensors of the file, in place, without communication.

        Args:
            targets: Tensors to fill by their FQNs in the file, each [shape in the file]; sharded (DTensors) or not.
        """
        planner = DefaultLoadPlanner(flatten_state_dict=False)
        planner.set_up_planner(dict(targets), self.metadata, is_coordinator=True)
        self.reader.set_up_storage_reader(self.metadata, is_coordinator=True)
        self.reader.read_data(planner.create_local_plan(), planner)


def _read(tensors: Mapping[str, Tensor], source_of: Mapping[str, str], files: Iterable[_StoredFile]) -> None:
    """Fill each tensor of the network once, even if it has several names."""
    wanted = {source: tensors[name] for name, source in source_of.items()}
    for file in files:
        file.read_into({source: wanted[source] for source in file.shapes() if source in wanted})


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
