"""A GPT in a loop of one's own, under Fabric and MiCS.

python -m recipes.loops.fabric                # all GPUs of this machine, or two "nodes" of two CPU processes
torchrun ... -m recipes.loops.fabric --nodes=2 --devices=8
"""

from __future__ import annotations

import argparse
from itertools import islice, repeat
from pathlib import Path

import numpy as np
import torch
from lightning.fabric import Fabric
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_mics import MiCSFabricStrategy
from recipes.data.sources.stdlib_text import source_files
from recipes.data.token_windows import TokenWindows

LENGTH = 128


def main() -> None:
    gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--devices", type=int, default=gpus or 4, help="per node")
    parser.add_argument("--partition-size", default="auto", type=lambda size: size if size == "auto" else int(size))
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--micro-steps", type=int, default=2, help="per optimizer step")
    parser.add_argument("--folder", type=Path, default=Path("outputs/fabric"))
    arguments = parser.parse_args()

    strategy = MiCSFabricStrategy(partition_size=arguments.partition_size, ranks_per_node=None if gpus else 2)
    fabric = Fabric(devices=arguments.devices, num_nodes=arguments.nodes, strategy=strategy)
    fabric.launch()
    fabric.seed_everything(0)

    text = b"".join(path.read_bytes() for path in source_files())
    windows = TokenWindows(np.frombuffer(text, dtype=np.uint8), length=LENGTH, overlap=0)
    loader = fabric.setup_dataloaders(DataLoader(windows, batch_size=8, shuffle=True, drop_last=True))

    config = GPT2Config(vocab_size=256, n_positions=LENGTH, n_embd=192, n_layer=4, n_head=4)
    model = GPT2LMHeadModel(config)
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=2e-3))

    state = {"model": model, "optimizer": optimizer, "step": 0}
    checkpoint = arguments.folder / "last.ckpt"
    if checkpoint.exists():
        fabric.load(checkpoint, state)  # of any number of ranks
    batches = (batch for epoch in repeat(loader) for batch in epoch)
    while state["step"] < arguments.steps:
        for index, tokens in enumerate(islice(batches, arguments.micro_steps), start=1):
            with fabric.no_backward_sync(model, enabled=index < arguments.micro_steps):
                loss = model(tokens, labels=tokens).loss
                fabric.backward(loss / arguments.micro_steps)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        state["step"] += 1
        if state["step"] % 20 == 0:
            mean = fabric.all_reduce(loss.detach())
            fabric.print(f"step {state['step']}: {mean:.3f} nats per byte")
    fabric.save(checkpoint, state)


if __name__ == "__main__":
    main()
