"""Fabric's marked methods: ``model.training_step(batch)`` runs as a forward, and so does ``mark_forward_method``.

Fabric sends such methods through the forward of the wrapper that a strategy puts around a model. FSDP2 has no wrapper,
so Fabric calls them directly, while the root's weights are sharded. For a strategy of ours it now sends them as well.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from lightning.fabric.wrappers import _FabricModule


def run_marked_methods_as_forwards(strategy: type) -> None:
    """Patch Fabric's wrapper of models, with an effect for one class of strategies only.

    Args:
        strategy: Class of strategies.
    """
    of_fabric = _FabricModule.__getattr__
    served: tuple[type, ...] = getattr(of_fabric, "served", ())
    if strategy in served:
        return

    @wraps(of_fabric)
    def get(model: Any, name: str) -> Any:
        own = vars(model)
        if name in own.get("_forward_methods", ()) and isinstance(own.get("_strategy"), strategy):
            return model._redirection_through_forward(name)
        return of_fabric(model, name)

    vars(get)["served"] = (*served, strategy)
    _FabricModule.__getattr__ = get  # type: ignore[method-assign]
