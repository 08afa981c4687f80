"""The blocks of a model: modules that are parameter groups of their own. All other parameters are in the root's group.

FSDP2 unshards a parameter group just before its module runs, and reshards it after. The usual block is a transformer
layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lightning_mics._torch.fsdp import OptimizedModule

ModuleClasses = Collection[type[nn.Module] | str]


def find_blocks(model: nn.Module, block_classes: ModuleClasses | None = None) -> dict[str, nn.Module]:
    """The blocks of ``model`` by name, a block inside another one before the outer one.

    Args:
        model: The model to search.
        block_classes: Module classes or class names. None takes the classes that the model (or a model inside it) names
            in ``_no_split_modules``, as those of ``transformers`` do, except modules tied to others, such as BERT's
            embeddings; else the entries of the longest ``ModuleList``, ``ModuleDict`` or ``Sequential`` that holds
            modules of one class. With an empty list there are no blocks, and all parameters are in the root's group.

    Raises:
        TypeError: If the model is already wrapped or sharded, has no parameters, or has no blocks that can be found.
        ValueError: If a class of ``block_classes`` is not in the model, if a parameter is shared between two
            parameter groups, or if parameters cannot be sharded together.
    """
    _check_not_wrapped(model)
    if block_classes is None:
        blocks = _without_tied(model, _of_classes(model, _no_split_names(model))) or _longest_list(model)
        if not blocks:
            raise TypeError(
                f"found no blocks to shard in {type(model).__name__}: it has no `_no_split_modules` and no list of "
                "modules of one class; pass block_classes=[BlockClass], or block_classes=[] to shard it as one "
                "parameter group"
            )
    else:
        blocks = find_modules(model, block_classes, option="block_classes")
    _check_groups(model, blocks)
    return blocks


def find_modules(model: nn.Module, classes: ModuleClasses, *, option: str) -> dict[str, nn.Module]:
    """The modules of ``model`` of the given classes, by name, inner ones first.

    Args:
        model: The model to search.
        classes: Module classes or their names.
        option: Name of the option that the classes come from, for messages.

    Raises:
        TypeError: If ``classes`` holds anything but module classes and their names.
        ValueError: If a class is not in the model.
    """
    entries = [classes] if isinstance(classes, str | type) else list(classes)
    for entry in entries:
        if not isinstance(entry, str) and not (isinstance(entry, type) and issubclass(entry, nn.Module)):
            raise TypeError(f"{option} takes module classes or their names, got {entry!r}")
        if not _of_classes(model, [entry]):
            present = Counter(type(module).__name__ for module in model.modules() if module is not model)
            raise ValueError(
                f"{option}: {type(model).__name__} has no {entry if isinstance(entry, str) else entry.__name__}; "
                f"its module classes are {', '.join(f'{name} ({count})' for name, count in present.most_common())}"
            )
    return _of_classes(model, entries)


def group_modules(owner: nn.Module, blocks: Collection[nn.Module]) -> Iterator[nn.Module]:
    """The modules whose tensors are in the parameter group of ``owner``, children first.

    Args:
        owner: A block or the model.
        blocks: All blocks of the model; those inside ``owner`` are left out.
    """
    for child in dict.fromkeys(owner.children()):
        if child not in blocks:
            yield from group_modules(child, blocks)
    yield owner


def _of_classes(model: nn.Module, entries: Collection[type[nn.Module] | str]) -> dict[str, nn.Module]:
    names = {entry for entry in entries if isinstance(entry, str)}
    classes = tuple(entry for entry in entries if not isinstance(entry, str))
    skipped = {model, *(module._orig_mod for module in model.modules() if isinstance(module, OptimizedModule))}
    found = {}
    for name, module in model.named_modules():
        inner = module._orig_mod if isinstance(module, OptimizedModule) else module  # the class that was compiled
        if module not in skipped and (type(inner).__name__ in names or isinstance(inner, classes)):
            found[name] = module
    return dict(reversed(found.items()))  # `named_modules` lists outer modules first


def _no_split_names(model: nn.Module) -> set[str]:
    return {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}


def _without_tied(model: nn.Module, blocks: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Leave out blocks that share a parameter with another parameter group; the root's group takes them."""
    owners_of: dict[int, set[nn.Module]] = {}  # by parameter
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners_of.setdefault(id(parameter), set()).add(_owner(model, name, blocks.values()))
    tied = {owner for owners in owners_of.values() if len(owners) > 1 for owner in owners}
    return {name: block for name, block in blocks.items() if block not in tied}


def _longest_list(model: nn.Module) -> dict[str, nn.Module]:
    longest: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            continue
        entries = {f"{name}.{key}".lstrip("."): entry for key, entry in module.named_children()}
        of_one_class = len({type(entry) for entry in entries.values()}) == 1
        if of_one_class and _have_parameters(entries.values()) and len(entries) > max(1, len(longest)):
            longest = entries
    return dict(reversed(longest.items()))


def _have_parameters(modules: Iterable[nn.Module]) -> bool:
    return all(next(module.parameters(), None) is not None for module in modules)


def _check_not_wrapped(model: nn.Module) -> None:
    if not _have_parameters([model]):
        raise TypeError(f"{type(model).__name__} has no parameters, so there is nothing to shard")
    for name, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel | DistributedDataParallel | FSDPModule):
            raise TypeError(
                f"module {name or 'at the root'!r} ({type(module).__name__}) is already wrapped or sharded; "
                "pass the original module, it is sharded here"
            )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise TypeError(f"parameter {name!r} is already a DTensor; pass the original module, it is sharded here")


def _check_groups(model: nn.Module, blocks: dict[str, nn.Module]) -> None:
    """Check what FSDP2 requires: a parameter is in one parameter group, whose gradients are reduced in one dtype."""
    name_of = {block: name for name, block in blocks.items()} | {model: "the root"}
    first_of: dict[int, tuple[str, nn.Module]] = {}  # by parameter
    first_trainable_of: dict[nn.Module, tuple[str, nn.Parameter]] = {}  # by owner
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = _owner(model, name, name_of)
        first_name, first_owner = first_of.setdefault(id(parameter), (name, owner))
        if owner is not first_owner:
            raise ValueError(
                f"parameters {first_name!r} (in {name_of[first_owner]}) and {name!r} (in {name_of[owner]}) are one "
                "tied parameter in two parameter groups; choose block_classes so that one group holds both"
            )
        if parameter.ndim == 0:
            raise ValueError(f"parameter {name!r} has no dimension to shard; give it the shape [1]")
        if not parameter.requires_grad:
            continue
        other_name, other = first_trainable_of.setdefault(owner, (name, parameter))
        if parameter.dtype != other.dtype:
            raise ValueError(
                f"parameters {other_name!r} ({other.dtype}) and {name!r} ({parameter.dtype}) are in one parameter "
                f"group, {name_of[owner]}, whose gradients are reduced together; give them one dtype, or separate "
                "groups by block_classes"
            )


def _owner(model: nn.Module, parameter_name: str, blocks: Collection[nn.Module]) -> nn.Module:
    """The innermost of ``blocks`` that holds a parameter, or else ``model``."""
    owner = module = model
    for attribute in parameter_name.split(".")[:-1]:
        module = getattr(module, attribute)
        owner = module if module in blocks else owner
    return owner
