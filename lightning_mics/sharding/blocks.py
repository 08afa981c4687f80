"""The blocks of a model: modules that are parameter groups of their own. All other parameters are in the root's group.

FSDP2 unshards a parameter group just before its module runs, and reshards it after. The usual block is a transformer
layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator

from torch import nn
from torch.nn.utils import parametrize

from lightning_mics._torch.fsdp import OptimizedModule
from lightning_mics.sharding.modules.checks import check_shardable, is_container

ModuleClasses = Collection[type[nn.Module] | str]


def find_blocks(
    model: nn.Module, block_classes: ModuleClasses | None = None, *, may_be_empty: bool = False
) -> dict[str, nn.Module]:
    """The blocks of ``model`` by name, a block inside another one before the outer one.

    Args:
        model: The model to search.
        block_classes: Module classes or class names. None takes the classes that the model (or a model inside it) names
            in ``_no_split_modules``, as those of ``transformers`` do, except modules tied to others, such as BERT's
            embeddings; else the entries of the longest ``ModuleList``, ``ModuleDict`` or ``Sequential`` that holds
            modules of one class, or lists of modules, whose members are meant then. If there is no such list, or the
            classes are an empty list, there are no blocks, and all parameters are in the root's group.
        may_be_empty: Whether the model may have no parameters, as one that is only evaluated.

    Raises:
        TypeError: If the model is already wrapped or sharded, has no parameters, or parameters that cannot be sharded.
        ValueError: If a class of ``block_classes`` is not in the model, if a parameter is shared between two
            parameter groups, or if parameters cannot be sharded together.
    """
    if not may_be_empty and not _have_parameters([model]):
        raise TypeError(f"{type(model).__name__} has no parameters, so there is nothing to shard")
    check_shardable(model)
    if block_classes is None:
        blocks = _without_tied(model, _of_classes(model, _no_split_names(model))) or _longest_list(model)
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


def evenly(count: int, blocks: int) -> list[bool]:
    """Which blocks are ``count`` of them, at equal distances; the last one is among them.

    Args:
        count: Number of blocks to take.
        blocks: Number of all blocks.
    """
    return [(block + 1) * count // blocks > block * count // blocks for block in range(blocks)]


def group_modules(owner: nn.Module, blocks: Collection[nn.Module]) -> Iterator[nn.Module]:
    """The modules whose tensors are in the parameter group of ``owner``, children first.

    Args:
        owner: A block or the model.
        blocks: All blocks of the model; those inside ``owner`` are left out, and so are modules inside of them that
            have a second name outside.
    """
    inner = _inner_modules(owner, blocks)

    def visit(module: nn.Module) -> Iterator[nn.Module]:
        for child in dict.fromkeys(module.children()):
            if child not in inner:
                yield from visit(child)
        yield module

    yield from visit(owner)


def aliased_parameters(owner: nn.Module, blocks: Collection[nn.Module]) -> set[nn.Parameter]:
    """The parameters inside of inner blocks that have a second name outside, in the parameter group of ``owner``.

    Args:
        owner: A block or the model.
        blocks: All blocks of the model.
    """
    inner = _inner_modules(owner, blocks)
    aliases = {child for module in group_modules(owner, blocks) for child in module.children() if child in inner} - set(
        blocks
    )
    return {parameter for alias in aliases for parameter in alias.parameters()}


def _inner_modules(owner: nn.Module, blocks: Collection[nn.Module]) -> set[nn.Module]:
    known = set(blocks)
    inner = [module for module in owner.modules() if module in known and module is not owner]
    return {module for block in inner for module in block.modules()}


def _of_classes(model: nn.Module, entries: Collection[type[nn.Module] | str]) -> dict[str, nn.Module]:
    names = {entry for entry in entries if isinstance(entry, str)}
    classes = tuple(entry for entry in entries if not isinstance(entry, str))
    skipped = {model, *(module._orig_mod for module in model.modules() if isinstance(module, OptimizedModule))}
    found = {}
    for name, module in model.named_modules():
        inner = module._orig_mod if isinstance(module, OptimizedModule) else module  # the class that was compiled
        if module not in skipped and (_class_of(inner).__name__ in names or isinstance(inner, classes)):
            found[name] = module
    return dict(reversed(found.items()))  # `named_modules` lists outer modules first


def _no_split_names(model: nn.Module) -> set[str]:
    return {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}


def _without_tied(model: nn.Module, blocks: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Leave out blocks that share a parameter with another parameter group; the root's group takes them."""
    owners_of: dict[int, set[nn.Module]] = {}  # by parameter
    for _, parameter, owner in _owned(model, blocks.values()):
        owners_of.setdefault(id(parameter), set()).add(owner)
    tied = {owner for owners in owners_of.values() if len(owners) > 1 for owner in owners}
    return {name: block for name, block in blocks.items() if block not in tied}


def _longest_list(model: nn.Module) -> dict[str, nn.Module]:
    longest: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            continue
        entries = {f"{name}.{key}".lstrip("."): entry for key, entry in module.named_children()}
        if entries and all(map(is_container, entries.values())):
            entries = _large_members(entries)
        elif len({_class_of(entry) for entry in entries.values()}) != 1 or not _have_parameters(entries.values()):
            continue
        if len(entries) > max(1, len(longest)):
            longest = entries
    return dict(reversed(longest.items()))


def _large_members(containers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules in containers that are worth a collective; norms and the like stay in the root's group."""
    members: dict[str, nn.Module] = {}
    for name, container in containers.items():
        for key, entry in container.named_children():
            inner = {f"{name}.{key}": entry}
            members |= _large_members(inner) if is_container(entry) else inner
    sizes = {name: sum(p.numel() for p in member.parameters()) for name, member in members.items()}
    least = max(sizes.values(), default=0) / 10
    return {name: member for name, member in members.items() if sizes[name] > least}


def _class_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module as its author wrote it: parametrizations make a class of its own for each module."""
    kind = parametrize.type_before_parametrizations(module)
    assert issubclass(kind, nn.Module)
    return kind


def _have_parameters(modules: Iterable[nn.Module]) -> bool:
    return all(next(module.parameters(), None) is not None for module in modules)


def _check_groups(model: nn.Module, blocks: dict[str, nn.Module]) -> None:
    """Check what FSDP2 requires: a parameter is in one parameter group, whose gradients are reduced in one dtype."""
    name_of = {block: name for name, block in blocks.items()} | {model: "the root"}
    for name, block in blocks.items():
        if is_container(block):
            raise ValueError(
                f"{name} is a {type(block).__name__} without a forward, which no forward unshards; choose "
                "block_classes of the modules in it"
            )
    first_of: dict[int, tuple[str, nn.Module]] = {}  # by parameter
    first_trainable_of: dict[nn.Module, tuple[str, nn.Parameter]] = {}  # by owner
    for name, parameter, owner in _owned(model, blocks.values()):
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


def _owned(model: nn.Module, blocks: Collection[nn.Module]) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """Each name of each parameter, the parameter, and its owner: the block whose group it is in, or ``model``.

    A module inside a block may have a second name outside, by which it is not in another group.
    """
    owners_of: dict[nn.Module, list[nn.Module]] = {}
    for owner in (*blocks, model):
        for module in dict.fromkeys(group_modules(owner, blocks)):
            owners_of.setdefault(module, []).append(owner)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        named = module = model
        for attribute in name.split(".")[:-1]:
            module = getattr(module, attribute)
            named = module if module in blocks else named
        owners = owners_of[module]
        yield name, parameter, named if named in owners else owners[0]
