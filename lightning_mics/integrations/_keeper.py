"""Which keeper belongs to a job: settings from the environment, and ``python -m lightning_mics keeper``."""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import ipaddress
import json
import os
import socket
import struct
import sys
from collections.abc import Mapping, Sequence

from lightning_mics.in_memory.keeper.client import KeeperConnection, KeeperSettings, settings_from
from lightning_mics.in_memory.keeper.wire import KeeperError
from lightning_mics.in_memory.launcher import PROCESS

TOKEN = "MICS_KEEPER_TOKEN"
INTERFACE = "MICS_KEEPER_INTERFACE"
IDLE = "MICS_KEEPER_IDLE_SECONDS"
SILENCE = "MICS_KEEPER_SILENCE_SECONDS"
STARTED = "MICS_KEEPER_STARTED"  # by the launch script, as a step of its own under SLURM
_SIOCGIFADDR = 0x8915


def keeper_settings(environment: Mapping[str, str], *, nodes: int) -> KeeperSettings:
    """The settings of this node's keeper: the same in each start of the job on this node, others for another job.

    Args:
        environment: Variables of the environment.
        nodes: Number of nodes in the job.

    Raises:
        ValueError: If several nodes have no token, or an interface has no address.
    """
    token = environment.get(TOKEN) or (_of_this_launch(environment) if nodes == 1 else "")
    if not token:
        raise ValueError(
            f"in_memory_checkpoint on {nodes} nodes needs a secret that all nodes and all starts of the job share: put "
            f"`export {TOKEN}=$(openssl rand -hex 32)` into the launch script, before it starts the nodes"
        )
    return KeeperSettings(
        name=hashlib.sha256(f"keeper of {token}".encode()).hexdigest()[:24],
        token=token,
        host="" if nodes == 1 else _address(environment),
        idle_seconds=float(environment.get(IDLE, 1800)),
        silence_seconds=float(environment.get(SILENCE, 10)),
    )


def launcher_process(environment: Mapping[str, str]) -> int | None:
    """The process of torchrun that has started this rank and may start it again; None under another launcher.

    Args:
        environment: Variables of the environment.
    """
    starts_again = int(environment.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
    return int(environment.get(PROCESS, os.getppid())) if starts_again else None


def _of_this_launch(environment: Mapping[str, str]) -> str:
    """On one node: what the restarts by one launcher have in common. It is no secret, and no keeper listens for it."""
    parent = os.getppid()
    with open(f"/proc/{parent}/stat") as status:
        started = status.read().rpartition(")")[2].split()[19]
    return f"{parent} {started} {environment.get('TORCHELASTIC_RUN_ID', '')}"


def _address(environment: Mapping[str, str]) -> str:
    """The address of the interface that nodes reach each other by."""
    interface = environment.get(INTERFACE) or environment.get("GLOO_SOCKET_IFNAME")
    if interface:
        return _address_of(interface.split(",")[0])
    master = environment.get("MASTER_ADDR", "localhost")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((master, 1))  # sends nothing
            address = str(probe.getsockname()[0])
        except OSError as error:
            raise ValueError(f"MASTER_ADDR={master}: {error}; set {INTERFACE} to the interface between nodes") from None
    if ipaddress.ip_address(address).is_loopback:
        raise ValueError(
            f"MASTER_ADDR={master} is this node's own address inside of it, {address}, where keepers of other nodes "
            f"cannot reach this one: set {INTERFACE} to the interface between nodes, such as eth0"
        )
    return address


def _address_of(interface: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("256s", interface.encode()[:15])
        try:
            found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
        except OSError as error:
            raise ValueError(f"the interface {interface!r} has no address: {error.strerror}") from None
    return socket.inet_ntoa(found[20:24])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a keeper in front, or look at the one of this node, or end it.

    Args:
        arguments: Arguments of the command; None takes them from ``sys.argv``.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(
        prog="python -m lightning_mics keeper",
        description="The process that holds this node's part of in-memory checkpoints. Ranks start it by themselves; "
        f"in front it is for a step of its own under SLURM. {TOKEN} names the job.",
    )
    parser.add_argument("command", nargs="?", choices=("status", "stop"), help="print what it holds, or end it")
    parser.add_argument("--settings-from-stdin", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        if options.settings_from_stdin:
            settings = settings_from(sys.stdin.read())
        elif not os.environ.get(TOKEN):
            raise ValueError(f"{TOKEN} is not set; it names the job")
        else:
            settings = keeper_settings(os.environ, nodes=2)
        if options.command is not None:
            connection = KeeperConnection.local(settings)
            answer, _ = connection.ask({"do": options.command})
            if options.command == "status":
                print(json.dumps(answer, indent=1))
            return 0
        from lightning_mics.in_memory.keeper.server import Keeper

        Keeper(settings).run()
    except (ValueError, OSError, KeeperError) as error:
        print(f"python -m lightning_mics keeper: {error}", file=sys.stderr)
        return 1
    return 0
