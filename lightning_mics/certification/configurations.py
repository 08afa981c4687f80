"""Smaller configurations of models of ``transformers``: fewer layers of each kind, and narrower ones."""

from __future__ import annotations

import copy
import math
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

FEW_KINDS = 4  # entries of a list with an entry for each layer that name its kind
LAYERS = re.compile(  # numbers of layers, or lists of them with an entry for each stage
    r"(\w+_)?num_hidden_layers|(num_|[nlrx]_)layers|n_layer|(\w+_)?depths|depth|block_sizes|"
    r"(?!\w*sparse)(\w+_)?(encoder|decoder)_(num_)?(layers|depth)"
)
BY_LAYER = re.compile(r"(?!conv|image|id2|rope|architectures|\w*token)\w+")  # lists with an entry for each layer
INDICES = re.compile(r"(?!out_|\w*token)\w*(layers|_ids|_idxs?|_indices|_indexes)")  # lists of positions of layers
HEADS = re.compile(r"(\w+_)?(num_attention_heads|attention_heads|num_heads|n_heads?|num_query_heads)")
KEY_HEADS = re.compile(r"(\w+_)?(num_key_value_heads|num_kv_heads|n_kv_heads)")
WIDTHS = re.compile(
    r"(\w+_)?(hidden_sizes?|intermediate_size|d_model|n_embd|n_inner|ffn_dim|d_ff|embed_dim|embedding_size|"
    r"ffn_hidden_size|word_embed_proj_dim|lru_width)|dim|hidden_dim"
)
NARROWEST, MULTIPLE = 32, 8  # of widths; kernels of experts take multiples only


def is_configuration(value: Any) -> bool:
    """Whether a value is a configuration of ``transformers``; none exists before that package is imported."""
    kind = getattr(sys.modules.get("transformers.configuration_utils"), "PreTrainedConfig", None)
    return kind is not None and isinstance(value, kind)  # none exists if the module was not imported


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for value in filter(is_configuration, vars(config).values()):
        yield from _parts(value)


def _numbers(value: Any) -> list[int]:
    values = value if isinstance(value, list | tuple) else [value]
    return list(values) if all(type(number) is int for number in values) else []


def layers_of(config: Any) -> int:
    """The number of layers in the longest chain of equal ones that a configuration asks for."""
    fields = [field for part in _parts(config) for field in vars(part).items()]
    return max((n for name, value in fields if LAYERS.fullmatch(name) for n in _numbers(value)), default=0)


def with_fewer_layers(config: Any, least: int) -> Iterator[Any]:
    """Copies of a configuration with fewer layers, those with the fewest first.

    Args:
        config: The configuration.
        least: Number of layers to begin with.
    """
    for layers in range(least, layers_of(config)):
        for of_each_kind in (True, False) if layers == least else (False,):
            candidate = copy.deepcopy(config)
            for part in _parts(candidate):
                _keep_layers(part, layers, of_each_kind=of_each_kind)
            yield candidate


def _keep_layers(config: Any, layers: int, *, of_each_kind: bool) -> None:
    """Keep the first layers, or one or more of each kind that a list with an entry for each layer names."""
    fields: Any = vars(config)
    lists = {name: value for name, value in fields.items() if isinstance(value, list | tuple)}
    counts = {name: value for name, value in fields.items() if LAYERS.fullmatch(name) and type(value) is int}
    kept: dict[int, Sequence[int]] = {count: range(layers) for count in counts.values() if count > layers}
    for count in kept if of_each_kind else ():
        named = [[repr(entry) for entry in value] for value in lists.values() if len(value) == count]
        first = {entries.index(entry) for entries in named if len(set(entries)) <= FEW_KINDS for entry in entries}
        others = [index for index in range(count) if index not in first][: max(0, layers - len(first))]
        kept[count] = sorted([*first, *others])
    fields.update({name: len(kept.get(count, range(count))) for name, count in counts.items()})
    for name, value in lists.items():
        numbers = _numbers(value)
        if numbers and LAYERS.fullmatch(name):
            fields[name] = type(value)(min(stage, layers) for stage in numbers)
        elif kept and numbers and INDICES.fullmatch(name) and numbers == sorted({*numbers} - {-1}):
            chosen = list(kept[max(kept)])
            fields[name] = type(value)(chosen.index(index) for index in numbers if index in chosen)
        elif BY_LAYER.fullmatch(name) and len(value) in kept:
            fields[name] = type(value)(value[index] for index in kept[len(value)])


def narrowed(config: Any, divisor: int) -> Any:
    """A copy of a configuration with a fraction of the heads and widths; heads are narrower only where one is left.

    Args:
        config: The configuration.
        divisor: Number by which heads and widths are divided.
    """
    narrow = copy.deepcopy(config)
    for part in {id(part): part for part in _parts(narrow)}.values():
        fields: Any = vars(part)
        heads = next((value for name, value in fields.items() if HEADS.fullmatch(name) and type(value) is int), 1)
        for name, value in list(fields.items()):
            numbers = _numbers(value)
            if HEADS.fullmatch(name):
                numbers = [max(1, number // divisor) for number in numbers]
            elif KEY_HEADS.fullmatch(name):
                numbers = [math.gcd(max(1, heads // divisor), max(1, number // divisor)) for number in numbers]
            elif WIDTHS.fullmatch(name):
                numbers = [_narrow_width(number, heads, divisor) for number in numbers]
            if numbers:
                fields[name] = numbers[0] if type(value) is int else type(value)(numbers)
    return narrow


def _narrow_width(width: int, heads: int, divisor: int) -> int:
    heads = heads if width % heads == 0 else 1
    of_head = width // heads
    narrow = max(1, heads // divisor) * max(min(of_head, NARROWEST), of_head // max(1, divisor // heads))
    return min(width, -(-narrow // MULTIPLE) * MULTIPLE)


def changes(before: Any, after: Any, prefix: str = "") -> Iterator[str]:
    """The numbers that differ between a configuration and a smaller one, in words.

    Args:
        before: The configuration.
        after: The smaller one.
        prefix: Name of the part of a larger configuration that both are, with a dot.
    """
    for name, value in vars(before).items():
        smaller = vars(after)[name]
        if is_configuration(value):
            yield from changes(value, smaller, f"{prefix}{name}.")
        elif value != smaller and 0 < len(_numbers(value)) == len(_numbers(smaller)):
            yield f"{prefix}{name} {value} -> {smaller}"
