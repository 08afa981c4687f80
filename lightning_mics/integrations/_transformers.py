"""The Trainer of transformers saves models of a ``MiCSPlugin`` whose state dict is sharded, too."""

from __future__ import annotations

import os
from functools import wraps
from typing import Any

from torch.distributed.fsdp import StateDictType

from lightning_mics.integrations._after_import import AfterImport


def save_sharded_models(plugin_class: type) -> None:
    """Patch ``Trainer.save_model`` of transformers, now or when it is imported.

    With a sharded state dict it would write nothing, without a word. Inside a checkpoint the shards that follow are
    enough; but the folder must exist before ranks ask for it, as they do to find the best checkpoint.

    Args:
        plugin_class: Class of the plugins whose models are saved; for others nothing changes.
    """

    def patch(trainers: Any) -> None:
        trainers.Trainer.save_model = _patched(trainers.Trainer.save_model, plugin_class)

    AfterImport({"transformers.trainer": patch}).start()


def _patched(save_model: Any, plugin_class: type) -> Any:
    @wraps(save_model)
    def save_either(trainer: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
        plugin: Any = getattr(trainer.accelerator.state, "fsdp_plugin", None)
        is_ours = isinstance(plugin, plugin_class)
        if not is_ours or plugin.state_dict_type == StateDictType.FULL_STATE_DICT:
            save_model(trainer, output_dir, _internal_call)
        elif _internal_call and output_dir is not None and not trainer.args.push_to_hub:
            if trainer.args.should_save:
                os.makedirs(output_dir, exist_ok=True)
        else:
            sharded_type, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
            try:
                save_model(trainer, output_dir, _internal_call)
            finally:
                plugin.state_dict_type = sharded_type

    return save_either
