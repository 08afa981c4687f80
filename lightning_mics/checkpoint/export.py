"""From a sharded checkpoint to a folder that ``transformers`` loads with ``from_pretrained``.

python -m lightning_mics export outputs/gpt/checkpoints/last.ckpt exported

Writes the weights as safetensors files, with ``config.json`` and the tokenizer's files if there are any. Runs no code
of the checkpoint, needs neither its model nor a GPU, and holds one of the files in memory at a time. The exit status is
0 if the folder is complete, 1 if the checkpoint is corrupted or unsafe to read, 2 if it is not a checkpoint or the
options do not fit it.

torch's ``HuggingFaceStorageWriter`` would hold each file twice, as tensors and as the bytes of ``safetensors.save``
(``_write_files_from_queue`` in torch's ``filesystem.py``), and call a single file ``model-00001-of-00001.safetensors``
(``_gen_file_name`` in ``_hf_utils.py``). ``consolidate_safetensors_files`` reads safetensors files, which a sharded
checkpoint does not have, and converts no dtypes. So ``huggingface_hub`` splits the weights into files and
``safetensors`` writes them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from lightning_mics.checkpoint.content.trained_only import left_out
from lightning_mics.checkpoint.errors import DamagedCheckpointError, UnsafeCheckpointError
from lightning_mics.checkpoint.foreign.folders import holds_shards
from lightning_mics.checkpoint.opening import OpenCheckpoint, open_checkpoint
from lightning_mics.checkpoint.origin import saved_network
from lightning_mics.checkpoint.storage.folder import META_FILE
from lightning_mics.checkpoint.storage.path import StoragePath, storage_path
from lightning_mics.checkpoint.whole_model import read_tensors, stored_current_model, stored_model

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
TOKENIZER_KEY = "tokenizer"  # in a checkpoint: the folder of its tokenizer

DTYPES = ("float32", "bfloat16", "float16", "float64")


def export(
    checkpoint: StoragePath,
    out: Path,
    *,
    shard_size: str = "5GB",
    dtype: str | None = None,
    config: Path | None = None,
    prefix: str | None = None,
    tokenizer: Path | None = None,
    current: bool = False,
) -> Path | None:
    """Write the network in a sharded checkpoint to the folder ``out``, which appears when it is complete.

    If the checkpoint holds an average of weights, as with Lightning's ``EMAWeightAveraging``, that is its model.

    Args:
        checkpoint: Directory of a sharded checkpoint.
        out: Folder to make, which may exist if it is empty.
        shard_size: Maximum size of a file, such as ``"5GB"``; a larger tensor has a file of its own.
        dtype: One of :data:`DTYPES`, for floating-point weights; None converts nothing.
        config: A ``config.json``, or a folder with one, in place of the checkpoint's configuration.
        prefix: Prefix of the network's FQNs in the checkpoint, if the checkpoint does not record it.
        tokenizer: Folder with the tokenizer's files; None takes the folder that the checkpoint names, if it exists.
        current: Whether to write the weights that were trained in place of their average.

    Returns:
        The folder that the tokenizer's files were copied from, if any.

    Raises:
        ValueError: If ``checkpoint`` is not a sharded checkpoint, holds only what trains, or an option does not fit it.
        FileExistsError: If ``out`` is not empty.
        FileNotFoundError: If a file that an option names is missing.
        DamagedCheckpointError: If files of the checkpoint are missing, cut short or altered.
        UnsafeCheckpointError: If reading it would run code.
    """
    _check_options(checkpoint, out, dtype)
    opened = open_checkpoint(checkpoint)
    opened.check()
    if said := left_out(_meta(opened, needed=False)):
        raise ValueError(
            f"{checkpoint} holds only what trains: it was saved with save_frozen=False, without {said}. An export "
            "needs the base model too: resume from it over the base model and save with save_frozen=True, or call "
            "`save_pretrained` of the model of peft, which writes the adapters alone"
        )
    stored = stored_current_model(opened) if current else stored_model(opened)
    network = _network(opened, sorted(stored.shapes), config=config, prefix=prefix, tokenizer=tokenizer)
    weights = _weights(stored.shapes, network, dtype)
    split = split_torch_state_dict_into_shards(
        weights, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_size
    )
    with _complete_or_removed(out) as folder:
        for file, names in split.filename_to_tensors.items():
            read = read_tensors(opened, stored, [network.prefix + name for name in names])
            converted = {name: read.pop(network.prefix + name).to(weights[name].dtype) for name in names}
            save_file(converted, folder / file, metadata={"format": "pt"})
        if split.is_sharded:
            _write_json(folder / INDEX_FILE, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
        _write_configs(folder, network, weights)
    return network.tokenizer


@dataclass(frozen=True)
class _Network:
    """The configuration of the network, and its names in the checkpoint.

    Attributes:
        prefix: Prefix of the network's FQNs.
        left_out: FQNs without the prefix that are not exported.
        config: Content of ``config.json``.
        generation_config: Content of ``generation_config.json``, as JSON, or None.
        tokenizer: Folder with the tokenizer's files, or None.
    """

    prefix: str
    left_out: frozenset[str]
    config: dict[str, Any]
    generation_config: str | None
    tokenizer: Path | None


def _weights(stored: Mapping[str, Tensor], network: _Network, dtype: str | None) -> dict[str, Tensor]:
    """The tensors to write, by the network's own FQNs, with shapes and dtypes in the file but on the meta device."""
    weights = {}
    for name, entry in stored.items():
        own = name.removeprefix(network.prefix)
        if name.startswith(network.prefix) and own not in network.left_out:
            target = getattr(torch, dtype) if dtype and entry.dtype.is_floating_point else entry.dtype
            weights[own] = torch.empty(entry.shape, dtype=target, device="meta")
    return weights


@contextmanager
def _complete_or_removed(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``out`` at the end, or is removed after an error."""
    unfinished = out.absolute().with_name(f".{out.absolute().name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_configs(folder: Path, network: _Network, weights: Mapping[str, Tensor]) -> None:
    values: Counter[str] = Counter()
    for tensor in weights.values():
        if tensor.is_floating_point():
            values[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    config = {name: value for name, value in network.config.items() if name != "torch_dtype"}  # its former name
    _write_json(folder / CONFIG_FILE, {**config, **({"dtype": values.most_common(1)[0][0]} if values else {})})
    if network.generation_config is not None:
        (folder / GENERATION_FILE).write_text(network.generation_config)
    for file in _tokenizer_files(network.tokenizer):
        shutil.copyfile(file, folder / file.name)


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


# -- the network, from the checkpoint or the options ------------------------------------------------------------------


def _network(
    checkpoint: OpenCheckpoint, names: list[str], *, config: Path | None, prefix: str | None, tokenizer: Path | None
) -> _Network:
    meta = _meta(checkpoint, needed=config is None)
    said = saved_network(meta)
    if said is None and config is None:
        raise ValueError(
            f"{checkpoint.path} does not record the configuration of its network, because it was not saved with "
            "exactly one model of transformers in its LightningModule; pass --config with its config.json"
        )
    given = _given(config) if config is not None else {}
    architecture = {"architectures": [said.architecture]} if said else {}
    return _Network(
        prefix=_prefix(names, prefix, said.prefix if said else None),
        left_out=frozenset(said.left_out if said else ()),
        config={**architecture, **given} if given or said is None else {**json.loads(said.config), **architecture},
        generation_config=_given_generation(config) or (said.generation_config if said else None),
        tokenizer=_tokenizer(tokenizer, [meta.get(TOKENIZER_KEY), said.name_or_path if said else None]),
    )


def _meta(checkpoint: OpenCheckpoint, *, needed: bool) -> dict[str, Any]:
    try:
        return checkpoint.meta(weights_only=True)
    except UnsafeCheckpointError:
        if needed:
            raise
        return {}  # the options take its place


def _given(config: Path) -> dict[str, Any]:
    file = config / CONFIG_FILE if config.is_dir() else config
    content = json.loads(file.read_text())
    if not isinstance(content, dict) or "model_type" not in content:
        raise ValueError(f"{file} is not a configuration of transformers: it has no model_type")
    return content


def _given_generation(config: Path | None) -> str | None:
    if config is None or not (config / GENERATION_FILE).is_file():
        return None
    return (config / GENERATION_FILE).read_text()


def _prefix(names: list[str], given: str | None, said: str | None) -> str:
    first = list(dict.fromkeys(name.partition(".")[0] for name in names))
    chosen = given if given is not None else said
    if chosen is None and len(first) == 1:
        chosen = f"{first[0]}."  # the only attribute of the LightningModule with weights
    if chosen is None:
        raise ValueError(f"the model's names begin with {', '.join(first)}; pass --prefix with the network's")
    if not any(name.startswith(chosen) for name in names):
        raise ValueError(f"none of the model's names begins with {chosen!r}; they begin with {', '.join(first)}")
    return chosen


def _tokenizer(given: Path | None, named: Iterable[Any]) -> Path | None:
    if given is not None:
        if not _tokenizer_files(given):
            raise FileNotFoundError(f"{given} has no files of a tokenizer, such as {TOKENIZER_FILES[0]}")
        return given
    folders = (Path(folder) for folder in named if isinstance(folder, str) and folder)
    return next((folder for folder in folders if _tokenizer_files(folder)), None)


def _tokenizer_files(folder: Path | None) -> list[Path]:
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()] if folder is not None else []


def _check_options(checkpoint: StoragePath, out: Path, dtype: str | None) -> None:
    if not holds_shards(checkpoint):
        raise ValueError(f"{checkpoint} is not a sharded checkpoint: not a directory with {META_FILE} in it")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists already and is not an empty folder; choose another")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}")


# -- the command ------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Export a checkpoint as the command's ``arguments`` request; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lightning_mics export", description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", help="the path or URL of a sharded checkpoint")
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--shard-size", default="5GB", help="the most bytes in one file (default: %(default)s)")
    parser.add_argument("--dtype", help=f"what to convert weights to: {', '.join(DTYPES)} (default: as they are)")
    parser.add_argument("--config", type=Path, help="a config.json or its folder, in place of the checkpoint's own")
    parser.add_argument("--prefix", help="what the network's names begin with, where the checkpoint does not say")
    parser.add_argument("--tokenizer", type=Path, help="the folder of the tokenizer's files")
    parser.add_argument(
        "--current", action="store_true", help="the weights that were trained, where the model is an average of them"
    )
    options = vars(parser.parse_args(arguments))
    try:
        tokenizer = export(**{**options, "checkpoint": storage_path(options["checkpoint"])})
    except (DamagedCheckpointError, UnsafeCheckpointError) as error:
        print(error, file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    _report(options["out"], tokenizer)
    return 0


def _report(out: Path, tokenizer: Path | None) -> None:
    print(out)
    for file in sorted(out.iterdir()):
        print(f"  {file.name:<36}  {file.stat().st_size:,} bytes")
    print(f"  tokenizer from {tokenizer}" if tokenizer else "  without a tokenizer; --tokenizer FOLDER adds one")
