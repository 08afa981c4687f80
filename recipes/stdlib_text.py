"""Text that is on every machine: the source files of Python's standard library. Nothing is downloaded."""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_mics import ResumableSampler
from recipes.token_cache import cache_folder, load_tokenizer, load_tokens, prepare_tokens
from recipes.token_windows import TokenWindows

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "encodings"}  # encodings are tables, not text


class StdlibText(L.LightningDataModule):
    """Windows ``[batch, sequence_length + 1]`` of tokens, each rank its own; one file in ten is for validation.

    Args:
        vocab_size: Tokens of the BPE.
        sequence_length: Targets in a window.
        batch_size: Windows per rank and micro-step.
        val_batch_size: The same for validation, which needs less memory.
        val_windows: Windows of the validation set, spread evenly over the held-out files.
        prompt: What the sample of generated text continues.
        cache_dir: Where the BPE and the tokens are kept between runs.
        seed: Of the order of the training windows.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        sequence_length: int,
        batch_size: int,
        val_batch_size: int,
        val_windows: int,
        prompt: str,
        cache_dir: str = "~/.cache/lightning_mics",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size
        self.val_windows = val_windows
        self.prompt = prompt
        self.seed = seed
        sizes = {str(path): path.stat().st_size for path in source_files()}
        self.folder = cache_folder(cache_dir, name="stdlib", depends_on=[platform.python_version(), vocab_size, sizes])

    @property
    def tokenizer_folder(self) -> Path:
        """Where the BPE's ``tokenizer.json`` is."""
        return self.folder

    def prepare_data(self) -> None:
        if self.folder.is_dir():
            return
        train, val = [], []
        for path in source_files():
            (val if is_held_out(path) else train).append(path.read_text(encoding="utf-8", errors="replace"))
        rank_zero_info(f"Training a tokenizer of {self.vocab_size} tokens on {len(train)} files, once: {self.folder}")
        prepare_tokens(self.folder, train_texts=train, val_texts=val, vocab_size=self.vocab_size)

    def setup(self, stage: str) -> None:
        self.tokenizer = load_tokenizer(self.folder)
        self.train_tokens = load_tokens(self.folder, "train")
        self.train = TokenWindows(self.train_tokens, length=self.sequence_length)
        self.val = TokenWindows(load_tokens(self.folder, "val"), length=self.sequence_length, count=self.val_windows)

    def train_dataloader(self) -> DataLoader:
        """Goes on in the middle of an epoch, also on another number of ranks if an optimizer step stays as large."""
        samples_per_step = self.batch_size * self.trainer.world_size * self.trainer.accumulate_grad_batches
        sampler = ResumableSampler(self.train, samples_per_step=samples_per_step, **self._ranks(), seed=self.seed)
        return StatefulDataLoader(self.train, batch_size=self.batch_size, sampler=sampler)

    def val_dataloader(self) -> DataLoader:
        sampler = DistributedSampler(self.val, **self._ranks(), shuffle=False)
        return DataLoader(self.val, batch_size=self.val_batch_size, sampler=sampler)

    def predict_dataloader(self) -> DataLoader:
        """The prompt, on every rank: sharded parameters are gathered by all ranks together."""
        return DataLoader([torch.tensor(self.tokenizer.encode(self.prompt).ids)], batch_size=1)

    def _ranks(self) -> dict[str, int]:
        return {"num_replicas": self.trainer.world_size, "rank": self.trainer.global_rank}

    def decode(self, tokens: Tensor) -> str:
        """The text of tokens ``[tokens]``."""
        return self.tokenizer.decode(tokens.tolist(), skip_special_tokens=False)


def source_files() -> list[Path]:
    """The library's .py files without tests and installed packages, sorted.

    Raises:
        RuntimeError: If there are none, as where the library is zipped or stripped to bytecode.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in library.rglob("*.py") if not SKIPPED_FOLDERS & set(p.relative_to(library).parts))
    if not files:
        raise RuntimeError(f"found no .py files of the standard library in {library}; use a Python that has them")
    return files


def is_held_out(path: Path) -> bool:
    """One file in ten, by its path within the library: the same ones on every machine."""
    name = path.relative_to(sysconfig.get_paths()["stdlib"]).as_posix()
    return hashlib.sha256(name.encode()).digest()[0] % 10 == 0
