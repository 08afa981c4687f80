"""Batches of token windows for a Trainer, from any source of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler
from transformers import PreTrainedTokenizerBase

from lightning_mics import ResumableSampler
from lightning_mics.collectives.agreement import on_all_ranks
from recipes.data.masked_windows import EpochSampler, MaskedWindows, edge_tokens
from recipes.data.token_windows import TokenSequence, TokenWindows
from recipes.data.window_loader import WindowLoader

PROMPT_MASK_EVERY = 6  # tokens; about the 15 % of training


class TokenData(L.LightningDataModule):
    """Windows of tokens, different ones on each rank. Subclasses provide the tokens.

    A causal model gets ``[batch, sequence_length + 1]``: inputs and, one further, targets. A masked model gets
    ``{"input_ids", "labels"}``, both ``[batch, sequence_length]``, see
    :class:`~recipes.data.masked_windows.MaskedWindows`.

    Args:
        vocab_size: Size of the vocabulary, at most.
        sequence_length: Inputs in a window.
        batch_size: Windows per rank and micro-step.
        val_batch_size: Windows per rank and step of validation.
        val_windows: Windows of the validation set, spread evenly over the held-out tokens.
        val_fraction: Fraction that is held out if the source has no text for validation.
        prompt: Text that the model continues for a sample; for a masked model, some of its tokens are masked.
        objective: ``"causal"`` or ``"masked"``.
        num_workers: Processes per rank that prepare batches in advance; 0 uses the main process. It cannot change when
            a run is resumed.
        seed: Seed of the order of the training windows, and of masks.

    Raises:
        ValueError: If ``objective`` or ``val_fraction`` is invalid.
    """

    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        *,
        vocab_size: int,
        sequence_length: int,
        batch_size: int,
        val_batch_size: int,
        val_windows: int,
        prompt: str,
        val_fraction: float = 0.1,
        objective: str = "causal",
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if objective not in ("causal", "masked"):
            raise ValueError(f"objective={objective!r} is neither 'causal' nor 'masked'")
        if not 0 < val_fraction < 1:
            raise ValueError(f"data.val_fraction={val_fraction} is not between 0 and 1")
        self.vocab_size = vocab_size
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size
        self.val_windows = val_windows
        self.val_fraction = val_fraction
        self.prompt = prompt
        self.objective = objective
        self.num_workers = num_workers
        self.seed = seed
        self._failure: Exception | None = None

    @property
    def tokenizer_folder(self) -> Path | None:
        """Folder of the tokenizer's files, for an export; None for a name on the hub."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Prepare files in one process per machine while others wait; machines may share the files."""
        raise NotImplementedError

    def open(self) -> tuple[PreTrainedTokenizerBase, list[TokenSequence], list[TokenSequence]]:
        """The tokenizer, and training and validation tokens, memory-mapped: ranks of a machine share one copy."""
        raise NotImplementedError

    def prepare_data(self) -> None:
        """Run :meth:`prepare` and store its error for :meth:`setup`, where all ranks can raise it.

        Raised here, it would not reach the waiting ranks, which would fail later with missing files.
        """
        self._failure = None
        try:
            self.prepare()
        except Exception as failure:
            self._failure = failure

    def setup(self, stage: str) -> None:
        """Open the tokens; an error on one rank is raised on all, before a model is built."""
        agreed(self._raise_failure)  # first, or other ranks would report missing files instead
        agreed(lambda: self._open_windows(stage))

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _open_windows(self, stage: str) -> None:
        self.tokenizer, train, val = self.open()
        # the first of several files is enough for the baselines
        self.train_tokens, self.val_tokens = train[0], val[0]
        self.train = self._windows(train, name="the training text", split=0)
        self.val = self._windows(val, name="the validation text", split=1, count=self.val_windows)
        if stage == "fit":
            self._check_enough()

    def _windows(
        self, tokens: Sequence[TokenSequence], *, name: str, split: int, count: int | None = None
    ) -> TokenWindows | MaskedWindows:
        if self.objective == "causal":
            return TokenWindows(tokens, length=self.sequence_length, count=count, name=name)
        masks = {"tokenizer": self.tokenizer, "seed": [self.seed, split]}
        return MaskedWindows(tokens, length=self.sequence_length, count=count, name=name, **masks)

    @property
    def _windows_per_step(self) -> int:
        return self.batch_size * self.trainer.world_size * self.trainer.accumulate_grad_batches

    def _check_enough(self) -> None:
        if len(self.train) < self._windows_per_step:
            raise ValueError(
                f"the training text has {len(self.train)} windows of {self.sequence_length} tokens, fewer than the "
                f"{self._windows_per_step} of one optimizer step (batch_size {self.batch_size} x "
                f"{self.trainer.world_size} ranks x {self.trainer.accumulate_grad_batches} micro-steps); use more "
                "text, a shorter data.sequence_length or a smaller batch"
            )

    def train_dataloader(self) -> DataLoader:
        """Goes on in the middle of an epoch, also on another number of ranks if an optimizer step stays as large."""
        sampler_type = ResumableSampler if self.objective == "causal" else EpochSampler
        sampler = sampler_type(self.train, global_batch_size=self._windows_per_step, **self._ranks(), seed=self.seed)
        return WindowLoader(self.train, batch_size=self.batch_size, sampler=sampler, **self._loading())

    def val_dataloader(self) -> DataLoader:
        sampler = DistributedSampler(self.val, **self._ranks(), shuffle=False)
        return DataLoader(self.val, batch_size=self.val_batch_size, sampler=sampler, **self._loading())

    def predict_dataloader(self) -> DataLoader:
        """The prompt, on every rank: sharded parameters are gathered by all ranks together."""
        tokens = torch.tensor(self.tokenizer.encode(self.prompt, add_special_tokens=False))
        if self.objective == "masked":
            tokens[PROMPT_MASK_EVERY // 2 :: PROMPT_MASK_EVERY] = self.tokenizer.mask_token_id
            begin, end = edge_tokens(self.tokenizer)
            tokens = torch.cat([begin, tokens, end])
        return DataLoader([tokens], batch_size=1)

    def _ranks(self) -> dict[str, int]:
        return {"num_replicas": self.trainer.world_size, "rank": self.trainer.global_rank}

    def _loading(self) -> dict[str, object]:
        return {
            "num_workers": self.num_workers,
            # workers that are not forked would each copy the memory-mapped tokens
            "multiprocessing_context": "fork" if self.num_workers else None,
            "pin_memory": self.trainer.strategy.root_device.type == "cuda",
        }

    def val_targets(self) -> np.ndarray:
        """The target tokens ``[targets]`` of the validation loss, for baselines."""
        return _targets(self.val)

    def decode(self, tokens: Tensor) -> str:
        """The text of tokens ``[tokens]``."""
        return self.tokenizer.decode(tokens.tolist(), skip_special_tokens=False)


def agreed(action: Callable[[], None]) -> None:
    """Run ``action`` on all ranks of the job; an error on one is raised on all."""
    if dist.is_initialized():
        on_all_ranks(action)
    else:
        action()


def split_tail(tokens: Sequence[TokenSequence], *, fraction: float) -> tuple[list[TokenSequence], list[TokenSequence]]:
    """Split sequences of tokens without held-out documents: all but the last ``fraction``, and the rest.

    Args:
        tokens: Sequences ``[tokens]``.
        fraction: Fraction of all tokens for validation, 0 to 1.
    """
    left = int(sum(map(len, tokens)) * fraction)
    train, val = [], []
    for sequence in reversed(tokens):
        cut = len(sequence) - min(left, len(sequence))
        left -= len(sequence) - cut
        train.insert(0, sequence[:cut])
        val.insert(0, sequence[cut:])
    rank_zero_info(f"The last {fraction:.0%} of the tokens are for validation")
    return [part for part in train if len(part)], [part for part in val if len(part)]


def _targets(windows: Dataset) -> np.ndarray:
    def of(window: Tensor | dict[str, Tensor]) -> Tensor:
        return window["labels"][window["labels"] != -100] if isinstance(window, dict) else window[1:]

    return torch.cat([of(window) for window in windows]).numpy()
