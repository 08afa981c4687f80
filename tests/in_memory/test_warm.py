"""A rank that is forked warm runs as its launcher has started it, and ends as it would have."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_mics.in_memory import warm

SCRIPT = """
import gc, os, sys, signal, time
print(sys.argv[1:], os.environ.get("ONE"), os.getcwd(), "torch" in sys.modules, __name__, flush=True)
what = sys.argv[1]
if what == "collect": print(any(module is sys for module in gc.get_objects()), gc.isenabled())
if what == "raise": raise ValueError("its own error")
if what == "exit": sys.exit(7)
if what == "kill": os.kill(os.getpid(), signal.SIGKILL)
if what == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
    print(os.getpid(), flush=True)
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the script, while a server runs: with nothing imported, as that is not what is tested."""
    folder = tmp_path_factory.mktemp("warm")
    (folder / "script.py").write_text(SCRIPT)
    serve = "from lightning_mics.in_memory import warm; warm.IMPORTED = (); warm.serve(warm.address())"
    server = subprocess.Popen([sys.executable, "-c", serve])
    until = time.monotonic() + 20
    while (connection := warm._connected(warm.address())) is None and time.monotonic() < until:
        time.sleep(0.02)
    assert connection is not None
    connection.close()
    yield folder
    server.kill()
    server.wait()


def start(folder: Path, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lightning_mics", "warm", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "ONE": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_arguments_environment_folder_and_streams_are_those_of_the_launcher(folder: Path) -> None:
    process = start(folder, "script.py", "run", "--lr", "1")
    output, errors = process.communicate(timeout=20)
    assert output == f"['run', '--lr', '1'] 1 {folder} False __main__\n"
    assert errors == ""
    assert process.returncode == 0


def test_a_module_runs_as_python_runs_it(folder: Path) -> None:
    assert start(folder, "-m", "script", "run").communicate(timeout=20)[0].startswith("['run'] 1")


def test_collections_do_not_visit_what_the_server_has_imported(folder: Path) -> None:
    assert start(folder, "script.py", "collect").communicate(timeout=20)[0].splitlines()[1:] == ["False True"]


@pytest.mark.parametrize(("what", "status"), [("raise", 1), ("exit", 7), ("kill", -signal.SIGKILL)])
def test_it_ends_as_the_script_ends(folder: Path, what: str, status: int) -> None:
    process = start(folder, "script.py", what)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == status
    assert ("ValueError: its own error" in errors) == (what == "raise")


def test_signals_reach_the_script(folder: Path) -> None:
    process = start(folder, "script.py", "wait")
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.readline()
    process.terminate()
    assert process.wait(timeout=20) == 3


def test_the_rank_dies_with_the_process_that_the_launcher_kills(folder: Path) -> None:
    process = start(folder, "script.py", "wait")
    assert process.stdout is not None
    process.stdout.readline()
    rank = int(process.stdout.readline())
    process.kill()
    process.wait()
    until = time.monotonic() + 10
    while Path("/proc", str(rank)).exists() and time.monotonic() < until:
        time.sleep(0.02)
    assert not Path("/proc", str(rank)).exists()
