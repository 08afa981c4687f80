"""The paper's jobs, and large ones of today, each by "auto" without and with host memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.auto.pairs import COMPARED, ON_HOST, ModelPlans, described

PAPERS = ("global_batch_size=8192", "data.batch_size=8")
JOBS = (  # model, cluster, rates of a node's network in Gbit/s, and further overrides
    ("gpt-100b", "p4d_64", (400,), ("global_batch_size=32768", "data.batch_size=16")),
    ("gpt-100b", "p4d_64", (400,), ()),
    ("gpt-175b", "p4de_16", (400,), ()),
    *((f"bert-{size}", "p3dn_16", (100,), PAPERS) for size in ("10b", "15b", "20b", "50b")),
    ("bert-50b", "p3dn_16", (100,), ()),
    ("llama-70b", "p5_8", (400, 100), ()),
    ("llama-70b", "p4de_16", (100, 25), ()),
    ("llama-8b", "p5_8", (3200,), ()),
)


def planned_jobs(jobs: Sequence[tuple[str, str, Sequence[float], Sequence[str]]] = JOBS) -> Iterator[dict[str, Any]]:
    """Plan each job at each of its rates.

    Args:
        jobs: Model, cluster, rates and overrides of each job.

    Yields:
        The job, the three candidates of its plan, and what is recommended with host memory.
    """
    for model, cluster, rates, overrides in jobs:
        plans, on_host = ModelPlans(model, overrides), ModelPlans(model, (*overrides, *ON_HOST))
        for rate in rates:
            found, with_host = plans.plan(cluster, rate), on_host.plan(cluster, rate)
            yield {
                "model": model,
                "cluster": cluster,
                "overrides": list(overrides),
                "network_rate_gbits_per_s": rate,
                **{name: described(getattr(found, name)) for name in COMPARED},
                "on_host": described(with_host.recommended),
            }
