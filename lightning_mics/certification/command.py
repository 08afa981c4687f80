"""``python -m lightning_mics certify my_package:make_module --batches my_package:make_batches``."""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning_mics.certification.certify import certify
from lightning_mics.certification.report import CannotCertifyError
from lightning_mics.integrations.trainer.strategy import MiCSStrategy

WRONG, IMPOSSIBLE = 1, 2  # exit statuses


def main(arguments: Sequence[str] | None = None) -> int:
    """Certify a module by its name, and print the report.

    Args:
        arguments: Arguments of the command; None takes them from ``sys.argv``.

    Returns:
        The exit status: 0 if all agrees, 1 if not, 2 if it cannot be certified.
    """
    options = _parser().parse_args(arguments)
    sys.path.insert(0, str(Path.cwd()))
    try:
        if options.json is not None and not options.json.absolute().parent.is_dir():
            raise ValueError(f"--json {options.json}: there is no such folder")
        strategy = MiCSStrategy(**dict(map(_option, options.option)))
        report = certify(
            _found(options.module),
            _found(options.batches),
            strategy=strategy,
            shape=options.shape,
            job_shape=options.job_shape,
            accumulate=options.accumulate,
            resume_ranks=options.resume_ranks,
            precision=options.precision,
            shrink=not options.no_shrink,
        )
    except (CannotCertifyError, TypeError, ValueError, ImportError, AttributeError) as error:
        print(f"{getattr(error, 'trace', '')}\ncannot be certified: {error}", file=sys.stderr)
        return IMPOSSIBLE
    print(report)
    if options.json is not None:
        report.write(options.json)
    return 0 if report.ok else WRONG


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lightning_mics certify",
        description="Train a module under the options of a job on a few forked ranks of this machine, beside one "
        "process, and say where they differ. Exit status 0: nowhere; 1: somewhere; 2: it cannot be certified.",
    )
    parser.add_argument("module", help="class, or function that returns the module: package.file:name")
    parser.add_argument("--batches", required=True, help="list of micro-batches, or function: package.file:name")
    parser.add_argument(
        *("--option", "-o"),
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="option of MiCSStrategy, such as partition_size=16; as often as needed",
    )
    parser.add_argument("--shape", type=_shape, help="nodes x ranks per node to run on (default: as many as needed)")
    parser.add_argument("--job-shape", type=_shape, help="nodes x ranks per node of the job (default: nodes of 8)")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-steps in an optimizer step (default: 2)")
    parser.add_argument("--resume-ranks", type=int, help="ranks that resume (default: half as many)")
    parser.add_argument("--precision", help="precision of the job, such as bf16-mixed, to compare in as well")
    parser.add_argument("--no-shrink", action="store_true", help="take the module as it is")
    parser.add_argument("--json", type=Path, help="file for the report as JSON")
    return parser


def _found(name: str) -> Any:
    """The object that ``package.file:name`` names.

    Raises:
        ValueError: If the name has no colon.
        ImportError: If the file cannot be imported.
        AttributeError: If there is no such object in it.
    """
    file, _, attribute = name.partition(":")
    if not attribute:
        raise ValueError(f"{name!r} names no object: write package.file:name")
    return getattr(import_module(file), attribute)


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--option {text!r} is not NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):  # a word, such as node
        return name, value


def _shape(text: str) -> tuple[int, int]:
    try:
        nodes, ranks = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NODESxRANKS, such as 2x2") from None
    return nodes, ranks
