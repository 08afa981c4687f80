from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader

from recipes.data.masked_windows import EpochSampler, MaskedWindows
from recipes.data.tokenizer import train_tokenizer
from tests.support.small_tokenizers import word_tokenizer

WORDS = word_tokenizer(words=60)  # w0 is token 5


TOKENS = np.random.default_rng(0).integers(5, 65, 6000).astype(np.uint16)


def windows(**options: Any) -> MaskedWindows:
    return MaskedWindows(TOKENS, **{"length": 50, "tokenizer": WORDS, "seed": [0], **options})


def whole(samples: MaskedWindows) -> dict[str, Tensor]:
    return torch.utils.data.default_collate(list(samples))


def originals(batch: dict[str, Tensor]) -> Tensor:
    return torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])


def test_windows_cover_the_tokens_between_begin_and_end_tokens() -> None:
    tokens = originals(whole(windows()))  # [windows, 50]
    assert tokens[:, 1:-1].flatten().tolist() == TOKENS[: 125 * 48].tolist()
    assert (tokens[:, 0] == WORDS.cls_token_id).all() and (tokens[:, -1] == WORDS.sep_token_id).all()


def test_a_tokenizer_without_them_fills_the_windows() -> None:
    tokenizer = train_tokenizer(["text"], vocab_size=300)
    assert originals(whole(windows(tokenizer=tokenizer))).flatten().tolist() == TOKENS.tolist()


def test_about_15_percent_are_masked_of_them_80_by_the_mask_and_10_by_others() -> None:
    batch = whole(windows())
    chosen = batch["labels"] != -100
    inputs, labels = batch["input_ids"][chosen], batch["labels"][chosen]
    assert chosen.float().mean() == pytest.approx(0.15 * 48 / 50, abs=0.015)
    assert (inputs == WORDS.mask_token_id).float().mean() == pytest.approx(0.8, abs=0.05)
    assert ((inputs != WORDS.mask_token_id) & (inputs != labels)).float().mean() == pytest.approx(0.1, abs=0.04)
    assert not chosen[:, 0].any() and not chosen[:, -1].any()


def test_ends_of_documents_are_not_masked() -> None:
    ends = np.full(6000, WORDS.sep_token_id, dtype=np.uint16)
    batch = whole(MaskedWindows(ends, length=50, tokenizer=WORDS, seed=[0]))
    assert (batch["labels"] == -100).all()


def test_masks_depend_on_seed_epoch_and_window_alone() -> None:
    first = whole(windows())["labels"]
    torch.manual_seed(7)  # what else has been drawn does not matter
    assert whole(windows())["labels"].equal(first)
    assert not whole(windows(seed=[1]))["labels"].equal(first)
    second_epoch = torch.stack([windows()[125 + index]["labels"] for index in range(125)])
    assert not second_epoch.equal(first)
    assert originals(windows()[125 + 3]).equal(originals(windows()[3]))


def loader(rank: int, ranks: int, *, epoch: int, num_workers: int = 2) -> StatefulDataLoader[Any]:
    data = windows()
    sampler = EpochSampler(data, global_batch_size=8, num_replicas=ranks, rank=rank, seed=3)
    sampler.set_epoch(epoch)
    options = {"multiprocessing_context": "fork"} if num_workers else {}
    return StatefulDataLoader(data, batch_size=2, sampler=sampler, num_workers=num_workers, **options)


def rows(*batches: dict[str, Tensor]) -> set[tuple[int, ...]]:
    return {tuple(row) for batch in batches for row in torch.cat([batch["input_ids"], batch["labels"]], dim=1).tolist()}


def test_a_resumed_run_on_other_ranks_has_the_same_masks() -> None:
    epoch = rows(*loader(0, 1, epoch=1))
    assert len(epoch) == 120 and not epoch & rows(*loader(0, 1, epoch=0))
    both = [loader(rank, 2, epoch=1) for rank in range(2)]
    begun = rows(*(batch for each in both for _, batch in zip(range(6), each, strict=False)))
    resumed = loader(0, 1, epoch=0)
    resumed.load_state_dict(both[0].state_dict())
    left = rows(*resumed)
    assert (len(begun), len(left)) == (24, 96)
    assert begun | left == epoch == rows(*loader(0, 1, epoch=1, num_workers=0))


def test_a_tokenizer_without_a_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="has no mask token, which a masked model needs"):
        windows(tokenizer=word_tokenizer(mask=False))
