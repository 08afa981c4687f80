"""Every Python block of the README runs as it stands, and so do those of the pages on Fabric and Accelerate."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.support.models import TinyLM, TinyModule, loader_of_tokens, tokens
from tests.support.networks import make
from tests.support.trainers import on_ranks

ROOT = Path(__file__).parents[2]


PAGES = ("README.md", "docs/fabric.md", "docs/accelerate.md")


BLOCKS = re.findall(r"```python\n(.*?)```", "".join((ROOT / page).read_text() for page in PAGES), flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.strip().splitlines()[-1].strip())
def test_the_block_runs(block, tmp_path):
    world_size = 4 if re.search("world_size=4|devices=4|MiCSPlugin", block) else 1
    assert on_ranks(_run, block, tmp_path, world_size=world_size) == [True] * world_size


def _run(block: str, folder: Path) -> bool:
    os.chdir(folder)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    rank = dist.get_rank()
    names: dict[str, Any] = {
        "MyModel": TinyModule,
        "MyData": loader_of_tokens,
        "model": TinyLM(),
        "batches": [tokens(1, seed=4 * step + rank) for step in range(8)],
        "dataset": tokens(512),
    }
    make("gpt").save_pretrained(folder / f"pretrained {rank}")
    names |= {"make_network": lambda: type(make("gpt"))(make("gpt").config), "folder": folder / f"pretrained {rank}"}
    before = names["model"].norm.weight.detach().clone()
    exec(block, names)
    if "optimizer" in names:
        model = getattr(names["model"], "_forward_module", names["model"])  # Fabric has wrapped it
        after = model.norm.weight.full_tensor()
        assert not after.equal(before)
    return True


def test_all_blocks_are_found():
    assert len(BLOCKS) == 8
