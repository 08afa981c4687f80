import pytest
import torch

from lightning_mics._torch import streams

CPU = torch.device("cpu")


def test_work_on_a_cpu_is_done_when_its_call_returns_and_memory_is_not_kept():
    assert not streams.has_streams(CPU)
    streams.keep_for_current_stream(torch.ones(2))  # torch has no `record_stream` there


@pytest.mark.parametrize("device", ["cuda", "xpu", "hpu"])
def test_every_other_device_has_streams(device):
    assert streams.has_streams(torch.device(device))


def test_a_stream_is_the_current_one_inside_its_context_only():
    before, own = streams.current_stream(CPU), streams.new_stream(CPU)
    own.wait_stream(before)
    with streams.on_stream(own, CPU):
        assert streams.current_stream(CPU) is own
    assert streams.current_stream(CPU) is before


def test_memory_of_a_device_with_streams_is_kept_for_the_current_one(monkeypatch):
    kept = []
    monkeypatch.setattr(streams, "WITHOUT_STREAMS", frozenset())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: kept.append((tensor, stream)))
    tensor = torch.ones(2)
    streams.keep_for_current_stream(tensor)
    assert kept == [(tensor, streams.current_stream(CPU))]
