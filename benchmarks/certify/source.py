"""Mutants of source code: one node of one function is changed, and the function compiled again.

Functions are those of the modules in which numbers can go wrong, in this package and in FSDP2; statements are those
that the trainings reach. Left out is what has no numbers: streams and events, which the CPU has not; counters, names,
logs and messages; checks, which act only if something else is wrong; memory; what decides when something is gathered,
and not what; and the first values of attributes, which are set again before they are read.
"""

from __future__ import annotations

import ast
import copy
import gc
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import torch

import lightning_mics
from benchmarks.certify.mutants import Mutant

PACKAGE, TORCH = Path(lightning_mics.__file__).resolve().parent, Path(torch.__file__).resolve().parent
FILES = (
    *(PACKAGE / f"techniques/{name}.py" for name in ("flat", "hierarchical", "inter_node_prefetch", "once_per_step")),
    *(PACKAGE / f"techniques/{name}.py" for name in ("pending_gradients", "two_hop")),
    *(PACKAGE / f"sharding/{name}.py" for name in ("accumulation_window", "weight_cache", "initialization")),
    *(PACKAGE / f"sharding/{name}.py" for name in ("schedule", "optimizer_hooks", "communication")),
    PACKAGE / "sharding/modules/broadcast_buffers.py",
    PACKAGE / "collectives/counted_group.py",
    PACKAGE / "_torch/fsdp.py",
    *(PACKAGE / f"checkpoint/{name}.py" for name in ("saving", "loading", "optimizer_states", "random_states")),
    PACKAGE / "checkpoint/full_file.py",
    *(PACKAGE / f"checkpoint/dcp/{name}.py" for name in ("rows", "reader", "load_planner", "save_planner")),
    *(PACKAGE / f"integrations/trainer/{name}.py" for name in ("checkpoints", "resuming")),
    *(
        TORCH / f"distributed/fsdp/_fully_shard/{name}.py"
        for name in ("_fsdp_collectives", "_fsdp_param_group", "_fsdp_param")
    ),
)
QUIET = (  # in names: what has no numbers, as the module says
    *("stream", "event", "record", "_stage", "wait", "_spread_out", "_gathered", "_compared", "device_handle"),
    *("count", "traffic", "_range", "technique", "named", "profil", "log", "warn", "progress", "advance", "describe"),
    *("check", "verify", "assert", "validate", "raise", "answer", "agree", "_control", "differs", "_differ", "compare"),
    *("free", "isinstance", "is_fake", "compiler", "report", "note_", "together", "strict", "timeout", "refuse"),
    *("is_local", "store", "sync_files", "pin_memory", "non_blocking", "offload", "symm", "inference_mode"),
    *("weights_only", "alone", "mark_valid", "is_cached", "extensions", "fetch_next"),
)
SILENT = (  # in names of functions, likewise
    *("InterNodePrefetch", "UnitPrefetch.fetch_next", "UnitPrefetch.announce", "continue_forward"),
    *("__init__", "_shows_progress", "free", "alloc_", "reset_sharded_param", "reshard", "HostBuffers", "_packed"),
)
SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


@dataclass(frozen=True)
class Place:
    """A node of a function that an operator can change.

    Attributes:
        file: File of the function.
        function: Qualified name of the function.
        first_line: First line of the function, decorators included.
        line: Line of the node.
        position: Position of the node among all of the file.
        operator: Name of the operator.
    """

    file: str
    function: str
    first_line: int
    line: int
    position: int
    operator: str

    @property
    def name(self) -> str:
        """Name of the mutant."""
        base = PACKAGE.parent if self.file.startswith(str(PACKAGE)) else TORCH.parent
        return f"{os.path.relpath(self.file, base)}:{self.line} {self.function}: {self.operator} [{self.position}]"


def _dropped(node: Any) -> ast.AST | None:
    """A call as a statement, an assignment to an attribute or in place."""
    is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    kept = isinstance(node, ast.AugAssign) or (
        isinstance(node, ast.Assign) and all(isinstance(target, ast.Attribute) for target in node.targets)
    )
    return ast.Pass() if is_call or kept else None


def _negated(node: Any) -> ast.AST | None:
    if not isinstance(node, ast.If | ast.IfExp | ast.While):
        return None
    node.test = ast.UnaryOp(ast.Not(), node.test)
    return node


def _one_more(node: Any) -> ast.AST | None:
    is_number = isinstance(node, ast.Constant) and type(node.value) is int
    return ast.Constant(node.value + 1) if is_number else None


def _flipped(node: Any) -> ast.AST | None:
    is_truth = isinstance(node, ast.Constant) and type(node.value) is bool
    return ast.Constant(not node.value) if is_truth else None


def _other(node: Any) -> ast.AST | None:
    """Another arithmetic, comparison or logic."""
    if isinstance(node, ast.Compare):
        if type(node.ops[0]) not in SWAPPED:
            return None
        node.ops[0] = SWAPPED[type(node.ops[0])]()  # type: ignore[call-overload]
    elif isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign):
        if type(node.op) not in SWAPPED:
            return None
        node.op = SWAPPED[type(node.op)]()  # type: ignore[assignment]
    else:
        return None
    return node


def _exchanged(node: Any) -> ast.AST | None:
    """The first two arguments of a call."""
    if not isinstance(node, ast.Call) or len(node.args) < 2 or any(isinstance(a, ast.Starred) for a in node.args[:2]):
        return None
    node.args[:2] = node.args[1::-1]
    return node


def _without_first(node: Any) -> ast.AST | None:
    """A loop that leaves out its first turn."""
    if not isinstance(node, ast.For):
        return None
    every = ast.Call(ast.Name("list", ast.Load()), [node.iter], [])
    node.iter = ast.Subscript(every, ast.Slice(ast.Constant(1)), ast.Load())
    return node


OPERATORS: dict[str, Callable[[Any], ast.AST | None]] = {
    "statement dropped": _dropped,
    "condition negated": _negated,
    "number + 1": _one_more,
    "truth flipped": _flipped,
    "other operator": _other,
    "arguments exchanged": _exchanged,
    "loop without its first turn": _without_first,
}


def places(file: str) -> Iterator[Place]:
    """All places of a file, in the order of its nodes.

    Args:
        file: Path of the file.
    """
    for position, (node, function, first_line) in enumerate(_nodes(_parsed(file))):
        if function is None or any(name in function for name in SILENT) or _is_quiet(node):
            continue
        for name, change in OPERATORS.items():
            if change(copy.deepcopy(node)) is not None:
                yield Place(file, function, first_line, node.lineno, position, name)


def _nodes(tree: ast.AST) -> Iterator[tuple[Any, str | None, int]]:
    """All nodes with a line, each with the function or method that it is in, and that one's first line."""

    def inside(node: ast.AST, path: tuple[str, ...], function: str | None, first_line: int) -> Iterator[Any]:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            if function is None and isinstance(node, ast.FunctionDef):
                function = ".".join((*path, node.name))
                first_line = min(each.lineno for each in (node, *node.decorator_list))
            path = (*path, node.name)
            children: Any = node.body
        elif isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr) or _is_quiet_option(node):
            return
        else:
            children = ast.iter_child_nodes(node)
        for child in children:
            if isinstance(child, ast.stmt | ast.expr):
                yield child, function, first_line
            yield from inside(child, path, function, first_line)

    return inside(tree, (), None, 0)


def _is_quiet_option(node: ast.AST) -> bool:
    return isinstance(node, ast.keyword) and any(quiet in (node.arg or "") for quiet in QUIET)


def _is_quiet(node: ast.AST) -> bool:
    if isinstance(node, ast.If | ast.For | ast.While):
        node = node.iter if isinstance(node, ast.For) else node.test
    words = [getattr(each, "id", None) or getattr(each, "attr", None) or "" for each in ast.walk(node)]
    return any(quiet in word.lower() for word in words for quiet in QUIET)


def _parsed(file: str) -> ast.Module:
    return ast.parse(_text(file))


@cache
def _text(file: str) -> str:
    return Path(file).read_text()


def compiled(place: Place) -> CodeType:
    """The code of the place's function, changed.

    Args:
        place: The place.
    """
    tree = _parsed(place.file)
    wanted = next(node for position, (node, *_) in enumerate(_nodes(tree)) if position == place.position)
    change = OPERATORS[place.operator]

    class Changed(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> Any:
            if node is not wanted:
                return self.generic_visit(node)
            new = change(node)
            assert new is not None
            return ast.copy_location(new, wanted)

    tree = ast.fix_missing_locations(Changed().visit(tree))
    return next(_codes(compile(tree, place.file, "exec", dont_inherit=True), place))


def _codes(code: CodeType, place: Place) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            if (constant.co_qualname, constant.co_firstlineno) == (place.function, place.first_line):
                yield constant
            yield from _codes(constant, place)


@cache
def functions() -> Mapping[tuple[str, str, int], list[FunctionType]]:
    """The functions of all files by file, qualified name and first line; to be called before ranks are forked."""
    found: dict[tuple[str, str, int], list[FunctionType]] = defaultdict(list)
    files = set(map(str, FILES))
    gc.unfreeze()  # what was frozen, as by a process that forks tests, is not among the objects
    for each in gc.get_objects():
        if type(each) is FunctionType and os.path.realpath(each.__code__.co_filename) in files:
            code = each.__code__
            found[os.path.realpath(code.co_filename), code.co_qualname, code.co_firstlineno].append(each)
    return found


def source_mutant(place: Place) -> Mutant | None:
    """The mutant of a place; None if its function cannot be changed while it exists.

    Args:
        place: The place.
    """
    every = functions().get((place.file, place.function, place.first_line), [])
    code = compiled(place)
    if not every or any(each.__code__.co_freevars != code.co_freevars for each in every):
        return None
    where = f"{place.function}, line {place.line}"
    return Mutant(
        place.name,
        f"source: {place.operator}",
        where,
        partial(_exchange, every, code),
        (place.file, place.line, place.line),
    )


def _exchange(every: list[FunctionType], code: CodeType) -> None:
    for function in every:
        function.__code__ = code
