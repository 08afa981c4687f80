"""``certify`` finds what training under a schedule changes, says where, and finds nothing where nothing is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_mics import CertifyReport, MiCSStrategy, certify
from lightning_mics.certification.command import main
from lightning_mics.certification.report import CannotCertifyError, NotCertifiedError
from tests.certification import programs
from tests.support.campaign import campaign

OVER_NODES = {"partition_size": 4, "cache_parameters": "node", "accumulate_gradients": "node"}
IN_NODES = {"partition_size": 2, "cache_parameters": "rank", "accumulate_gradients": "rank"}


def certified(module: Callable[[], nn.Module], options: dict[str, Any] = OVER_NODES, **more: Any) -> CertifyReport:
    strategy = MiCSStrategy(**options)
    return certify(module, programs.batches, strategy=strategy, shape=(2, 2), job_shape=(2, 2), **more)


RIGHT = {
    "an ordinary module, over nodes": (programs.Regression, OVER_NODES, "one process"),
    "buffers of ranks' own data": (programs.Normalized, OVER_NODES, "DistributedDataParallel on 4 ranks"),
    "two optimizers by hand, in nodes": (programs.TwoOptimizers, IN_NODES, "DistributedDataParallel on 4 ranks"),
}
RIGHT_IN_CAMPAIGN = {
    "a layer that no loss uses": (programs.NeverUses, OVER_NODES, "one process"),
    "an ordinary module, in nodes": (programs.Regression, IN_NODES, "one process"),
    "a plain module, in mixed precision": (programs.ForwardReturnsLoss, OVER_NODES, "one process"),
}


@pytest.mark.parametrize("case", [*RIGHT, *map(campaign, RIGHT_IN_CAMPAIGN)])
def test_right_modules_are_certified_and_everything_is_compared(case: str, tmp_path: Path) -> None:
    module, options, reference = (RIGHT | RIGHT_IN_CAMPAIGN)[case]
    mixed = {"precision": "bf16-mixed"} if "mixed" in case else {}
    report = certified(module, options, **mixed)
    report.raise_if_wrong()
    assert ("the job, bf16-mixed" in {row.run for row in report.rows}) == bool(mixed)
    assert report.reference.startswith(reference)
    compared = {row.what for row in report.rows}
    expected = {"initial weights", "losses", "gradients", "weights", "optimizer states", "hyperparameters"}
    expected |= {"loaded bits", "replicas", "optimizer steps"}
    assert compared >= expected
    if module is not programs.TwoOptimizers:
        assert compared >= {"clipped gradients", "evaluation"}
    assert any(row.worst.relative > 0 for row in report.rows)  # sums have another order: something was compared
    path = tmp_path / "report.json"
    report.write(path)
    assert json.loads(path.read_text())["ok"] is True


WRONG = {  # module, what is wrong first, and a word of the likely reason
    programs.ForgetsWhenLoading: ("loaded bits", "a hook that changes what is saved or loaded"),
}
WRONG_IN_CAMPAIGN = {
    programs.LooksAtShards: ("weights", "looks at whole tensors"),
    programs.StartsByRank: ("initial weights", "depend on the rank"),
    programs.MultipliesSamples: ("losses", "the forward itself differs"),  # the limit in docs/what-works.md
}


@pytest.mark.parametrize("module", [*WRONG, *map(campaign, WRONG_IN_CAMPAIGN)])
def test_modules_whose_training_changes_are_found_with_the_reason(module: Any) -> None:
    what, reason = (WRONG | WRONG_IN_CAMPAIGN)[module]
    report = certified(module)
    assert not report.ok
    assert what in {row.what for row in report.rows if not row.ok}
    assert any(reason in each for each in report.reasons), report.reasons
    with pytest.raises(NotCertifiedError, match="is NOT certified"):
        report.raise_if_wrong()


@pytest.mark.parametrize(
    "module", [programs.CountsBatches, *map(campaign, (programs.DrawsByRank, programs.ScalesGradients))]
)
def test_what_depends_on_the_rank_by_itself_is_compared_with_replicas_and_said(module: Any) -> None:
    report = certified(module)
    report.raise_if_wrong()
    assert report.reference == "DistributedDataParallel on 4 ranks, as one process trains otherwise"
    assert any("depends on the rank, or on how many micro-batches" in note for note in report.notes)


def test_ranks_that_differ_are_an_error_of_the_report_with_its_reason() -> None:
    report = certified(programs.OtherOrder)
    assert "ranks take different ways" in report.failures["the job"]
    assert "allow_unused=True" in str(report)
    assert "RanksDifferError" in report.traces["the job"]


def test_a_rank_whose_process_dies_is_named_after_a_second_try() -> None:
    report = certified(programs.Dies)
    assert report.failures["the job"] == "the process of rank 1 has died"
    assert any("a process died, so it was run again" in note for note in report.notes)


# -- what cannot be certified ------------------------------------------------------------------------------------------


def test_a_module_that_fails_by_itself_is_no_fault_of_the_schedule() -> None:
    with pytest.raises(CannotCertifyError, match="a loss that is not a number, by itself"):
        certified(programs.NotANumber)


def test_a_number_of_ranks_to_resume_that_does_not_divide_a_step_is_rejected() -> None:
    with pytest.raises(ValueError, match="resume_ranks=3 does not divide the 8 micro-batches of a step"):
        certified(programs.Regression, resume_ranks=3)


def test_a_module_that_trains_nothing_cannot_be_certified() -> None:
    with pytest.raises(CannotCertifyError, match="nothing is trained: no optimizer of TrainsNothing makes a step"):
        certified(programs.TrainsNothing)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"accumulate": 0}, "accumulate=0 must be at least 1"),
        ({"precision": "fp7"}, "precision='fp7' is not one of '32-true'"),
    ],
)
def test_values_that_no_training_has_are_rejected_at_once(more: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        certified(programs.Regression, **more)


@pytest.mark.parametrize("batches", [[], 3, list])
def test_batches_must_be_a_list(batches: Any) -> None:
    with pytest.raises(TypeError, match="batches must be a list of micro-batches"):
        certify(programs.Regression, batches)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_says_by_its_status_whether_a_module_is_certified(tmp_path: Path, capsys: Any) -> None:
    here = "tests.certification.programs"
    arguments = ["--batches", f"{here}:batches", "--shape", "2x2", "-o", "partition_size=16"]
    path = tmp_path / "report.json"
    assert main([f"{here}:OtherOrder", *arguments, "--json", str(path)]) == 1
    assert "is NOT certified" in capsys.readouterr().out
    assert json.loads(path.read_text())["ok"] is False
    assert main([f"{here}:NotANumber", *arguments]) == 2
    assert main([f"{here}:Nothing", *arguments]) == 2
    assert main([here, *arguments]) == 2
    assert main([f"{here}:Regression", *arguments[:-1], "partition_sise=2"]) == 2
    said = capsys.readouterr().err
    for words in ("not a number", "has no attribute 'Nothing'", "names no object", "did you mean 'partition_size'?"):
        assert words in said


# -- models of transformers --------------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


def _model(name: str) -> nn.Module:
    import transformers as hf

    makers: dict[str, Callable[[], nn.Module]] = {
        "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=99, n_embd=32, n_layer=6, n_head=4)),
        "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES)),
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=2)),
        "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4)),
    }
    return makers[name]()


@pytest.mark.parametrize("name", [*map(campaign, ("gpt2", "bert", "llama", "mixtral"))])
def test_models_of_transformers_are_shrunk_and_certified(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(5, 99, (2, 12), generator=generator) for _ in range(8)]
    batches = [{"input_ids": each, "labels": each} for each in tokens]
    strategy = MiCSStrategy(partition_size=16)
    report = certify(lambda: _model(name), batches, strategy=strategy, shape=(2, 2), accumulate=1)
    report.raise_if_wrong()
    assert any("6 -> 2" in note for note in report.notes)
    assert any("float32, as float64 fails" in note for note in report.notes) == (name == "mixtral")
