"""Precisions of Lightning that sharded training supports, and how ``precision="16-mixed"`` reaches the strategies.

Lightning's connectors (2.6) reject ``"16-mixed"`` for every ``ModelParallelStrategy``, before the strategy is asked.
The method that does is patched here, with an effect for the strategies of this package only. On CPUs Lightning itself
replaces ``"16-mixed"`` by ``"bf16-mixed"``, with a warning and for all its strategies; a plugin,
``MixedPrecision("16-mixed", "cpu")``, computes in float16 there.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from lightning.fabric.plugins.precision import MixedPrecision
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.amp import GradScaler
from torch.optim import Optimizer
from typing_extensions import override

from lightning_mics.sharding.optimizers.overflow import scale_with_all_ranks

PRECISIONS = ("32-true", "bf16-true", "bf16-mixed", "16-mixed")


class Float16Mixed(MixedPrecision):
    """Fabric's ``"16-mixed"`` with gradient clipping for fused optimizers, whose gradients Fabric does not unscale."""

    @classmethod
    def of(cls, plugin: Any, scaler: GradScaler) -> Any:
        """A plugin of this class in place of Fabric's own; one of the user's classes is returned unchanged.

        Args:
            plugin: Precision plugin of Fabric.
            scaler: Gradient scaler of the plugin.
        """
        return cls("16-mixed", plugin.device, scaler) if type(plugin) is MixedPrecision else plugin

    @override
    def unscale_gradients(self, optimizer: Optimizer) -> None:
        assert self.scaler is not None
        self.scaler.unscale_(optimizer)


def check_precision(precision: object) -> None:
    """Check that sharded training supports ``precision``, by Lightning's name of it.

    Raises:
        ValueError: If it is none of :data:`PRECISIONS`.
    """
    if precision not in PRECISIONS:
        raise ValueError(
            f"strategy 'mics' does not support precision={str(precision)!r}; "
            f"use one of {', '.join(map(repr, PRECISIONS))}"
        )


def prepared_scaler(plugin: Any) -> GradScaler | None:
    """The gradient scaler of a precision plugin, made to agree on overflows with all ranks; None if there is none.

    Args:
        plugin: Precision plugin of the Trainer or Fabric.
    """
    scaler: GradScaler | None = getattr(plugin, "scaler", None)
    if scaler is not None:
        scale_with_all_ranks(scaler)
    return scaler


def accept_16_mixed(connector: Any, strategy: type[Any], *, plugin: type[Any], flags: tuple[str, str]) -> None:
    """Let a connector of Lightning take ``precision="16-mixed"`` for a strategy of this package.

    Args:
        connector: Class of the connector, which is patched.
        strategy: Class of the strategy.
        plugin: Lightning's class of the plugin for the precision.
        flags: Names of the connector's attributes for the precision by name, and for its plugin.
    """
    by_name, as_plugin = flags
    original = connector._check_and_init_precision

    @wraps(original)
    def check_and_init_precision(self: Any) -> Any:
        if getattr(self, by_name) == "16-mixed" and isinstance(self.strategy, strategy):
            given = getattr(self, as_plugin)
            if given is None and self._accelerator_flag == "cpu":
                rank_zero_warn(
                    "precision='16-mixed' is for GPUs, and this job runs on CPUs: using 'bf16-mixed' instead, as "
                    "Lightning does; for float16 on CPUs pass plugins=[MixedPrecision('16-mixed', 'cpu')]"
                )
                setattr(self, by_name, "bf16-mixed")
            else:  # as if the plugin had been given, which is not checked
                setattr(self, by_name, "32-true")
                setattr(self, as_plugin, given or plugin("16-mixed", "cuda"))
        return original(self)

    connector._check_and_init_precision = check_and_init_precision
