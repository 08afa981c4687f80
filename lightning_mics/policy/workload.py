"""The work of a model, independent of the cluster: its parameter groups, and memory and FLOPs of a sample."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch

from lightning_mics.cost.step_traffic import Unit, unit_sizes
from lightning_mics.policy.activations import Activations
from lightning_mics.policy.memory import ADAM_STATES, ModelSize, saved_by_low_bits
from lightning_mics.sharding.modules.frozen_blocks import UnitSize
from lightning_mics.techniques.sharded_dim import padded_numel


@dataclass(frozen=True, kw_only=True)
class Elements:
    """Elements of parameter groups, padded so that all ranks have equal shards.

    Attributes:
        root: Elements of the root.
        largest: Elements of the largest block; 0 without blocks.
        total: Elements of all groups.
        nearest: Elements of the first and the second block, if there are any.
        blocks: Elements of each block, in order.
    """

    root: int
    largest: int
    total: int
    nearest: tuple[int, ...]
    blocks: tuple[int, ...]

    @classmethod
    def of(cls, root: int, blocks: tuple[int, ...]) -> Elements:
        """The elements of a model.

        Args:
            root: Elements of the root.
            blocks: Elements of each block, in order.
        """
        largest, total = max(blocks, default=0), root + sum(blocks)
        return cls(root=root, largest=largest, total=total, nearest=blocks[:2], blocks=blocks)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Sizes of a model, and memory and FLOPs of one sample.

    Attributes:
        units: Parameter groups: the root and the blocks.
        size: Sizes of model states.
        parameters: Number of parameters.
        activations: Activations in each phase of a micro-step.
        model_flops: FLOPs of a forward and backward of one sample, without recomputation.
        hardware_flops: FLOPs of a forward and backward of one sample, with recomputation.
        gathered_dtype: Dtype of unsharded parameters.
        reduce_dtype: Dtype of gradient sums.
        sample_tokens: Tokens of one sample; None if it has none, or nobody has counted them.
        recomputed_share: Share of the blocks that are recomputed in backward; None if nobody has counted them.
        activation_offload: Whether the inputs of recomputed blocks wait for the backward in host memory.
        alternatives: The same model with other shares of its blocks recomputed, or their inputs elsewhere, for a plan
            to choose from.
    """

    units: tuple[Unit, ...]
    size: ModelSize
    parameters: int
    activations: Activations
    model_flops: float
    hardware_flops: float
    gathered_dtype: torch.dtype
    reduce_dtype: torch.dtype
    sample_tokens: int | None = None
    recomputed_share: float | None = None
    activation_offload: bool = False
    alternatives: tuple[Workload, ...] = ()

    def elements(self, ranks: int, *, trained: bool = False) -> Elements:
        """Elements of the parameter groups; computed once.

        Args:
            ranks: Ranks that have equal shards.
            trained: Whether those that require gradients are counted alone.
        """
        if (ranks, trained) not in self._elements:
            count = [unit.trained_elements(ranks) if trained else unit.elements(ranks) for unit in self.units]
            root = sum(elements for elements, unit in zip(count, self.units, strict=True) if unit.is_root)
            blocks = tuple(elements for elements, unit in zip(count, self.units, strict=True) if not unit.is_root)
            self._elements[ranks, trained] = Elements.of(root, blocks)
        return self._elements[ranks, trained]

    @cached_property
    def sizes(self) -> list[UnitSize]:
        """Elements of each parameter group, and those of them that require gradients; the root's first."""
        return unit_sizes(self.units)

    @cached_property
    def parameter_tensors(self) -> int:
        """Number of parameters, each a tensor."""
        return sum(len(unit.parameters) for unit in self.units)

    def saved_by_low_bits_bytes(self, partition_size: int, *, bits: int) -> int | None:
        """Bytes that optimizer states of some bits save on the rank with the largest shards, beside AdamW in float32.

        Args:
            partition_size: Ranks per partition group.
            bits: Bits of a code, 8 or 4.

        Returns:
            The bytes; None if not all parameters are in float32.
        """
        trained = [each for unit in self.units for each in (unit.parameters if unit.trained is None else unit.trained)]
        values = self.parameters + ADAM_STATES * sum(map(prod, trained))
        if self.size.states_bytes - self.size.gradients_bytes != torch.float32.itemsize * values:
            return None
        shards = (padded_numel(shape, partition_size) // partition_size for shape in trained)
        return sum(saved_by_low_bits(elements, bits=bits) for elements in shards)

    @cached_property
    def _elements(self) -> dict[tuple[int, bool], Elements]:
        return {}

    @property
    def ways(self) -> tuple[Workload, ...]:
        """This workload and its alternatives."""
        return (self, *self.alternatives)

    def way(self, recomputed_share: float | None, *, activation_offload: bool) -> Workload:
        """The workload or one of its alternatives, without further alternatives.

        Args:
            recomputed_share: Share of the blocks that are recomputed.
            activation_offload: Whether their inputs wait on the host.
        """
        wanted = (recomputed_share, activation_offload)
        chosen = next(each for each in self.ways if (each.recomputed_share, each.activation_offload) == wanted)
        return replace(chosen, alternatives=())
