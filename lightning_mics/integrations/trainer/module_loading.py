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
