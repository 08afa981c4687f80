"""Starting from the weights that ``transformers`` has saved: each rank reads its own part of them, and no more.

::

    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    load_pretrained(network, folder)        # read when the network, or what it is inside of, is sharded
    shard_model(network, groups)            # or Trainer(strategy="mics")

Safetensors files are read in slices: of each tensor, the rows that this rank holds.
"""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_mics._torch.checkpoint import own_slices
from lightning_mics.collectives.agreement import on_all_ranks

ONE_FILE = "model.safetensors"


INDEX_FILE = "model.safetensors.index.json"


OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # of the first BERTs


_SOURCE = "_starts_from"


@dataclass(frozen=True)
class Loaded:
    """What did not meet its counterpart.

    Attributes:
        missing: Names of the model that the folder lacks; they keep the values they had.
        unused: Names of the folder that the model lacks.
    """

    missing: list[str]
    unused: list[str]


@dataclass(frozen=True)
class _Source:
    folder: Path
    strict: bool


def load_pretrained(network: nn.Module, folder: str | Path, *, strict: bool = True) -> Loaded | None:
    """Load weights of ``transformers`` into ``network``: at once, or on the meta device when it is sharded.

    Every rank calls it, before the first forward. Each rank reads its own part of what is sharded. A checkpoint that is
    loaded later, as by ``ckpt_path``, replaces the weights. Names with and without the network's ``base_model_prefix``
    are the same, so a network with a head starts from one without, and the other way round.

    Args:
        network: The whole network, sharded or not. If any of its parameters is on the meta device, the weights are read
            when it, or a model that it is inside of, is sharded.
        folder: What ``save_pretrained`` writes: ``model.safetensors``, or several files and their index. Or one such
            file.
        strict: Whether the folder must have all the network's parameters. Off, those that it lacks keep their values,
            and rank 0 warns.

    Returns:
        The names that had no counterpart; None if the weights are to be read later.

    Raises:
        FileNotFoundError: If ``folder`` holds no weights in safetensors files.
        ValueError: If the weights are quantized, or have other shapes than the network's.
        RuntimeError: If names are missing and ``strict``, if none fits, or if a file cannot be read. Where weights are
            read later, errors about their content are raised then.
    """
    source = _Source(Path(folder), strict)
    if any(parameter.is_meta for parameter in network.parameters()):
        _files(source.folder)
        setattr(network, _SOURCE, source)
        return None
    return _load_on_all_ranks(network, source)


def load_sources(model: nn.Module) -> None:
    """Load what :func:`load_pretrained` has left for when ``model`` is sharded, as it now is; every rank calls it."""
    for module in list(model.modules()):
        source = vars(module).pop(_SOURCE, None)
        if source is not None:
            _load_on_all_ranks(module, source)


@torch.no_grad()
def _load_on_all_ranks(network: nn.Module, source: _Source) -> Loaded:
    load = partial(_load, network, source.folder, strict=source.strict)
    if not dist.is_initialized():
        return load()
    return on_all_ranks(load)[dist.get_rank()]  # a file that one rank cannot read must not make the others wait for it


def _load(network: nn.Module, folder: Path, *, strict: bool) -> Loaded:
    _check_not_quantized(folder)
    stored = _stored(_files(folder))
    tensors = _tensors(network)
    source_of, unused = _match(tensors, stored, base=getattr(network, "base_model_prefix", ""))
    missing = sorted(tensors.keys() - source_of.keys())
    _check_names(folder, missing, unused, found=len(source_of), strict=strict)
    _check_shapes(folder, tensors, source_of, stored)
    _read(tensors, source_of, stored)
    if missing and _rank() == 0:
        warnings.warn(f"{len(missing)} tensors are not in {folder} and keep their values: {missing[:3]}", stacklevel=2)
    return Loaded(missing=missing, unused=unused)


# -- the folder -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stored:
    file: Path
    shape: list[int]


def _files(folder: Path) -> list[Path]:
    files = _listed(folder)
    lost = [file.name for file in files if not file.is_file()]
    if not lost:
        return files
    pickled = sorted(file.name for file in folder.glob("*.bin"))
    if pickled and lost == [ONE_FILE]:
        raise FileNotFoundError(
            f"{folder} holds its weights in {pickled[0]}, a pickle, which may run code and cannot be read in parts; "
            "convert it once, with the model's own class of transformers: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    raise FileNotFoundError(f"{folder} has no {lost[0]}; give a folder that `save_pretrained` of transformers has made")


def _listed(folder: Path) -> list[Path]:
    if folder.suffix == ".safetensors":
        return [folder]
    if not (folder / INDEX_FILE).is_file():
        return [folder / ONE_FILE]
    try:
        names = set(json.loads((folder / INDEX_FILE).read_text())["weight_map"].values())
        return [folder / Path(name).name for name in sorted(names)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RuntimeError(f"{folder / INDEX_FILE} is no index of safetensors files: {error!r}") from None


def _stored(files: Iterable[Path]) -> dict[str, _Stored]:
    """What the files hold, from their headers alone."""
    found = {}
    for file in files:
        with _opened(file) as content:
            for name in content.keys():  # noqa: SIM118 - not a dict
                found[name] = _Stored(file, content.get_slice(name).get_shape())
    return found


def _opened(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open  # only who starts from such files needs the package

    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise RuntimeError(f"{file} cannot be read: {error}") from error


def _check_not_quantized(folder: Path) -> None:
    config = folder / "config.json"
    if config.is_file() and json.loads(config.read_text()).get("quantization_config"):
        raise ValueError(f"the weights in {folder} are quantized (see its config.json); training needs the original")


# -- names and shapes -------------------------------------------------------------------------------------------------


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """What checkpoints hold of the network, by name; tied tensors by one name only, followed by their others."""
    kept = network.state_dict().keys()
    every = chain(network.named_parameters(remove_duplicate=False), network.named_buffers(remove_duplicate=False))
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in every if name in kept}


def _match(
    tensors: Mapping[str, Tensor], stored: Mapping[str, _Stored], *, base: str
) -> tuple[dict[str, str], list[str]]:
    """For each name of the network the folder's name, and the folder's names that nobody wants."""
    source_of: dict[str, str] = {}
    unused = []
    for source in stored:
        name = _modern(source)
        candidates = (name, name.removeprefix(f"{base}."), f"{base}.{name}")
        target = next((candidate for candidate in candidates if candidate in tensors), None)
        if target is None:
            unused.append(source)
        else:
            source_of[target] = source
    by_tensor = {tensors[name]: source for name, source in source_of.items()}  # tied: one of the names is enough
    return {name: by_tensor[tensor] for name, tensor in tensors.items() if tensor in by_tensor}, sorted(unused)


def _modern(name: str) -> str:
    for old, new in OLD_NAMES.items():
        name = name.replace(old, new)
    return name


def _check_names(folder: Path, missing: list[str], unused: list[str], *, found: int, strict: bool) -> None:
    if found and (not missing or not strict):
        return
    raise RuntimeError(
        f"{folder} has {found} of the network's {found + len(missing)} tensors: {len(missing)} are missing "
        f"{missing[:3]}, {len(unused)} are unknown to the network {unused[:3]}; if they are new, as a head is, pass "
        "strict=False to keep their first weights; if transformers renames them as it loads, let it load and "
        "save_pretrained them once with save_original_format=False"
    )


def _check_shapes(
    folder: Path, tensors: Mapping[str, Tensor], source_of: Mapping[str, str], stored: Mapping[str, _Stored]
) -> None:
    other = [name for name, source in source_of.items() if list(tensors[name].shape) != stored[source].shape]
    if other:
        name = min(other)
        raise ValueError(
            f"{len(other)} tensors have another shape in {folder} than in the network, for instance {name!r} with "
            f"{stored[source_of[name]].shape} there and {list(tensors[name].shape)} here; make the network from the "
            "folder's config.json"
        )


# -- reading ----------------------------------------------------------------------------------------------------------


def _read(tensors: Mapping[str, Tensor], source_of: Mapping[str, str], stored: Mapping[str, _Stored]) -> None:
    wanted: defaultdict[Path, dict[Tensor, str]] = defaultdict(dict)  # by file, each tensor once
    for name, source in source_of.items():
        wanted[stored[source].file][tensors[name]] = source
    for file, sources in wanted.items():
        with _opened(file) as content:
            for tensor, source in sources.items():
                _copy_own_part(tensor, content, source)


def _copy_own_part(tensor: Tensor, content: Any, name: str) -> None:
    if not isinstance(tensor, DTensor):
        tensor.copy_(content.get_tensor(name))
        return
    own = tensor.to_local()
    if own.numel():
        own.copy_(content.get_slice(name)[own_slices(tensor)])


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
