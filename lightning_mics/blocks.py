"""Which modules of a model are sharded as units: its blocks. What is left belongs to the root.

A block's parameters are gathered together just before it runs and dropped after; a transformer layer is the usual one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from torch import nn
from torch._dynamo import OptimizedModule
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

ModuleClasses = Iterable[type[nn.Module] | str]


def find_blocks(model: nn.Module, shard_modules: ModuleClasses | None = None) -> dict[str, nn.Module]:
    """The blocks of ``model`` by name, a block inside another one before the outer one.

    Args:
        model: The model to search.
        shard_modules: Module classes or class names. None takes the classes that the model (or a model inside it) names
            in ``_no_split_modules``, as those of ``transformers`` do, else the entries of the longest ``ModuleList``,
            ``ModuleDict`` or ``Sequential`` that holds modules of one class. Empty: no blocks, the root holds all.

    Raises:
        TypeError: If the model is already wrapped or sharded, or if it has no blocks that can be found.
        ValueError: If a class of ``shard_modules`` is not in the model, or if a parameter is shared between two blocks.
    """
    _check_not_wrapped(model)
    if shard_modules is None:
        blocks = _of_classes(model, _no_split_names(model)) or _longest_list(model)
        if not blocks:
            raise TypeError(
                f"found no blocks to shard in {type(model).__name__}: it has no `_no_split_modules` and no list of "
                "modules of one class; pass shard_modules=[BlockClass], or shard_modules=[] to shard it as one unit"
            )
    else:
        blocks = find_modules(model, shard_modules, option="shard_modules")
    _check_untied(model, blocks)
    return blocks


def find_modules(model: nn.Module, classes: ModuleClasses, *, option: str) -> dict[str, nn.Module]:
    """The modules of ``model`` of the given classes, by name, inner ones first.

    Raises:
        TypeError: If ``classes`` (the value of ``option``) holds anything but module classes and their names.
        ValueError: If a class is not in the model.
    """
    names = {_class_name(entry, option) for entry in ([classes] if isinstance(classes, str) else classes)}
    present = Counter(type(module).__name__ for module in model.modules() if module is not model)
    if missing := sorted(names - present.keys()):
        raise ValueError(
            f"{option}={sorted(names)}: {type(model).__name__} has no {', '.join(missing)}; "
            f"its module classes are {', '.join(f'{name} ({count})' for name, count in present.most_common())}"
        )
    return _of_classes(model, names)


def unit_modules(unit: nn.Module) -> Iterator[nn.Module]:
    """The modules whose tensors belong to ``unit``, children first: all but already sharded ones inside it."""
    for child in dict.fromkeys(unit.children()):
        if not isinstance(child, FSDPModule):
            yield from unit_modules(child)
    yield unit


def _of_classes(model: nn.Module, names: set[str]) -> dict[str, nn.Module]:
    inside_compiled = {module._orig_mod for module in model.modules() if isinstance(module, OptimizedModule)}
    skipped = {model, *inside_compiled}
    found = [(name, m) for name, m in model.named_modules() if m not in skipped and _own_class_name(m) in names]
    return dict(reversed(found))  # `named_modules` lists outer modules first


def _no_split_names(model: nn.Module) -> set[str]:
    return {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}


def _longest_list(model: nn.Module) -> dict[str, nn.Module]:
    longest: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            continue
        entries = {f"{name}.{key}".lstrip("."): entry for key, entry in module.named_children()}
        of_one_class = len({type(entry) for entry in entries.values()}) == 1
        if of_one_class and _has_parameters(entries.values()) and len(entries) > max(1, len(longest)):
            longest = entries
    return dict(reversed(longest.items()))


def _has_parameters(modules: Iterable[nn.Module]) -> bool:
    return all(next(module.parameters(), None) is not None for module in modules)


def _class_name(entry: object, option: str) -> str:
    if isinstance(entry, str):
        return entry
    if isinstance(entry, type) and issubclass(entry, nn.Module):
        return entry.__name__
    raise TypeError(f"{option} takes module classes or their names, got {entry!r}")


def _own_class_name(module: nn.Module) -> str:
    """The class name that the user wrote: a compiled module counts as what is inside."""
    return type(module._orig_mod if isinstance(module, OptimizedModule) else module).__name__


def _check_not_wrapped(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel | DistributedDataParallel | FSDPModule):
            raise TypeError(
                f"module {name or 'at the root'!r} ({type(module).__name__}) is already wrapped or sharded; "
                "hand over the plain module, it is sharded here"
            )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise TypeError(f"parameter {name!r} is already a DTensor; hand over the plain module, it is sharded here")


def _check_untied(model: nn.Module, blocks: dict[str, nn.Module]) -> None:
    """FSDP2 gathers a parameter with one unit only, so a parameter may not be in two."""
    block_of = {module: name for name, block in reversed(blocks.items()) for module in block.modules()}
    unit_of: dict[int, tuple[str, str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = model.get_submodule(name.rpartition(".")[0])
        unit = block_of.get(owner, "the root")
        first_name, first_unit = unit_of.setdefault(id(parameter), (name, unit))
        if unit != first_unit:
            raise ValueError(
                f"parameters {first_name!r} (in {first_unit}) and {name!r} (in {unit}) are one tied parameter in two "
                "units; choose shard_modules so that one unit holds both"
            )
