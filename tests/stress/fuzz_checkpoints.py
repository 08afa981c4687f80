"""Change the files of a checkpoint at random and see that loading it ends in an error that says so, or changes nothing.

python -m tests.stress.fuzz_checkpoints --mutations 2000

Every second mutation is as a disk would make it: the manifest is left as it was, and has to notice. The others are as
an attacker would make them: the manifest is written anew, and whatever reads the bytes has to stand them. A load may
refuse with an error that this package raises itself, or, where the manifest was written anew, go through; anything else
is counted as wrong, and so is a load of what a disk has changed.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from lightning_mics import Topology, checkpoint, create_partition_groups, shard_model
from lightning_mics.checkpoint.optimizer_states import optimizer_state
from lightning_mics.checkpoint.storage.manifest import MANIFEST_FILE, FileFacts, Manifest

PACKAGE = Path(checkpoint.__file__).parent


LOADED = "loaded"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it in this process, as a job of one rank; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress.fuzz_checkpoints")
    parser.add_argument("--mutations", type=int, default=2000, help="how many (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations (default: 0)")
    options = parser.parse_args(arguments)
    chance = random.Random(options.seed)
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            job, whole = Job(), Path(folder, "whole.ckpt")
            job.save(whole)
            for number in range(options.mutations):
                by_attacker = number % 2 == 1
                path = Path(folder, "mutated.ckpt")
                shutil.rmtree(path, ignore_errors=True)
                shutil.copytree(whole, path)
                what = mutate(path, chance, renew_manifest=by_attacker)
                outcome, clean = job.try_to_load(path)
                outcomes[outcome.partition(":")[0]] += 1
                if not clean or (outcome == LOADED and not by_attacker):
                    wrong.append(f"mutation {number}, {what}: {outcome}")
        finally:
            dist.destroy_process_group()
    print(f"{options.mutations} mutations: {', '.join(f'{n} {kind}' for kind, n in outcomes.most_common())}")
    print(f"{len(wrong)} wrong", *wrong[:20], sep="\n")
    return 1 if wrong else 0


class Job:
    """A model with an optimizer on one rank."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(2)))
        topology = Topology(world_size=1, ranks_per_node=1, partition_size=1)
        schedule = shard_model(self.model, create_partition_groups(topology, device_type="cpu"))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        with schedule.micro_step(boundary=True):
            self.model(torch.randn(2, 8)).square().sum().backward()
        self.optimizer.step()

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        checkpoint.save_sharded(
            path,
            model_state=self.model.state_dict(),
            optimizer_states=[optimizer_state(self.model, self.optimizer, sharded=True)],
            meta={"global_step": 1, "callbacks": {"a": [1.0, "b", None]}, "rng": torch.get_rng_state()},
        )

    def try_to_load(self, path: Path) -> tuple[str, bool]:
        """What came of it, the type and message of an error or ``LOADED``, and whether it is nothing but that."""
        try:
            checkpoint.load(path, model=self.model, optimizers=[self.optimizer], strict=True, weights_only=True)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
            ours = PACKAGE in raised_in.parents and isinstance(error, RuntimeError | ValueError)  # no slip of the code
            return f"{type(error).__name__}: {error}"[:300], ours
        return LOADED, True


def mutate(path: Path, chance: random.Random, *, renew_manifest: bool) -> str:
    """Change one file of the checkpoint; returns what was done."""
    names = sorted(file.name for file in path.iterdir() if not (renew_manifest and file.name == MANIFEST_FILE))
    file = path / chance.choice(names)
    if not renew_manifest and file.name != MANIFEST_FILE and chance.random() < 0.1:
        file.unlink()
        return f"{file.name} deleted"
    before = file.read_bytes()
    kind = chance.choice(list(_CHANGES))
    while (after := _CHANGES[kind](before, chance)) == before:
        pass
    file.write_bytes(after)
    if renew_manifest:
        Manifest.now({name: FileFacts.of(path / name) for name in names}, world_size=1).write(path)
    return f"{file.name} {kind}"


def _bit_flipped(content: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :]


def _byte_set(content: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(content))
    return content[:at] + chance.randbytes(1) + content[at + 1 :]


def _cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


def _zeroed(content: bytes, chance: random.Random) -> bytes:
    first, last = sorted(chance.randrange(len(content) + 1) for _ in range(2))
    return content[:first] + bytes(last - first) + content[last:]


def _lengthened(content: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(content))
    return content[:at] + chance.randbytes(chance.randint(1, 64)) + content[at:]


def _part_repeated(content: bytes, chance: random.Random) -> bytes:
    first, last = sorted(chance.randrange(len(content) + 1) for _ in range(2))
    return content[:last] + content[first:last] + content[last:]


def _part_removed(content: bytes, chance: random.Random) -> bytes:
    first, last = sorted(chance.randrange(len(content) + 1) for _ in range(2))
    return content[:first] + content[last:]


_CHANGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "with a bit flipped": _bit_flipped,
    "with a byte set": _byte_set,
    "cut": _cut,
    "with a part zeroed": _zeroed,
    "lengthened": _lengthened,
    "with a part repeated": _part_repeated,
    "with a part removed": _part_removed,
}


if __name__ == "__main__":
    sys.exit(main())
