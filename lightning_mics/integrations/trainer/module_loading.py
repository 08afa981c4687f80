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

from lightning.pytorch.core import saving

from lightning_mics.checkpoint.storage.folder import is_sharded
from lightning_mics.checkpoint.storage.path import storage_path
from lightning_mics.checkpoint.whole_model import read_whole


def read_directories_too(load: Any) -> Any:
    """``load``, Lightning's reader of one file, which from now on reads sharded checkpoints as well."""

    @wraps(load)
    def load_either(path_or_url: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        if isinstance(path_or_url, str | os.PathLike) and is_sharded(storage_path(path_or_url)):
            return read_whole(
                storage_path(path_or_url), map_location=map_location, weights_only=weights_only is not False
            )
        return load(path_or_url, map_location=map_location, weights_only=weights_only)

    return load_either


if hasattr(saving, "pl_load"):  # as in Lightning 2.0 to 2.6; without it, directories are refused as they always were
    saving.pl_load = read_directories_too(saving.pl_load)
