"""What optimizers that need whole matrices send between nodes, on an emulated cluster: Muon beside AdamW.

    python -m benchmarks.optimizers --shapes 2x2 4x2 --out benchmarks/results/optimizers

A GPT of twelve layers trains with AdamW and with ``torch.optim.Muon`` for the matrices of its blocks, in one launch per
shape; each node reads the counter of its own link before and after each optimizer step. It needs root and iproute2.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.optim._muon as torch_muon
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.comparison.launches import Shape
from benchmarks.link_counters import sent_bytes
from benchmarks.measured_on_links import circumstances, measure
from lightning_mics import CommunicationOptions, Topology, create_partition_groups, shard_model

LAYERS, DIM, HEADS, VOCAB, LENGTH, BATCH = 12, 128, 4, 256, 32, 2
STEPS = 4  # of which the first is told apart
MICRO_STEPS = (1, 4)
OWNERS = ("gradients to owners", "updates from owners", "rows of owned matrices")  # techniques between nodes


@dataclass(frozen=True)
class Way:
    """How the model is trained.

    Attributes:
        name: Name on the page.
        muon: Whether Muon steps the matrices of blocks.
        iteration: Dtype of its iteration; float32 replaces torch's.
    """

    name: str
    muon: bool
    iteration: torch.dtype = torch.bfloat16


ADAMW = Way("AdamW", muon=False)
WAYS = (ADAMW, Way("Muon", muon=True), Way("Muon, iterating in float32", muon=True, iteration=torch.float32))


class Block(nn.Module):
    """A block of a GPT without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM, bias=False), nn.Linear(DIM, DIM, bias=False)
        self.up, self.down = nn.Linear(DIM, 4 * DIM, bias=False), nn.Linear(4 * DIM, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Attention and MLP, each added: [batch, length, dim] -> same."""
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.before_attention(x)).chunk(3, -1)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.before_mlp(x))))


class Gpt(nn.Module):
    """A small GPT."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(DIM, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Loss of the next token: [batch, length] -> []."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return functional.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """The matrices of blocks."""
    return [p for name, p in model.named_parameters() if p.dim() == 2 and name.startswith("blocks.")]


def optimizers(model: nn.Module, way: Way) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of blocks and AdamW for the rest, or AdamW for all."""
    if not way.muon:
        return [torch.optim.AdamW(model.parameters(), lr=1e-3)]
    of_blocks = matrices(model)
    rest = [p for p in model.parameters() if not any(p is matrix for matrix in of_blocks)]
    return [torch.optim.Muon(of_blocks, lr=0.02), torch.optim.AdamW(rest, lr=1e-3)]


def in_float32(update: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Muon's iteration without torch's rounding to bfloat16.

    Args:
        update: Update of a matrix: [rows, columns].
        coefficients: Three coefficients of the polynomial of one iteration.
        steps: Number of iterations.
        eps: Smallest norm to divide by.
    """
    a, b, c = coefficients
    x = update.T if update.size(0) > update.size(1) else update
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if update.size(0) > update.size(1) else x


@contextmanager
def iterating(way: Way) -> Iterator[None]:
    """Run Muon's iteration in the dtype of a way."""
    original: Callable[..., Tensor] = torch_muon._zeropower_via_newtonschulz

    if way.iteration == torch.float32:
        torch_muon._zeropower_via_newtonschulz = in_float32
    try:
        yield
    finally:
        torch_muon._zeropower_via_newtonschulz = original


def train(way: Way, size: int, micro_steps: int, ranks_per_node: int) -> dict[str, Any]:
    """Bytes on this node's link in each step and by owners' techniques of this rank, its operations, and the losses."""
    torch.manual_seed(0)
    model: Any = Gpt()
    topology = Topology(world_size=dist.get_world_size(), ranks_per_node=ranks_per_node, partition_size=size)
    groups = create_partition_groups(topology, device_type="cpu")
    schedule = shard_model(model, groups, communication=CommunicationOptions.NODE)
    sent, owned, losses = [], [], []
    with iterating(way):
        both = optimizers(model, way)
        for optimizer in both:
            schedule.optimizer_hooks.adopt(optimizer)
        for step in range(STEPS):
            dist.barrier()
            before, before_owned, total = sent_bytes("eth0"), _of_owners(schedule), torch.zeros(())
            for micro_step in range(micro_steps):
                generator = torch.Generator().manual_seed(1000 * step + 10 * micro_step + 7919 * dist.get_rank())
                tokens = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator)
                with schedule.micro_step(boundary=micro_step == micro_steps - 1):
                    loss = model(tokens) / micro_steps
                    loss.backward()
                total += loss.detach()
            for optimizer in both:
                optimizer.step()
                optimizer.zero_grad()
            dist.barrier()
            sent.append(sent_bytes("eth0") - before)
            owned.append(_of_owners(schedule) - before_owned)
            dist.all_reduce(total)
            losses.append(float(total) / dist.get_world_size())
    owners = schedule.optimizer_hooks.owners
    loads = list(owners.loads) if owners is not None else []
    return {"sent": sent, "owned": owned, "losses": losses, "loads": loads}


def _of_owners(schedule: Any) -> float:
    return sum(sent.between_bytes for name, sent in schedule.traffic.by_technique().items() if name.startswith(OWNERS))


def sizes(shape: Shape) -> list[int]:
    """Partition sizes: one rank, a node, two nodes, all ranks."""
    world_size = shape.nodes * shape.ranks_per_node
    return sorted({1, shape.ranks_per_node, min(2 * shape.ranks_per_node, world_size), world_size})


def work(out: Path, shape: Shape) -> None:
    """One rank; rank 0 writes what was measured."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = Gpt()
    weights, of_matrices = (sum(p.nbytes for p in kind) for kind in (model.parameters(), matrices(model)))
    runs: list[dict[str, Any]] = []
    for size in sizes(shape):
        for micro_steps in MICRO_STEPS:
            for way in WAYS if micro_steps == 1 else WAYS[:2]:
                found = train(way, size, micro_steps, shape.ranks_per_node)
                gc.collect()  # models and their hooks refer to each other
                of_ranks: list[Any] = [None] * dist.get_world_size()
                dist.all_gather_object(of_ranks, (found["sent"], found["owned"]))
                k = shape.ranks_per_node
                runs.append(
                    {
                        "way": way.name,
                        "size": size,
                        "micro_steps": micro_steps,
                        "losses": found["losses"],
                        "loads": found["loads"],
                        "sent_by_node": [sent for sent, _ in of_ranks[::k]],
                        "owned_by_node": [
                            [sum(of_step) for of_step in zip(*(owned for _, owned in of_ranks[i : i + k]), strict=True)]
                            for i in range(0, len(of_ranks), k)
                        ],
                    }
                )
                if dist.get_rank() == 0:
                    print(size, micro_steps, way.name, runs[-1]["sent_by_node"], flush=True)
    if dist.get_rank() == 0:
        out.write_text(json.dumps({"matrices": of_matrices, "weights": weights, "runs": runs}))
    dist.barrier()
    time.sleep(0.2)


def row(shape: Shape, run: dict[str, Any], reference: dict[str, Any], *, share: float, matrices: int) -> str:
    """A line of the table."""
    later = [of_node[1:] for of_node in run["sent_by_node"]]
    means = [sum(of_step) / shape.nodes for of_step in zip(*later, strict=True)]
    mean = sum(means) / len(means)
    ratio = mean / _mean_of_later(reference)
    cells = [str(shape), run["size"], run["micro_steps"], run["way"], f"{mean / 1e6:.3f}", f"{ratio:.3f}"]
    if run["way"] == ADAMW.name:
        return "| " + " | ".join(map(str, [*cells, "-", "-", "-", "-"])) + " |"
    owned = [sum(of_node[1:]) / (STEPS - 1) for of_node in run["owned_by_node"]]
    bound = 2 * matrices * (shape.nodes - 1) / shape.nodes
    expected = (1.0 if "float32" in run["way"] else 0.75) * share + (1 - share)
    loads = run["loads"]
    cells += [
        f"{expected:.3f}",
        f"{sum(owned) / shape.nodes / bound:.3f}",
        f"{max(owned) * shape.nodes / sum(owned):.3f}",
        f"{max(loads) * len(loads) / sum(loads):.3f}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def _mean_of_later(run: dict[str, Any]) -> float:
    later = [sent for of_node in run["sent_by_node"] for sent in of_node[1:]]
    return sum(later) / len(later)


def write_page(measured: dict[str, dict[str, Any]], out: Path, arguments: Sequence[str]) -> None:
    """Write the page.

    Args:
        measured: What was measured, by shape.
        out: Folder of the page.
        arguments: Arguments of the command.
    """
    any_shape = next(iter(measured.values()))
    share = any_shape["matrices"] / any_shape["weights"]
    rows = []
    for text, found in measured.items():
        references = {(r["size"], r["micro_steps"]): r for r in found["runs"] if r["way"] == ADAMW.name}
        for run in found["runs"]:
            reference = references[run["size"], run["micro_steps"]]
            rows.append(row(Shape.parse(text), run, reference, share=share, matrices=any_shape["matrices"]))
    (out / "results.json").write_text(json.dumps(measured, indent=1))
    (out / "README.md").write_text(
        PAGE.format(
            layers=LAYERS,
            later=STEPS - 1,
            weights=any_shape["weights"] / 1e6,
            matrices=any_shape["matrices"] / 1e6,
            share=share,
            arguments=" ".join(arguments),
            rows="\n".join(rows),
            **circumstances(),
        )
    )


PAGE = """# Optimizers: what Muon sends between nodes, beside AdamW

**Question.** What crosses a node's link in an optimizer step with Muon, where each matrix is orthogonalized once in the
whole job, in multiples of what AdamW needs in the same run?

**Method.** A GPT of {layers} layers with {weights:.2f} MB of weights in float32, of which the matrices of blocks,
{matrices:.2f} MB or {share:.3f}, are Muon's and the rest AdamW's. Communication is once per step. Each node reads the
counter of its own link around each optimizer step, headers, barriers and agreement included; the mean over nodes and
the {later} steps after the first counts. *Expected* is 0.75 f + (1 - f) for a share f of matrices, and 1 where the
iteration is replaced by one in float32, whose updates are sent in float32. *Matrices* is by the package's own counters,
in multiples of 2M(N-1)/N for M bytes of matrices on N nodes; *node* is the largest node over the mean of these, *rank*
the busiest rank's operations of the iteration over the mean.

**Machine.** {cores} cores, {system}; {versions}, gloo.

**Commit.** {commit}, {date}.

```bash
python -m benchmarks.optimizers {arguments}
```

| nodes x ranks | partition | micro-steps | optimizer | MB | of AdamW's | expected | matrices | node | rank |
|---|--:|--:|---|--:|--:|--:|--:|--:|--:|
{rows}
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
        work(options.work, shapes[0])
        return
    if options.out is None:
        parser.error("--out is needed: the folder of the page and the numbers")
    options.out.mkdir(parents=True, exist_ok=True)
    measured = {str(shape): measure("benchmarks.optimizers", shape, options.out / "scratch") for shape in shapes}
    write_page(measured, options.out, sys.argv[1:])


if __name__ == "__main__":
    main()
