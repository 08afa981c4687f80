"""Every code block of the documentation works: Python blocks run, the commands of bash blocks are understood."""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import tomllib
import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed.tensor import DTensor

import train
from lightning_mics.integrations.trainer import traffic_monitor
from recipes.job.auto import choose_automatically
from recipes.job.cluster_plan import hardware_of, plan_run
from recipes.plan.dry_run import WIDTH
from recipes.plan.tables import plan_table
from tests.docs.pages import PAGES, ROOT, Block, blocks
from tests.support.configs import composed
from tests.support.models import TinyLM, TinyModule, loader_of_tokens, tokens
from tests.support.networks import make
from tests.support.trainers import on_ranks

# Pages whose Python blocks another test runs, since they belong together or are slow.
RUN_ELSEWHERE = {"docs/planning.md": "tests/planning/test_planner.py::test_the_page_of_the_docs_runs"}


PYTHON = [block for block in blocks("python") if block.page not in RUN_ELSEWHERE]


COMMAND_PAGES = (*PAGES, ROOT / "recipes" / "README.md", ROOT / "benchmarks" / "README.md")


# -- Python ------------------------------------------------------------------------------------------------------------


def _title(block: Block) -> str:
    return f"{block.page}: {block.text.strip().splitlines()[-1].strip()}"


@pytest.mark.parametrize("block", PYTHON, ids=_title)
def test_the_block_runs(block, tmp_path):
    world_size = 4 if re.search(r"world_size=4|devices=4|MiCSPlugin", block.text) else 1
    assert on_ranks(_run, block.text, tmp_path, world_size=world_size) == [True] * world_size


def _run(text: str, folder: Path) -> bool:
    os.chdir(folder)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    rank = dist.get_rank()
    model = TinyLM()
    names: dict[str, Any] = {
        "MyModel": TinyModule,
        "MyData": loader_of_tokens,
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters()),
        "batches": [tokens(1, seed=4 * step + rank) for step in range(8)],
        "batch": tokens(1, seed=rank),
        "dataset": tokens(512),
    }
    make("gpt").save_pretrained(folder / f"pretrained {rank}")
    names |= {"make_network": lambda: type(make("gpt"))(make("gpt").config), "folder": folder / f"pretrained {rank}"}
    before = model.norm.weight.detach().clone()
    exec(text, names)
    trained = dict(names["model"].named_parameters())
    norm = next(parameter for name, parameter in trained.items() if name.endswith("norm.weight"))
    if re.search(r"shard_model\(model|\.setup\(model|\.prepare\(model", text):
        assert isinstance(norm, DTensor)
    if "optimizer.step()" in text:
        assert not norm.full_tensor().equal(before)
    return True


def test_the_blocks_that_run_elsewhere_do():
    for page, test in RUN_ELSEWHERE.items():
        file, _, name = test.partition("::")
        source = (ROOT / file).read_text()
        assert f"def {name}(" in source
        assert Path(page).name in source


def test_blocks_are_found():
    assert len(PYTHON) >= 16
    assert {block.page for block in PYTHON} >= {"README.md", "docs/integrations.md", "docs/options.md"}


# -- commands ----------------------------------------------------------------------------------------------------------


class Understood(Exception):  # noqa: N818 - it is none
    """A program has parsed its arguments."""


def commands() -> list[str]:
    """All commands: lines of bash blocks, and code in sentences and tables that begins with a program's name."""
    lines = [
        line
        for block in blocks("bash", COMMAND_PAGES)
        for line in block.text.replace("\\\n", " ").splitlines()
        if shlex.split(line, comments=True)
    ]
    spans = [
        span
        for page in COMMAND_PAGES
        for span in re.findall(r"`((?:python train\.py|make|pip install) [^`]+)`", page.read_text())
    ]
    return list(dict.fromkeys([*lines, *(span for span in spans if not re.search(r"\b[A-Z_]{3,}\b(?!=)", span))]))


@pytest.mark.parametrize("line", commands())
def test_the_command_is_understood(line, monkeypatch):
    understand(shlex.split(line, comments=True), monkeypatch)


def understand(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a command as far as it goes without running it."""
    match words:
        case ["python", "train.py", *overrides]:
            sweep = "-m" in overrides
            given = [override for override in overrides if override != "-m"]
            composed(*(override.split(",")[0] if sweep else override for override in given))
        case ["python", "-m", module, *arguments]:
            with pytest.raises(Understood):
                _parse(module, arguments, monkeypatch)
        case ["torchrun", *options]:
            at = options.index("-m")
            with pytest.raises(Understood):
                _parse(options[at + 1], options[at + 2 :], monkeypatch)
        case ["make", target, *settings]:
            makefile = (ROOT / "Makefile").read_text()
            assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), f"no target {target}"
            assert all(re.search(rf"^{s.partition('=')[0]} \?=", makefile, re.MULTILINE) for s in settings)
        case ["pip", "install", *requirements]:
            for requirement in requirements:
                _check_requirement(requirement)
        case ["lint-imports"]:
            assert "[tool.importlinter]" in (ROOT / "pyproject.toml").read_text()
        case _:
            raise AssertionError(f"no check for {shlex.join(words)}")


def _parse(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Start a module as a program and raise :class:`Understood` once its arguments are parsed."""
    parse_args = argparse.ArgumentParser.parse_args
    parsers_to_come = 1 if module == "lightning_mics" else 0  # it has commands with a parser of their own

    def stop_after_parsing(self: argparse.ArgumentParser, *args: Any, **options: Any) -> argparse.Namespace:
        nonlocal parsers_to_come
        parsed = parse_args(self, *args, **options)
        if not parsers_to_come:
            raise Understood
        parsers_to_come -= 1
        return parsed

    def stop_before_invoking(self: click.Command, context: click.Context) -> None:
        if not isinstance(self, click.Group):  # whose command is parsed next
            raise Understood

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop_after_parsing)
    monkeypatch.setattr(click.Command, "invoke", stop_before_invoking)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    runpy.run_module(module, run_name="__main__")


def _check_requirement(requirement: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    if found := re.fullmatch(r"\.\[([\w,]+)\]", requirement):
        assert set(found[1].split(",")) <= set(project["optional-dependencies"])
    elif requirement.startswith("torch=="):
        assert f"TORCH ?= {requirement}\n" in (ROOT / "Makefile").read_text()
    else:
        assert re.fullmatch(r"\.|[a-z0-9]+", requirement)


@pytest.mark.parametrize(
    "line",
    [
        "python train.py strategy.no_such_option=1",
        "python train.py model=no-such-model",
        "python -m lightning_mics no-such-command",
        "python -m lightning_mics inspect --no-such-option PATH",
        "python -m lightning_mics run --no-such-option=1 train.py",
        "python -m benchmarks.no_such_module",
        "make no-such-target",
        'pip install ".[no-such-extra]"',
        "pip install torch==1.0",
        "no-such-program",
    ],
)
def test_a_command_that_does_not_exist_fails(line, monkeypatch):
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - pytest's own, a program's exit, Hydra's
        understand(shlex.split(line), monkeypatch)
    assert caught.type is not Understood


# -- outputs -----------------------------------------------------------------------------------------------------------


def test_the_table_of_the_traffic_monitor_is_that_of_its_docstring():
    docstring = "\n".join(line.removeprefix("    ") for line in (traffic_monitor.__doc__ or "").splitlines())
    shown = [block.text for block in blocks("text") if block.page == "docs/monitoring.md"]
    assert len(shown) == 1
    assert shown[0].rstrip() in docstring


@pytest.mark.rehearsal
def test_the_dry_run_of_the_readme_prints_what_the_readme_shows(capsys):
    config = composed("model=gpt-100b", "cluster=p4d_64", "dry_run=true")
    assert "python train.py model=gpt-100b cluster=p4d_64 dry_run=true\n" in (ROOT / "README.md").read_text()
    model = train.make_model(config)
    job = choose_automatically(config, model)
    planned = plan_run(config, job.workload, hardware_of(job.config.cluster))
    console = Console(width=WIDTH)
    console.print(plan_table(planned, config=job.config))
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    printed += [f"Note: {warning}." for warning in planned.warnings]
    shown = next(block.text for block in blocks("text") if block.page == "README.md").splitlines()
    assert len(shown) == 8
    assert [line for line in shown if line not in printed] == []
