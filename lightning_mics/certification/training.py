"""One training of the certified module, as a rank runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import DoublePrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from lightning_mics.certification.recorder import Recorder, Seen, Take, seed_all
from lightning_mics.sharding.blocks import ModuleClasses, find_blocks
from lightning_mics.sharding.initialization import InitialWeights, seeded_by_rank_0
from lightning_mics.sharding.pretrained import load_sources

STEPS = 4  # windows of accumulation
SAVED_AFTER = 2  # windows
SEED = 1
RESUMED = 100  # added to the seed of a resumed training, whose first weights must not matter


class InDouble(DoublePrecision):
    """Lightning's plugin for float64, under the name of the precision in which nothing is cast: strategies know it."""

    precision: Any = "32-true"


@dataclass(frozen=True)
class Training:
    """A training on some ranks, or on one process in their place.

    Attributes:
        world_size: Number of ranks.
        micro_steps: Micro-steps of each rank in a window.
        ranks: Number of ranks whose evaluation batches all ranks together take.
        make_module: Function that returns the module.
        make_strategy: Function that returns the strategy.
        batches: Micro-batches, taken in turn.
        folder: Folder for what the Trainer writes.
        precision: Lightning's name of the precision; ``"64-true"`` is float64.
        clip: Norm to which gradients are clipped; None clips to half of the first one.
        clip_algorithm: ``"norm"`` or ``"value"``.
        save: Path of a checkpoint to save in the middle; None saves none.
        resume: Path of a checkpoint to resume from; None begins anew.
        backwards: Whether the micro-batches of each window come in the opposite order.
    """

    world_size: int
    micro_steps: int
    ranks: int
    make_module: Callable[[], pl.LightningModule]
    make_strategy: Callable[[], Strategy]
    batches: Sequence[Any]
    folder: Path
    precision: str = "64-true"
    clip: float | None = None
    clip_algorithm: str = "norm"
    save: Path | None = None
    resume: Path | None = None
    backwards: bool = False

    def _number(self, place: int) -> int:
        """The number of the batch at a place among the micro-steps of all ranks."""
        step, micro_step = divmod(place, window := self.world_size * self.micro_steps)
        return step * window + (window - 1 - micro_step if self.backwards else micro_step)

    def run(self, take: Take) -> Seen:
        """Train on this rank.

        Args:
            take: Function that gets the tensors of each moment; see
                :class:`~lightning_mics.certification.recorder.Recorder`.
        """
        seed_all(SEED + dist.get_rank() + (RESUMED if self.resume else 0))  # apart, where training makes them agree
        module = self.make_module()
        first = SAVED_AFTER * self.micro_steps if self.resume else 0
        save = None if self.save is None else (SAVED_AFTER * self.micro_steps, str(self.save))
        recorder = Recorder(take, clip=self.clip, trained=first * self.world_size, number=self._number, save=save)
        evaluates = is_overridden("validation_step", module, pl.LightningModule)
        every = self.micro_steps + self.ranks // self.world_size  # in each window at another micro-step
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=self.world_size,
            strategy=self.make_strategy(),
            callbacks=[recorder],
            accumulate_grad_batches=self.micro_steps if module.automatic_optimization else 1,
            gradient_clip_algorithm=self.clip_algorithm,
            max_epochs=1,
            limit_train_batches=STEPS * self.micro_steps,
            limit_val_batches=self.ranks // self.world_size,
            val_check_interval=every if evaluates else None,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=self.folder,
            **({"plugins": [InDouble()]} if self.precision == "64-true" else {"precision": self.precision}),
        )
        trainer.fit(
            module,
            train_dataloaders=DataLoader(Stream(self.batches, self._number, first=first), batch_size=None),
            val_dataloaders=DataLoader(Stream(self.batches, int), batch_size=None) if evaluates else None,
            ckpt_path=None if self.resume is None else str(self.resume),
        )
        return recorder.seen


class Stream(IterableDataset[Any]):
    """The micro-batches of this rank: together, ranks take one after the other.

    Args:
        batches: Micro-batches, taken in turn.
        number: Function from the place of a micro-step of all ranks to the number of its batch.
        first: Number of micro-steps of this rank that were done before.
    """

    def __init__(self, batches: Sequence[Any], number: Callable[[int], int], *, first: int = 0) -> None:
        self._batches = batches
        self._number = number
        self._first = first

    def __iter__(self) -> Iterator[Any]:
        rank, size = dist.get_rank(), dist.get_world_size()
        for step in count(self._first):
            yield self._batches[self._number(step * size + rank) % len(self._batches)]


class OneProcess(SingleDeviceStrategy):
    """Training in one process, the reference.

    Args:
        block_classes: Classes of the blocks that sharding would initialize one by one.
    """

    def __init__(self, block_classes: ModuleClasses | None) -> None:
        super().__init__(device="cpu")
        self._block_classes = block_classes

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        initialize(self.lightning_module, self.precision_plugin, self._block_classes)
        super().setup(trainer)


class PlainReplicas(DDPStrategy):
    """DistributedDataParallel, the reference where ranks have to be ranks; evaluations use the buffers of rank 0 too.

    Args:
        block_classes: Classes of the blocks that sharding would initialize one by one.
    """

    def __init__(self, block_classes: ModuleClasses | None) -> None:
        super().__init__(find_unused_parameters=True)
        self._block_classes = block_classes

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        initialize(self.lightning_module, self.precision_plugin, self._block_classes)
        super().setup(trainer)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self.lightning_module is not None
        for buffer in self.lightning_module.buffers():
            dist.broadcast(buffer, src=0)
        return super().validation_step(*args, **kwargs)


def initialize(module: nn.Module | None, precision: Precision, block_classes: ModuleClasses | None) -> None:
    """Give modules on the meta device the weights that sharding would give them.

    Args:
        module: Module that may be on the meta device.
        precision: Plugin that decides its dtype.
        block_classes: Classes of the blocks, which are initialized one by one.
    """
    if module is None or not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        return
    module = precision.convert_module(module)
    blocks, device = find_blocks(module, block_classes).values(), torch.device("cpu")
    weights = InitialWeights(module, blocks, device)
    with seeded_by_rank_0(device):
        for owner in (*blocks, module):
            weights.place(owner)
    load_sources(module)
