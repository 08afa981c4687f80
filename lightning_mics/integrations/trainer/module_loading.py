"""``LightningModule.load_from_checkpoint`` on the directory of a sharded checkpoint.

Lightning opens what it is given as one file, and offers no hook for anything else. But its ``core.saving`` does so
through a function that it imports by the name ``pl_load`` and uses for nothing else. That one name is replaced, so that
a sharded directory arrives as the content of a full file, and all that follows (hyper-parameters, ``strict``, hooks,
devices) stays Lightning's own.
"""

from __future__ import annotations

import os
from functools import wraps
from typing import Any

_MARK = "_reads_directories_too"


def read_directories_too(saving: Any) -> None:
    """Let Lightning's reader of one file read sharded checkpoints as well.

    Args:
        saving: The module ``lightning.pytorch.core.saving``. Its ``pl_load`` is there in Lightning 2.0 to 2.6; without
            it, directories are rejected as they always were.
    """
    load = getattr(saving, "pl_load", None)
    if load is None or hasattr(load, _MARK):
        return

    @wraps(load)
    def load_either(path_or_url: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        if isinstance(path_or_url, str | os.PathLike):
            from lightning_mics.checkpoint.storage.folder import is_sharded  # when it is needed: it imports torch
            from lightning_mics.checkpoint.storage.path import storage_path
            from lightning_mics.checkpoint.whole_model import read_whole

            path = storage_path(path_or_url)
            if is_sharded(path):
                return read_whole(path, map_location=map_location, weights_only=weights_only is not False)
        return load(path_or_url, map_location=map_location, weights_only=weights_only)

    setattr(load_either, _MARK, True)
    saving.pl_load = load_either
