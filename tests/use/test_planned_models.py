"""Plans of recurrent layers, of mixtures of experts, and of models whose shapes depend on values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from lightning_mics import Topology
from lightning_mics.planning import measure_workload, rehearse

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
HIDDEN, LENGTH = 8, 5


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer = kind(HIDDEN, HIDDEN, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Routed(nn.Module):
    """Sends rows through its second block, chosen by their values or by their place."""

    def __init__(self, choose: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.choose = choose

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](self.choose(self.blocks[0](x)))


def mixture(experts: str) -> nn.Module:
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=19,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=4,
        )
    )
    model.set_experts_implementation(experts)
    return model


def flops(make: Callable[[], nn.Module], batch: Tensor, precision: str, loss: Any = lambda m, b: m(b).sum()) -> float:
    return measure_workload(make, batch, samples=len(batch), loss=loss, precision=precision).model_flops


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers_are_counted_as_their_products(kind: type[nn.RNNBase], gates: int, precision: str) -> None:
    batch = torch.zeros(2, LENGTH, HIDDEN, dtype=torch.bfloat16 if precision == "bf16-true" else torch.float32)
    product = 2 * HIDDEN * gates * HIDDEN  # one step's, of its input or of the state before
    two_layers = 2 * 3 * LENGTH * 2 * product
    left_out = LENGTH * product + 2 * product  # gradients of the batch, and of each layer's first state
    assert flops(lambda: nn.Sequential(Recurrent(kind), Recurrent(kind)), batch, precision) == two_layers - left_out


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_mixtures_of_experts_are_counted_in_full_and_half_precision_as_by_batched_products(precision: str) -> None:
    tokens = torch.zeros(2, 6, dtype=torch.long)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(input_ids=batch, labels=batch).loss

    grouped, batched = (flops(lambda e=e: mixture(e), tokens, precision, loss) for e in ("grouped_mm", "batched_mm"))
    assert grouped == batched > 0


def test_shapes_that_depend_on_values_are_named_with_their_line_and_what_to_do() -> None:
    job: dict[str, Any] = {"loss": lambda m, b: m(b).sum()}
    chosen_by_value = lambda x: x[x[:, 0] > 0]  # noqa: E731
    for run in (
        lambda: measure_workload(lambda: Routed(chosen_by_value), torch.zeros(4, 4), samples=4, **job),
        lambda: rehearse(
            lambda: Routed(chosen_by_value),
            torch.zeros(4, 4),
            topology=Topology(world_size=4, ranks_per_node=2, partition_size=2),
            **job,
        ),
    ):
        with pytest.raises(
            ValueError, match=r"test_planned_models.py:\d+ has shapes that depend on values .*: give it a"
        ):
            run()


@pytest.mark.parametrize(
    "choose", [lambda x: x[:2], lambda x: x * (x[:, :1] > 0), lambda x: x if x.sum().item() < 1 else 2 * x]
)
def test_models_whose_values_change_no_shapes_are_measured(choose: Callable[[Tensor], Tensor]) -> None:
    assert flops(lambda: Routed(choose), torch.zeros(4, 4), "32-true") > 0
