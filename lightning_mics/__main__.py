"""``python -m lightning_mics run | inspect | export | certify | keeper | warm``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence


def _run(arguments: Sequence[str]) -> int:
    from lightning.fabric import cli  # offers strategy "mics", which importing this package has registered

    if not hasattr(cli, "_main"):
        print("python -m lightning_mics run needs the package click: pip install click", file=sys.stderr)
        return 1
    cli._main(["run", *arguments], prog_name="python -m lightning_mics")  # raises SystemExit
    return 0


def _inspect(arguments: Sequence[str]) -> int:
    from lightning_mics.checkpoint.inspect import main

    return main(arguments)


def _export(arguments: Sequence[str]) -> int:
    from lightning_mics.checkpoint.export import main

    return main(arguments)


def _certify(arguments: Sequence[str]) -> int:
    from lightning_mics.certification.command import main

    return main(arguments)


def _keeper(arguments: Sequence[str]) -> int:
    from lightning_mics.integrations._keeper import main

    return main(arguments)


def _warm(arguments: Sequence[str]) -> int:
    from lightning_mics.in_memory.warm import main

    return main(arguments)


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "run": (_run, "start a Fabric script on several processes: run --strategy=mics --devices=4 SCRIPT"),
    "inspect": (_inspect, "show what is in a sharded checkpoint, and whether it is complete"),
    "export": (_export, "write the model in a sharded checkpoint as a folder for transformers' from_pretrained"),
    "certify": (_certify, "train a module on a few ranks of this machine, and compare it with one process"),
    "keeper": (_keeper, "hold this node's part of in-memory checkpoints; or its status, or stop"),
    "warm": (_warm, "run SCRIPT as a rank that a process of this node forks, with everything imported"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of :data:`COMMANDS`, each with arguments of its own.

    Args:
        arguments: The command and its arguments; None takes them from ``sys.argv``.

    Returns:
        The exit status.
    """
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="python -m lightning_mics",
        description="MiCS for PyTorch Lightning.",
        epilog="\n".join(["commands:", *(f"  {name:<{width}}  {about}" for name, (_, about) in COMMANDS.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, help="see below; COMMAND --help lists its arguments")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    return COMMANDS[given.command][0](given.arguments)


if __name__ == "__main__":
    sys.exit(main())
