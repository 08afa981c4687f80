"""The origin of a checkpoint, as plain data inside it: the topology of the job, what "auto" stood for, and the network
if it is one of ``transformers``.

A network of ``transformers`` is recognized by its attributes, so nothing here imports ``transformers``.
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
from lightning_mics.checkpoint.content.trained_only import TRAINED_ONLY_KEY
from lightning_mics.topology import Topology

TOPOLOGY_KEY = "mics_topology"
CHOICE_KEY = "mics_choice"
NETWORK_KEY = "mics_network"
ORIGIN_KEYS = (TOPOLOGY_KEY, CHOICE_KEY, NETWORK_KEY, TRAINED_ONLY_KEY)


@dataclass(frozen=True, kw_only=True)
class Network:
    """The facts about a network that ``from_pretrained`` needs beside the weights.

    Attributes:
        prefix: Prefix of the network's FQNs inside the saved model, such as ``"network."``.
        architecture: Name of the network's class.
        config: Configuration of the network, as JSON.
        generation_config: Configuration of text generation, as JSON, or None.
        left_out: FQNs, without the prefix, of tensors that are tied to another name or that the network does not save.
        name_or_path: Folder or hub name that the network was loaded from, or "".
    """

    prefix: str
    architecture: str
    config: str
    generation_config: str | None
    left_out: list[str]
    name_or_path: str


def origin(model: nn.Module, topology: Topology, chosen: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Entries to add to a checkpoint, of strings, numbers, lists and dicts.

    Args:
        model: The model that is saved.
        topology: Topology of the job.
        chosen: Values that were chosen for options of sharding, by name; None if none were.
    """
    network = describe_network(model)
    return {
        TOPOLOGY_KEY: asdict(topology),
        **({CHOICE_KEY: dict(chosen)} if chosen else {}),
        **({NETWORK_KEY: asdict(network)} if network else {}),
    }


def describe_network(model: nn.Module) -> Network | None:
    """Describe the network of ``transformers`` that ``model`` is or contains; None if there is none, or several."""
    found = list(_networks(model))
    if len(found) != 1:
        return None
    ((name, network),) = found
    try:
        return _describe(name, network)
    except (TypeError, ValueError, AttributeError) as error:  # saving matters more than the description
        warnings.warn(
            f"the configuration of {type(network).__name__} cannot be saved, so an export will need --config: "
            f"{error!r}",
            stacklevel=2,
        )
        return None


def saved_topology(meta: Mapping[str, Any]) -> Topology | None:
    """The topology of the job that wrote a checkpoint, from the checkpoint's ``meta``; None if it is not recorded."""
    try:
        return Topology(**meta[TOPOLOGY_KEY])
    except (KeyError, TypeError, ValueError):
        return None


def saved_choice(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The values that were chosen for options of sharding, by name, from a checkpoint's ``meta``; empty if none are."""
    choice = meta.get(CHOICE_KEY)
    return dict(choice) if isinstance(choice, Mapping) else {}


def saved_network(meta: Mapping[str, Any]) -> Network | None:
    """The description of the network in a checkpoint, from its ``meta``; None if it is missing or invalid."""
    try:
        network = Network(**meta[NETWORK_KEY])
        json.loads(network.config)["model_type"]  # may be anything: the file may come from anywhere
        texts = (network.prefix, network.architecture, network.name_or_path, *network.left_out)
        return network if all(isinstance(text, str) for text in texts) else None
    except (KeyError, TypeError, ValueError):
        return None


def _networks(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The outermost networks of ``transformers`` in ``module``, with their FQNs."""
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
    """The FQNs of tied parameters, without the one that ``transformers`` saves each by."""
    tied_to_others = getattr(network, "all_tied_weights_keys", None) or {}
    names_of: dict[int, list[str]] = {}  # by parameter
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name.replace("_orig_mod.", ""))
    for names in names_of.values():
        kept = next((name for name in names if name not in tied_to_others), names[0])
        yield from (name for name in names if name != kept)
