"""A virtual environment for each family of systems, so that every peer has the versions it is at its best with.

::

    python -m benchmarks.comparison.environments              # all of them
    python -m benchmarks.comparison.environments ours         # one

Each is made when it is first wanted, from a file in ``requirements/``, and used again until that file changes.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.comparison.systems import resolve

TORCH = "torch==2.13.0"
ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / ".environments"
REQUIREMENTS = Path(__file__).parent / "requirements"

_OTHER_THAN_OURS = {  # by module of systems/
    "accelerate_fsdp2": "accelerate",
    "deepspeed_zero2": "deepspeed-zero3",
    "deepspeed_zero3": "deepspeed-zero3",
    "deepspeed_mics": "deepspeed-mics",
}


def environment_of(system: str) -> str:
    """The name of the environment that ``system`` runs in.

    Raises:
        ValueError: If there is no such system.
    """
    return _OTHER_THAN_OURS.get(resolve(system).module.rpartition(".")[2], "ours")


def python_of(system: str) -> Path:
    """The interpreter that runs ``system``; its environment is made if it is not there.

    Raises:
        ValueError: If there is no such system.
        subprocess.CalledProcessError: If the environment cannot be made.
    """
    return make_environment(environment_of(system))


def make_environment(name: str) -> Path:
    """Make the environment ``name`` unless it is there as its file wants it; returns its interpreter.

    Raises:
        ValueError: If no file describes it.
        subprocess.CalledProcessError: If pip fails.
    """
    if name not in environment_names():
        raise ValueError(f"no environment is called {name!r}; there are {', '.join(environment_names())}")
    requirements, folder = REQUIREMENTS / f"{name}.txt", FOLDER / name
    python, stamp = folder / "bin" / "python", folder / "made-from.txt"
    wanted = f"{TORCH}\n{requirements.read_text()}"
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    _ignore_in_git(FOLDER)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    # torch by itself: some packages look for it while they are built
    for packages in (["setuptools", "wheel", TORCH], ["-r", requirements]):
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *packages], check=True, cwd=ROOT)
    stamp.write_text(wanted)  # last: a half-made environment is made again
    return python


def environment_names() -> list[str]:
    """The environments that files in ``requirements/`` describe."""
    return sorted(path.stem for path in REQUIREMENTS.glob("*.txt"))


def _ignore_in_git(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")


def main(arguments: list[str] | None = None) -> int:
    """Make the environments named on the command line, or all."""
    parser = argparse.ArgumentParser(description="Make the virtual environments of the compared systems.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(environment_names())}; default: all")
    for name in parser.parse_args(arguments).names or environment_names():
        print(f"{name}: {make_environment(name)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
