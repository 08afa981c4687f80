"""The memory, traffic and time of a job, before it runs."""

from lightning_mics.cost.hardware import Hardware, find_instance
from lightning_mics.cost.nccl_tests import with_measured
from lightning_mics.planning.planner import Plan, plan, weak_scaling
from lightning_mics.planning.rehearsal.rehearse import Rehearsal, rehearse
from lightning_mics.planning.rehearsal.workload import measure_workload
from lightning_mics.policy.workload import Workload

__all__ = [
    "Hardware",
    "Plan",
    "Rehearsal",
    "Workload",
    "find_instance",
    "measure_workload",
    "plan",
    "rehearse",
    "weak_scaling",
    "with_measured",
]
