"""Objects that were registered with Accelerate for checkpointing, and whose states may hold sharded tensors."""

from __future__ import annotations

from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from lightning_mics.checkpoint.content.entries import entries_of_all_ranks, place_whole


class WithShards:
    """An object whose sharded tensors are unsharded in its state, and sharded again when that is loaded.

    Accelerate writes the state that the main process has, and only that.

    Args:
        registered: Object with ``state_dict`` and ``load_state_dict``.
        mesh: Mesh of the job.
    """

    def __init__(self, registered: Any, mesh: DeviceMesh) -> None:
        self._registered = registered
        self._mesh = mesh

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_registered"], name)

    def state_dict(self) -> Any:
        """The state, with unsharded tensors on rank 0; every rank calls it."""
        state = self._registered.state_dict()
        if not isinstance(state, dict):
            return state
        entries = entries_of_all_ranks(state)
        return entries.put_whole(state, entries.whole(), places=True) if entries.found else state

    def load_state_dict(self, state: Any) -> Any:
        """Load a state that :meth:`state_dict` has returned, of any number of ranks."""
        if isinstance(state, dict):
            place_whole(state, lambda: self._mesh)
        return self._registered.load_state_dict(state)


def gather_shards_of(objects: list[Any], mesh: DeviceMesh) -> None:
    """Let objects save and load all rows of sharded tensors.

    Args:
        objects: The objects, replaced in the list by others that save and load them.
        mesh: Mesh of the job.
    """
    objects[:] = [known if isinstance(known, WithShards) else WithShards(known, mesh) for known in objects]
