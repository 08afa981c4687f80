"""What fine-tuning sends between nodes: adapters of ``peft``, and averages of weights, on an emulated cluster.

    python -m benchmarks.finetuning --shapes 2x2 4x2 --out benchmarks/results/finetuning

A Llama with adapters on all linear layers, sharded over all ranks, trains under plain FSDP2 and under three schedules
of ours, in one launch per shape; each node reads the counter of its own link before and after each optimizer step. It
needs root and iproute2.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.comparison.launches import Shape
from benchmarks.link_counters import sent_bytes
from benchmarks.measured_on_links import circumstances, measure
from lightning_mics import CommunicationOptions, Topology, create_partition_groups, shard_model

RANK, VOCAB, LENGTH, BATCH = 64, 512, 32, 2
STEPS = 4  # of which the first is told apart
MICRO_STEPS = (1, 4)
BASES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
averaging: Callable[[float], Any] = get_ema_multi_avg_fn
Micro = Callable[[bool], AbstractContextManager[None]]


@dataclass(frozen=True)
class Way:
    """How the adapted model is sharded over all ranks.

    Attributes:
        name: Name on the page.
        options: Options of ours; None is plain FSDP2.
        averages: Whether an average of the weights is kept as well.
    """

    name: str
    options: CommunicationOptions | None
    averages: bool = False


WAYS = (
    Way("FSDP2, all ranks", None),
    Way("MiCS, gathered at every use", CommunicationOptions.PAPER),
    Way("MiCS, once per step", CommunicationOptions.NODE),
    Way("MiCS, once per step, with an average", CommunicationOptions.NODE, averages=True),
)


def network(dtype: torch.dtype) -> Any:
    """A small Llama with adapters in float32 beside a frozen base."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=512, intermediate_size=1376, num_hidden_layers=6, num_attention_heads=4
    )
    base: Any = LlamaForCausalLM(config)
    model = get_peft_model(base.to(dtype), LoraConfig(r=RANK, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            if "lora_B" in name:
                parameter.data.normal_(std=0.02)
    return model


def batch(step: int, micro_step: int) -> Tensor:
    """Tokens of this rank: [batch, length]."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro_step + 7919 * dist.get_rank())
    return torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator)


def sharded(way: Way, model: Any, ranks_per_node: int) -> Micro:
    """Shard ``model``; returns what each micro-step runs in, told whether it is the boundary."""
    if way.options is None:
        for layer in model.base_model.model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        return lambda boundary: nullcontext()
    topology = Topology(
        world_size=dist.get_world_size(), ranks_per_node=ranks_per_node, partition_size=dist.get_world_size()
    )
    groups = create_partition_groups(topology, device_type="cpu", hierarchical=way.options.hierarchical)
    schedule = shard_model(model, groups, communication=way.options)
    return lambda boundary: schedule.micro_step(boundary=boundary)


def train(way: Way, base: str, micro_steps: int, ranks_per_node: int) -> dict[str, Any]:
    """Bytes on this node's link in each optimizer step, and the mean loss of all ranks in each."""
    model = network(BASES[base])
    micro = sharded(way, model, ranks_per_node)
    average = AveragedModel(model, multi_avg_fn=averaging(0.99)) if way.averages else None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, eps=1e-6)
    sent, losses = [], []
    for step in range(STEPS):
        dist.barrier()
        before, total = sent_bytes("eth0"), torch.zeros(())
        for micro_step in range(micro_steps):
            with micro(micro_step == micro_steps - 1):
                tokens = batch(step, micro_step)
                with torch.autocast("cpu", torch.bfloat16) if base == "bfloat16" else nullcontext():
                    loss = model(input_ids=tokens, labels=tokens).loss / micro_steps
                loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        if average is not None:
            average.update_parameters(model)
        dist.barrier()
        sent.append(sent_bytes("eth0") - before)
        dist.all_reduce(total)
        losses.append(float(total) / dist.get_world_size())
    return {"sent": sent, "losses": losses}


def work(out: Path, ranks_per_node: int) -> None:
    """One rank; rank 0 writes what was measured: for each way, base and number of micro-steps the nodes' bytes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    measured: list[dict[str, Any]] = []
    model = network(torch.float32)
    adapters = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    for base in BASES:
        for micro_steps in MICRO_STEPS:
            for way in WAYS:
                found = train(way, base, micro_steps, ranks_per_node)
                gc.collect()  # models and their hooks refer to each other
                of_ranks: list[Any] = [None] * dist.get_world_size()
                dist.all_gather_object(of_ranks, found["sent"])
                measured.append(
                    {
                        "way": way.name,
                        "base": base,
                        "micro_steps": micro_steps,
                        "losses": found["losses"],
                        "sent_by_node": of_ranks[::ranks_per_node],
                    }
                )
                if dist.get_rank() == 0:
                    print(base, micro_steps, way.name, [sum(step) for step in zip(*of_ranks, strict=True)], flush=True)
    if dist.get_rank() == 0:
        out.write_text(json.dumps({"adapters": adapters, "weights": weights, "runs": measured}))
    dist.barrier()
    time.sleep(0.2)


def row(shape: Shape, run: dict[str, Any], *, adapters: int, reference: Sequence[float]) -> str:
    """A line of the table."""
    bound = 2 * adapters * (shape.nodes - 1) / shape.nodes
    first, *others = (max(of_nodes) for of_nodes in zip(*run["sent_by_node"], strict=True))
    gap = max(abs(a - b) for a, b in zip(run["losses"], reference, strict=True))
    return (
        f"| {shape} | {run['base']} | {run['micro_steps']} | {run['way']} | {first / 1e6:.2f} | "
        f"{max(others) / 1e6:.2f} | {max(others) / bound:.3f} | {gap:.1e} |"
    )


def write_page(measured: dict[str, dict[str, Any]], out: Path, arguments: Sequence[str]) -> None:
    """Write the page.

    Args:
        measured: What was measured, by shape.
        out: Folder of the page.
        arguments: Arguments of the command.
    """
    rows = []
    for text, found in measured.items():
        runs = found["runs"]
        for run in runs:
            (reference,) = (
                other["losses"]
                for other in runs
                if (other["base"], other["micro_steps"]) == (run["base"], run["micro_steps"])
                and other["way"] == WAYS[0].name
            )
            rows.append(row(Shape.parse(text), run, adapters=found["adapters"], reference=reference))
    any_shape = next(iter(measured.values()))
    about = circumstances()
    (out / "results.json").write_text(json.dumps(measured, indent=1))
    (out / "README.md").write_text(
        PAGE.format(
            rank=RANK,
            later=STEPS - 1,
            adapters=any_shape["adapters"] / 1e6,
            weights=any_shape["weights"] / 1e6,
            **{**about, "versions": f"{about['versions']}, peft {peft.__version__}"},
            arguments=" ".join(arguments),
            rows="\n".join(rows),
        )
    )


PAGE = """# Fine-tuning: what adapters and averages send between nodes

**Question.** What crosses a node's link in an optimizer step when only adapters train, and when an average of the
weights is kept?

**Method.** A Llama with adapters of `peft` (r = {rank}) on all linear layers, sharded over all ranks: {adapters:.2f} MB
of adapters in float32, {weights:.2f} MB with the base in float32. Each node reads the counter of its own link around
each optimizer step, headers, barriers and agreement included; of the nodes the largest counts, of the {later} steps
after the first the largest. The bound is 2A(N-1)/N for A bytes of adapters on N nodes.

**Machine.** {cores} cores, {system}; {versions}, gloo, whose reduce-scatter in FSDP2's flat schedule sends twice what
NCCL's does.

**Commit.** {commit}, {date}.

```bash
python -m benchmarks.finetuning {arguments}
```

| nodes x ranks | base | micro-steps | way | first step, MB | later steps, MB | of the bound | gap of losses to FSDP2 |
|---|---|--:|---|--:|--:|--:|--:|
{rows}

An average is updated after each step and sends nothing: the two last rows of each kind differ by agreement only.
"""


def main() -> None:
    """Run as one rank, or measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["2x2", "4x2"], help="nodes x ranks per node")
    parser.add_argument("--out", type=Path, help="folder of the page and the numbers")
    parser.add_argument("--work", type=Path, help="be one rank, and write what was measured here")
    options = parser.parse_args()
    shapes = [Shape.parse(text) for text in options.shapes]
    if options.work is not None:
        work(options.work, shapes[0].ranks_per_node)
        return
    if options.out is None:
        parser.error("--out is needed: the folder of the page and the numbers")
    options.out.mkdir(parents=True, exist_ok=True)
    measured = {str(shape): measure("benchmarks.finetuning", shape, options.out / "scratch") for shape in shapes}
    write_page(measured, options.out, sys.argv[1:])


if __name__ == "__main__":
    main()
