"""``"16-mixed"`` before training: how the precision reaches the strategies, and whose scaler they take."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.fabric.connector import _Connector
from lightning.fabric.plugins.precision import MixedPrecision as FabricMixedPrecision
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from torch.amp import GradScaler

from lightning_mics import MiCSFabricStrategy, MiCSStrategy
from tests.support.scaled import scaler


class OwnScaler(GradScaler):
    """A scaler of the user's own class."""


@pytest.mark.parametrize(
    ("strategy", "plugin"), [(MiCSStrategy, MixedPrecision), (MiCSFabricStrategy, FabricMixedPrecision)]
)
def test_a_scaler_of_ones_own_stays_the_same_object_of_its_class(strategy: Any, plugin: Any) -> None:
    own, attribute = OwnScaler("cpu"), "precision_plugin" if strategy is MiCSStrategy else "precision"
    ours = strategy()
    setattr(ours, attribute, plugin("16-mixed", "cpu", own))
    assert getattr(ours, attribute).scaler is own
    assert isinstance(own, OwnScaler)
    assert own.state_dict() == {**GradScaler("cpu").state_dict(), "skipped_steps": 0}


def test_the_scale_of_a_checkpoint_of_fsdp_is_loaded() -> None:
    strategy = MiCSStrategy()
    strategy.precision_plugin = MixedPrecision("16-mixed", "cpu", scaler())
    strategy.precision_plugin.on_load_checkpoint({"FSDPPrecision": {**scaler().state_dict(), "scale": 8.0}})
    assert strategy.precision_plugin.scaler.get_scale() == 8


CONNECTORS: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "trainer": (_AcceleratorConnector, {"_precision_flag": "16-mixed", "_precision_plugin_flag": None}, MiCSStrategy),
    "fabric": (_Connector, {"_precision_input": "16-mixed", "_precision_instance": None}, MiCSFabricStrategy),
}


@pytest.mark.parametrize("name", CONNECTORS)
@pytest.mark.filterwarnings("ignore:torch.cuda.amp.GradScaler is enabled, but CUDA is not available")
def test_16_mixed_by_name_reaches_the_strategy_on_gpus(name: str) -> None:
    connector, flags, strategy = CONNECTORS[name]
    job = SimpleNamespace(strategy=strategy(), _strategy_flag=strategy(), _accelerator_flag="cuda", **flags)
    job._validate_precision_choice = partial(getattr(connector, "_validate_precision_choice", lambda _: None), job)
    plugin = connector._check_and_init_precision(job)
    assert (plugin.precision, plugin.device) == ("16-mixed", "cuda")


@pytest.mark.parametrize("name", CONNECTORS)
def test_other_precisions_of_other_strategies_are_checked_as_ever(name: str) -> None:
    connector, flags, strategy = CONNECTORS[name]
    other = object.__new__(next(base for base in strategy.__mro__ if base.__name__ == "ModelParallelStrategy"))
    job = SimpleNamespace(strategy=other, _strategy_flag=other, _accelerator_flag="cuda", **flags)
    job._validate_precision_choice = partial(getattr(connector, "_validate_precision_choice", lambda _: None), job)
    with pytest.raises(ValueError, match=r"does not support .*16-mixed"):
        connector._check_and_init_precision(job)
