from __future__ import annotations

from importlib.util import find_spec

import pytest

from recipes.job import loggers
from recipes.job.loggers import check_loggers
from tests.support.configs import composed


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_logger_whose_package_is_missing_is_refused_with_how_to_install_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = composed(f"logger={name}").logger
    monkeypatch.setattr(loggers, "find_spec", lambda package: None if package == name else find_spec(package))
    with pytest.raises(
        ModuleNotFoundError,
        match=f"logger={name} needs the package '{name}', which is not installed: pip install {name}",
    ):
        check_loggers(chosen)


@pytest.mark.parametrize("name", ["csv", "tensorboard", "wandb"])
def test_csv_is_written_whatever_else_is_chosen(name: str) -> None:
    chosen = composed(f"logger={name}").logger
    assert list(chosen) == list(dict.fromkeys(["csv", name]))
    check_loggers({"csv": chosen.csv})
