"""Train one model under many systems on emulated clusters, in turns, and write a page of results.

python -m benchmarks.comparison.compare --shapes 2x4 4x2 --micro-steps 1 4 16 --rates 200 1000 --rounds 3 \
    --systems all --out benchmarks/results/DIR

Each launch is one system on one shape. It goes through all phases: every rate (and unshaped links) with every number of
micro-steps. Rounds repeat all launches in another order. Two more launches compare losses, with SGD and with AdamW.
Ended in the middle, the same command goes on where it was; launches that failed are tried again.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

from benchmarks.comparison import result_page
from benchmarks.comparison.collect import machine, write_results
from benchmarks.comparison.launches import Launch, Shape, is_finished, perform
from benchmarks.comparison.plan import Phase, Plan
from benchmarks.comparison.systems import SYSTEMS, resolve, systems_for
from benchmarks.comparison.workload import Workload, parameter_bytes
from benchmarks.emulated_cluster.iproute import check_machine

_LOSS_MICRO_STEPS = 2  # the fewest with which an accumulation can go wrong
_FULL_MICRO_STEPS = 4  # up to here a phase has all its steps, beyond it fewer in proportion


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is compared, and how often."""

    shapes: tuple[Shape, ...]
    micro_steps: tuple[int, ...]
    rates_mbit: tuple[float, ...]
    rounds: int
    systems: tuple[str, ...]
    steps: int
    warmup_steps: int
    loss_steps: int
    launch_minutes: float
    workload: Workload


def main(arguments: list[str] | None = None) -> int:
    """Perform what has not been performed, and write results, plots and page after each round."""
    typed = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(typed)
    try:
        settings = _settings(options)
        check_machine()
    except (RuntimeError, ValueError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    facts = _facts(settings, typed)
    launches = [list(round_of(settings, number)) for number in range(settings.rounds)]
    failures = 0
    try:
        for of_one_round in launches:
            failures += _perform_all(of_one_round, options.out, settings)
            _write(options.out, facts, chain(*launches))
    except KeyboardInterrupt:
        print("\nended; the same command goes on from here", file=sys.stderr)
        _write(options.out, facts, chain(*launches))
        return 128 + signal.SIGINT
    print(f"wrote {options.out / result_page.PAGE}" + (f"; {failures} launches failed" if failures else ""))
    return 1 if failures else 0


def round_of(settings: Settings, number: int) -> Iterator[Launch]:
    """The launches of one round. Each round begins with another system, so that no system is always first."""
    for shape in settings.shapes:
        systems = [name for name in systems_for(nodes=shape.nodes) if name in settings.systems]
        first = number * len(systems) // settings.rounds
        for system in systems[first:] + systems[:first]:
            for purpose, plan in _plans(settings, shape, number):
                yield Launch(shape=shape, system=system, purpose=purpose, round=number, plan=plan)


def _plans(settings: Settings, shape: Shape, number: int) -> Iterator[tuple[str, Plan]]:
    yield "timing", _plan(settings, shape, "sgd", timing_phases(settings))
    if number == 0 and settings.loss_steps:
        phase = Phase(
            name="losses", rate_mbit=None, micro_steps=_LOSS_MICRO_STEPS, warmup_steps=0, steps=settings.loss_steps
        )
        for optimizer in ("sgd", "adamw"):
            yield f"losses-{optimizer}", _plan(settings, shape, optimizer, (phase,))


def timing_phases(settings: Settings) -> tuple[Phase, ...]:
    """Every rate with every number of micro-steps; unshaped links come first.

    Each rate is warmed up once, by its shortest steps, and phases of many micro-steps have fewer steps: most of a
    comparison's time goes into these.
    """
    return tuple(
        Phase(
            name=f"s={micro_steps}, {'unshaped' if rate is None else f'{rate:g} Mbit/s'}",
            rate_mbit=rate,
            micro_steps=micro_steps,
            warmup_steps=settings.warmup_steps if micro_steps == settings.micro_steps[0] else 0,
            steps=max(1, min(settings.steps, settings.steps * _FULL_MICRO_STEPS // micro_steps)),
        )
        for rate in (None, *settings.rates_mbit)
        for micro_steps in settings.micro_steps
    )


def _plan(settings: Settings, shape: Shape, optimizer: str, phases: tuple[Phase, ...]) -> Plan:
    ranks = shape.ranks_per_node
    return Plan(workload=settings.workload, ranks_per_node=ranks, optimizer=optimizer, phases=phases)


def _perform_all(launches: Sequence[Launch], out: Path, settings: Settings) -> int:
    """Perform what is left, tell how it goes, and return how many failed."""
    left = [launch for launch in launches if not is_finished(launch, out)]
    begun, failed = time.monotonic(), 0
    for done, launch in enumerate(left):
        minutes = (time.monotonic() - begun) / 60 / max(done, 1) * (len(left) - done)
        remaining = f", about {minutes:.0f} min left in this round" if done else ""
        print(f"[{done + 1}/{len(left)}{remaining}] {launch} ... ", end="", flush=True)
        outcome = perform(launch, out, time_limit=settings.launch_minutes * 60)
        failed += not outcome["ok"]
        print(f"{outcome['seconds']:.0f} s" + ("" if outcome["ok"] else f", FAILED: {outcome['reason']}"), flush=True)
    return failed


def _write(out: Path, facts: Mapping[str, object], launches: Iterable[Launch]) -> None:
    """Write results, plots and page of the launches that have been performed."""
    folders = [folder for launch in launches if (folder := launch.folder(out)).joinpath("outcome.json").exists()]
    if folders:
        write_results(out, facts, folders)
        result_page.write(out)


def _facts(settings: Settings, typed: Sequence[str]) -> dict[str, object]:
    return {
        "command": f"python -m benchmarks.comparison.compare {shlex.join(typed)}",
        "machine": machine(),
        "workload": asdict(settings.workload),
        "parameter_bytes": parameter_bytes(settings.workload),
        "micro_steps": list(settings.micro_steps),
        "rates_mbit": list(settings.rates_mbit),
        "rounds": settings.rounds,
        "steps": settings.steps,
        "warmup_steps": settings.warmup_steps,
        "launch_minutes": settings.launch_minutes,
    }


def _settings(options: argparse.Namespace) -> Settings:
    for name, least in (("rounds", 1), ("steps", 1), ("warmup_steps", 0), ("loss_steps", 0)):
        if getattr(options, name) < least:
            raise ValueError(f"{name}={getattr(options, name)} must be at least {least}")
    if min(options.micro_steps) < 1 or min(options.rates) < 1:
        raise ValueError("--micro-steps and --rates must be at least 1")
    systems = SYSTEMS if options.systems == ["all"] else tuple(resolve(name).name for name in options.systems)
    return Settings(
        shapes=tuple(Shape.parse(text) for text in options.shapes),
        micro_steps=tuple(sorted(set(options.micro_steps))),
        rates_mbit=tuple(sorted(set(options.rates))),
        rounds=options.rounds,
        systems=systems,
        steps=options.steps,
        warmup_steps=options.warmup_steps,
        loss_steps=options.loss_steps,
        launch_minutes=options.launch_minutes,
        workload=_workload(options.workload),
    )


def _workload(changes: Sequence[str]) -> Workload:
    """The workload with ``KEY=VALUE`` in place of what it has by itself."""
    kinds = {name: type(value) for name, value in asdict(Workload()).items()}
    values = {}
    for change in changes:
        name, _, value = change.partition("=")
        if name not in kinds:
            raise ValueError(f"--workload {change!r}: use one of {', '.join(kinds)}, as in width=256")
        values[name] = kinds[name](value)
    return Workload(**values)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.comparison.compare", description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["2x4", "4x2"], metavar="NODESxRANKS")
    parser.add_argument("--micro-steps", nargs="+", type=int, default=[1, 4, 16], metavar="S")
    parser.add_argument("--rates", nargs="+", type=float, default=[200, 1000], metavar="MBIT")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--systems", nargs="+", default=["all"], metavar="NAME")
    parser.add_argument("--steps", type=int, default=3, help="measured optimizer steps of a phase; fewer if s > 4")
    parser.add_argument("--warmup-steps", type=int, default=1, help="steps before the first of each rate")
    parser.add_argument("--loss-steps", type=int, default=50, help="steps of the launches that compare losses; 0: none")
    parser.add_argument("--launch-minutes", type=float, default=30, help="after which a launch has failed")
    parser.add_argument("--workload", nargs="+", default=[], metavar="KEY=VALUE", help="sizes of model and batch")
    parser.add_argument("--out", type=Path, required=True, help="folder of the raw results, the plots and the page")
    return parser


if __name__ == "__main__":
    sys.exit(main())
