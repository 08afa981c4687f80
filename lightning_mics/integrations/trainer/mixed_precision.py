"""16-bit computation under autocast, with gradient clipping for fused optimizers and overflows that ranks agree on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch.amp import GradScaler
from torch.optim import Optimizer
from typing_extensions import override

FSDP_KEY = "FSDPPrecision"  # of the scaler's state in checkpoints of Lightning's own FSDPStrategy


class _ClipsFusedOptimizers(MixedPrecision):
    """Lightning's autocast with gradient clipping for all optimizers.

    Lightning (2.6) raises an error when clipping gradients of a fused optimizer under any mixed precision, because such
    an optimizer can undo the scaling of float16 gradients in its own step. bfloat16 gradients are not scaled, and those
    of float16 are unscaled before they are clipped here.
    """

    @override
    def clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        Precision.clip_gradients(self, optimizer, clip_val, gradient_clip_algorithm)


class BFloat16Mixed(_ClipsFusedOptimizers):
    """Lightning's ``"bf16-mixed"`` with gradient clipping for all optimizers.

    Args:
        device: Type of the device that autocast runs on, ``"cuda"`` or ``"cpu"``.
    """

    def __init__(self, *, device: str) -> None:
        super().__init__("bf16-mixed", device)


class Float16Mixed(_ClipsFusedOptimizers):
    """Lightning's ``"16-mixed"`` with unscaled gradients for the hooks and the clipping of all optimizers.

    Args:
        device: Type of the device that autocast runs on, ``"cuda"`` or ``"cpu"``.
        scaler: Gradient scaler.
    """

    # Lightning's key of the scaler's state in checkpoints, so that those of other strategies load, and these do there
    __qualname__ = MixedPrecision.__qualname__

    def __init__(self, *, device: str, scaler: GradScaler | None) -> None:
        super().__init__("16-mixed", device, scaler)

    @override
    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: pl.LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        assert self.scaler is not None
        result = closure()
        has_gradients = result is not None or not model.automatic_optimization
        if has_gradients:  # also those of fused optimizers, which Lightning leaves scaled for hooks and clipping
            self.scaler.unscale_(optimizer)
        self._after_closure(model, optimizer)
        if not has_gradients:
            return result
        output = self.scaler.step(optimizer, **kwargs)
        self.scaler.update()
        return output

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if FSDP_KEY in checkpoint:
            self.load_state_dict(checkpoint[FSDP_KEY])
