"""The plan and the rehearsal for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from omegaconf import DictConfig
from rich import box
from rich.table import Table

from lightning_mics.planning import Plan, Rehearsal
from lightning_mics.planning.memory import in_gib
from lightning_mics.planning.planner import Row

COLUMNS = (
    ("partition", "ranks"),
    ("micro-batch", "x steps"),
    ("memory", "GiB"),
    ("once per step", ""),
    ("inside nodes", "GB/step"),
    ("between nodes", "GB/step"),
    ("step", "s"),
    ("HFU", "TFLOPS"),
    ("MFU", "TFLOPS"),
    ("limit", ""),
)


def plan_table(planned: Plan, *, config: DictConfig) -> Table:
    """All ways to run the job, the best first; what "auto" takes in bold."""
    topology = planned.recommended.topology
    table = Table(
        title=f"Plan: {topology.world_size} GPUs on {topology.nodes} nodes, {planned.global_batch} sequences per step",
        caption=duration(planned.recommended, config),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE,
    )
    for name, unit in COLUMNS:
        table.add_column(f"{name}\n{unit}", justify="left" if name in ("once per step", "limit") else "right")
    for row in planned.rows:
        table.add_row(*cells(row, planned.capacity_bytes), style="bold" if row is planned.recommended else None)
    table.add_section()
    table.add_row(*cells(planned.baseline, planned.capacity_bytes))
    return table


def cells(row: Row, capacity_bytes: int) -> list[str]:
    """What is said of one way to run the job."""
    seconds, sent = row.seconds, row.node_sent
    over = row.memory_bytes - capacity_bytes
    return [
        str(row.topology.partition_size) if row.system == "MiCS" else row.system,
        f"{row.batches.micro} x {row.batches.accumulation}",
        f"{row.memory_bytes / 2**30:.1f}" + ("" if row.fits else f", {in_gib(over)} over" if over > 0 else ", tight"),
        once_per_step(row),
        f"{sent.inside_bytes / 1e9:,.4g}",
        f"{sent.between_bytes / 1e9:,.4g}",
        f"{seconds.expected:.3g} ({seconds.least:.3g} to {seconds.most:.3g})",
        f"{row.hfu_tflops:.0f}",
        f"{row.mfu_tflops:.0f}",
        seconds.limit,
    ]


def once_per_step(row: Row) -> str:
    """What travels once per step, in words."""
    once = row.once_per_step
    if once is None:
        return "-"
    parts = {
        "parameters": once.cross_node_gather.once or once.in_node_gather.once,
        "gradients": once.cross_node_reduce.once or once.in_node_reduce.once,
    }
    where = " everywhere" if once.in_node_gather.once else ""
    return " and ".join(name for name, is_once in parts.items() if is_once) + where or "-"


def duration(row: Row, config: DictConfig) -> str:
    """How long the whole run takes, and for how many tokens."""
    steps, days = config.trainer.max_steps, [s / 86400 for s in (row.seconds.least, row.seconds.most)]
    tokens = steps * config.global_batch_size * config.data.sequence_length
    return (
        f'"auto" takes partition_size={row.topology.partition_size}: {steps:,} steps of '
        f"{tokens / steps / 1e6:,.3g} M tokens ({tokens / 1e9:,.3g} B in all) take {steps * days[0]:,.3g} to "
        f"{steps * days[1]:,.3g} days"
    )


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
        largest[key] = max(largest.get(key, 0), c.whole_bytes)
        both = sent.setdefault(key, [0.0, 0.0])
        both[0] += c.sent.inside_bytes
        both[1] += c.sent.between_bytes
    return [
        [*key, str(times), f"{largest[key] / 1e6:,.1f}", *(f"{value / 1e6:,.1f}" for value in sent[key])]
        for key, times in counts.items()
    ]
