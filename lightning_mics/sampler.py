"""A sampler whose position in an epoch can be resumed on another number of ranks.

Rank r of W takes ``order[r::W]``. Whenever all ranks have taken equally many samples, together they have taken the
first ones of ``order``, for any W, so the position in an epoch is one number, which every rank knows::

    order      0 1 2 3 4 5 6 7 | 8 9 10 11 12 13 14 15
    4 ranks    0 1 2 3 0 1 2 3 | saved after 8 samples
    2 ranks                    | 0 1 0  1  0  1  0  1
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import Dataset, DistributedSampler


class ResumableSampler(DistributedSampler[Any]):
    """A ``DistributedSampler`` for torchdata's ``StatefulDataLoader``, whose position counts the samples of all ranks.

    Each epoch has another order, and leaves out the samples at its end that do not fill an optimizer step.

    Args:
        dataset: Dataset with a length.
        global_batch_size: Samples of all ranks in all micro-steps of an optimizer step. With the same number, an epoch
            has the same number of steps on any number of ranks.
        num_replicas: Number of ranks; None takes the default process group's.
        rank: This rank; None takes the rank in the default process group.
        shuffle: Whether the order is random.
        seed: Seed of the order, the same on all ranks.

    Raises:
        ValueError: If the ranks cannot share a step equally, or the dataset is smaller than a step.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        global_batch_size: int,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle, seed, drop_last=True)
        samples = len(dataset)  # type: ignore[arg-type]
        if global_batch_size < 1 or global_batch_size % self.num_replicas:
            raise ValueError(
                f"global_batch_size={global_batch_size} is not a multiple of the number of ranks, {self.num_replicas}"
            )
        if samples < global_batch_size:
            raise ValueError(f"a dataset of {samples} samples is smaller than global_batch_size={global_batch_size}")
        self.total_size = samples - samples % global_batch_size
        self.num_samples = self.total_size // self.num_replicas

    def __iter__(self) -> Iterator[int]:
        return _Epoch(self)

    def own_order(self) -> Iterator[int]:
        """Indices of this rank's samples in a full epoch."""
        return super().__iter__()


class _Epoch(Iterator[int]):
    """A rank's position in an epoch; ``StatefulDataLoader`` saves its state with each batch."""

    def __init__(self, sampler: ResumableSampler) -> None:
        self._sampler = sampler
        self._taken = 0  # by this rank
        self._left: Iterator[int] | None = None

    def __next__(self) -> int:
        if self._left is None:  # here, since Lightning sets the sampler's epoch after making the iterator
            self._left = islice(self._sampler.own_order(), self._taken, None)
        index = next(self._left)
        self._taken += 1
        return index

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._sampler.epoch, "samples_of_all_ranks": self._taken * self._sampler.num_replicas}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._taken, rest = divmod(state["samples_of_all_ranks"], self._sampler.num_replicas)
        if rest:
            raise ValueError(
                f"the epoch was interrupted after {state['samples_of_all_ranks']} samples, which "
                f"{self._sampler.num_replicas} ranks cannot have taken equally; resume on a number of ranks that "
                "divides it"
            )
        self._sampler.set_epoch(state["epoch"])  # workers begin before Lightning sets it
        self._left = None
