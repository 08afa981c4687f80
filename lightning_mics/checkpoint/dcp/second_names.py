"""Second names of entries in a checkpoint's metadata, under which other programs look for them.

Lightning's ModelParallelStrategy reads the model under ``state_dict``, its FSDPStrategy and its tool for consolidation
under ``model``; Fabric reads what the user has saved under the user's keys. A second name costs no bytes of shards: it
points to those of the first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

from lightning_mics.checkpoint.keys import MODEL_KEY, optimizer_key

OWN_KEYS = re.compile(rf"{MODEL_KEY}|entries(\.\d+)?|(optimizer|rank)_\d+")  # of this package's entries

TRAINER_MODEL_KEY = "state_dict"


def second_keys(model: str, optimizers: Sequence[str]) -> dict[str, str]:
    """Keys to add for other programs, with this package's keys.

    Args:
        model: Key of the user for the model, or the Trainer's; none if empty.
        optimizers: Keys of the user for the optimizers.
    """
    keys = {model: MODEL_KEY, **{key: optimizer_key(number) for number, key in enumerate(optimizers)}}
    return {second: first for second, first in keys.items() if second and not OWN_KEYS.fullmatch(second)}


def add_second_names(metadata: Metadata, results: list[list[WriteResult]], keys: Mapping[str, str]) -> None:
    """Add names to metadata and to the places of what was written, in place.

    Args:
        metadata: Metadata of the checkpoint.
        results: Places of what each rank has written.
        keys: Keys of :func:`second_keys`.
    """
    paths = metadata.planner_data or {}
    for second, first in keys.items():
        names = {name: f"{second}{name[len(first) :]}" for name, path in paths.items() if path[0] == first}
        for name, other in names.items():
            metadata.state_dict_metadata[other] = metadata.state_dict_metadata[name]
            paths[other] = (second, *paths[name][1:])
        for written in results:
            written.extend(
                [
                    replace(each, index=MetadataIndex(names[each.index.fqn], each.index.offset, each.index.index))
                    for each in written
                    if each.index.fqn in names
                ]
            )
