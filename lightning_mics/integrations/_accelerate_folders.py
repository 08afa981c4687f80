"""Accelerate's own ``save_state`` and ``load_state``: folders are checked first, gradient scalers count no steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any


def checked_first(load: Callable[..., Any], *, of: type[Any]) -> Callable[..., Any]:
    """Accelerate's function that loads a model, with a check of the folder before it.

    Args:
        load: The function.
        of: Class of the plugins whose folders are checked.
    """

    @wraps(load)
    def load_checked(plugin: Any, accelerator: Any, model: Any, folder: Any, *args: Any, **options: Any) -> Any:
        if isinstance(plugin, of) and options.get("use_dcp", True):
            check_is_accelerates(folder, sharded=plugin.state_dict_type.name.startswith("SHARDED"))
        return load(plugin, accelerator, model, folder, *args, **options)

    return load_checked


def unscaled(function: Callable[..., Any], *, of: type[Any]) -> Callable[..., Any]:
    """Accelerate's function that saves or loads the states of an optimizer, which no gradient scaler takes for a step.

    torch initializes states by a step. Through Accelerate's scaler it would count as a good step, after which the scale
    grows earlier; and it would raise an error before the first backward, which makes the scale.

    Args:
        function: The function.
        of: Class of the plugins with an effect.
    """

    @wraps(function)
    def without_scaler(plugin: Any, accelerator: Any, optimizer: Any, *args: Any, **options: Any) -> Any:
        if not isinstance(plugin, of) or getattr(optimizer, "scaler", None) is None:
            return function(plugin, accelerator, optimizer, *args, **options)
        scaler, optimizer.scaler = optimizer.scaler, None
        try:
            return function(plugin, accelerator, optimizer, *args, **options)
        finally:
            optimizer.scaler = scaler

    return without_scaler


def check_is_accelerates(folder: str | Path, *, sharded: bool) -> None:
    """Check that ``Accelerator.save_state`` has written a folder, with the kind of files that will be read.

    Args:
        folder: Folder to load.
        sharded: Whether shards are read, as with ``state_dict_type="sharded"``; otherwise one file.

    Raises:
        ValueError: If it has other files.
    """
    path = Path(folder)
    found = {True: (path / "pytorch_model_fsdp_0").is_dir(), False: (path / "pytorch_model_fsdp.bin").is_file()}
    if found[sharded]:
        return
    if found[not sharded]:
        kind, other = ("sharded", "full") if sharded else ("full", "sharded")
        raise ValueError(
            f'{folder} was saved with state_dict_type="{other}", and this plugin has "{kind}": pass '
            f'MiCSPlugin(state_dict_type="{other}"), or load model and optimizers with '
            "accelerator.state.fsdp_plugin.load_checkpoint(accelerator, folder)"
        )
    raise ValueError(
        f"{folder} was not written by accelerator.save_state with FSDP: load model and optimizers of any other "
        "checkpoint with accelerator.state.fsdp_plugin.load_checkpoint(accelerator, folder)"
    )
