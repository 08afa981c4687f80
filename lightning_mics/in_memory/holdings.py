"""What the keepers of a job hold, and which step is whole."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_mics.in_memory.keeper.memory import Stamp

Key = tuple[str, int]  # kind and rank of a part


@dataclass(frozen=True)
class Holdings:
    """The parts on all nodes.

    Attributes:
        nodes: Nodes that hold a part, by step and part.
    """

    nodes: Mapping[Stamp, Mapping[Key, list[int]]]

    @classmethod
    def of(cls, lists: Sequence[Sequence[Mapping[str, Any]]]) -> Holdings:
        """From the answers of all keepers to ``list``, in the order of nodes."""
        nodes: dict[Stamp, dict[Key, list[int]]] = defaultdict(lambda: defaultdict(list))
        for node, held in enumerate(lists):
            for entry in held:
                stamp = Stamp(*map(int, entry["stamp"]))
                nodes[stamp][str(entry["kind"]), int(entry["rank"])].append(node)
        return cls({stamp: dict(parts) for stamp, parts in nodes.items()})

    @property
    def newest(self) -> Stamp | None:
        """The newest step of which all parts are there: of the last generation that has one."""
        return max((stamp for stamp in self.nodes if not self.missing(stamp)), default=None)

    @property
    def newest_in_part(self) -> Stamp | None:
        """The newest step of which any part is there."""
        return max(self.nodes, default=None)

    @property
    def fullest(self) -> Stamp | None:
        """The step of which the fewest parts are missing, the newest of those."""
        return max(self.nodes, key=lambda stamp: (-len(self.missing(stamp)), stamp), default=None)

    @property
    def next_generation(self) -> int:
        """Number for the next start of the job."""
        return 1 + max((stamp.generation for stamp in self.nodes), default=0)

    def missing(self, stamp: Stamp) -> list[Key]:
        """Parts of a step that no node has."""
        held = self.nodes.get(stamp, {})
        return [
            (kind, rank) for kind in ("private", "rows") for rank in range(stamp.world_size) if (kind, rank) not in held
        ]
