"""Caches and sums in host memory under every integration: the same bits, and runs that resume with or without."""

from __future__ import annotations

from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from lightning_mics.techniques.cache_offload import HeldOnHost
from tests.integrations.test_offload import HOSTS, Seen, assert_same
from tests.support.trainers import cases_on_ranks

NODE = {"partition_size": 4, "cache_parameters": "node", "accumulate_gradients": "node"}


def counted(run: Any, *args: Any) -> tuple[Seen, int]:
    """What a run has seen, and how many values went to the host."""
    count, put = 0, HeldOnHost.put

    def counting(self: HeldOnHost, values: Any) -> None:
        nonlocal count
        count += 1
        put(self, values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeldOnHost, "put", counting)
        return run(*args), count


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache_offload")


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[Any, Any]:
    """By host and option, what each rank has seen of a run in one piece, which has saved half-way."""
    return cases_on_ranks(
        {
            (host, moves): partial(counted, run, folder / f"{host}-{moves}", None, {**NODE, "cache_offload": moves})
            for (host, run), moves in product(HOSTS.items(), (False, True))
        }
    )


@pytest.fixture(scope="module")
def resumed(folder: Path, trained: dict[Any, Any]) -> dict[Any, Any]:
    """By host and by option of the checkpoint, what each rank has seen of the second half, with the other option."""
    return cases_on_ranks(
        {
            (host, saved): partial(
                counted, run, folder / "resumed", folder / f"{host}-{saved}", {**NODE, "cache_offload": not saved}
            )
            for (host, run), saved in product(HOSTS.items(), (False, True))
        }
    )


@pytest.mark.parametrize("host", HOSTS)
def test_training_has_the_same_bits(host: str, trained: dict[Any, Any]) -> None:
    ours, theirs = trained[host, True], trained[host, False]
    assert all(count > 0 for _, count in ours) and all(count == 0 for _, count in theirs)
    assert_same([seen for seen, _ in ours], [seen for seen, _ in theirs])


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("host", HOSTS)
def test_a_run_resumes_with_the_same_bits_with_or_without_it(
    host: str, saved: bool, trained: dict[Any, Any], resumed: dict[Any, Any]
) -> None:
    found = resumed[host, saved]
    assert all((count > 0) is not saved for _, count in found)
    assert_same([seen for seen, _ in found], [seen for seen, _ in trained[host, False]])
