"""Where a checkpoint comes from, as plain data inside it: the topology of the job, and the network if it is one of
``transformers``.

A network is known by what it offers, its configuration and its names, so nothing here imports ``transformers``.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from lightning_mics._torch.fsdp import OptimizedModule
from lightning_mics.topology import Topology

TOPOLOGY_KEY = "mics_topology"


NETWORK_KEY = "mics_network"


@dataclass(frozen=True, kw_only=True)
class Network:
    """What ``from_pretrained`` needs to know of a network beside its weights.

    Attributes:
        prefix: What the network's names begin with inside the model that was saved, such as ``"network."``.
        architecture: Its class.
        config: Its configuration, as JSON.
        generation_config: How it generates text, as JSON, or None.
        left_out: Names, without the prefix, that are another name's tensor or that the network does not save.
        name_or_path: Where it was loaded from, or "".
    """

    prefix: str
    architecture: str
    config: str
    generation_config: str | None
    left_out: list[str]
    name_or_path: str


def origin(model: nn.Module, topology: Topology) -> dict[str, Any]:
    """What to add to a checkpoint of ``model``: entries of strings, integers, lists and dicts."""
    network = describe_network(model)
    return {TOPOLOGY_KEY: asdict(topology), **({NETWORK_KEY: asdict(network)} if network else {})}


def describe_network(model: nn.Module) -> Network | None:
    """The network of ``transformers`` in ``model``, or that is ``model``; None if there is none, or more than one."""
    found = list(_networks(model))
    if len(found) != 1:
        return None
    ((name, network),) = found
    try:
        return _describe(name, network)
    except (TypeError, ValueError, AttributeError) as error:  # a checkpoint is worth more than what it says of itself
        warnings.warn(
            f"the checkpoint will not say how {type(network).__name__} is configured, so exporting it needs --config: "
            f"{error!r}",
            stacklevel=2,
        )
        return None


def saved_topology(meta: Mapping[str, Any]) -> Topology | None:
    """The topology of the job that wrote a checkpoint, if the checkpoint says so."""
    try:
        return Topology(**meta[TOPOLOGY_KEY])
    except (KeyError, TypeError, ValueError):
        return None


def saved_network(meta: Mapping[str, Any]) -> Network | None:
    """The network in a checkpoint, if the checkpoint says so."""
    try:
        network = Network(**meta[NETWORK_KEY])
        json.loads(network.config)["model_type"]  # what whoever has written it may have got wrong
        texts = (network.prefix, network.architecture, network.name_or_path, *network.left_out)
        return network if all(isinstance(text, str) for text in texts) else None
    except (KeyError, TypeError, ValueError):
        return None


def _networks(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The outermost ones, by name."""
    if not isinstance(module, OptimizedModule) and _is_network(module):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _networks(child, f"{name}.{child_name}".lstrip("."))


def _is_network(module: nn.Module) -> bool:
    config = getattr(module, "config", None)
    return hasattr(module, "save_pretrained") and hasattr(config, "model_type") and hasattr(config, "to_json_string")


def _describe(name: str, network: Any) -> Network:
    generation = getattr(network, "generation_config", None)
    return Network(
        prefix=f"{name}.".replace("_orig_mod.", "") if name else "",
        architecture=next(cls.__name__ for cls in type(network).__mro__ if not issubclass(cls, FSDPModule)),
        config=network.config.to_json_string(),
        generation_config=generation.to_json_string() if generation is not None else None,
        left_out=sorted({*_second_names(network), *(getattr(network, "_keys_to_ignore_on_save", None) or ())}),
        name_or_path=str(getattr(network.config, "name_or_path", "") or ""),
    )


def _second_names(network: nn.Module) -> Iterator[str]:
    """Of tied parameters all names but the one that ``transformers`` saves them by."""
    tied_to_others = getattr(network, "all_tied_weights_keys", None) or {}
    names_of: dict[int, list[str]] = {}  # by parameter
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name.replace("_orig_mod.", ""))
    for names in names_of.values():
        kept = next((name for name in names if name not in tied_to_others), names[0])
        yield from (name for name in names if name != kept)
