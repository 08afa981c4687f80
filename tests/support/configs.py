"""Composed configs."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

import train

CONF = Path(train.__file__).parent / "conf"


def composed(*overrides: str) -> DictConfig:
    config = copy.deepcopy(_composed(*overrides))
    HydraConfig.instance().set_config(config)
    return config


@cache
def _composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", overrides=list(overrides), return_hydra_config=True)
    config.hydra.runtime.output_dir = "outputs/composed"
    return config
