"""The program of what one GPU can show runs on CPUs in small sizes, and says in one line that there is no GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import page, parts
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.findings import Findings
from benchmarks.gpu.parts import PARTS

ROOT = Path(__file__).parents[2]


def test_every_part_runs_small_on_cpus(tmp_path: Path) -> None:
    assert main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert list(results) == list(PARTS)
    for name, part in results.items():
        assert part["failed"] == "", name
        assert len(part["findings"]) >= 2, name
        assert all(entry["holds"] is not False for entry in part["findings"]), name
    assert sum(entry["holds"] is True for entry in results["same_bits"]["findings"]) >= 9
    assert (tmp_path / "ranges.svg").read_text().count("<rect") > 20
    text = (tmp_path / "README.md").read_text()
    assert all(f"## {part.title}\n" in text for part in PARTS.values())
    assert "Status on GPUs: not run on a GPU." in text


def test_without_a_gpu_it_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert "no GPU" in line


@pytest.mark.parametrize(("function", "reason"), [("_raises", "ValueError: no such thing"), ("_dies", "status 3")])
def test_a_part_that_fails_is_on_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, reason: str
) -> None:
    module = f"{__name__}_{function}"
    monkeypatch.setitem(parts.PARTS, "memory", parts.Part("Memory", module))
    monkeypatch.setattr("benchmarks.gpu.running.importlib.import_module", lambda _: _Module(function))
    assert main(["--device", "cpu", "--part", "memory", "--out", str(tmp_path)]) == 1
    text = (tmp_path / "README.md").read_text()
    assert "**Failed**" in text and reason in text
    assert "| first | seen | seen | yes |" in text  # what there was before


class _Module:
    def __init__(self, function: str) -> None:
        self._function = function

    def run(self, findings: Findings) -> None:
        findings.add("first", "seen", target="seen", holds=True)
        if self._function == "_dies":
            import os

            os._exit(3)
        raise ValueError("no such thing")


def test_an_error_inside_a_part_is_a_finding_and_the_part_goes_on(tmp_path: Path) -> None:
    findings = Findings(tmp_path / "findings.json", device="cpu", out=tmp_path)
    with findings.attempt("one thing"):
        raise RuntimeError("broken\nand more")
    findings.add("another", 1)
    first, second = json.loads((tmp_path / "findings.json").read_text())
    assert first["holds"] is False
    assert first["seen"].startswith("RuntimeError: broken (test_gpu.py:")
    assert second["seen"] == 1


def test_the_readme_has_the_status_of_the_committed_page() -> None:
    assert page.status() in (ROOT / "README.md").read_text()


def test_the_status_counts_targets_on_the_gpu() -> None:
    about: dict[str, Any] = {"device": "NVIDIA X", "torch": "2.11.0"}
    entries = [{"holds": True}, {"holds": False}, {"holds": None}]
    part = {"device": "cuda", "about": about, "findings": entries, "failed": ""}
    line = page.status_line({"parts": {"memory": part, "nccl": {**part, "device": "cpu"}}})
    assert line == (
        "Status on GPUs: on one NVIDIA X with torch 2.11.0: memory 1 of 2 targets met. On several GPUs: not run."
    )
