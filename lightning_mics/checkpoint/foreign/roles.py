"""The part that each entry of a checkpoint plays, by its path: of the model, of an optimizer, or something else.

Programs choose the keys under which DCP saves a state. An optimizer is recognized by its ``param_groups``, nested or
flattened; the model by its key, or by being the only other thing with tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from lightning_mics.checkpoint.content.layout import FullNames

Path = tuple[object, ...]

MODEL_KEYS = ("model", "state_dict", "model_state_dict", "module", "network", "net")

FLAT_GROUPS = "param_groups."  # in keys of `flatten_optimizer_state_dict=True`: then the FQN and the option


@dataclass(frozen=True, kw_only=True)
class Roles:
    """The paths of the model and the optimizers.

    Attributes:
        model: Path of the model's state; empty if its FQNs are keys of the checkpoint; None if there is no model.
        optimizers: Paths of the optimizers' states, in order.
    """

    model: Path | None
    optimizers: list[Path]

    @property
    def names(self) -> FullNames | None:
        """The keys of the model and the optimizers, as a program has chosen them."""
        if not self.model:
            return None
        return FullNames(model=str(self.model[-1]), optimizers=[str(path[-1]) for path in self.optimizers])


def roles_of(paths: Iterable[Path], tensors: Iterable[Path], *, wanted: str | None) -> Roles:
    """Recognize the parts of a checkpoint.

    Args:
        paths: Paths of all entries.
        tensors: Paths of those that are tensors.
        wanted: Key of the model in the state to load into, if it has one.

    Raises:
        ValueError: If several entries could be the model.
    """
    optimizers = sorted({path for each in paths if (path := _optimizer(each)) is not None}, key=_in_order)
    rest = [path for path in tensors if not any(path[: len(optimizer)] == optimizer for optimizer in optimizers)]
    around = {path[:-1] for path in optimizers if path[:-1]}
    prefix = min(around, key=len) if around else ()  # as in {"app": {"model": ..., "optim": ...}}
    inside = [path for path in rest if path[: len(prefix)] == prefix]
    model = _model(inside, prefix, wanted) if inside else _model(rest, (), wanted)
    return Roles(model=model, optimizers=optimizers)


def _optimizer(path: Path) -> Path | None:
    """The path of the optimizer that an entry belongs to, if the entry is one of its options."""
    for depth, key in enumerate(path):
        if depth and (key == "param_groups" or (isinstance(key, str) and key.startswith(FLAT_GROUPS))):
            return path[:depth]
    return None


def _in_order(path: Path) -> tuple[object, ...]:
    """Numbers in keys count as numbers: optimizer_10 comes after optimizer_9."""
    return tuple((int(part) if part.isdigit() else -1, part) for key in path for part in re.split(r"(\d+)", str(key)))


def _model(tensors: list[Path], prefix: Path, wanted: str | None) -> Path | None:
    depth = len(prefix)
    inside = _grouped((path for path in tensors if len(path) > depth + 1), depth)
    for known in (wanted, *MODEL_KEYS):
        if known in inside:
            return (*prefix, known)
    for key, of_key in inside.items():  # a wrapper that holds no optimizer
        deeper = _grouped((path for path in of_key if len(path) > depth + 2), depth + 1)
        found = [model for model in MODEL_KEYS if model in deeper]
        if found:
            return (*prefix, key, found[0])
    if any(len(path) == depth + 1 for path in tensors):
        return prefix
    if len(inside) > 1:
        raise ValueError(
            f"it holds tensors under {_quoted(inside)}, and no key says which are the model's; save it under one "
            f"of {_quoted(MODEL_KEYS)}, or load it with fabric.load and the key of the model in the state"
        )
    return (*prefix, next(iter(inside))) if inside else None


def _quoted(keys: Iterable[object]) -> str:
    return ", ".join(repr(str(key)) for key in keys)


def _grouped(paths: Iterable[Path], depth: int) -> dict[object, list[Path]]:
    groups: dict[object, list[Path]] = {}
    for path in paths:
        groups.setdefault(path[depth], []).append(path)
    return groups
