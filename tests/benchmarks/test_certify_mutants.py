"""Faults of most kinds are found by ``certify``, and none where there is none."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace

import pytest

from benchmarks.certify.campaign import Campaign, Entry
from benchmarks.certify.model import CASES
from benchmarks.certify.operators import operator_mutants
from benchmarks.certify.source import FILES, places, source_mutant

ALL, NODE = (replace(case, trainings=("job", "resumed")) for case in CASES[:2])
OF_ALL_NODES = (
    "sums scaled (1.000000001): blocks.0, step 2",
    "accumulated (lost): blocks.1, step 1",
    "cached copy (kept and not compared): root",
    "first weights (1e-12): blocks.1, rank 3",
    "order of reduced (first two): blocks.0",
    "rows written (swapped, exp_avg): blocks.0",
    "buffer loaded (offset): everywhere",
)
OF_NODES = (
    "hop 2 (drop): blocks.0, step 2",
    "clipped (local norm): root, step 1",
    "step of a rank (1.000000001): step 2, rank 3",
    "options loaded (weight_decay, first group): everywhere",
    "schedule loaded (not there): everywhere",
)


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    made = Campaign(tmp_path_factory.mktemp("certify"), cases=(ALL, NODE))
    made.train_without_mutants(follows=False)
    return made


def test_without_a_fault_nothing_is_found(campaign: Campaign) -> None:
    assert len(campaign.clean) == 4
    assert [entry["by"] for entry in campaign.clean] == [None] * 4


def test_faults_of_most_kinds_are_found(campaign: Campaign) -> None:
    by_name = {mutant.name: mutant for mutant in operator_mutants()}
    numbered = [(2 * place, by_name[name]) for place, name in enumerate(OF_ALL_NODES)]  # even: first on all nodes
    numbered += [(2 * place + 1, by_name[name]) for place, name in enumerate(OF_NODES)]
    entries: dict[str, Entry] = {}
    stop = multiprocessing.get_context("fork").Event()
    for _, entry in campaign.find_all(numbered, workers=2, stop=stop):
        entries[entry["name"]] = entry
    assert entries.keys() == {*OF_ALL_NODES, *OF_NODES}
    missed = [name for name, entry in entries.items() if not entry["acted"] or entry["by"] in (None, "error")]
    assert not missed, entries


def test_a_mutant_of_source_code_changes_its_function_in_place() -> None:
    from lightning_mics.techniques.pending_gradients import PendingGradients

    file = next(file for file in FILES if file.name == "pending_gradients.py")
    found = [each for each in places(str(file.resolve())) if each.function == "PendingGradients.add_into"]
    added = next(each for each in found if each.operator == "other operator")
    mutant = source_mutant(added)
    assert mutant is not None
    own = PendingGradients.add_into.__code__
    try:
        mutant.apply()
        assert PendingGradients.add_into.__code__ is not own
        assert PendingGradients.add_into.__code__.co_firstlineno == own.co_firstlineno
    finally:
        PendingGradients.add_into.__code__ = own
