"""Any accelerator will do: nothing asks for CUDA by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import lightning_mics
from lightning_mics._torch.accelerator import device_in_use
from lightning_mics.policy.memory import device_memory_bytes

BY_NAME = re.compile(r"torch\.cuda\b|\.is_cuda\b|device\(\"cuda\"|type [!=]= \"cuda\"")


def test_the_package_asks_for_no_kind_of_accelerator_by_name() -> None:
    files = sorted(Path(lightning_mics.__file__).parent.rglob("*.py"))
    assert len(files) > 50
    found = [f"{file.name}: {line}" for file in files for line in file.read_text().splitlines() if BY_NAME.search(line)]
    assert found == []


def test_no_device_is_in_use_before_torch_has_initialized_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    assert device_in_use() is None
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 3)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert device_in_use() is None
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert device_in_use() == torch.device("cuda", 3)


def test_memory_of_any_kind_of_device_is_what_its_module_says(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        total_memory = 2**36

    class Module:
        @staticmethod
        def get_device_properties(_device: torch.device) -> Properties:
            return Properties()

    monkeypatch.setattr(torch, "get_device_module", lambda _device: Module)
    assert device_memory_bytes(torch.device("xpu", 1), processes=8) == 2**36
