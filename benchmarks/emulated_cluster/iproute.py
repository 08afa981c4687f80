"""Calls of ``ip`` and ``tc``, and whether this machine can run an emulated cluster at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

_INSTALL = "apt-get install iproute2"

# Tried in a network namespace that ends with the command, so that a refusal leaves nothing behind.
_TRIALS = (
    ("true", "gives this process no network namespaces", "run on the machine itself or in a privileged container"),
    ("ip link add name bridge0 type bridge", "has no bridges", "try: modprobe bridge"),
    ("ip link add name veth0 type veth peer name veth1", "has no veth pairs", "try: modprobe veth"),
    ("tc qdisc add dev lo root tbf rate 1mbit burst 9kb limit 9kb", "has no tbf shaping", "try: modprobe sch_tbf"),
)


def ip(arguments: str, *, namespace: str | None = None) -> str:
    """Run one ``ip`` command, in ``namespace`` if given, and return what it printed."""
    return _call(["ip", *_in(namespace), *arguments.split()])


def ip_batch(commands: Sequence[str], *, namespace: str | None = None) -> None:
    """Run several ``ip`` commands in one process."""
    _call(["ip", *_in(namespace), "-batch", "-"], stdin="\n".join(commands))


def ip_json(arguments: str, *, namespace: str | None = None) -> Any:
    """Run one ``ip`` command that describes something, and return the description."""
    return json.loads(_call(["ip", *_in(namespace), "-json", *arguments.split()]))


def tc(arguments: Sequence[str], *, namespace: str) -> None:
    """Run one ``tc`` command in ``namespace``."""
    _call(["tc", *_in(namespace), *arguments])


def tc_json(arguments: str, *, namespace: str) -> Any:
    """Run one ``tc`` command that describes something, and return the description."""
    return json.loads(_call(["tc", *_in(namespace), "-json", *arguments.split()]))


def check_machine() -> None:
    """Refuse a machine on which no emulated cluster can be made, before anything is made.

    Raises:
        RuntimeError: If not root, or without iproute2, or if the kernel lacks something; says what to change.
    """
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise RuntimeError(f"an emulated cluster needs the command {tool!r}, which is not here; {_INSTALL}")
    if os.geteuid() != 0:
        raise RuntimeError(f"an emulated cluster needs root for its namespaces; this is user {os.geteuid()}: use sudo")
    for command, refusal, remedy in _TRIALS:
        trial = subprocess.run(["unshare", "--net", *command.split()], capture_output=True, text=True)
        if trial.returncode:
            raise RuntimeError(f"this kernel {refusal} ({trial.stderr.strip()}); {remedy}")


def _in(namespace: str | None) -> list[str]:
    return [] if namespace is None else ["-netns", namespace]


def _call(command: list[str], *, stdin: str | None = None) -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True)
    if done.returncode:
        what = " ".join(command) + (f" <<< {stdin!r}" if stdin else "")
        raise RuntimeError(f"{what!r} ended with status {done.returncode}: {done.stderr.strip()}")
    return done.stdout
