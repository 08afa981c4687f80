"""What is in a checkpoint, and whether it is whole, without loading it.

python -m lightning_mics inspect outputs/gpt/checkpoints/last.ckpt

Reads one sharded checkpoint, runs nothing that is in it, and needs neither its model nor a GPU. The exit status is 0 if
the checkpoint is whole, 1 if it is damaged or unsafe to read, 2 if there is none.
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

from lightning_mics.checkpoint.dcp.unpickling import load_value, read_metadata
from lightning_mics.checkpoint.errors import DamagedCheckpointError, UnsafeCheckpointError
from lightning_mics.checkpoint.origin import saved_topology
from lightning_mics.checkpoint.storage.folder import DCP_FILE, META_FILE, is_sharded
from lightning_mics.checkpoint.storage.manifest import Manifest
from lightning_mics.checkpoint.storage.path import StoragePath, is_local, storage_path
from lightning_mics.topology import Topology


@dataclass
class Part:
    """The tensors of the model, or of one optimizer.

    Attributes:
        tensors: How many.
        values: How many numbers are in them.
        size_bytes: What they take.
        dtypes: Numbers of each dtype.
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


def describe(path: StoragePath) -> list[tuple[str, str]]:
    """What the checkpoint in the directory ``path`` says of itself, as rows of a name and a value.

    Raises:
        DamagedCheckpointError: If the files that say so cannot be read.
        UnsafeCheckpointError: If reading them would run code.
    """
    manifest = Manifest.read(path)
    content = manifest.content(path)
    meta, unsafe = _meta(content)
    written = datetime.fromisoformat(manifest.saved)
    rows = [
        ("step", str(meta.get("global_step", "not said"))),
        ("epoch", str(meta.get("epoch", "not said"))),
        ("saved", f"{manifest.saved}, {_age(datetime.now(timezone.utc) - written)} ago"),
        ("written by", f"{manifest.world_size} {_plural('rank', manifest.world_size)}"),
        *_topology(saved_topology(meta)),
    ]
    for name, part in parts(content).items():
        dtypes = ", ".join(dtype for dtype, _ in part.dtypes.most_common())
        rows.append((name, f"{part.tensors} tensors, {part.values:,} values, {_size(part.size_bytes)}, {dtypes}"))
    on_disk = sum(facts.size_bytes for facts in manifest.files.values())
    return [*rows, *unsafe, ("on disk", f"{len(manifest.files)} files, {_size(on_disk)}")]


def parts(content: StoragePath) -> dict[str, Part]:
    """The model, each optimizer and the states of single ranks in the checkpoint whose files are in ``content``."""
    found: dict[str, Part] = {}
    for name, entry in sorted(read_metadata(content / DCP_FILE).state_dict_metadata.items()):
        if isinstance(entry, TensorStorageMetadata):
            part = name.partition(".")[0]
            found.setdefault("rank states" if part.startswith("rank_") else part, Part()).add(entry)
    return found


def _topology(topology: Topology | None) -> list[tuple[str, str]]:
    if topology is None:
        return [("nodes", "not said"), ("partition groups", "not said")]
    t = topology
    replicas = f"{t.replicas} {_plural('replica', t.replicas)}"
    return [
        ("nodes", f"{t.nodes} of {t.ranks_per_node} {_plural('rank', t.ranks_per_node)}"),
        ("partition groups", f"{t.replicas} of {t.partition_size} {_plural('rank', t.partition_size)}: {replicas}"),
    ]


def _meta(content: StoragePath) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """What is neither model nor optimizer, if it is plain data, or else a row that says that it is not."""
    try:
        return load_value(content / META_FILE, name=META_FILE, weights_only=True), []
    except UnsafeCheckpointError as error:
        return {}, [("not read", str(error))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print it; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lightning_mics inspect", description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=storage_path, help="the directory of a sharded checkpoint, or its URL")
    path: StoragePath = parser.parse_args(arguments).checkpoint
    if not is_sharded(path):
        print(f"{path} is no sharded checkpoint: no directory with {META_FILE} in it", file=sys.stderr)
        return 2
    try:
        rows, problems = describe(path), Manifest.read(path).problems(path)
    except (DamagedCheckpointError, UnsafeCheckpointError) as error:
        print(error, file=sys.stderr)
        return 1
    rows.append(("whole", f"no: {', '.join(problems)}" if problems else _as_written(path)))
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
