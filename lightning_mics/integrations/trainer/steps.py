"""Training and evaluation steps, run as the LightningModule's forward: the root's hooks of FSDP2 fire by that alone."""

from __future__ import annotations

from typing import Any

import torch


class StepsAsForward:
    """The part of a strategy for the Trainer that runs steps, and starts and ends evaluations.

    Methods take an untyped ``self``, whose attributes are those of Lightning's strategies.
    """

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.train_step_context():
            return self._run_as_forward("training_step", *args, **kwargs)

    def validation_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.val_step_context():
            return self._run_as_forward("validation_step", *args, **kwargs)

    def test_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.test_step_context():
            return self._run_as_forward("test_step", *args, **kwargs)

    def predict_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.predict_step_context():
            return self._run_as_forward("predict_step", *args, **kwargs)

    def _run_as_forward(self: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        module, grad_enabled = self.lightning_module, torch.is_grad_enabled()
        assert module is not None
        # what FSDP2 allocates in an inference mode (the user's own; Lightning's is off) could not be trained with
        with torch.inference_mode(False), torch.set_grad_enabled(grad_enabled):
            return self._forward_redirection(module, module, method, *args, **kwargs)

    def on_validation_start(self: Any) -> None:
        self._start_evaluation()

    def on_validation_end(self: Any) -> None:
        self._end_evaluation()

    def on_test_start(self: Any) -> None:
        self._start_evaluation()

    def on_test_end(self: Any) -> None:
        self._end_evaluation()

    def on_predict_start(self: Any) -> None:
        self._start_evaluation()

    def on_predict_end(self: Any) -> None:
        self._end_evaluation()

    def _start_evaluation(self: Any) -> None:
        """All batches of an evaluation share weights; callbacks may exchange them before it and after it.

        See [Note: When cached weights are dropped].
        """
        self._evaluation.enter_context(self._state().schedule.cached_weights())

    def _end_evaluation(self: Any) -> None:
        self._reshard_root()
        self._evaluation.close()
