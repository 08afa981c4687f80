"""Mutation campaign of ``certify``: ``python -m benchmarks.certify --mutants 220 --seed 0 --out FOLDER``."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.certify.campaign import Campaign
from benchmarks.certify.equivalent import argument
from benchmarks.certify.page import write_page


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a campaign, or go on with it; returns 0 if no fault was missed and nothing else was found.

    Args:
        arguments: Arguments of the command; None takes those of the process.
    """
    typed = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.certify", description=__doc__.partition("\n")[0])
    parser.add_argument("--mutants", type=int, default=220, help="faults that act (default: 220)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    parser.add_argument("--workers", type=int, default=2, help="faults at a time (default: 2)")
    parser.add_argument("--again", nargs="*", default=[], metavar="TEXT", help="train faults again with it in the name")
    parser.add_argument("--missed-again", action="store_true", help="train faults again that were not found")
    parser.add_argument("--out", type=Path, required=True, help="folder of the page and the numbers")
    options = parser.parse_args(typed)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"mutants": {}}
    known: dict[str, Any] = results["mutants"]
    for name, entry in list(known.items()):
        if any(text in name for text in options.again) or (options.missed_again and entry["by"] is None):
            del known[name]
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="certify-mutants-") as folder:
        campaign = Campaign(Path(folder))
        campaign.train_without_mutants()
        results["clean"] = campaign.clean
        drawn = campaign.drawn(options.mutants, options.seed)
        names = {mutant.name for mutant in drawn}
        for name in known.keys() - names:  # of another version of the code
            del known[name]
        print(f"{time.monotonic() - began:.0f} s: {len(drawn)} drawn, {len(known)} known", flush=True)
        waiting = [(number, mutant) for number, mutant in enumerate(drawn) if mutant.name not in known]
        waiting = [] if _acted(known) >= options.mutants else waiting
        stop = multiprocessing.get_context("fork").Event()
        for _number, entry in campaign.find_all(waiting, workers=options.workers, stop=stop):
            known[entry["name"]] = entry
            file.write_text(json.dumps(results, indent=1))
            _print(time.monotonic() - began, entry)
            if _acted(known) >= options.mutants:
                stop.set()
    write_page(options.out, _without(_without(typed, "--again"), "--missed-again"), results)
    missed = [each for each in known.values() if each["acted"] and each["by"] is None and not argument(each["name"])]
    alarms = [entry for entry in campaign.clean if entry["by"] is not None]
    print(f"{len(known)} trained, {len(missed)} missed, {len(alarms)} alarms without a fault")
    return int(bool(missed or alarms))


def _acted(known: dict[str, Any]) -> int:
    return sum(entry["acted"] for entry in known.values())


def _print(seconds: float, entry: dict[str, Any]) -> None:
    if "not applied" in entry:
        print(entry["not applied"])
    found = entry["by"] or ("NOT FOUND" if entry["acted"] else "never acts")
    print(
        f"{seconds:5.0f} s  {found} ({entry.get('training', '')}): {entry['name']}  {entry.get('where', '')}",
        flush=True,
    )


def _without(arguments: Sequence[str], option: str) -> list[str]:
    return list(arguments[: arguments.index(option)] if option in arguments else arguments)


if __name__ == "__main__":
    sys.exit(main())
