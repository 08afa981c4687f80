"""``torch.optim.Muon`` on a sharded model: each matrix is orthogonalized by its owner, once in the whole job.

The optimizer stays the user's, with its groups, options, hooks and states; its step is replaced for matrices that have
owners, and is torch's for any other parameter. All operations are torch's own, on the same numbers: those on elements
run on the rows that ranks hold, the iteration on whole matrices::

    holders     momentum and update of their rows
    owner       gathers the update, orthogonalizes it, returns its rows
    holders     send the rows to all nodes
    all ranks   weight decay, and the update by the learning rate, on the rows of their shards

Another optimizer that needs whole matrices, of your own, can do the same with
:class:`~lightning_mics.sharding.matrix_owners.MatrixOwners`.
"""

from __future__ import annotations

import weakref
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mics._torch.dtensors.owned_rows import OwnedRows
from lightning_mics._torch.optimizers.muon import (
    MOMENTUM,
    iteration_dtype,
    iteration_flops,
    learning_rate,
    orthogonalized,
    take_over_step,
)
from lightning_mics.sharding.matrix_owners import MatrixOwners
from lightning_mics.techniques.matrix_owners import OwnedMatrix


class StepOnOwners:
    """The step of one Muon, replaced for matrices that have owners.

    Args:
        optimizer: A Muon that holds parameters of a sharded model.
        owners: Owners of the model's matrices.
    """

    def __init__(self, optimizer: Optimizer, owners: MatrixOwners) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._owners = owners
        self._known: set[Tensor] = set()
        self._matrices: dict[Tensor, OwnedMatrix] = {}
        self._dtypes: dict[int, torch.dtype] = {}  # of updates, by number of the group
        self._own(optimizer)
        take_over_step(optimizer, self._step)
        optimizer.register_state_dict_post_hook(self._save_by_rows)

    @property
    def report(self) -> str:
        """A line on how many matrices have owners, and how the work is spread."""
        name, others = type(self._optimizer()).__name__, len(self._known) - len(self._matrices)
        rest = f"{others} are no matrices sharded by rows, which torch gathers inside of its step"
        if not self._matrices:
            return f"{name}: no parameter has an owner; {rest}"
        loads = self._owners.loads
        most = max(loads) * len(loads) / sum(loads)
        return (
            f"{name}: {len(self._matrices)} matrices are orthogonalized once per step in the whole job, each by the "
            f"rank that owns it; the busiest rank has {most:.2f} times the mean work{f'; {rest}' if others else ''}"
        )

    @torch.no_grad()
    def _step(self) -> set[Tensor]:
        """Step the matrices that have owners; returns their parameters."""
        optimizer = self._optimizer()
        assert optimizer is not None
        self._own(optimizer)
        groups = {p: number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
        stepping = [p for p in self._matrices if p in groups and p.grad is not None]
        kinds = {p: (p.dtype, self._dtypes[groups[p]]) for p in stepping}
        for kind in dict.fromkeys(kinds.values()):
            self._step_alike(optimizer, [p for p in stepping if kinds[p] == kind], groups, kind[1])
        return set(stepping)

    def _step_alike(
        self, optimizer: Optimizer, parameters: list[Any], groups: dict[Any, int], update_dtype: torch.dtype
    ) -> None:
        """Step matrices of one dtype whose updates have one dtype."""
        exchange, matrices = self._owners.exchange, [self._matrices[p] for p in parameters]
        group_of = [optimizer.param_groups[groups[p]] for p in parameters]
        gradients = self._owners.held(matrices, [p.grad for p in parameters])
        buffers = self._momentum(optimizer, parameters, matrices, gradients)
        updates = []
        for group, gradient, buffer in zip(group_of, gradients, buffers, strict=True):
            buffer.lerp_(gradient, 1 - group["momentum"])
            updates.append(gradient.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer)
        whole = exchange.to_owners(matrices, updates)
        done = [
            None if update is None else orthogonalized(update, group)
            for update, group in zip(whole, group_of, strict=True)
        ]
        held = exchange.from_owners(matrices, done, like=updates[0].new_empty(0, dtype=update_dtype))
        of_group = dict(zip(parameters, group_of, strict=True))

        def apply(parameter: nn.Parameter, weights: Tensor, update: Tensor) -> None:
            group = of_group[parameter]
            lr, of_matrix = learning_rate(group, parameter.shape)
            weights.mul_(1 - lr * group["weight_decay"])
            weights.add_(update, alpha=-of_matrix)

        for _, unit in groupby(range(len(matrices)), key=lambda index: matrices[index].unit):
            indices = list(unit)
            self._owners.add(
                [parameters[i] for i in indices], [matrices[i] for i in indices], [held[i] for i in indices], apply
            )

    def _momentum(
        self, optimizer: Optimizer, parameters: list[Any], matrices: list[OwnedMatrix], gradients: list[Tensor]
    ) -> list[Tensor]:
        """The momentum of the rows that this rank holds, the optimizer's state from now on: [held, columns] each."""
        known = [index for index, p in enumerate(parameters) if MOMENTUM in optimizer.state[p]]
        buffers = [torch.zeros_like(gradient) for gradient in gradients]
        if known:
            states = [optimizer.state[parameters[index]][MOMENTUM] for index in known]
            held = self._owners.held([matrices[index] for index in known], states)
            for index, rows in zip(known, held, strict=True):
                buffers[index] = rows
        for parameter, matrix, buffer in zip(parameters, matrices, buffers, strict=True):
            state = optimizer.state[parameter].get(MOMENTUM)
            if not isinstance(state, OwnedRows) or state.held is not buffer:
                optimizer.state[parameter][MOMENTUM] = self._owners.rows(parameter, matrix, buffer)
        return buffers

    def _own(self, optimizer: Optimizer) -> None:
        """Give owners to matrices that were added since."""
        for number, group in enumerate(optimizer.param_groups):
            if number not in self._dtypes:
                self._dtypes[number] = iteration_dtype(group)
        new = {p for group in optimizer.param_groups for p in group["params"]} - self._known
        if new:
            self._known |= new
            steps = optimizer.param_groups[0]["ns_steps"]
            self._matrices |= self._owners.own(new, lambda *shape: iteration_flops(*shape, steps=steps))

    def _save_by_rows(self, _optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """Let the state hold momentum as any optimizer's states are sharded; every rank gets it."""
        state_dict["state"] = {
            number: {name: value.by_rows() if isinstance(value, OwnedRows) else value for name, value in slots.items()}
            for number, slots in state_dict["state"].items()
        }
