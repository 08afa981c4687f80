"""What "auto" becomes, on the clusters of ``conf/`` and here."""

from __future__ import annotations

import re

import pytest
from hydra.utils import instantiate
from omegaconf import DictConfig

import train
from recipes.job.auto import choose_automatically
from recipes.job.workload import measure_run
from tests.support.configs import composed


def chosen(*overrides: str) -> tuple[DictConfig, str]:
    config = composed(*overrides)
    job = choose_automatically(config, train.make_model(config))
    return job.config, job.choices


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cpu.get_capabilities", dict, raising=False)


def shape(config: DictConfig) -> tuple:
    ranks = config.cluster.num_nodes * config.cluster.devices
    return (ranks, config.strategy.partition_size, config.data.batch_size, config.trainer.accumulate_grad_batches)


def test_without_a_gpu_four_processes_share_the_batch() -> None:
    config, table = chosen()
    assert shape(config) == (4, 2, 8, 1)
    assert config.trainer.precision == "32-true"
    assert config.trainer.devices == 4
    assert re.search(r'  micro-batch +8 \("auto": up to ', table)
    assert re.search(r'  cache parameters +rank \("auto": .* per rank of .* that model states leave\)', table)
    assert config.strategy.cache_parameters == config.strategy.accumulate_gradients == "rank"
    assert config.trainer.val_check_interval == config.validate_every_n_steps


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.batch_size=4"], (4, 2, 4, 2)),
        (["trainer.accumulate_grad_batches=8"], (4, 2, 1, 8)),
        (["strategy.partition_size=4"], (4, 4, 8, 1)),
        (["cluster.devices=2"], (2, 2, 16, 1)),
        (["global_batch_size=16"], (4, 2, 4, 1)),
    ],
)
def test_each_value_can_be_given_and_the_global_batch_stays(overrides: list[str], expected: tuple) -> None:
    config, table = chosen(*overrides)
    assert shape(config) == expected
    ranks, _, micro, accumulation = expected
    assert config.global_batch_size == ranks * micro * accumulation
    assert table.count("(given)") == (0 if overrides[0].startswith("global") else 1)


def test_a_processor_with_bfloat16_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    config, table = chosen()
    assert config.trainer.precision == "bf16-mixed"
    assert "this processor multiplies in bfloat16" in table


def test_micro_steps_come_with_what_does_not_fit() -> None:
    config, _ = chosen("model=gpt-20b", "cluster=p4d_8")
    assert config.trainer.accumulate_grad_batches > 1


def test_the_papers_largest_run_fits_in_the_papers_partition_size_and_runs_as_fast_as_it_can() -> None:
    papers, by_hand = chosen("model=gpt-100b", "cluster=p4d_64", "strategy.partition_size=128", "data.batch_size=16")
    assert "may not fit" not in by_hand
    assert papers.strategy.inter_node_prefetch == 1 and "faster by more than 1 %" in by_hand
    config, table = chosen("model=gpt-100b", "cluster=p4d_64")
    assert shape(config) == (512, 512, 16, 1)
    assert config.strategy.hierarchical is False and 0 < config.strategy.cache_parameters < 1
    assert config.strategy.inter_node_prefetch == 0
    assert "may not fit" not in table
    _, crowded = chosen("model=gpt-100b", "cluster=p4d_64", "strategy.partition_size=64", "data.batch_size=16")
    assert "this may not fit" in crowded


def test_recomputing_some_blocks_takes_what_is_in_between() -> None:
    def taken(choice: str) -> float:
        config = composed(f"strategy.activation_checkpointing={choice}", "model.network.num_hidden_layers=12")
        config.cluster.precision = "32-true"
        return measure_run(config, train.make_model(config)).activations.peaks(8)["loss"]

    none, last, half, full = map(taken, ("false", "['network.gpt_neox.layers.11']", "['*[02468]']", "true"))
    assert none > last > half > full > 0


def test_recomputing_blocks_leaves_room_for_larger_micro_batches() -> None:
    kept, recomputed = (
        chosen("model=llama-8b", "cluster=p5_8", f"strategy.activation_checkpointing={choice}")[0].data.batch_size
        for choice in ("false", "true")
    )
    assert recomputed > kept


def test_an_impossible_batch_is_refused() -> None:
    message = "global_batch_size=1000 sequences cannot be split over 512 ranks; the nearest that can are 512 and 1024"
    with pytest.raises(ValueError, match=re.escape(message)):
        chosen("model=gpt-100b", "cluster=p4d_64", "global_batch_size=1000")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cluster.precision=16-mixd", "does not support precision='16-mixd'; use one of "),
        ("strategy.reduce_dtype=float33", "reduce_dtype='float33' is not one of torch.float32, torch.bfloat16"),
        ("strategy.reduce_dtype=nn", "reduce_dtype='nn' is not one of "),
        ("strategy.activation_offload=maybe", "strategy.activation_offload=maybe is not one of true, false, auto"),
        ("cluster.network_rate_gbits_per_s=fast", "cluster.network_rate_gbits_per_s=fast must be a number"),
    ],
)
def test_a_value_that_an_option_does_not_have_is_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        chosen("model=gpt-10b", "cluster=p4d_8", override)


def test_a_partition_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="partition_size=3 does not divide world_size=4"):
        chosen("strategy.partition_size=3")


@pytest.mark.parametrize(
    "overrides", [[], ["cluster=p4d_2"], ["cluster=p4d_64", "model=gpt-100b"], ["cluster=p5_8", "global_batch_size=64"]]
)
def test_the_strategy_takes_what_was_chosen(overrides: list[str]) -> None:
    config, _ = chosen(*overrides)
    free = ("partition_size", "cache_parameters", "accumulate_gradients", "inter_node_prefetch")
    assert "auto" not in {config.strategy[name] for name in free}
    assert instantiate(config.strategy)


def test_caches_go_to_the_host_where_that_is_faster_and_the_strategy_does_the_same() -> None:
    config, table = chosen("model=gpt-100b", "cluster=p4d_64", "strategy.cache_offload=auto")
    assert config.strategy.cache_offload is True and config.strategy.cache_parameters == "node"
    assert 'caches and sums of nodes  on the host ("auto": as fast as any that fits)' in table
    assert "of the host per rank" in table
    assert instantiate(config.strategy)
    config, table = chosen("strategy.cache_offload=auto")
    assert config.strategy.cache_offload is False
    assert 'caches and sums of nodes  on the device ("auto": the rates of the cluster are unknown)' in table


def test_recomputation_is_chosen_with_the_rest() -> None:
    config, table = chosen("model=gpt2", "cluster=p4d_2", "strategy.activation_checkpointing=auto")
    assert config.strategy.activation_checkpointing is False
    assert '0% ("auto": as fast as any that fits)' in table
    config, table = chosen("strategy.activation_checkpointing=auto", "model.network.num_hidden_layers=2")
    assert config.strategy.activation_checkpointing is False
    assert '0% ("auto": the fewest with which the micro-batch fits)' in table
