"""``python -m lightning_mics run | inspect | export``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_mics.__main__ import main


def test_each_command_gets_its_own_arguments(tmp_path: Path, capsys: Any) -> None:
    assert main(["inspect", str(tmp_path)]) == 2
    assert f"{tmp_path} is not a sharded checkpoint" in capsys.readouterr().err
    assert main(["export", str(tmp_path), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 2
    assert "is not a sharded checkpoint" in capsys.readouterr().err
    for command, argument in (("inspect", "checkpoint"), ("export", "--shard-size"), ("run", "--strategy")):
        with pytest.raises(SystemExit) as left:
            main([command, "--help"])
        shown = capsys.readouterr().out
        assert left.value.code == 0
        assert f"python -m lightning_mics {command}" in shown and argument in shown


def test_fabrics_command_line_offers_the_strategy(tmp_path: Path, capsys: Any) -> None:
    for strategy, said in (("mics", "nowhere.py' does not exist"), ("mix", "'mix' is not one of")):
        with pytest.raises(SystemExit) as left:
            main(["run", f"--strategy={strategy}", str(tmp_path / "nowhere.py")])
        assert left.value.code == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspekt", "a.ckpt"], "argument command: invalid choice: 'inspekt' (choose from"),
        ([], "the following arguments are required: command"),
    ],
)
def test_an_unknown_command_is_named_and_the_status_is_two(arguments: list[str], said: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert said in capsys.readouterr().err


def test_help_lists_the_commands(capsys: Any) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {command} " in shown for command in ("run", "inspect", "export"))


@pytest.mark.parametrize("command", ["inspect", "export"])
def test_commands_that_read_checkpoints_do_without_lightning(command: str) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['lightning_mics', '{command}', '--help']\n"
        "try:\n    runpy.run_module('lightning_mics', run_name='__main__')\n"
        "except SystemExit as left:\n    print(left.code, sorted({'lightning', 'accelerate'} & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
