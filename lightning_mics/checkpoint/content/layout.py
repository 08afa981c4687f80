"""The layout of a sharded checkpoint: what its tensors do not say of themselves, as an entry of plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_mics.checkpoint.content.containers import leaves, nested
from lightning_mics.checkpoint.content.placing import settled
from lightning_mics.checkpoint.content.state_record import StateRecord
from lightning_mics.checkpoint.keys import MODEL_KEY, optimizer_entries

LAYOUT_KEY = "mics_layout"


@dataclass(frozen=True, kw_only=True)
class FullNames:
    """The keys of the model and its optimizers in the state that a user of Fabric has saved.

    Attributes:
        model: Key of the model's state.
        optimizers: Keys of the optimizers' states, in the order of the optimizers.
        models: Keys of several models, which are one here: the FQNs of each begin with its key.
    """

    model: str
    optimizers: Sequence[str]
    models: Sequence[str] = ()

    def plain(self) -> dict[str, Any]:
        """The names as plain data."""
        return {"model": self.model, "optimizers": list(self.optimizers), "models": list(self.models)}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The layout of a checkpoint that is saved or loaded.

    Attributes:
        names: Keys of the user for the model and the optimizers; None if there are none.
        record: Containers and shardings of the states of optimizers and modules.
    """

    names: FullNames | None = None
    record: StateRecord = field(default_factory=StateRecord)

    def plain(self) -> dict[str, Any]:
        """The layout as an entry of a checkpoint."""
        return {"names": self.names.plain() if self.names else None, "record": self.record.plain()}

    @classmethod
    def taken_from(cls, meta: dict[str, Any]) -> Layout | None:
        """The layout in a checkpoint's entries, removed from them; None if it says nothing.

        Raises:
            ValueError: If it is not what was written.
        """
        plain: Any = meta.pop(LAYOUT_KEY, None)
        if not isinstance(plain, Mapping):
            return None
        try:
            names = plain.get("names")
            return cls(names=FullNames(**names) if names else None, record=StateRecord.of(plain["record"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"the entry {LAYOUT_KEY!r}: {error!r}") from None

    def describe(
        self, model_state: Mapping[str, Any], optimizer_states: Sequence[dict[str, Any]]
    ) -> dict[str, dict[str, Any]]:
        """The states to write, under their keys, as a sharded checkpoint can hold them; every rank calls it.

        Args:
            model_state: Tensors and extra states of modules by FQN.
            optimizer_states: States of optimizers by FQN.
        """
        shards = {name: value for name, value in model_state.items() if isinstance(value, Tensor)}
        model = {name: self._model_entry(value, name) for name, value in model_state.items()}
        optimizers = optimizer_entries(optimizer_states)
        described = {key: self.record.describe(state, key, shards) for key, state in optimizers.items()}
        return {MODEL_KEY: model, **{key: state for key, state in described.items() if state}}

    def _model_entry(self, value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            return settled(value)
        key = f"{MODEL_KEY}.{name}"
        simple = self.record.containers.simplify(value, key)
        if not isinstance(simple, dict | list):
            return simple
        values = {
            path: self.record.described(entry, ".".join(map(str, (key, *path))), None) for path, entry in leaves(simple)
        }
        return nested(values) if values else simple
