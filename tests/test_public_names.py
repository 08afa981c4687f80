"""What importing the package costs and does: public names on demand, and "mics" known to Lightning in any order."""

from __future__ import annotations

import importlib
import inspect
import pickle
import subprocess
import sys
import threading
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.pytorch.core import saving
from lightning.pytorch.strategies import StrategyRegistry

import lightning_mics
from lightning_mics.integrations._after_import import AfterImport

NAMES = [*lightning_mics.__all__, "MiCSPlugin"]

USE = """
import os, sys
import torch
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule, Trainer
trainer = Trainer(strategy="mics", accelerator="cpu", devices=2, logger=False, enable_checkpointing=False)
fabric = Fabric(strategy="mics", accelerator="cpu", devices=2)
os.makedirs("a.ckpt")
open("a.ckpt/meta.pt", "w").close()
try:
    LightningModule.load_from_checkpoint("a.ckpt")
except Exception as error:
    print(type(trainer.strategy).__name__, type(fabric.strategy).__name__, type(error).__name__)
print("finders:", sum(type(finder).__name__ == "AfterImport" for finder in sys.meta_path))
"""


def run(code: str, folder: Path) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# -- importing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    ["import lightning_mics", "from lightning_mics.topology import Topology", "from lightning_mics import Topology"],
)
def test_neither_torch_nor_lightning_is_imported(statement: str, tmp_path: Path) -> None:
    heavy = "{'torch', 'numpy', 'lightning', 'accelerate'}"
    assert run(f"import sys\n{statement}\nprint(sorted({heavy} & sys.modules.keys()))", tmp_path) == ["[]"]


ORDERS = (
    "import lightning_mics\nimport lightning as L",
    "from lightning.fabric import Fabric\nimport lightning_mics",
    "import lightning.pytorch\nfrom lightning_mics import MiCSStrategy",
)

UNPICKLE = """
import pickle
names = pickle.loads({pickled!r})
import lightning_mics
from lightning.pytorch.strategies import StrategyRegistry
print([getattr(lightning_mics, each.__name__) is each for each in names], "mics" in StrategyRegistry)
"""

FORKED = """
import os, sys
import torch._dynamo, torch.distributed.fsdp, torchmetrics  # what takes long of an import of Lightning
assert not {{'lightning', 'lightning_mics'}} & sys.modules.keys()
for number, code in enumerate({codes!r}):
    if os.fork() == 0:
        os.mkdir(str(number))
        os.chdir(str(number))
        sys.stdout = open("said", "w")
        exec(code, {{'__name__': '__main__'}})
        sys.stdout.flush()
        os._exit(0)
    assert os.wait()[1] == 0
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """Lines printed by each order of imports, and by the unpickling of public names, each in a process of its own."""
    folder = tmp_path_factory.mktemp("processes")
    names = (lightning_mics.MiCSStrategy, lightning_mics.Topology, lightning_mics.shard_model)
    codes = [*(order + USE for order in ORDERS), UNPICKLE.format(pickled=pickle.dumps(names))]
    run(FORKED.format(codes=codes), folder)
    return [(folder / str(number) / "said").read_text().splitlines() for number in range(len(codes))]


def test_mics_is_known_in_whatever_order_things_are_imported(said: list[list[str]]) -> None:
    expected = [
        "MiCSStrategy MiCSFabricStrategy DamagedCheckpointError",
        "finders: 1",
    ]  # it waits for copies of Lightning
    assert [lines[-2:] for lines in said[: len(ORDERS)]] == [expected] * len(ORDERS)


def test_public_names_go_to_a_process_that_has_imported_nothing(said: list[list[str]]) -> None:
    assert said[len(ORDERS) :] == [["[True, True, True] True"]]


def test_a_public_name_is_what_its_module_defines() -> None:
    for name in NAMES:
        public = getattr(lightning_mics, name)
        assert name in dir(lightning_mics)
        assert name in inspect.getsource(public)
        assert pickle.loads(pickle.dumps(public)) is public
        if not inspect.isclass(public):
            assert public.__module__ == "lightning_mics"
            assert typing.get_type_hints(public)
    assert {"checkpoint", "planning"} <= set(dir(lightning_mics))
    assert lightning_mics.planning.with_measured and lightning_mics.checkpoint.save_sharded


def test_what_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'lightning_mics' has no attribute 'start_from'"):
        _ = lightning_mics.start_from
    with pytest.raises(ImportError, match="cannot import name 'start_from'"):
        from lightning_mics import start_from  # noqa: F401


def test_errors_of_checkpoints_say_where_they_are_imported_from() -> None:
    for name in ("DamagedCheckpointError", "SilentRankError", "UnsafeCheckpointError"):
        error = getattr(lightning_mics.checkpoint, name)
        assert f"{error.__module__}.{error.__qualname__}" == f"lightning_mics.checkpoint.{name}"
        assert str(pickle.loads(pickle.dumps(error("why")))) == "why"


def test_a_reload_registers_nothing_twice() -> None:
    before, load = dict(StrategyRegistry), saving.pl_load
    finders = sum(isinstance(finder, AfterImport) for finder in sys.meta_path)
    importlib.reload(lightning_mics)
    assert dict(StrategyRegistry) == before and "mics" in STRATEGY_REGISTRY
    assert saving.pl_load is load
    assert sum(isinstance(finder, AfterImport) for finder in sys.meta_path) == finders


# -- the finder --------------------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package with the modules ``one`` and ``two``, in place of Lightning's."""
    folder = tmp_path / "followed"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "one.py").write_text("value = 1\n")
    (folder / "two.py").write_text("from followed import one\n")
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    yield folder
    sys.meta_path[:] = finders
    for name in [name for name in sys.modules if name.partition(".")[0] == "followed"]:
        del sys.modules[name]


def test_each_module_is_seen_once_it_has_run_and_the_finder_goes(package: Path) -> None:
    seen: list[Any] = []

    def note(module: ModuleType) -> None:
        seen.append((module.__name__, type(module.__loader__).__name__, getattr(module, "value", None)))

    finder = AfterImport({"followed.one": note, "followed.two": note})
    finder.start()
    assert seen == []
    importlib.import_module("followed.two")
    assert seen == [("followed.one", "SourceFileLoader", 1), ("followed.two", "SourceFileLoader", None)]
    assert finder not in sys.meta_path


def test_what_is_imported_already_is_seen_at_once(package: Path) -> None:
    importlib.import_module("followed.one")
    seen: list[str] = []
    finder = AfterImport({"followed.one": lambda module: seen.append(module.__name__)})
    finder.start()
    assert seen == ["followed.one"] and finder not in sys.meta_path


def test_an_error_of_the_import_is_the_importers_and_the_next_attempt_is_seen(package: Path) -> None:
    (package / "one.py").write_text("raise RuntimeError('mine')\n")
    seen: list[ModuleType] = []
    AfterImport({"followed.one": seen.append}).start()
    with pytest.raises(RuntimeError, match=r"^mine$"):
        importlib.import_module("followed.one")
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'followed\.three'"):
        importlib.import_module("followed.three")
    assert seen == []
    (package / "one.py").write_text("value = 'another'\n")
    importlib.invalidate_caches()
    assert importlib.import_module("followed.one") in seen


def test_an_error_after_the_import_is_a_warning(package: Path) -> None:
    def fail(module: ModuleType) -> None:
        raise KeyError("registry")

    AfterImport({"followed.one": fail}).start()
    with pytest.warns(UserWarning, match=r"could not adapt followed\.one: KeyError"):
        assert importlib.import_module("followed.one").value == 1


def test_threads_that_import_at_once_have_it_seen_once(package: Path) -> None:
    (package / "one.py").write_text("import time\ntime.sleep(0.05)\nvalue = 1\n")
    seen: list[ModuleType] = []
    finders = [AfterImport({"followed.one": seen.append}) for _ in range(2)]  # two copies, as after a purge of modules
    for finder in finders:
        finder.start()
    threads = [threading.Thread(target=importlib.import_module, args=("followed.one",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 2 and not set(finders) & set(sys.meta_path)
