"""``LightningModule.load_from_checkpoint`` on the directory of a sharded checkpoint.

Lightning opens the path as one file, and offers no hook for directories. Its ``core.saving`` opens files through a
function that it imports as ``pl_load`` and uses only for that. This name is patched, so that a sharded directory is
returned as the content of a full file. Everything after it (hyper-parameters, ``strict``, hooks, devices) is code of
Lightning.
"""

from __future__ import annotations

import os
from functools import wraps
from typing import Any

_MARK = "_reads_directories"


def read_directories_too(saving: Any) -> None:
    """Patch Lightning's function that reads a file to read sharded checkpoints as well.

    Args:
        saving: The module ``lightning.pytorch.core.saving``. Lightning 2.0 to 2.6 has ``pl_load`` in it; without
            that name nothing is patched, and Lightning rejects directories.
    """
    load = getattr(saving, "pl_load", None)
    if load is None or hasattr(load, _MARK):
        return

    @wraps(load)
    def load_either(path_or_url: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        if isinstance(path_or_url, str | os.PathLike):
            from lightning_mics.checkpoint.foreign.folders import holds_shards  # imported late: it imports torch
            from lightning_mics.checkpoint.storage.path import storage_path
            from lightning_mics.checkpoint.whole_model import read_whole

            path = storage_path(path_or_url)
            if holds_shards(path):
                return read_whole(path, map_location=map_location, weights_only=weights_only is not False)
        return load(path_or_url, map_location=map_location, weights_only=weights_only)

    setattr(load_either, _MARK, True)
    saving.pl_load = load_either
    _explain_missing_weights(saving)


def _explain_missing_weights(saving: Any) -> None:
    """Say what a checkpoint of what trains alone lacks, where the module is loaded strictly.

    Args:
        saving: The module ``lightning.pytorch.core.saving``, with its function ``_load_state``.
    """
    load_state = getattr(saving, "_load_state", None)
    if load_state is None:
        return

    @wraps(load_state)
    def load_state_or_explain(cls: Any, checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return load_state(cls, checkpoint, *args, **kwargs)
        except RuntimeError as error:
            from lightning_mics.checkpoint.content.trained_only import HOW_TO_GIVE, left_out

            said = left_out(checkpoint)
            if not said:
                raise
            raise RuntimeError(
                f"the checkpoint holds only what trains: it was saved with save_frozen=False, without {said}. If "
                f"{cls.__name__} has them when it is built, call load_from_checkpoint(..., strict=False); else "
                f"{HOW_TO_GIVE}"
            ) from error

    saving._load_state = load_state_or_explain
