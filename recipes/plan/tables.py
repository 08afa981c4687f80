"""The plan and the rehearsal for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from omegaconf import DictConfig
from rich import box
from rich.console import JustifyMethod
from rich.table import Table

from lightning_mics.planning import Plan, Rehearsal
from lightning_mics.policy.candidates import Candidate
from lightning_mics.policy.memory import in_gib

COLUMNS: tuple[tuple[str, str, JustifyMethod], ...] = (  # and the unit, and the side that values are on
    ("partition", "ranks", "right"),
    ("micro-batch", "x steps", "right"),
    ("memory", "GiB", "right"),
    ("cached,", "accumulated", "left"),
    ("in nodes", "GB/step", "right"),
    ("between", "GB/step", "right"),
    ("step", "s", "right"),
    ("HFU, MFU", "TFLOPS", "right"),
    ("limit", "", "left"),
)


def plan_table(planned: Plan, *, config: DictConfig) -> Table:
    """All ways to run the job, the best first, what the run takes in bold; then the systems that it is held against."""
    topology = planned.chosen.topology
    table = Table(
        title=f"Plan: {topology.world_size} GPUs on {topology.nodes} nodes, "
        f"{planned.global_batch_size} sequences per step",
        caption=duration(planned, config),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE,
    )
    for name, unit, side in COLUMNS:
        table.add_column(f"{name}\n{unit}", justify=side, no_wrap=True)
    for candidate in planned.candidates:
        table.add_row(*cells(candidate, planned), style="bold" if candidate is planned.chosen else None)
    table.add_section()
    for candidate in (planned.baseline, planned.baseline_tuned, *planned.unsharded_weights):
        table.add_row(*cells(candidate, planned))
    return table


def cells(candidate: Candidate, planned: Plan) -> list[str]:
    """The cells of a candidate, one per column.

    Args:
        candidate: Candidate of the plan, or a system that it is held against.
        planned: The plan.
    """
    seconds, sent = candidate.seconds, candidate.node_sent
    over = candidate.memory_bytes - planned.capacity_bytes
    return [
        size_label(candidate, planned) if candidate.system == "MiCS" else candidate.system,
        f"{candidate.batches.micro} x {candidate.batches.accumulation}",
        _short(candidate.memory_bytes / 2**30)
        + ("" if candidate.fits else f" (+{_short(over / 2**30)})" if over > 0 else " (tight)"),
        places(candidate),
        _short(sent.inside_bytes / 1e9),
        _short(sent.between_bytes / 1e9),
        f"{_short(seconds.expected)} ({_short(seconds.least)} to {_short(seconds.most)})",
        f"{candidate.hfu_tflops:.0f}, {candidate.mfu_tflops:.0f}",
        seconds.limit,
    ]


def _short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def places(candidate: Candidate) -> str:
    """Where parameters are cached and gradients accumulated, and what else a plan may choose of them."""
    options = candidate.communication
    on_host = " (host)" if options.cache_offload else ""
    ahead = f", {options.inter_node_prefetch} ahead" if options.inter_node_prefetch else ""
    inputs = "; inputs on host" if candidate.activation_offload else ""
    frozen = f"; {options.frozen_on_ranks:.0%} frozen" if options.frozen_on_ranks else ""
    places = f"{place_label(options.cache_parameters)}, {place_label(options.accumulate_gradients)}"
    return f"{places}{on_host}{ahead}{frozen}{inputs}"


def place_label(place: str | float) -> str:
    """A value of ``cache_parameters`` or ``accumulate_gradients`` in a table."""
    return place if isinstance(place, str) else f"{place:.0%}"


def size_label(candidate: Candidate, planned: Plan) -> str:
    """The partition size, whether its collectives over nodes are flat, and whether "auto" takes it."""
    both = candidate.topology.spans_nodes and candidate.topology.local_ranks_per_partition_group > 1
    flat = " flat" if both and not candidate.in_stages else ""
    return f"{candidate.topology.partition_size}{flat}" + (' "auto"' if candidate is planned.recommended else "")


def duration(planned: Plan, config: DictConfig) -> str:
    """How long the whole run takes, and for how many tokens."""
    candidate, steps = planned.chosen, config.trainer.max_steps
    days = [steps * seconds / 86400 for seconds in (candidate.seconds.least, candidate.seconds.most)]
    tokens = steps * config.global_batch_size * config.data.sequence_length
    return (
        f"With partition_size={size_label(candidate, planned)}, {steps:,} steps of {tokens / steps / 1e6:,.3g} M "
        f"tokens ({_short(tokens / 1e9)} B in all) take {_short(days[0])} to {_short(days[1])} days"
    )


def low_bit_line(planned: Plan) -> str:
    """What low-bit optimizer states would save, in a sentence; empty if that is not known, or nothing."""
    saved = [f"{bits} bits {in_gib(count)}" for bits, count in planned.low_bit_saved_bytes.items() if count]
    if not saved:
        return ""
    return f"Beside AdamW in float32, optimizer states of torchao would save on each rank: {', '.join(saved)}"


def rehearsal_tables(rehearsal: Rehearsal, *, capacity_bytes: int | None) -> Iterator[Table]:
    """The collectives of the rank that was rehearsed, and its memory."""
    topology = rehearsal.topology
    title = f"Rehearsal: rank {rehearsal.rank} of {topology.world_size}, one optimizer step of {rehearsal.micro_steps}"
    table = Table(title=f"{title} micro-steps", title_justify="left", box=box.SIMPLE)
    for name in ("collective", "group", "dtype", "micro-step"):
        table.add_column(name)
    for name in ("times", "largest\nMB", "sent inside\nnodes, MB", "sent between\nnodes, MB"):
        table.add_column(name, justify="right")
    for cells in collective_rows(rehearsal):
        table.add_row(*cells)
    yield table
    of = f" of {in_gib(capacity_bytes)}" if capacity_bytes else ""
    memory = Table(title=f"Peak memory: {in_gib(rehearsal.peak_bytes)}{of}", title_justify="left", box=box.SIMPLE)
    memory.add_column("what")
    memory.add_column("GiB", justify="right")
    for name, size in rehearsal.peak.items():
        memory.add_row(name, f"{size / 2**30:.3f}")
    yield memory


def collective_rows(rehearsal: Rehearsal) -> list[list[str]]:
    """Collectives of one kind in one group and one micro-step, together."""
    counts: Counter[tuple[str, str, str, str]] = Counter()
    largest: dict[tuple[str, str, str, str], int] = {}
    sent: dict[tuple[str, str, str, str], list[float]] = {}
    for ran in rehearsal.ran:
        c = ran.collective
        nodes = f"{c.nodes} nodes" if c.nodes > 1 else "one node"
        group = f"{c.group}: {c.ranks} ranks, {nodes}"
        last = ran.micro_step + ran.times - 1
        when = "after" if ran.micro_step == 0 else str(last) if ran.times == 1 else f"{ran.micro_step} to {last}, each"
        key = (c.kind, group, str(c.dtype).removeprefix("torch."), when)
        counts[key] += 1
        largest[key] = max(largest.get(key, 0), c.total_bytes)
        both = sent.setdefault(key, [0.0, 0.0])
        both[0] += c.sent.inside_bytes
        both[1] += c.sent.between_bytes
    return [
        [*key, str(times), f"{largest[key] / 1e6:,.1f}", *(f"{value / 1e6:,.1f}" for value in sent[key])]
        for key, times in counts.items()
    ]
