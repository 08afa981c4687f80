"""Plans of all pairs of a model and a cluster, in three ways: as they are, by another formula, and with host memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

import train
from benchmarks.auto.order_free import order_free
from lightning_mics.planning import Plan, Workload
from lightning_mics.policy.candidates import Candidate
from recipes.job.cluster_plan import hardware_of, plan_run
from recipes.job.workload import measure_run

ROOT = Path(__file__).resolve().parents[2]
SLOWER_GBITS = (100, 25)
NO_PAIRS = {"local", "hf"}  # rates unknown; a model that is downloaded
COMPARED = ("recommended", "baseline", "baseline_tuned")
INPUTS_ON_HOST = ("strategy.activation_offload=auto",)
ON_HOST = (*INPUTS_ON_HOST, "strategy.cache_offload=auto")
IN_WORDS = {"global_batch_size": "{} sequences", "data.batch_size": "micro-batch {}"}  # overrides of jobs


def names(group: str) -> list[str]:
    """Names of the configurations of ``group``, as users type them."""
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml") if path.stem not in NO_PAIRS)


def composed(model: str, cluster: str, *overrides: str) -> DictConfig:
    """The configuration of a model on a cluster."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("train", [f"model={model}", f"cluster={cluster}", *overrides])


class ModelPlans:
    """Plans of one model, whose work is measured once for each precision.

    Args:
        model: Name of the model.
        overrides: Overrides of the configuration.
    """

    def __init__(self, model: str, overrides: Sequence[str] = ()) -> None:
        self.model = model
        self._overrides = tuple(overrides)
        self._of_precision: dict[str, Workload] = {}
        self._config = cache(self.config)

    def config(self, cluster: str) -> DictConfig:
        """The configuration on a cluster."""
        return composed(self.model, cluster, *self._overrides)

    def plan(self, cluster: str, gbits: float) -> Plan:
        """The plan on a cluster whose network has another rate.

        Args:
            cluster: Name of the cluster.
            gbits: Rate of a node's network, in Gbit/s.

        Raises:
            ValueError: If there is no plan.
        """
        config = self._config(cluster)
        precision = config.cluster.precision
        if precision not in self._of_precision:
            self._of_precision[precision] = measure_run(config, train.make_model(config))
        hardware = replace(hardware_of(config.cluster), network_rate_gbits_per_s=gbits)
        return plan_run(config, self._of_precision[precision], hardware)


def planned_pairs(
    models: Sequence[str], clusters: Sequence[str], overrides: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Plan each model on each cluster, at each rate.

    Args:
        models: Names of models.
        clusters: Names of clusters.
        overrides: Further overrides of the configuration.

    Yields:
        A row with the three candidates and with two more plans of the pair, by the formula without an order and with
        inputs of blocks on the host; or with the reason why there is no plan.
    """
    for model in models:
        plans, on_host = ModelPlans(model, overrides), ModelPlans(model, (*overrides, *INPUTS_ON_HOST))
        for cluster in clusters:
            own = hardware_of(plans.config(cluster).cluster).network_rate_gbits_per_s
            for rate in (own, *(rate for rate in SLOWER_GBITS if rate < own)):
                row = {"model": model, "cluster": cluster, "network_rate_gbits_per_s": rate}
                try:
                    found = plans.plan(cluster, rate)
                except ValueError as error:
                    yield row | {"no_plan": str(error)}
                    break
                with order_free():
                    unordered = plans.plan(cluster, rate)
                yield {
                    **row,
                    **{name: described(getattr(found, name)) for name in COMPARED},
                    "order_free": in_short(unordered),
                    "on_host": in_short(on_host.plan(cluster, rate)),
                }


def label(row: dict[str, Any]) -> str:
    """A job in a few words."""
    given = (override.split("=") for override in row["overrides"])
    return ", ".join([f"{row['model']} on {row['cluster']}", *(IN_WORDS[name].format(value) for name, value in given)])


def described(candidate: Candidate) -> dict[str, Any]:
    """Options, memory, traffic and seconds of a candidate as plain data."""
    return {
        "partition_size": candidate.topology.partition_size,
        "in_stages": candidate.in_stages,
        "micro_batch": candidate.batches.micro,
        "micro_steps": candidate.batches.accumulation,
        "activation_offload": candidate.activation_offload,
        "cache_offload": candidate.communication.cache_offload,
        "cache_parameters": candidate.communication.cache_parameters,
        "accumulate_gradients": candidate.communication.accumulate_gradients,
        "inter_node_prefetch": candidate.communication.inter_node_prefetch,
        "memory_gib": candidate.memory_bytes / 2**30,
        "fits": candidate.fits,
        "between_bytes": candidate.node_sent.between_bytes,
        "seconds": {name: getattr(candidate.seconds, name) for name in ("least", "expected", "most")},
    }


def in_short(plan: Plan) -> dict[str, Any]:
    """Whether what a plan recommends fits and uses the host, and its ratios to both baselines."""
    chosen = plan.recommended
    seconds = chosen.seconds.expected
    return {
        "fits": chosen.fits,
        "activation_offload": chosen.activation_offload,
        "over_baseline": plan.baseline.seconds.expected / seconds,
        "over_tuned": plan.baseline_tuned.seconds.expected / seconds,
    }


def ratio(row: dict[str, Any], baseline: str, seconds: str = "expected") -> float:
    """Seconds of a baseline over those of what is recommended; above 1 "auto" is faster."""
    return row[baseline]["seconds"][seconds] / row["recommended"]["seconds"][seconds]
