"""Make a module small enough to be trained on a laptop: fewer equal blocks, and narrower ones where that is not enough.

Models of ``transformers`` are built anew from a smaller configuration, or will be if they are built later. In other
modules, and in models changed after they were built (by adapters for example), equal blocks are dropped from lists.
"""

from __future__ import annotations

import copy
import math
import re
import sys
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_mics._torch.fsdp import OptimizedModule
from lightning_mics.certification.configurations import (
    changes,
    is_configuration,
    layers_of,
    narrowed,
    with_fewer_layers,
)
from lightning_mics.sharding.blocks import find_blocks

FEW_BLOCKS, FEW_PARAMETERS = 4, 1_000_000  # a module with as many of both is small enough as it is
LARGEST_DIVISOR = 2**12  # of widths
POSITION = re.compile(r"(?<![^.])\d+(?![^.])")  # of a module in a list, in its name


class CannotShrinkError(ValueError):
    """A module that has too many parameters for a laptop even with few and narrow blocks."""


def shrunk(
    module: nn.Module,
    *,
    blocks: int = 2,
    wanted_parameters: int = 1_000_000,
    most_parameters: int = 20_000_000,
    known: dict[str, Any] | None = None,
) -> tuple[nn.Module, list[str]]:
    """The module with ``blocks`` of its equal blocks, and what was made smaller, in words.

    The module is changed in place; another one is returned only if it is itself a model of ``transformers``, which is
    built anew, with weights drawn from torch's current seed. Integers by which other modules count their layers are
    left as they are: where ``forward`` depends on them, it fails, and a module made smaller by hand is to be passed,
    with ``shrink=False``.

    Args:
        module: The module, on any device; a network that is built later is made smaller by its configuration.
        blocks: Number of equal blocks to leave in each list; more where a configuration needs them for all its kinds.
        wanted_parameters: Number of parameters above which models of ``transformers`` are made narrower as well.
        most_parameters: Number of parameters above which a module is too large.
        known: Smaller configurations that earlier calls have found, by configuration; this call adds its own. Large
            networks need not be built again then.

    Returns:
        The smaller module, and a line for each part made smaller: none for 4 blocks and a million parameters, or fewer.

    Raises:
        CannotShrinkError: If more than ``most_parameters`` remain.
    """
    shrinking = _Shrinking(blocks, wanted_parameters, most_parameters, {} if known is None else known)
    module = shrinking.rebuild_models(module)
    shrinking.replace_configurations(module)
    shrinking.drop_blocks(module)
    _check_size(type(module).__name__, module, most_parameters)
    return module, shrinking.words


class _Shrinking:
    """One call of ``shrunk``; ``words`` is what was made smaller."""

    def __init__(self, blocks: int, wanted_parameters: int, most_parameters: int, known: dict[str, Any]) -> None:
        self.blocks = blocks
        self._known = known
        self.wanted_parameters = wanted_parameters
        self.most_parameters = most_parameters
        self.words: list[str] = []
        self._configurations: dict[int, tuple[Any, Any]] = {}  # the original and its replacement, by id of the original
        self._rebuilt: set[nn.Module] = set()  # modules of models that have no blocks to drop

    def rebuild_models(self, root: nn.Module) -> nn.Module:
        """Replace each model of ``transformers`` by one with a smaller configuration; returns the new root."""
        for name, model in list(_models(root)):
            place = f"{type(root).__name__}.{name} ({type(model).__name__})" if name else type(model).__name__
            before: Any = model.config
            after, network = self._smaller(before, type(model), model)
            if network is None or not _can_replace(root, model, network):
                after = before  # it was changed after it was built, or is used by names that a smaller one lacks
            elif after is not before:
                _check_size(place, network, self.most_parameters)
                with next(model.parameters()).device:
                    smaller = type(model)(after)
                _take_over(smaller, model)
                for registry, key, inner in list(_uses(root, model)):
                    registry[key] = _by_name(smaller)[inner]
                root, model = smaller if root is model else root, smaller
            self._note(place, before, after)
            if after is not before or (network is not None and layers_of(before) <= FEW_BLOCKS):
                self._rebuilt.update(model.modules())
        return root

    def replace_configurations(self, root: nn.Module) -> None:
        """Replace configurations that networks are built from later by smaller copies."""
        inside = {inner for _, model in _models(root) for inner in model.modules()}
        for name, holder in [(name, holder) for name, holder in root.named_modules() if holder not in inside]:
            is_empty = not any(module._parameters for module in holder.modules() if module not in inside)
            for values in (vars(holder), vars(holder).get("_hparams") or {}):
                for key, config in [(key, value) for key, value in values.items() if is_configuration(value)]:
                    if is_empty and id(config) not in self._configurations:
                        place = f"{type(root).__name__}.{name}{name and '.'}{key}"
                        after, network = self._smaller(config, _network_class(config))
                        _check_size(f"the network of {place}", network or nn.Module(), self.most_parameters)
                        self._note(place, config, after)
                    values[key] = self._configurations.get(id(config), (config, config))[1]

    def _note(self, place: str, before: Any, after: Any) -> None:
        self._configurations[id(before)] = before, after
        if made := ", ".join(changes(before, after)):
            self.words.append(f"{place}: {made}")

    def drop_blocks(self, root: nn.Module) -> None:
        """Drop equal blocks from the lists that hold the module's blocks, then from further lists if need be."""
        while next(root.parameters(), None) is not None:
            try:
                found = {name: block for name, block in find_blocks(root).items() if block not in self._rebuilt}
            except (TypeError, ValueError):
                return  # the module cannot be sharded either, which says more about the reason
            if len(found) <= FEW_BLOCKS and _size(root) <= FEW_PARAMETERS:
                return
            dropped = [self._drop(root, name) for name in dict.fromkeys(name.rpartition(".")[0] for name in found)]
            if not any(dropped) or _size(root) <= self.most_parameters:
                return

    def _drop(self, root: nn.Module, name: str) -> bool:
        holder = root.get_submodule(name)
        if not isinstance(holder, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            return False
        entries = list(holder._modules.items())
        uses = _everything(root)
        kept = _without_repeats([_kind(entry, uses) for _, entry in entries if entry is not None], self.blocks)
        if len(kept) == len(entries) or None in holder._modules.values():
            return False
        keys = map(str, range(len(kept))) if all(key.isdigit() for key, _ in entries) else [entries[i][0] for i in kept]
        holder._modules.clear()
        holder._modules.update(zip(keys, [entries[index][1] for index in kept], strict=True))
        self.words.append(f"{type(root).__name__}{name and '.'}{name}: blocks {len(entries)} -> {len(kept)}")
        return True

    def _smaller(self, config: Any, network: Any, model: nn.Module | None = None) -> tuple[Any, nn.Module | None]:
        """A smaller copy of a configuration, or itself, and its network on the meta device unless ``model`` differs."""
        key = f"{type(config).__name__}, {getattr(network, '__name__', '')}: {config.to_json_string(use_diff=False)}"
        if self._known.get(key) is not None:
            smaller = copy.deepcopy(self._known[key])
            return smaller, _built(network, smaller)
        smaller, built = self._found(config, network, model)
        if smaller is not config and built is not None:
            self._known[key] = smaller
        return smaller, built

    def _found(self, config: Any, network: Any, model: nn.Module | None) -> tuple[Any, nn.Module | None]:
        built = _built(network, config)
        if model is not None and (built is None or _kinds(built) != _kinds(model)):
            return config, None
        if built is not None and _size(built) <= FEW_PARAMETERS and layers_of(config) <= FEW_BLOCKS:
            return config, built
        smaller, kinds = config, _kinds(built, in_lists=True)
        for candidate in with_fewer_layers(config, self.blocks):
            fewer = _built(network, candidate)
            if (built is None) == (fewer is None) and _kinds(fewer, in_lists=True) == kinds:
                smaller, built = candidate, fewer
                break
        wide, divisor = smaller, 2
        while built is not None and _size(built) > self.wanted_parameters and divisor <= LARGEST_DIVISOR:
            candidate = narrowed(wide, divisor)
            if (narrower := _built(network, candidate)) is not None:
                smaller, built = candidate, narrower
            divisor *= 2
        return smaller, built


def _models(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    kind = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", ())
    inside: set[nn.Module] = set()
    for name, module in root.named_modules():
        if isinstance(module, kind) and module not in inside:
            inside.update(module.modules())
            yield name, module


def _network_class(config: Any) -> Any:
    """The class that is built from a configuration, one with a head if there is any; None if it is unknown."""
    heads = ("AutoModelForSeq2SeqLM", "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModel")
    mappings = [getattr(sys.modules["transformers"], head)._model_mapping for head in heads]
    found = next((mapping[type(config)] for mapping in mappings if type(config) in mapping), None)
    return found[0] if isinstance(found, tuple) else found


def _built(network: Any, config: Any) -> nn.Module | None:
    with suppress(Exception), torch.device("meta"):  # numbers that do not fit, or what needs memory
        return network(copy.deepcopy(config)) if network is not None else None
    return None


def _traits(module: nn.Module) -> Hashable:
    """What tells a module from others of its name: class, shapes, switches, and whether it was changed or compiled."""
    values = vars(module)
    switches = (
        (name, value.strip("0123456789") if isinstance(value, str) else value)
        for name, value in values.items()
        if isinstance(value, bool | str) and name not in ("training", "gradient_checkpointing") and name[0] != "_"
    )
    shapes = tuple((name, tuple(p.shape)) for name, p in module._parameters.items() if p is not None)
    return type(module), shapes, frozenset(switches), "forward" in values, bool(values.get("_compiled_call_impl"))


def _kinds(model: nn.Module | None, *, in_lists: bool = False) -> set[tuple[str, Hashable]]:
    """Names of modules without positions in lists, each with the traits of one or more modules of that name."""
    modules = model.named_modules() if model is not None else ()
    return {(POSITION.sub("#", name), _traits(m)) for name, m in modules if not in_lists or POSITION.search(name)}


def _everything(module: nn.Module) -> Counter[int]:
    """How many names each module and parameter has inside a module, by id."""
    modules, parameters = module.named_modules(remove_duplicate=False), module.named_parameters(remove_duplicate=False)
    return Counter(id(inner) for _, inner in [*modules, *parameters])


def _kind(entry: nn.Module, uses: Counter[int]) -> Hashable:
    """Equal for equal blocks; a block that is used by a name outside of it, too, is like no other."""
    if any(uses[inner] > count for inner, count in _everything(entry).items()):
        return object()
    return tuple(
        (name, _traits(module), frozenset(_hooks(module)), *(p.requires_grad for p in module.parameters(recurse=False)))
        for name, module in entry.named_modules()
    )


def _hooks(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if "ward_" in name and "hook" in name and value}


def _without_repeats(kinds: list[Hashable], most: int) -> list[int]:
    """Positions in ``kinds`` without runs that follow ``most`` equal runs, so that neighbors fit as before."""
    kept: list[int] = []
    for index in range(len(kinds)):
        kept.append(index)
        for length in range(1, len(kept) // (most + 1) + 1):
            tail = [kinds[position] for position in kept[-length * (most + 1) :]]
            if tail == tail[:length] * (most + 1):
                del kept[-length:]
                break
    return kept


def _uses(root: nn.Module, model: nn.Module) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Where modules outside of ``model`` hold it or parts of it: registry, key, and name of the part in ``model``."""
    name_of = {part: name for name, part in _by_name(model).items()}
    for holder in set(root.modules()) - set(model.modules()):
        for registry in (holder._modules, holder._parameters):
            for key, part in registry.items():
                if part is not None and part in name_of:
                    yield registry, key, name_of[part]


def _by_name(model: nn.Module) -> dict[str, Any]:
    return {**dict(model.named_modules()), **dict(model.named_parameters(remove_duplicate=False))}


def _can_replace(root: nn.Module, model: nn.Module, smaller: nn.Module) -> bool:
    compiled = [module._orig_mod for module in root.modules() if isinstance(module, OptimizedModule)]
    return model not in compiled and {name for _, _, name in _uses(root, model)} <= set(_by_name(smaller))


def _take_over(smaller: nn.Module, model: nn.Module) -> None:
    """Give a model what the larger one was given after it was built: ties, dtypes, modes, hooks, frozen parameters."""
    former = _by_name(model)
    alike = {POSITION.sub("#", name): part for name, part in former.items()}  # for layers that have moved
    first: dict[Any, nn.Parameter] = {}  # by parameter of `model`
    last: dict[str, nn.Parameter] = {}  # by name without position
    parameters = model.named_parameters(remove_duplicate=False)
    flags = {(POSITION.sub("#", name), parameter.requires_grad) for name, parameter in parameters}
    for name, parameter in list(smaller.named_parameters(remove_duplicate=False)):
        holder, _, key = name.rpartition(".")
        kind = POSITION.sub("#", name)
        origin = former.get(name, alike[kind])
        tied = last[kind] = first.setdefault(origin, parameter) if name in former else parameter
        smaller.get_submodule(holder)._parameters[key] = tied
        tied.data = tied.data.to(origin.dtype)
        flags.discard((kind, tied.requires_grad_(origin.requires_grad).requires_grad))
    for kind, requires_grad in flags:  # some layers of `model` were frozen, and others trained
        last[kind].requires_grad_(requires_grad)
    for name, module in smaller.named_modules():
        origin = former.get(name, alike[POSITION.sub("#", name)])
        module.training = origin.training
        for key, buffer in module._buffers.items():
            if buffer is not None and origin._buffers.get(key) is not None:
                module._buffers[key] = buffer.to(origin._buffers[key].dtype)
        checkpointing = {key: value for key, value in vars(origin).items() if "gradient_checkpointing" in key}
        vars(module).update({**checkpointing, **_hooks(origin), **_hooks(module)})


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if not is_lazy(parameter))


def _check_size(name: str, module: nn.Module, most_parameters: int) -> None:
    if (size := _size(module)) <= most_parameters:
        return
    of_part, part = max(((_size(child), inner) for inner, child in module.named_children()), default=(size, "itself"))
    shapes = {inner: list(parameter.shape) for inner, parameter in module.named_parameters() if not is_lazy(parameter)}
    largest = max(shapes, key=lambda inner: math.prod(shapes[inner]))
    raise CannotShrinkError(
        f"{name} still has {size:,} parameters with fewer and narrower blocks, more than most_parameters="
        f"{most_parameters:,}; {of_part:,} are in {part!r}, and the largest parameter is {largest!r}, "
        f"{shapes[largest]}; pass a callable that makes a smaller module, and shrink=False"
    )
