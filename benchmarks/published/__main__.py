"""Predictions of the step-time model beside published throughputs.

    python -m benchmarks.published --out benchmarks/results/published

``points.yaml`` has the published numbers, their sources, and which of them calibrate. Three shares of the peak (V100,
A100, Hopper) and the share of communication that is hidden are fitted to those alone; the rest is a test.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

from lightning_mics.cost.hardware import INSTANCES, Hardware
from lightning_mics.cost.step_time import HIDDEN_SHARE, Arithmetic, Seconds, step_seconds
from lightning_mics.cost.step_traffic import StepTraffic, Unit, find_units, step_traffic
from lightning_mics.sharding.blocks import find_blocks
from lightning_mics.sharding.options import CommunicationOptions
from lightning_mics.topology import Topology
from recipes.models.flops import TransformerShape

HERE = Path(__file__).parent
RANKS_PER_NODE = 8
FAMILIES = {"V100": ("p3dn.24xlarge",), "A100": ("p4d.24xlarge", "p4de.24xlarge"), "H100": ("p5.48xlarge",)}


@dataclass(frozen=True, kw_only=True)
class Point:
    """A published throughput and the job that reached it."""

    name: str
    calibrates: bool
    engine: str
    like: str
    hardware: Hardware
    shape: tuple[Any, ...]
    topology: Topology
    sequence_length: int
    micro_batch: int
    micro_steps: int
    recomputed_share: float
    reduce_dtype: torch.dtype
    tokens_per_s: float  # of each GPU

    def predict(self) -> Seconds:
        """Seconds of an optimizer step; DeepSpeed's engine hides nothing."""
        return self.predict_for([self.hardware.kernel_share], hidden_share=HIDDEN_SHARE)[0]

    def predict_for(self, kernel_shares: Sequence[float], *, hidden_share: float) -> list[Seconds]:
        """Seconds of an optimizer step, if kernels reached these shares of the peak."""
        flops = self.micro_batch * self.flops(self.recomputed_share)
        arithmetic = Arithmetic(
            micro_steps=self.micro_steps, micro_step_flops=flops, recomputed_share=self.recomputed_share
        )
        ways = [
            replace(arithmetic, micro_step_flops=flops * self.hardware.kernel_share / share) for share in kernel_shares
        ]
        hidden_share = 0.0 if self.engine == "deepspeed" else hidden_share
        return step_seconds(_traffic(self), self.hardware, ways, hidden_share=hidden_share)

    def flops(self, recomputed_share: float) -> float:
        """Of a sequence."""
        return _shape(self.shape).training_flops(self.sequence_length, recomputed_share=recomputed_share)

    def speed(self, seconds: float) -> float:
        """Tokens per second of each GPU, for so many seconds per step."""
        return self.micro_steps * self.micro_batch * self.sequence_length / seconds


@cache
def _traffic(point: Point) -> StepTraffic:
    whole = point.topology.partition_size == point.topology.world_size
    return step_traffic(
        _units(point.shape),
        point.topology,
        communication=CommunicationOptions(hierarchical=False if whole and point.engine == "fsdp" else "auto"),
        gathered_dtype=torch.bfloat16,
        reduce_dtype=point.reduce_dtype,
    )


def _config(shape: tuple[Any, ...]) -> PretrainedConfig:
    layers, hidden, inner, heads, kv_heads, vocab, gated = shape
    if not gated:
        return GPT2Config(n_layer=layers, n_embd=hidden, n_inner=inner, n_head=heads, vocab_size=vocab)
    return LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
    )


@cache
def _model(shape: tuple[Any, ...]) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(_config(shape))


@cache
def _units(shape: tuple[Any, ...]) -> list[Unit]:
    return find_units(_model(shape), find_blocks(_model(shape)))


@cache
def _shape(shape: tuple[Any, ...]) -> TransformerShape:
    blocks = find_blocks(_model(shape))
    matrices = sum(p.numel() for block in blocks.values() for p in block.parameters() if p.ndim >= 2)
    return TransformerShape(
        layers=len(blocks), hidden=shape[1], vocab=shape[5], block_matrix_parameters=matrices // len(blocks)
    )


def read_points(path: Path = HERE / "points.yaml") -> tuple[list[Point], dict[str, Any]]:
    """The points, and all that the file says."""
    said = yaml.safe_load(path.read_text())
    points = [_point(entry, series, said) for series in said["series"] for entry in series["points"]]
    return points, said


def _point(entry: dict[str, Any], series: dict[str, Any], said: dict[str, Any]) -> Point:
    cluster = dict(said["clusters"][entry["cluster"]])
    like = cluster.pop("like")
    gpus, partition_size, length, micro_batch, micro_steps, recomputed = entry["job"]
    point = Point(
        name=entry["id"],
        calibrates=entry.get("part") == "calibration",
        engine=entry["engine"],
        like=like,
        hardware=replace(INSTANCES[like], **cluster),
        shape=tuple(said["shapes"][entry["shape"]]),
        topology=Topology(
            world_size=gpus, ranks_per_node=min(gpus, RANKS_PER_NODE), partition_size=partition_size or gpus
        ),
        sequence_length=length,
        micro_batch=micro_batch,
        micro_steps=micro_steps,
        recomputed_share=recomputed,
        reduce_dtype=torch.bfloat16 if series.get("reduce") == "bfloat16" else torch.float32,
        tokens_per_s=0.0,
    )
    return replace(point, tokens_per_s=_measured(entry, point))


def _measured(entry: dict[str, Any], point: Point) -> float:
    if "tokens" in entry:
        return float(entry["tokens"])
    if "mfu" in entry:
        flops_per_s, per_sequence = entry["mfu"] * point.hardware.peak_tflops * 1e12, point.flops(0)
    else:
        flops_per_s, per_sequence = entry["tflops"] * 1e12, point.flops(point.recomputed_share)
    return flops_per_s / per_sequence * point.sequence_length


def fit(points: Iterable[Point]) -> tuple[dict[str, float], float]:
    """The shares of the peak by family, and the hidden share, with the least squares of logarithms of errors."""
    calibration = [point for point in points if point.calibrates]
    shares = [share / 1000 for share in range(300, 801, 5)]
    # expected times lie on a line between the ends of the range
    ends = {point: [point.predict_for(shares, hidden_share=hidden) for hidden in (0.0, 1.0)] for point in calibration}

    def error(point: Point, index: int, hidden: float) -> float:
        most, least = (times[index].expected for times in ends[point])
        return math.log(point.speed(most - hidden * (most - least)) / point.tokens_per_s)

    def best_of_family(instances: tuple[str, ...], hidden: float) -> tuple[float, float]:
        own = [point for point in calibration if point.like in instances]
        return min((sum(error(p, index, hidden) ** 2 for p in own), share) for index, share in enumerate(shares))

    def total(hidden: float) -> float:
        return sum(best_of_family(instances, hidden)[0] for instances in FAMILIES.values())

    hidden = min((value / 20 for value in range(21)), key=total)
    return {name: best_of_family(instances, hidden)[1] for name, instances in FAMILIES.items()}, hidden


def _error(point: Point) -> float:
    """Logarithm of predicted over published speed."""
    return math.log(point.speed(point.predict().expected) / point.tokens_per_s)


def write_page(out: Path) -> None:
    """Write the page, and its figures as ``results.json``."""
    points, said = read_points()
    shares, hidden = fit(points)
    by_name = {point.name: point for point in points}
    tables = {True: [], False: []}
    for point in points:
        seconds = point.predict()
        low, expected, high = (point.speed(s) for s in (seconds.most, seconds.expected, seconds.least))
        error = expected / point.tokens_per_s - 1
        tables[point.calibrates].append(
            f"| {point.name} | {point.engine} | {point.tokens_per_s:,.0f} | {low:,.0f} to {high:,.0f} "
            f"| {expected:,.0f} | {error:+.0%} | {seconds.limit} |"
        )
    ratios = []
    for pair in said["pairs"]:
        over, under = by_name[pair["over"]], by_name[pair["under"]]
        measured = pair.get("published", over.tokens_per_s / under.tokens_per_s)
        predicted = over.speed(over.predict().expected) / under.speed(under.predict().expected)
        engines = "+".join(sorted({over.engine, under.engine}))
        ratios.append(
            f"| {pair['name']} | {engines} | {measured:.2f} | {predicted:.2f} | {predicted / measured - 1:+.0%} |"
        )
    rankings = [_ranking([by_name[name] for name in names]) for names in said["partition_sizes"]]
    sources = [f"- {s['source']}. Unknown: {s['unknown']}." for s in said["series"]]
    out.mkdir(parents=True, exist_ok=True)
    remarks = out / "remarks.md"
    page = PAGE.format(
        shares=", ".join(f"{name} {share:.3f}" for name, share in shares.items()),
        hidden=hidden,
        summary=_summary(points),
        calibration="\n".join(tables[True]),
        test="\n".join(tables[False]),
        ratios="\n".join(ratios),
        rankings="\n".join(rankings),
        remarks=remarks.read_text() if remarks.exists() else "",
        sources="\n".join(sources),
        assumed=said["assumed"],
    )
    (out / "README.md").write_text(page)
    (out / "results.json").write_text(json.dumps(_figures(points), indent=1) + "\n")


def _figures(points: list[Point]) -> dict[str, Any]:
    return {
        "errors": {name: _errors(chosen) for name, chosen in _parts(points).items()},
        "points": [
            {
                "name": point.name,
                "engine": point.engine,
                "calibrates": point.calibrates,
                "published_tokens_per_s": point.tokens_per_s,
                "expected_tokens_per_s": point.speed(point.predict().expected),
            }
            for point in points
        ],
    }


def _errors(points: list[Point]) -> dict[str, float]:
    """Relative errors of the expected speed."""
    errors = [abs(math.exp(_error(point)) - 1) for point in points]
    return {
        "points": len(errors),
        "mean": sum(errors) / len(errors),
        "largest": max(errors),
        "within_a_quarter": sum(error <= 0.25 for error in errors),
    }


def _parts(points: list[Point]) -> dict[str, list[Point]]:
    return {
        "calibration": [p for p in points if p.calibrates],
        "test, PyTorch's engine": [p for p in points if not p.calibrates and p.engine == "fsdp"],
        "test, DeepSpeed's engine": [p for p in points if not p.calibrates and p.engine == "deepspeed"],
    }


def _ranking(points: list[Point]) -> str:
    """Partition sizes of one job, the fastest first, as published and as predicted."""

    def sizes(ranked: list[Point]) -> str:
        return ", ".join(str(point.topology.partition_size) for point in ranked)

    published = sorted(points, key=lambda point: -point.tokens_per_s)
    predicted = sorted(points, key=lambda point: -point.speed(point.predict().expected))
    return f"| {', '.join(point.name for point in points)} | {sizes(published)} | {sizes(predicted)} |"


def _summary(points: list[Point]) -> str:
    rows = []
    for name, chosen in _parts(points).items():
        found = _errors(chosen)
        rows.append(
            f"| {name} | {found['points']} | {found['mean']:.0%} | {found['largest']:.0%} "
            f"| {found['within_a_quarter']} of {found['points']} |"
        )
    return "\n".join(rows)


PAGE = """# Predicted and published

How far off is the step-time model (`lightning_mics/cost/step_time.py`)? Published throughputs beside what it says
of the same jobs. *Predicted; the measurements are their authors'.*

Fitted to the calibration points, and to nothing else: the share of the peak that kernels reach ({shares})
and the share of communication that is hidden behind arithmetic ({hidden:.2f}). Traffic is exact; rates and latencies
are those of `lightning_mics/cost/hardware.py`.

| points | number | mean error | largest | within 25 % |
|---|---|---|---|---|
{summary}

## Test

Tokens per second of each GPU. The range is from no communication behind arithmetic to as much
as the order of FSDP2 allows.

| point | engine | published | predicted range | expected | error | limited by |
|---|---|---|---|---|---|---|
{test}

Ratios of two points:

| ratio | engine | published | predicted | error |
|---|---|---|---|---|
{ratios}

Partition sizes, the fastest first (the emulated cluster's ranking is on [its own page](../predictions/README.md)):

| jobs | published | predicted |
|---|---|---|
{rankings}

## Calibration

| point | engine | published | predicted range | expected | error | limited by |
|---|---|---|---|---|---|---|
{calibration}

{remarks}
## Sources

{sources}

{assumed}

To get it again: `python -m benchmarks.published --out benchmarks/results/published`
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the result page")
    write_page(parser.parse_args().out)


if __name__ == "__main__":
    main()
