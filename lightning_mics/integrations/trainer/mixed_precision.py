"""bfloat16 under autocast, with gradient clipping for fused optimizers."""

from __future__ import annotations

from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch.optim import Optimizer
from typing_extensions import override


class BFloat16Mixed(MixedPrecision):
    """Lightning's ``"bf16-mixed"`` with gradient clipping for all optimizers.

    Lightning (2.6) raises an error when clipping gradients of a fused optimizer under any mixed precision, because such
    an optimizer undoes the scaling of float16 gradients in its own step. bfloat16 gradients are not scaled.

    Args:
        device: Type of the device that autocast runs on, ``"cuda"`` or ``"cpu"``.
    """

    def __init__(self, *, device: str) -> None:
        super().__init__("bf16-mixed", device)

    @override
    def clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        Precision.clip_gradients(self, optimizer, clip_val, gradient_clip_algorithm)
