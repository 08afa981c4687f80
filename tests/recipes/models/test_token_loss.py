from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mics.planning.rehearsal.activations import measure_activations
from recipes.models.token_loss import nats_per_token

VOCAB, TOKENS = 50, 21


def _loss_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    loss = nats_per_token(logits, targets)
    loss.sum().backward()
    return loss.detach(), logits.grad


@pytest.mark.parametrize("part_elements", [VOCAB // 2, 4 * VOCAB, 7 * VOCAB, 1000 * VOCAB])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_parts_loss_and_gradient_are_those_of_the_whole(
    part_elements: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipes.models.token_loss.PART_ELEMENTS", part_elements)
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(TOKENS, VOCAB, generator=random).to(dtype)
    targets = torch.randint(VOCAB, (TOKENS,), generator=random)
    targets[3:9] = -100
    whole = logits.clone().requires_grad_()
    expected = F.cross_entropy(whole.float(), targets, reduction="none")
    expected.sum().backward()
    loss, gradient = _loss_and_gradient(logits, targets)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    assert (loss[3:9] == 0).all() and loss[0] > 0
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, whole.grad)


def test_what_fits_one_part_is_not_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.models.token_loss.checkpoint", lambda *_, **__: pytest.fail("was recomputed"))
    assert nats_per_token(torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)).shape == (3,)


def test_logits_in_bfloat16_are_never_whole_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    def peak(part_elements: int) -> float:
        monkeypatch.setattr("recipes.models.token_loss.PART_ELEMENTS", part_elements)
        measured = measure_activations(
            lambda: nn.Linear(3, VOCAB, bias=False),
            (torch.zeros(1000, 3), torch.zeros(1000, dtype=torch.int64)),
            loss=lambda head, batch: nats_per_token(head(batch[0].bfloat16()), batch[1]).sum(),
            samples=1,
            dtype=torch.bfloat16,
            find_blocks=lambda _: {},
        )
        return max(measured.peaks(1).values())

    logits_bytes = 1000 * VOCAB * 2
    assert peak(1000 * VOCAB) > 5 * logits_bytes
    assert peak(10 * VOCAB) < 3.5 * logits_bytes
