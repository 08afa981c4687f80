"""The contents of a checkpoint, and whether it is complete, without loading it.

python -m lightning_mics inspect outputs/gpt/checkpoints/last.ckpt

Reads one sharded checkpoint, runs no code of it, and needs neither its model nor a GPU. The exit status is 0 if the
checkpoint is complete, 1 if it is corrupted or unsafe to read, 2 if there is none.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lightning_mics.checkpoint.content.trained_only import left_out
from lightning_mics.checkpoint.errors import DamagedCheckpointError, UnsafeCheckpointError
from lightning_mics.checkpoint.keys import MODEL_KEY
from lightning_mics.checkpoint.opening import OpenCheckpoint, open_checkpoint
from lightning_mics.checkpoint.origin import saved_topology
from lightning_mics.checkpoint.storage.folder import META_FILE, is_sharded
from lightning_mics.checkpoint.storage.manifest import Manifest
from lightning_mics.checkpoint.storage.path import StoragePath, is_local, storage_path
from lightning_mics.checkpoint.whole_model import stored_current_model
from lightning_mics.topology import Topology


def describe(path: StoragePath) -> list[tuple[str, str]]:
    """Describe the checkpoint in the directory ``path``, as rows of a name and a value.

    Raises:
        DamagedCheckpointError: If its manifest or its metadata is missing or cannot be read.
        UnsafeCheckpointError: If reading them would run code.
    """
    manifest = Manifest.read(path)
    checkpoint = OpenCheckpoint(path, manifest)
    meta, unsafe = _meta(checkpoint)
    written = datetime.fromisoformat(manifest.saved)
    rows = [
        ("step", str(meta.get("global_step", "not recorded"))),
        ("epoch", str(meta.get("epoch", "not recorded"))),
        ("saved", f"{manifest.saved}, {_age(datetime.now(timezone.utc) - written)} ago"),
        ("written by", f"{manifest.world_size} {_plural('rank', manifest.world_size)}"),
        *_topology(saved_topology(meta)),
        *([("left out", f"{left_out(meta)}: save_frozen=False")] if left_out(meta) else []),
    ]
    for name, part in parts(checkpoint).items():
        dtypes = ", ".join(dtype for dtype, _ in part.dtypes.most_common())
        rows.append((name, f"{part.tensors} tensors, {part.values:,} values, {_size(part.size_bytes)}, {dtypes}"))
    on_disk = sum(facts.size_bytes for facts in manifest.files.values())
    return [*rows, *unsafe, ("on disk", f"{len(manifest.files)} files, {_size(on_disk)}")]


@dataclass
class Part:
    """The tensors of the model, or of one optimizer.

    Attributes:
        tensors: Number of tensors.
        values: Number of values in them.
        size_bytes: Bytes of the values.
        dtypes: Number of values of each dtype.
    """

    tensors: int = 0
    values: int = 0
    size_bytes: int = 0
    dtypes: Counter[str] = field(default_factory=Counter)

    def add(self, entry: TensorStorageMetadata) -> None:
        """Count a tensor."""
        dtype = entry.properties.dtype
        self.tensors += 1
        self.values += entry.size.numel()
        self.size_bytes += entry.size.numel() * dtype.itemsize
        self.dtypes[str(dtype).removeprefix("torch.")] += entry.size.numel()


def parts(checkpoint: OpenCheckpoint) -> dict[str, Part]:
    """Count the tensors of the model, of each optimizer and of the states of single ranks, by name of the part.

    Where the model is an average of weights, the weights that were trained are a part of their own.
    """
    found: dict[str, Part] = {}
    current = _current(checkpoint)
    for name, entry in sorted(checkpoint.reader.read_metadata().state_dict_metadata.items()):
        if isinstance(entry, TensorStorageMetadata):
            part = "current model" if name in current else name.partition(".")[0]
            part = "model (average)" if current and part == MODEL_KEY else part
            found.setdefault("rank states" if part.startswith("rank_") else part, Part()).add(entry)
    return found


def _current(checkpoint: OpenCheckpoint) -> set[str]:
    """The names of the trained weights among the shards, where the model is an average of them."""
    try:
        return set(stored_current_model(checkpoint).names.values())
    except (ValueError, UnsafeCheckpointError):  # there is no average, or the entries are not read
        return set()


def _topology(topology: Topology | None) -> list[tuple[str, str]]:
    if topology is None:
        return [("nodes", "not recorded"), ("partition groups", "not recorded")]
    t = topology
    replicas = f"{t.replicas} {_plural('replica', t.replicas)}"
    return [
        ("nodes", f"{t.nodes} of {t.ranks_per_node} {_plural('rank', t.ranks_per_node)}"),
        ("partition groups", f"{t.replicas} of {t.partition_size} {_plural('rank', t.partition_size)}: {replicas}"),
    ]


def _meta(checkpoint: OpenCheckpoint) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The entries that are neither the model's nor an optimizer's, or a row that tells why they are unsafe to read."""
    try:
        return checkpoint.meta(weights_only=True), []
    except UnsafeCheckpointError as error:
        return {}, [("not read", str(error))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Describe and check a checkpoint as the command's ``arguments`` request; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lightning_mics inspect", description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=storage_path, help="the directory of a sharded checkpoint, or its URL")
    path: StoragePath = parser.parse_args(arguments).checkpoint
    if not is_sharded(path):
        print(f"{path} is not a sharded checkpoint: not a directory with {META_FILE} in it", file=sys.stderr)
        return 2
    try:
        rows, problems = describe(path), open_checkpoint(path).problems()
    except (DamagedCheckpointError, UnsafeCheckpointError) as error:
        print(error, file=sys.stderr)
        return 1
    rows.append(("complete", f"no: {', '.join(problems)}" if problems else _as_written(path)))
    width = max(len(name) for name, _ in rows)
    print("\n".join([str(path), *(f"  {name:<{width}}  {value}" for name, value in rows)]))
    return 1 if problems else 0


def _as_written(path: StoragePath) -> str:
    return f"yes: sizes and {'checksums' if is_local(path) else 'ETags or checksums'} are as written"


def _age(age: Any) -> str:
    for seconds, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if age.total_seconds() >= seconds:
            count = int(age.total_seconds() // seconds)
            return f"{count} {_plural(unit, count)}"
    return "less than a minute"


def _size(size_bytes: int) -> str:
    for power, unit in ((3, "GB"), (2, "MB"), (1, "kB")):
        if size_bytes >= 1000**power:
            return f"{size_bytes / 1000**power:.3g} {unit}"
    return f"{size_bytes} bytes"


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"
