"""Rehearsals with caches and sums in host memory: device memory falls by their bytes, less what passes through it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_mics.planning.rehearsal.rehearse import CACHED
from tests.support.jobs import JOBS, rehearsed

pytestmark = pytest.mark.rehearsal

WAYS = {
    "once per step, on the host": "once per step",
    "mixed precision, on the host": "mixed precision",
    "parameters once per step, on the host": "parameters once per step",
}


@pytest.mark.parametrize("job", WAYS)
def test_device_memory_falls_by_what_moves_but_for_two_slices_and_two_sums(job: str) -> None:
    layers = {"layers": 6}
    on_host = rehearsed("gpt", JOBS[job], **layers)
    on_device = rehearsed("gpt", JOBS[WAYS[job]], **layers)
    cached = on_device.peak[CACHED]
    assert on_host.on_host_bytes == cached > 0
    less, passing = on_device.peak_bytes - on_host.peak_bytes, cached - (on_device.peak_bytes - on_host.peak_bytes)
    units = 7  # of blocks there are six; that of the root, with the vocabulary, is one more
    assert less > 0 and 0 < passing < cached * 4 / units
    assert CACHED not in on_host.peak
    assert on_host.sent() == on_device.sent()
    assert [each.collective for each in on_host.ran] == [each.collective for each in on_device.ran]


def test_without_caches_nothing_changes() -> None:
    plain = JOBS["once per step"]
    again = replace(plain, communication=replace(plain.communication, cache_offload=False))
    assert rehearsed("gpt", plain) == rehearsed("gpt", again)
