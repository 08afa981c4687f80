"""Checksums of blocks: each byte is read once, checked, and never returned if it was altered."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_mics import Topology, checkpoint, create_partition_groups, shard_model
from lightning_mics.checkpoint.errors import DamagedCheckpointError
from lightning_mics.checkpoint.storage.blocks import BLOCK_BYTES, BlockChecksums, CheckedFile, are_checksums
from lightning_mics.checkpoint.storage.manifest import MANIFEST_FILE, FileFacts, Manifest
from tests.support.checkpoints import adamw, is_same, load_into, save_shards, sharded_model, train_steps, weights_of
from tests.support.forked import run_ranks

SIZE = 3 * BLOCK_BYTES + 700


class Counting(io.BytesIO):
    """Bytes that know which of them were read."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.reads: list[tuple[int, int]] = []

    def readinto(self, buffer: Any) -> int:
        begin = self.tell()
        count = super().readinto(buffer)
        self.reads.append((begin, begin + count))
        return count


def content_of(size: int) -> bytes:
    return (
        torch.randint(256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size)).numpy().tobytes()
    )


def checksums_of(content: bytes, *, written_at_once: int) -> str:
    checksums = BlockChecksums()
    for first in range(0, len(content), written_at_once):
        checksums.update(content[first : first + written_at_once])
    return checksums.text()


def opened(content: bytes, written: bytes | None = None) -> tuple[CheckedFile, Counting]:
    file = Counting(content)
    checksums = checksums_of(content if written is None else written, written_at_once=BLOCK_BYTES)
    size = len(content if written is None else written)
    return CheckedFile(file, checkpoint="step_1.ckpt", name="__0_0.distcp", size_bytes=size, checksums=checksums), file


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, SIZE])
def test_checksums_do_not_depend_on_how_a_file_is_written(size: int) -> None:
    content = content_of(size)
    found = {checksums_of(content, written_at_once=count) for count in (777_777, BLOCK_BYTES, SIZE)}
    assert len(found) == 1
    text = found.pop()
    assert are_checksums(text, size_bytes=size)
    assert not are_checksums(text + "0", size_bytes=size) and not are_checksums(None, size_bytes=size)
    assert not are_checksums(text, size_bytes=size + BLOCK_BYTES)


@pytest.mark.parametrize("whence", [io.SEEK_SET, io.SEEK_CUR, io.SEEK_END])
@pytest.mark.parametrize(("begin", "count"), [(0, SIZE), (5, 9), (BLOCK_BYTES - 3, 7), (SIZE - 4, 9), (SIZE + 3, 1)])
def test_what_is_read_is_what_is_there(begin: int, count: int, whence: int) -> None:
    content = content_of(SIZE)
    file, _ = opened(content)
    assert file.seek(begin - {io.SEEK_SET: 0, io.SEEK_CUR: 0, io.SEEK_END: SIZE}[whence], whence) == begin
    assert file.read(count) == content[begin : begin + count]
    assert file.tell() == max(begin, min(begin + count, SIZE))


def test_a_tensor_is_read_once_although_torch_begins_at_its_end() -> None:
    stream, tensor = io.BytesIO(), torch.arange(12 * BLOCK_BYTES // 4, dtype=torch.int32)
    torch.save(tensor, stream)
    file, counting = opened(stream.getvalue())
    assert torch.equal(torch.load(file, weights_only=True), tensor)
    assert sum(end - begin for begin, end in counting.reads) == len(stream.getvalue())


@pytest.mark.parametrize("position", [0, BLOCK_BYTES, 2 * BLOCK_BYTES + 5, SIZE - 1])
def test_values_of_an_altered_block_are_never_returned(position: int) -> None:
    content = content_of(SIZE)
    altered = content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]
    file, _ = opened(altered, written=content)
    for first in range(0, SIZE, BLOCK_BYTES):
        file.seek(first)
        if first <= position < first + BLOCK_BYTES:
            with pytest.raises(DamagedCheckpointError, match=r"step_1\.ckpt is corrupted: __0_0\.distcp was altered"):
                file.read(BLOCK_BYTES)
        else:
            assert file.read(BLOCK_BYTES) == content[first : first + BLOCK_BYTES]
    assert isinstance(file.failure, DamagedCheckpointError)


def test_a_file_that_became_shorter_is_named() -> None:
    content = content_of(SIZE)
    file, _ = opened(content[:-9], written=content)
    with pytest.raises(DamagedCheckpointError, match=f"has {SIZE - 9} of {SIZE} bytes"):
        file.read(SIZE)


# -- in checkpoints ----------------------------------------------------------------------------------------------------


def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1024, 2048, bias=False), nn.Linear(2048, 1024, bias=False))


def read_bytes() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def amounts(folder: Path) -> dict[str, int]:
    """Bytes that a rank reads as it loads a checkpoint, and all that are stored."""

    def sharded() -> nn.Module:
        model = wide()
        topology = Topology(world_size=2, ranks_per_node=2, partition_size=2)
        shard_model(model, create_partition_groups(topology, device_type="cpu"))
        return model

    model = sharded()
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    path = folder / "ckpt"
    save_shards(path, model, optimizer)
    dist.barrier()
    for _ in range(2):  # modules that are imported in the first are read as well
        again = sharded()
        before = read_bytes()
        load_into(path, again, torch.optim.AdamW(again.parameters()))
    return {"read": read_bytes() - before, "stored": sum(file.stat().st_size for file in path.glob("*.distcp"))}


def test_loading_reads_each_byte_once(tmp_path: Path) -> None:
    by_rank = run_ranks(2, amounts, tmp_path)
    read = sum(facts["read"] for facts in by_rank)
    shared = len(by_rank) * 4 * BLOCK_BYTES  # blocks of which the model and the optimizer read a part each
    assert by_rank[0]["stored"] <= read < by_rank[0]["stored"] + shared


def without_blocks(folder: Path) -> list[Any]:
    """A checkpoint whose manifest has no checksums of blocks, as earlier versions wrote it: loaded, then damaged."""
    model = sharded_model()
    optimizer = adamw(model.parameters())
    train_steps(model, optimizer, steps=1)
    path = folder / "ckpt"
    save_shards(path, model, optimizer)
    if dist.get_rank() == 0:
        manifest = Manifest.read(path)
        files = {name: FileFacts.of(manifest.content(path) / name) for name in manifest.files}
        Manifest.now(files, world_size=manifest.world_size).write(path)
    dist.barrier()
    facts: list[Any] = [json.loads((path / MANIFEST_FILE).read_text())["format"]]
    again = sharded_model(seed=1)
    load_into(path, again, adamw(again.parameters()))
    facts.append(is_same(weights_of(again), weights_of(model)))
    dist.barrier()
    if dist.get_rank() == 0:
        file = path / "__1_0.distcp"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    dist.barrier()
    other = sharded_model(seed=2)
    before = weights_of(other)
    try:
        load_into(path, other)
    except checkpoint.DamagedCheckpointError as error:
        facts.append(str(error))
    return [*facts, is_same(weights_of(other), before)]


def test_a_manifest_without_checksums_of_blocks_is_compared_before_loading(tmp_path: Path) -> None:
    for version, same, error, untouched in run_ranks(2, without_blocks, tmp_path):
        assert (version, same, untouched) == (1, True, True)
        assert "__1_0.distcp was altered: its checksum is another" in error
