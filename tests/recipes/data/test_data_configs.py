from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from hydra.utils import get_object
from omegaconf import OmegaConf

import train
from recipes.data.token_data import TokenData

FILES = sorted(Path(train.__file__).parent.glob("conf/data/*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_key_is_an_argument_of_the_data_module_or_its_base(path: Path) -> None:
    config = OmegaConf.load(path)
    target = get_object(config._target_)
    assert issubclass(target, TokenData)
    own, base = (inspect.signature(each).parameters.keys() for each in (target, TokenData))
    assert set(config) - {"_target_"} <= own | base
    assert base - own - {"objective"} <= set(config)  # and each can be set
