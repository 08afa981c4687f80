"""The module that is certified: made in each process, shrunk, and a LightningModule in any case."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_mics.certification.shrinking import shrunk

LARGE_BYTES = 2**30  # of weights, from which on a module is built without values


class Trained(pl.LightningModule):
    """A plain module with the loss that its forward returns, and AdamW.

    Args:
        module: Module whose forward takes a batch and returns a loss, or an output with one.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return loss_of(self.module, batch)

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return loss_of(self.module, batch)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.01)


def loss_of(module: nn.Module, batch: Any) -> Tensor:
    """The loss that a module's forward returns.

    Args:
        module: The module.
        batch: Keyword arguments as a mapping, positional ones as a tuple or list, else the only argument.

    Raises:
        TypeError: If there is none.
    """
    if isinstance(batch, Mapping):
        output = module(**batch)
    else:
        output = module(*batch) if isinstance(batch, tuple | list) else module(batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TypeError(
            f"the forward of {type(module).__name__} returns neither a loss nor an output with one: give certify a "
            "LightningModule, whose training_step returns it"
        )
    return loss.reshape(())


@dataclass(frozen=True)
class Preparation:
    """How the module is made.

    Attributes:
        make: The user's class or function.
        shrink: Whether it is shrunk.
        blocks: Number of equal blocks that are kept.
        on_meta: Whether it is built on the meta device, as its weights are too large.
        known: Smaller configurations that were found before.
    """

    make: Callable[[], nn.Module]
    shrink: bool
    blocks: int
    on_meta: bool = False
    known: dict[str, Any] = field(default_factory=dict)

    def module(self) -> tuple[pl.LightningModule, list[str]]:
        """The module, and what was shrunk, in words.

        Raises:
            TypeError: If the user's function does not return a module.
        """
        if self.on_meta:
            with torch.device("meta"):
                made = self.make()
        else:
            made = self.make()
        if not isinstance(made, nn.Module):
            raise TypeError(f"certify needs a module class or a function that returns a module, got {type(made)}")
        notes: list[str] = []
        if self.shrink:
            made, notes = shrunk(made, blocks=self.blocks, known=self.known)
        return (made if isinstance(made, pl.LightningModule) else Trained(made)), notes

    def is_large(self) -> bool:
        """Whether the module's weights are so large that it is built without values first."""
        try:
            with torch.device("meta"):
                made = self.make()
        except Exception:  # it reads values of its own tensors, so nobody builds large ones like it
            return False
        tensors = [*made.parameters(), *made.buffers()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors) > LARGE_BYTES
