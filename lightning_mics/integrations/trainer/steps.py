"""Training and evaluation steps run as the LightningModule's forward, because FSDP2's hooks on the root need one."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.strategies.strategy import _ForwardRedirection
from torch import Tensor
from typing_extensions import override

from lightning_mics._torch.fsdp import continue_forward
from lightning_mics._torch.units.use_errors import described_errors
from lightning_mics.sharding.modules.changes import reducing_when_read, shows_unsharded


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

    def backward(self: Any, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Run the backward, with hooks after it that see all gradients so far, also before the boundary.

        Args:
            closure_loss: Loss to begin at: [].
            optimizer: Optimizer that will step, for the hooks of the precision.
            args: Further arguments of the LightningModule's ``backward``.
            kwargs: Keyword arguments of it.
        """
        self.pre_backward(closure_loss)
        precision, module = self.precision_plugin, self.lightning_module
        closure_loss = precision.pre_backward(closure_loss, module)
        with described_errors():
            precision.backward(closure_loss, module, optimizer, *args, **kwargs)
        with reducing_when_read(self._state().schedule.window):
            loss: Tensor = precision.post_backward(closure_loss, module)
        self.post_backward(loss)
        return loss

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
            return self._run_as_forward("predict_step", *args, **kwargs)

    def _run_as_forward(self: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        module, grad_enabled = self.lightning_module, torch.is_grad_enabled()
        assert module is not None
        # tensors that FSDP2 allocates in inference mode (the user's; Lightning's is off) cannot be used in training
        with torch.inference_mode(False), torch.set_grad_enabled(grad_enabled), described_errors():
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
        self._state().groups.control.agree("ends an evaluation")
        self._evaluation.close()
