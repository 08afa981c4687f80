"""A GPT in a loop of one's own, under Accelerate and MiCS.

torchrun --standalone --nproc-per-node=4 -m recipes.loops.accelerate
accelerate launch --config_file=FILE -m recipes.loops.accelerate
"""

from __future__ import annotations

import argparse
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_mics.integrations.accelerate import MiCSPlugin
from recipes.data.sources.stdlib_text import source_files
from recipes.data.token_windows import TokenWindows

LENGTH = 128


def main() -> None:
    gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--partition-size", default="auto", type=lambda size: size if size == "auto" else int(size))
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--micro-steps", type=int, default=2, help="per optimizer step")
    parser.add_argument("--folder", type=Path, default=Path("outputs/accelerate"))
    arguments = parser.parse_args()

    plugin = MiCSPlugin(partition_size=arguments.partition_size, ranks_per_node=None if gpus else 2)
    accelerator = Accelerator(cpu=not gpus, fsdp_plugin=plugin, gradient_accumulation_steps=arguments.micro_steps)
    set_seed(0)

    text = b"".join(path.read_bytes() for path in source_files())
    windows = TokenWindows(np.frombuffer(text, dtype=np.uint8), length=LENGTH, overlap=0)
    loader = DataLoader(windows, batch_size=8, shuffle=True, drop_last=True)

    config = GPT2Config(vocab_size=256, n_positions=LENGTH, n_embd=192, n_layer=4, n_head=4)
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    step, checkpoint = 0, arguments.folder / "last.ckpt"
    if checkpoint.exists():
        step = plugin.load_checkpoint(accelerator, checkpoint)["step"]  # of any number of ranks
    batches = (batch for epoch in repeat(loader) for batch in epoch)
    while step < arguments.steps:
        with accelerator.accumulate(model):
            tokens = next(batches)
            loss = model(tokens, labels=tokens).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            step += 1
            if step % 20 == 0:
                mean = accelerator.reduce(loss.detach(), reduction="mean")
                accelerator.print(f"step {step}: {mean:.3f} nats per byte")
    plugin.save_checkpoint(accelerator, checkpoint, step=step)
    accelerator.end_training()


if __name__ == "__main__":
    main()
