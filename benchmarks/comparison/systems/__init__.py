"""The systems under comparison, by name, with what they keep. Importing this imports none of them.

Each name stands for a module of this package and a setting of it. The module offers::

    PACKAGES: tuple[str, ...]                       # distributions whose versions the results name, beside torch
    def train(setting: str | None, job: Job) -> None

``train`` builds the model of ``job.workload``, trains it through all of ``job.plan.phases`` and tells ``job.recorder``
where phases begin and steps end. Plain loops leave that to ``benchmarks.comparison.bare_loop``. The process group is
there already. A setting that ends in ``@node``, ``@two-nodes`` or ``@world`` says how far a partition group reaches.
"""

from __future__ import annotations

from dataclasses import dataclass

# What each rank keeps from one micro-step to the next: M is all parameters, G all gradients, k the ranks of a node.
SHARDS = "shards"
WEIGHTS = "shards, M"
NODE_COPY = "shards, M/k"
NODE = "shards, M/k, G/k"
GRADIENTS = "shards, G"
GATHERED = "shards, M, G"
EVERYTHING = "everything"

_SETTINGS: dict[str, tuple[str, str | None, str]] = {
    "ddp": ("ddp", None, EVERYTHING),
    "fsdp2-full": ("fsdp2", "full@world", SHARDS),
    "fsdp2-full-ring": ("fsdp2", "full-ring@world", SHARDS),
    "fsdp2-full-no-sync": ("fsdp2", "no-sync@world", GRADIENTS),
    "fsdp2-full-no-reshard": ("fsdp2", "full-no-reshard@world", SHARDS),
    "fsdp2-full-kept": ("fsdp2", "full-kept@world", GATHERED),
    "fsdp2-hybrid@node": ("fsdp2", "hybrid@node", SHARDS),
    "fsdp2-hybrid@two-nodes": ("fsdp2", "hybrid@two-nodes", SHARDS),
    "fsdp2-hybrid-deferred@node": ("fsdp2", "hybrid-deferred@node", SHARDS),
    "fsdp2-hybrid-deferred@two-nodes": ("fsdp2", "hybrid-deferred@two-nodes", SHARDS),
    "fsdp2-hybrid-deferred-ring@two-nodes": ("fsdp2", "hybrid-deferred-ring@two-nodes", SHARDS),
    "fsdp2-hybrid-kept@node": ("fsdp2", "hybrid-kept@node", GATHERED),
    "fsdp2-hybrid-kept@two-nodes": ("fsdp2", "hybrid-kept@two-nodes", GATHERED),
    "lightning-model-parallel": ("lightning_model_parallel", "hybrid@node", SHARDS),
    "lightning-model-parallel@world": ("lightning_model_parallel", "full@world", SHARDS),
    "accelerate-fsdp2": ("accelerate_fsdp2", "hybrid@node", GRADIENTS),
    "accelerate-fsdp2@world": ("accelerate_fsdp2", "full@world", GRADIENTS),
    "deepspeed-zero2": ("deepspeed_zero2", None, WEIGHTS),
    "deepspeed-zero3": ("deepspeed_zero3", None, SHARDS),
    "deepspeed-zero3-hpz": ("deepspeed_zero3", "hpz@node", NODE_COPY),
    "deepspeed-mics@node": ("deepspeed_mics", "mics@node", SHARDS),
    "deepspeed-mics@two-nodes": ("deepspeed_mics", "mics@two-nodes", SHARDS),
    "mics@node": ("mics", "flat@node", SHARDS),
    "mics-kept@node": ("mics", "kept@node", GATHERED),
    "mics-flat@two-nodes": ("mics", "flat@two-nodes", SHARDS),
    "mics-hierarchical@two-nodes": ("mics", "hierarchical@two-nodes", SHARDS),
    "mics-once-per-step@two-nodes": ("mics", "once-per-step@two-nodes", NODE),
    "mics-kept@two-nodes": ("mics", "kept@two-nodes", GATHERED),
    "mics-flat@world": ("mics", "flat@world", SHARDS),
    "mics-hierarchical@world": ("mics", "hierarchical@world", SHARDS),
    "mics-once-per-step@world": ("mics", "once-per-step@world", NODE),
    "mics-kept@world": ("mics", "kept@world", GATHERED),
    "mics-trainer@node": ("mics_trainer", "trainer@node", GATHERED),
    "mics-trainer@two-nodes": ("mics_trainer", "trainer@two-nodes", GATHERED),
    "mics-trainer@world": ("mics_trainer", "trainer@world", GATHERED),
}

SYSTEMS: tuple[str, ...] = tuple(_SETTINGS)


@dataclass(frozen=True, kw_only=True)
class System:
    """A system's module, as Python's import wants it, the setting that its ``train`` is given, and what ranks keep."""

    name: str
    module: str
    setting: str | None
    keeps: str


def resolve(name: str) -> System:
    """The system called ``name``.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in _SETTINGS:
        raise ValueError(f"no system is called {name!r}; there are {', '.join(SYSTEMS)}")
    module, setting, keeps = _SETTINGS[name]
    return System(name=name, module=f"{__name__}.{module}", setting=setting, keeps=keeps)


def systems_for(*, nodes: int) -> tuple[str, ...]:
    """The systems that differ on a cluster of ``nodes`` nodes: "two nodes" needs more than two, and an even number."""
    two_nodes_differ = nodes > 2 and nodes % 2 == 0
    return tuple(name for name in SYSTEMS if two_nodes_differ or not name.endswith("@two-nodes"))


def partition_nodes(setting: str, *, nodes: int) -> int:
    """Nodes that a partition group of this setting reaches over: the part after ``@`` as a number.

    Raises:
        ValueError: If the setting names no reach, or one that does not divide the cluster.
    """
    reach = {"node": 1, "two-nodes": 2, "world": nodes}.get(setting.rpartition("@")[2])
    if reach is None:
        raise ValueError(f"setting={setting!r} must end in @node, @two-nodes or @world")
    if nodes % reach:
        raise ValueError(f"setting={setting!r} needs a multiple of {reach} nodes, but there are {nodes}")
    return reach
