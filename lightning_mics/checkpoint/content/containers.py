"""Nested containers of values, as sharded checkpoints can describe them: lists, and dicts whose keys are strings.

Other keys and tuples are recorded, and come back when the values are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class ContainerRecord:
    """The containers, by dotted name, that are neither lists nor dicts of strings.

    Attributes:
        tuples: Names of tuples.
        keys: The keys of dicts by their spelling, by the name of the dict.
    """

    tuples: list[str] = field(default_factory=list)
    keys: dict[str, dict[str, Any]] = field(default_factory=dict)

    def simplify(self, value: Any, name: str) -> Any:
        """Turn tuples with tensors into lists, and keys into strings; note both.

        Args:
            value: Nested containers.
            name: Dotted name of the value.
        """
        if isinstance(value, Mapping):
            others = {str(key): key for key in value if not isinstance(key, str)}
            if others:
                self.keys[name] = others
            return {str(key): self.simplify(entry, f"{name}.{key}") for key, entry in value.items()}
        if isinstance(value, list | tuple) and holds_tensors(value):
            if isinstance(value, tuple):
                self.tuples.append(name)
            return [self.simplify(entry, f"{name}.{index}") for index, entry in enumerate(value)]
        return value

    def restore(self, value: Any, name: str) -> Any:
        """The containers that :meth:`simplify` was given, for those that it has returned.

        Args:
            value: Nested lists and dicts.
            name: Dotted name of the value.
        """
        if isinstance(value, dict):
            keys = self.keys.get(name, {})
            return {keys.get(key, key): self.restore(entry, f"{name}.{key}") for key, entry in value.items()}
        if isinstance(value, list) and value:
            entries = [self.restore(entry, f"{name}.{index}") for index, entry in enumerate(value)]
            return tuple(entries) if name in self.tuples else entries
        return value


def holds_tensors(value: Any) -> bool:
    """Whether a tensor is in ``value``, at any depth of lists, tuples and dicts."""
    if isinstance(value, Mapping):
        return any(map(holds_tensors, value.values()))
    if isinstance(value, list | tuple):
        return any(map(holds_tensors, value))
    return isinstance(value, Tensor)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The values in nested containers with their paths, as DCP divides them: lists without tensors are one value.

    Args:
        value: Nested lists and dicts.
        path: Path of ``value`` itself.
    """
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from leaves(entry, (*path, key))
    elif isinstance(value, list) and (holds_tensors(value) or any(isinstance(entry, Mapping) for entry in value)):
        for index, entry in enumerate(value):
            yield from leaves(entry, (*path, index))
    else:
        yield path, value


def nested(values: Mapping[tuple[Any, ...], Any]) -> Any:
    """Build nested containers from values by path; numbers in a path are positions in a list."""
    if () in values:
        return values[()]
    parts: dict[Any, dict[tuple[Any, ...], Any]] = {}
    for path, value in values.items():
        parts.setdefault(path[0], {})[path[1:]] = value
    if parts and all(isinstance(key, int) for key in parts):
        return [nested(parts[index]) for index in sorted(parts)]
    return {key: nested(of_key) for key, of_key in parts.items()}


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same nested dicts, lists and tuples with ``change`` applied to everything else.

    Args:
        value: Nested containers.
        change: Function of one value.
    """
    if isinstance(value, Mapping):
        return {key: mapped(entry, change) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(mapped(entry, change) for entry in value)
    return change(value)
