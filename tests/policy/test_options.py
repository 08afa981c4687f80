"""The options of sharding: declared once, seen by whoever asks the constructors for them."""

from __future__ import annotations

import inspect
import pydoc
import re
import typing
from dataclasses import FrozenInstanceError, fields

import pytest
import torch
from typing_extensions import Unpack

from lightning_mics import CommunicationOptions, MiCSFabricStrategy, MiCSPlugin, MiCSStrategy
from lightning_mics.policy.options import PolicyOptions
from lightning_mics.policy.policy import Policy

OPTIONS = typing.get_type_hints(PolicyOptions)


TAKERS = pytest.mark.parametrize("taker", [MiCSStrategy, MiCSFabricStrategy, MiCSPlugin, Policy])


@TAKERS
def test_type_hints_lead_to_the_options_at_runtime(taker: type) -> None:
    assert typing.get_type_hints(taker.__init__)["policy"] == Unpack[PolicyOptions]


@pytest.mark.parametrize("taker", [MiCSStrategy, MiCSFabricStrategy, MiCSPlugin])
def test_help_tells_every_option_once(taker: type) -> None:
    text = pydoc.plain(pydoc.render_doc(taker))
    for option in OPTIONS:
        assert len(re.findall(rf"^[ |]+{option}: \w", text, flags=re.MULTILINE)) == 1, option


def test_each_option_is_documented_and_each_entry_is_an_option() -> None:
    assert re.findall(r"^    (\w+): ", inspect.getdoc(PolicyOptions) or "", flags=re.MULTILINE) == list(OPTIONS)


def test_options_of_communication_are_options_of_a_policy() -> None:
    assert {field.name for field in fields(CommunicationOptions)} <= OPTIONS.keys()
    asked = CommunicationOptions(
        hierarchical=False,
        cache_parameters="rank",
        accumulate_gradients="shard",
        inter_node_reduce_dtype=torch.bfloat16,
        two_hop=False,
    )
    assert Policy(**asked.keywords()).communication == asked
    assert Policy().communication == CommunicationOptions.AUTO
    assert Policy(inter_node_reduce_dtype="bfloat16").communication.inter_node_reduce_dtype == torch.bfloat16


def test_options_of_communication_are_checked_and_do_not_change() -> None:
    with pytest.raises(
        ValueError, match="cache_parameters='shard' is neither one of 'auto', 'never', 'node', 'rank' nor a share"
    ):
        CommunicationOptions(cache_parameters="shard")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"inter_node_reduce_dtype=torch.float16 is not one of None"):
        CommunicationOptions(inter_node_reduce_dtype=torch.float16)
    with pytest.raises(FrozenInstanceError):
        CommunicationOptions.PAPER.two_hop = False  # type: ignore[misc]
