"""Optimizers that need whole matrices, such as ``torch.optim.Muon``: each matrix is updated by its owner, once in all.

The optimizer stays the user's, with its groups, options, hooks and states; its step is replaced for matrices that have
owners, and is its own for any other parameter. A step has three parts, of which two treat all elements alike::

    holders     update of their rows, from gradient and states              `of_rows`
    owner       gathers the update, makes another of it, returns its rows   `of_matrix`
    holders     send the rows to all nodes
    all ranks   change the rows of their shards by the update               `apply`

Muon's parts are torch's own operations. An optimizer of your own gives its parts as ``matrix_update``, on the class or
on the object.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_mics._torch.dtensors.owned_rows import OwnedRows
from lightning_mics._torch.optimizers.muon import MuonUpdate, is_muon, take_over_step
from lightning_mics.sharding.optimizers.matrix_owners import MatrixOwners
from lightning_mics.sharding.optimizers.substitutes import Substitution
from lightning_mics.techniques.matrix_owners import OwnedMatrix


class MatrixUpdate(Protocol):
    """The parts of a step that needs whole matrices. All are called with arguments by position.

    Attributes:
        update_dtype: Dtype that updates are sent in; None is that of the parameter. A part may leave it out.
    """

    update_dtype: torch.dtype | None

    def of_rows(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """The update of some rows before it is that of the matrix: [rows, columns]; treats all elements alike.

        Args:
            gradient: Some rows of the gradient: [rows, columns].
            state: State of these rows, empty at first: tensors of their shape, and numbers; changed in place.
            group: Parameter group of the matrix.
        """

    def of_matrix(self, update: Tensor, group: dict[str, Any]) -> Tensor:
        """The update of a matrix: [rows, columns].

        Args:
            update: Update before it: [rows, columns].
            group: Parameter group of the matrix.
        """

    def apply(self, weights: Tensor, update: Tensor, group: dict[str, Any], shape: torch.Size) -> None:
        """Change some rows of the weights in place; treats all elements alike.

        Args:
            weights: Some rows of the weights: [rows, columns].
            update: These rows of the update: [rows, columns].
            group: Parameter group of the matrix.
            shape: Shape of the matrix.
        """

    def flops(self, rows: int, columns: int, group: dict[str, Any]) -> float:
        """What ``of_matrix`` costs, by which owners are chosen: floating-point operations.

        Args:
            rows: Number of rows.
            columns: Number of columns.
            group: Parameter group of the matrix.
        """


class StepOnOwners:
    """The step of one optimizer, for matrices that have owners.

    Args:
        optimizer: Optimizer that holds parameters of a sharded model.
        owners: Owners of the model's matrices.
    """

    def __init__(self, optimizer: Optimizer, owners: MatrixOwners) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._owners = owners
        self._update = matrix_update(optimizer)
        self._known: set[Tensor] = set()
        self._matrices: dict[Tensor, OwnedMatrix] = {}
        self._update_dtype = getattr(self._update, "update_dtype", None)
        self._own(optimizer)
        if is_muon(optimizer):
            take_over_step(optimizer, self.step)
        else:
            _StepBefore(optimizer, self.step)
        optimizer.register_state_dict_post_hook(self._save_by_rows)

    @property
    def report(self) -> str:
        """A line on how many matrices have owners, and how the work is spread."""
        name, others = type(self._optimizer()).__name__, len(self._known) - len(self._matrices)
        rest = f"{others} are no matrices sharded by rows, and step as DTensors"
        if not self._matrices:
            return f"{name}: no parameter has an owner; {rest}"
        loads = self._owners.loads
        most = max(loads) * len(loads) / sum(loads)
        return (
            f"{name}: {len(self._matrices)} matrices are updated once per step in the whole job, each by the rank that "
            f"owns it; the busiest rank has {most:.2f} times the mean work{f'; {rest}' if others else ''}"
        )

    @torch.no_grad()
    def step(self) -> set[Tensor]:
        """Step the matrices that have owners; returns their parameters."""
        optimizer = self._optimizer()
        assert optimizer is not None
        self._own(optimizer)
        groups = {p: number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
        stepping = [p for p in self._matrices if p in groups and p.grad is not None]
        for dtype in dict.fromkeys(p.dtype for p in stepping):
            alike = [p for p in stepping if p.dtype == dtype]
            self._step_alike(optimizer, alike, [optimizer.param_groups[groups[p]] for p in alike])
        return set(stepping)

    def _step_alike(self, optimizer: Optimizer, parameters: list[Any], groups: list[dict[str, Any]]) -> None:
        """Step matrices of one dtype."""
        exchange, matrices = self._owners.exchange, [self._matrices[p] for p in parameters]
        gradients = self._owners.held(matrices, [p.grad for p in parameters])
        states = self._states_of_rows([optimizer.state[p] for p in parameters], matrices)
        updates = [
            self._update.of_rows(gradient, state, group)
            for gradient, state, group in zip(gradients, states, groups, strict=True)
        ]
        for parameter, matrix, state, gradient in zip(parameters, matrices, states, gradients, strict=True):
            self._keep(optimizer.state[parameter], state, parameter, matrix, gradient)
        sent_as = updates[0].new_empty(0, dtype=self._update_dtype)
        done = [
            None if update is None else self._update.of_matrix(update, group).to(sent_as.dtype)
            for update, group in zip(exchange.to_owners(matrices, updates), groups, strict=True)
        ]
        held = exchange.from_owners(matrices, done, like=sent_as)
        of_group = dict(zip(parameters, groups, strict=True))

        def apply(parameter: nn.Parameter, weights: Tensor, update: Tensor) -> None:
            self._update.apply(weights, update, of_group[parameter], parameter.shape)

        for _, unit in groupby(range(len(matrices)), key=lambda index: matrices[index].unit):
            indices = list(unit)
            self._owners.add(
                [parameters[i] for i in indices], [matrices[i] for i in indices], [held[i] for i in indices], apply
            )

    def _states_of_rows(
        self, states: Sequence[dict[str, Any]], matrices: Sequence[OwnedMatrix]
    ) -> list[dict[str, Any]]:
        """The states of the rows that this rank holds, moved from shards where they are there, as after loading."""
        of_rows = [dict(state) for state in states]
        for name in dict.fromkeys(name for state in states for name, value in state.items() if _is_sharded(value)):
            having = [index for index, state in enumerate(states) if _is_sharded(state.get(name))]
            held = self._owners.held([matrices[i] for i in having], [states[i][name] for i in having])
            for index, rows in zip(having, held, strict=True):
                of_rows[index][name] = rows
        return of_rows

    def _keep(
        self, kept: dict[str, Any], state: dict[str, Any], parameter: Tensor, matrix: OwnedMatrix, like: Tensor
    ) -> None:
        """Keep the state of rows as the optimizer's: tensors of the rows' shape as those of the parameter's."""
        for name, value in state.items():
            known = kept.get(name)
            if not (isinstance(value, Tensor) and value.shape == like.shape and value.dim() == 2):
                kept[name] = value
            elif not isinstance(known, OwnedRows) or known.held is not value:
                kept[name] = self._owners.rows(parameter, matrix, value)

    def _own(self, optimizer: Optimizer) -> None:
        """Give owners to matrices that were added since."""
        for group in optimizer.param_groups:
            new = set(group["params"]) - self._known
            if new:
                self._known |= new
                self._matrices |= self._owners.own(new, partial(_flops, self._update, group))

    def _save_by_rows(self, _optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """Let a state dict hold states as those of any optimizer are sharded; every rank gets it."""
        state_dict["state"] = {
            number: {name: value.by_rows() if isinstance(value, OwnedRows) else value for name, value in slots.items()}
            for number, slots in state_dict["state"].items()
        }


class _StepBefore(Substitution):
    """Steps some parameters before the optimizer's own step, which then finds the others."""

    def __init__(self, optimizer: Optimizer, step: Callable[[], set[Tensor]]) -> None:
        super().__init__(optimizer)
        self._step = step

    @override
    def step(self, optimizer: Optimizer, step: Callable[[], Any]) -> None:
        stepped, groups = self._step(), optimizer.param_groups
        rest = [{**group, "params": [p for p in group["params"] if p not in stepped]} for group in groups]
        if any(group["params"] for group in rest):
            optimizer.param_groups = rest
            try:
                step()
            finally:
                optimizer.param_groups = groups


def _is_sharded(value: Any) -> bool:
    return isinstance(value, DTensor) and value.dim() == 2


def _flops(update: MatrixUpdate, group: dict[str, Any], rows: int, columns: int) -> float:
    return update.flops(rows, columns, group)


def needs_matrices(optimizer: Optimizer) -> bool:
    """Whether the step of an optimizer needs whole matrices."""
    return is_muon(optimizer) or hasattr(optimizer, "matrix_update")


def matrix_update(optimizer: Any) -> MatrixUpdate:
    """The parts of the step of an optimizer that needs whole matrices."""
    update: MatrixUpdate = MuonUpdate() if is_muon(optimizer) else optimizer.matrix_update
    return update
