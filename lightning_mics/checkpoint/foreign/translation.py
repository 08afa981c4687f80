"""Metadata of checkpoints of other programs, with the names that this package gives to its own.

Shards hold bytes only; names are in the metadata. So a checkpoint with other names is read like one of this package's
once its metadata is renamed, without being copied.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from lightning_mics.checkpoint.content.layout import FullNames
from lightning_mics.checkpoint.dcp.second_names import OWN_KEYS
from lightning_mics.checkpoint.foreign.roles import FLAT_GROUPS, Path, Roles, roles_of
from lightning_mics.checkpoint.keys import MODEL_KEY, optimizer_key

OTHER = "other"  # of entries that are neither the model's nor an optimizer's

WRAPPERS = (
    "_orig_mod.",
    "_checkpoint_wrapped_module.",
    "_fsdp_wrapped_module.",
)  # names that modules around others add


@dataclass(frozen=True, kw_only=True)
class Translated:
    """The metadata of a checkpoint, with this package's names.

    Attributes:
        metadata: Metadata of all shards.
        names: Keys that a program has given the model and the optimizers; None if they say nothing.
        groups: Parameter groups of optimizers whose options are stored by parameter: the FQN of each group's one
            parameter, by key of the optimizer.
    """

    metadata: Metadata
    names: FullNames | None = None
    groups: dict[str, list[str]] = field(default_factory=dict)


def translated(metadata: Metadata, *, wanted: FullNames | None, first: int = 0) -> Translated:
    """Rename the entries of a checkpoint of another program.

    Args:
        metadata: Metadata as it is stored.
        wanted: Keys of the model and the optimizers in the state to load into, if it has any.
        first: Number of the first optimizer.

    Raises:
        ValueError: If it cannot be recognized which entries are the model's.
    """
    metadata = _without(metadata, _second_names(metadata))
    paths = {name: _path(name, metadata.planner_data or {}) for name in metadata.state_dict_metadata}
    tensors = [
        paths[name] for name, entry in metadata.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)
    ]
    roles = roles_of(paths.values(), tensors, wanted=wanted.model if wanted else None)
    renaming = _Renaming(roles, tensors, first)
    renamed = {name: renaming.path(path) for name, path in paths.items()}
    return Translated(metadata=_renamed(metadata, renamed), names=_names(roles, wanted), groups=renaming.groups)


def _names(roles: Roles, wanted: FullNames | None) -> FullNames | None:
    """The keys of the model and the optimizers; where there is one of a kind, another key means the same one."""
    names = roles.names
    if names is None or wanted is None:
        return names
    one = len(names.optimizers) == len(wanted.optimizers) == 1
    return FullNames(model=wanted.model, optimizers=wanted.optimizers if one else names.optimizers)


def own_entries(metadata: Metadata) -> Metadata:
    """The metadata of this package's own shards, without the second names that other programs read.

    Args:
        metadata: Metadata as it is stored.
    """
    paths = metadata.planner_data or {}
    return _without(metadata, {name for name in metadata.state_dict_metadata if not _is_own(_path(name, paths))})


def _second_names(metadata: Metadata) -> set[str]:
    """The names of entries that are stored at the place of an entry with one of this package's names."""
    paths, stored = metadata.planner_data or {}, metadata.storage_data or {}
    own = {name for name in metadata.state_dict_metadata if _is_own(_path(name, paths))}
    places = {(place.relative_path, place.offset) for index, place in stored.items() if index.fqn in own}
    return {
        index.fqn
        for index, place in stored.items()
        if index.fqn not in own and (place.relative_path, place.offset) in places
    }


def _without(metadata: Metadata, names: set[str]) -> Metadata:
    if not names:
        return metadata
    entries, paths = metadata.state_dict_metadata.items(), (metadata.planner_data or {}).items()
    return replace(
        metadata,
        state_dict_metadata={name: entry for name, entry in entries if name not in names},
        planner_data={name: path for name, path in paths if name not in names},
        storage_data={index: place for index, place in (metadata.storage_data or {}).items() if index.fqn not in names},
    )


def unwrapped(name: Any) -> Any:
    """An FQN without the parts that compilation, recomputation and torch's first FSDP put into it."""
    for part in WRAPPERS if isinstance(name, str) else ():
        name = name.replace(part, "")
    return name


def _path(name: str, paths: Mapping[str, Any]) -> Path:
    if name in paths:
        return tuple(paths[name])
    key, dot, rest = name.partition(".")  # tensors of entries have no paths, and in old versions of torch none had
    return (key, rest) if dot and OWN_KEYS.fullmatch(key) else (name,)


def _is_own(path: Path) -> bool:
    return OWN_KEYS.fullmatch(str(path[0])) is not None


def _inside(path: Path, outer: Path | None) -> bool:
    return outer is not None and path[: len(outer)] == outer and len(path) > len(outer)


class _Renaming:
    """The new path of each entry."""

    def __init__(self, roles: Roles, tensors: Collection[Path], first: int) -> None:
        depth = len(roles.model or ())
        self._roles, self._tensors, self._first = roles, frozenset(tensors), first
        self._parameters = {unwrapped(path[depth]) for path in tensors if _inside(path, roles.model)}
        self.groups: dict[str, list[str]] = {}

    def path(self, path: Path) -> Path:
        for number, optimizer in enumerate(self._roles.optimizers, self._first):
            if _inside(path, optimizer):
                return self._of_optimizer(optimizer_key(number), path[len(optimizer) :])
        if _inside(path, self._roles.model) and (self._roles.model or self._is_of_model(path)):
            inner = path[len(self._roles.model or ()) :]
            return (MODEL_KEY, unwrapped(inner[0]), *inner[1:])
        return path if _is_own(path) else (OTHER, *path)

    def _is_of_model(self, path: Path) -> bool:
        """Whether an entry whose key is on top, beside the FQNs of the model, is one of the model's."""
        return path in self._tensors or str(path[0]).endswith("_extra_state")

    def _of_optimizer(self, key: str, inner: Path) -> Path:
        first = str(inner[0])
        if first == "state" and len(inner) > 2:
            return (key, first, unwrapped(inner[1]), *inner[2:])
        if first.startswith(FLAT_GROUPS):
            name, option = self._divided(first.removeprefix(FLAT_GROUPS))
            groups = self.groups.setdefault(key, [])
            if name not in groups:
                groups.append(name)
            return (key, "param_groups", groups.index(name), option)
        if first.startswith("state."):
            name, slot = self._divided(first.removeprefix("state."))
            return (key, "state", name, slot, *inner[1:])
        return (key, *inner)

    def _divided(self, name: str) -> tuple[str, str]:
        """The FQN and what follows it: the longest FQN of the model that the name begins with."""
        name = unwrapped(name)
        end = len(name)
        while (end := name.rfind(".", 0, end)) > 0:
            if name[:end] in self._parameters:
                return name[:end], name[end + 1 :]
        parameter, _, rest = name.rpartition(".")
        return parameter, rest


def _renamed(metadata: Metadata, paths: Mapping[str, Path]) -> Metadata:
    names = {name: ".".join(map(str, path)) for name, path in paths.items()}
    stored = metadata.storage_data or {}
    return replace(
        metadata,
        state_dict_metadata={names[name]: entry for name, entry in metadata.state_dict_metadata.items()},
        planner_data={names[name]: path for name, path in paths.items()},
        storage_data={
            MetadataIndex(names[index.fqn], index.offset, index.index): place for index, place in stored.items()
        },
    )
