"""Training and evaluation steps run as the LightningModule's forward, because FSDP2's hooks on the root need one."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.hooks import ModelHooks
from lightning.pytorch.strategies.strategy import _ForwardRedirection
from typing_extensions import override

from lightning_mics._torch.fsdp import continue_forward
from lightning_mics.sharding.changes import shows_unsharded


class StepRedirection(_ForwardRedirection):
    """Runs a step inside the LightningModule's forward, where the step may call that forward itself."""

    @override
    def on_after_inner_forward(self, wrapper_module: Any, original_module: Any) -> None:
        if original_module.automatic_optimization:  # else its backwards have come already
            continue_forward(original_module)


class StepsAsForward:
    """Mixin of a Trainer's strategy that runs steps, and starts and ends evaluations.

    Methods take an untyped ``self``, which has the attributes of Lightning's strategies.
    """

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the LightningModule's ``training_step`` as a forward; arguments and result are its own."""
        with self.precision_plugin.train_step_context():
            output = self._run_as_forward("training_step", *args, **kwargs)
        self._shows_weights = shows_unsharded(self._root(), output)
        return output

    def validation_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the LightningModule's ``validation_step`` as a forward; arguments and result are its own."""
        with self.precision_plugin.val_step_context():
            return self._run_as_forward("validation_step", *args, **kwargs)

    def test_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the LightningModule's ``test_step`` as a forward; arguments and result are its own."""
        with self.precision_plugin.test_step_context():
            return self._run_as_forward("test_step", *args, **kwargs)

    def predict_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the LightningModule's ``predict_step`` as a forward; arguments and result are its own."""
        with self.precision_plugin.predict_step_context():
            predictions = self._run_as_forward("predict_step", *args, **kwargs)
        shows_unsharded(self._root(), predictions)  # results outlive the prediction
        return predictions

    def _run_as_forward(self: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        module, grad_enabled = self.lightning_module, torch.is_grad_enabled()
        assert module is not None
        # tensors that FSDP2 allocates in inference mode (the user's; Lightning's is off) cannot be used in training
        with torch.inference_mode(False), torch.set_grad_enabled(grad_enabled):
            return self._forward_redirection(module, module, method, *args, **kwargs)

    def on_validation_start(self: Any) -> None:
        """Cache weights for the evaluation that starts."""
        self._start_evaluation()

    def on_validation_end(self: Any) -> None:
        """Reshard the root and drop cached weights."""
        self._end_evaluation()

    def on_test_start(self: Any) -> None:
        """Cache weights for the evaluation that starts."""
        self._start_evaluation()

    def on_test_end(self: Any) -> None:
        """Reshard the root and drop cached weights."""
        self._end_evaluation()

    def on_predict_start(self: Any) -> None:
        """Cache weights for the evaluation that starts."""
        self._start_evaluation()

    def on_predict_end(self: Any) -> None:
        """Reshard the root and drop cached weights."""
        self._end_evaluation()

    def _start_evaluation(self: Any) -> None:
        """Share cached weights between all batches of an evaluation; callbacks may swap weights before and after it.

        See [Note: When cached weights are dropped].
        """
        self._evaluation.enter_context(self._state().schedule.cached_weights())

    def _end_evaluation(self: Any) -> None:
        self._reshard_root()
        self._evaluation.close()


def sees_each_gradient(trainer: Any) -> bool:
    """Whether a hook runs after each backward, ``on_after_backward``, which sees and may change all gradients so far.

    Then each micro-step reduces gradients completely, as if it were the boundary.

    Args:
        trainer: The Trainer, with its LightningModule and callbacks.
    """
    owners = [(trainer.lightning_module, ModelHooks), *((callback, pl.Callback) for callback in trainer.callbacks)]
    return any(
        "on_after_backward" in vars(owner) or type(owner).on_after_backward is not base.on_after_backward
        for owner, base in owners
    )
