"""What is compared, and when: a callback that shows each moment of a training as unsharded tensors.

::

    start              weights
    micro-step         losses of all ranks
    boundary           gradients -- clipped gradients -- weights, optimizer states, buffers
    inside a window    evaluation outputs of all ranks
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

LEAST_EPS = 1e-3  # of optimizers: with less, gradients of nearly zero become signs, which rounding decides
LEAST_RATE = 1e-3  # of learning: with less, updates would hide what depends on them
SAMPLED = 4096  # entries of an evaluation's output that are compared
EVALUATION_SEED = 10**6
UPDATED = ("weights", "optimizer states")  # by each replica for itself
SAVED = (*UPDATED, "buffers", "hyperparameters")

Take = Callable[[str, int, dict[str, Tensor]], None]


@dataclass
class Seen:
    """What one rank has seen, in plain data.

    Attributes:
        losses: Loss by global number of the micro-step.
        evaluations: Sampled outputs of evaluations by (micro-steps of all ranks before, global number of the batch).
        shards: Checksums of this rank's own tensors by (kind, optimizer steps).
        unsharded: Checksums of unsharded tensors by (kind, optimizer steps); of rank 0.
        generators: Checksum of torch's, Python's and NumPy's generators before a micro-step, by its place on this rank.
        steps: Optimizer steps at the end.
        clip: Norm to which gradients were clipped; None if they were not.
        changing_buffers: Names of the buffers that training has changed.
    """

    losses: dict[int, float] = field(default_factory=dict)
    evaluations: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)
    shards: dict[tuple[str, int], dict[str, int]] = field(default_factory=dict)
    unsharded: dict[tuple[str, int], dict[str, int]] = field(default_factory=dict)
    generators: dict[int, int] = field(default_factory=dict)
    steps: int = 0
    clip: float | None = None
    changing_buffers: list[str] = field(default_factory=list)


class Recorder(Callback):
    """Shows the tensors of a training on rank 0, and keeps what each rank has seen.

    Args:
        take: Function that gets each moment's kind, optimizer steps before, and unsharded tensors by name; called on
            rank 0.
        clip: Norm to which gradients are clipped; None clips to half of the first one.
        trained: Micro-steps of all ranks before.
        number: Function from the place of a micro-step of all ranks to the number of its batch; None takes the place.
        save: What to save, and after how many micro-steps of this rank; None saves nothing.
    """

    def __init__(
        self,
        take: Take,
        *,
        clip: float | None,
        trained: int = 0,
        number: Callable[[int], int] | None = None,
        save: tuple[int, str] | None = None,
    ) -> None:
        self._take = take
        self._number = number or int
        self._save = save
        self._names: dict[nn.Parameter, str] = {}
        self._first_buffers: dict[str, Tensor] = {}
        self._hooks: list[Any] = []
        self._trained = trained
        self._outputs: list[Tensor] = []
        self._steps = 0
        self.seen = Seen(clip=clip)

    # -- training ------------------------------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._names = {parameter: name for name, parameter in pl_module.named_parameters()}
        self._first_buffers = {name: _whole(buffer).clone() for name, buffer in pl_module.named_buffers()}
        self._steps = trainer.global_step
        clip = pl_module.configure_gradient_clipping
        vars(pl_module)["configure_gradient_clipping"] = partial(self._clip, clip)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                if isinstance(group.get("eps"), float):
                    group["eps"] = max(group["eps"], LEAST_EPS)
        if trainer.global_step:
            self._show_states(trainer, pl_module)
        else:
            self._show("weights", 0, pl_module.named_parameters())

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.seen.generators[batch_idx] = _generators()
        seed_all(self._number(batch_idx * trainer.world_size + trainer.global_rank))
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                rate = group.get("lr")
                if isinstance(rate, Tensor):
                    rate.clamp_(min=LEAST_RATE)
                elif isinstance(rate, int | float):
                    group["lr"] = max(rate, LEAST_RATE)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        gradients = list(self._gradients(optimizer))
        self._show("gradients", trainer.global_step, gradients)
        if self.seen.clip is None and pl_module.automatic_optimization:
            norms = [torch.linalg.vector_norm(_whole(gradient).double()) for _, gradient in gradients]
            half = float(torch.linalg.vector_norm(torch.stack(norms)) / 2) if norms else 0.0
            self.seen.clip = half if 0 < half < float("inf") else None
        if pl_module.automatic_optimization:
            trainer.gradient_clip_val = self.seen.clip

    def _clip(self, clip: Callable[..., None], optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """In place of the module's hook, which clips."""
        clip(optimizer, *args, **kwargs)
        self._show("clipped gradients", self._steps, self._gradients(optimizer))

    def _gradients(self, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    yield self._names.get(parameter, "a parameter that is not the module's"), parameter.grad

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            normalized = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            number = self._number(batch_idx * trainer.world_size + trainer.global_rank)
            self.seen.losses[number] = float(_whole(loss)) * normalized
        self._trained = (batch_idx + 1) * trainer.world_size
        if trainer.global_step != self._steps:
            self._steps = trainer.global_step
            self._show_states(trainer, pl_module)
        if self._save is not None and batch_idx + 1 == self._save[0]:
            trainer.save_checkpoint(self._save[1])

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen.steps = trainer.global_step
        self.seen.changing_buffers = [
            name
            for name, buffer in pl_module.named_buffers()
            if name not in self._first_buffers or not torch.equal(_whole(buffer), self._first_buffers[name])
        ]

    def _show_states(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        steps = trainer.global_step
        self._show("weights", steps, module.named_parameters())
        self._show("optimizer states", steps, self._states(trainer.optimizers))
        self._show("hyperparameters", steps, _hyperparameters(trainer))
        self._show("buffers", steps, _saved_buffers(module))

    def _states(self, optimizers: Iterable[Optimizer]) -> Iterator[tuple[str, Tensor]]:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    name, state = self._names.get(parameter, "?"), optimizer.state.get(parameter, {})
                    for key in sorted(map(str, state)):
                        if isinstance(state[key], Tensor):
                            yield f"{name}/{key}", state[key]

    def _show(self, kind: str, steps: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        own, unsharded = {}, {}
        first = dist.get_rank() == 0
        for name, tensor in tensors:
            if kind in UPDATED:
                own[name] = _checksum(tensor.to_local() if isinstance(tensor, DTensor) else tensor)
            whole = _whole(tensor)
            if first:
                unsharded[name] = whole
        self.seen.shards[kind, steps] = own
        if first:
            if kind in SAVED:
                self.seen.unsharded[kind, steps] = {name: _checksum(whole) for name, whole in unsharded.items()}
            self._take(kind, steps, unsharded)

    # -- evaluation ----------------------------------------------------------------------------------------------------

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for child in pl_module.children():
            self._hooks.append(
                child.register_forward_hook(lambda _, __, output: self._outputs.extend(_sampled(output)))
            )

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._outputs.clear()
        seed_all(EVALUATION_SEED + batch_idx * trainer.world_size + trainer.global_rank)

    @override
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        number = batch_idx * trainer.world_size + trainer.global_rank
        self.seen.evaluations[self._trained, number] = [*_sampled(outputs), *self._outputs]

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        while self._hooks:
            self._hooks.pop().remove()


def seed_all(seed: int) -> None:
    """Have all generators draw the same numbers from here on.

    Args:
        seed: The seed.
    """
    torch.manual_seed(seed)
    random.seed(seed)
    with suppress(ImportError):
        import numpy as np

        np.random.seed(seed)


def _saved_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that checkpoints hold, as they are: asking for a state dict would make them equal on all ranks."""
    for prefix, inner in module.named_modules():
        for name, buffer in inner.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in inner._non_persistent_buffers_set:
                yield name, buffer


def _hyperparameters(trainer: pl.Trainer) -> Iterator[tuple[str, Tensor]]:
    """Numbers of the optimizers' groups and of the schedulers."""
    for number, optimizer in enumerate(trainer.optimizers):
        for group, values in enumerate(optimizer.param_groups):
            of_group = {name: value for name, value in values.items() if name != "params"}
            yield from _numbers(f"group {group} of optimizer {number}", of_group)
    for number, config in enumerate(trainer.lr_scheduler_configs):
        yield from _numbers(f"scheduler {number}", config.scheduler.state_dict())


def _numbers(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from _numbers(f"{name}, {key}", value[key])
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _numbers(f"{name}, {index}", inner)
    elif isinstance(value, int | float):
        yield name, torch.tensor(float(value), dtype=torch.float64)
    elif isinstance(value, Tensor) and value.numel() == 1:
        yield name, _whole(value).double()


def _checksum(tensor: Tensor) -> int:
    bits = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return zlib.crc32(bits.numpy().tobytes()) if bits.numel() else 0


def _generators() -> int:
    """Checksum of the states of all generators that :func:`seed_all` seeds."""
    states: list[Any] = [_checksum(torch.get_rng_state()), random.getstate()]
    with suppress(ImportError):
        import numpy as np

        states.append([part.tolist() if hasattr(part, "tolist") else part for part in np.random.get_state()])
    return zlib.crc32(repr(states).encode())


def _whole(tensor: Tensor) -> Tensor:
    detached = tensor.detach()
    return detached.full_tensor() if isinstance(detached, DTensor) else detached


def _sampled(output: Any) -> list[Tensor]:
    """Entries of all tensors of numbers in an output, at equal distances."""
    if isinstance(output, Tensor):
        flat = _whole(output).flatten()
        return [flat[:: max(1, flat.numel() // SAMPLED)].clone()] if flat.is_floating_point() else []
    if isinstance(output, Mapping):
        return [sample for value in output.values() for sample in _sampled(value)]
    if isinstance(output, list | tuple):
        return [sample for value in output for sample in _sampled(value)]
    return []
