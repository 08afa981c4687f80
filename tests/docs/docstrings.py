"""The docstrings of the package, read as text: which entries they have, and for which parameters.

Thirty entries, drawn by a seed, for a reader's eye::

    python -m tests.docs.docstrings --draw 30 --seed 16
"""

from __future__ import annotations

import argparse
import ast
import inspect
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lightning_mics"
SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):$")
ENTRY = re.compile(r"\*{0,2}([\w.]+):(?: (.*))?$")
SHAPE = re.compile(r"\[[^\]]*\]")


@dataclass(frozen=True)
class Entry:
    """One entry of a docstring's section.

    Attributes:
        section: Heading of the section, ``"Args"`` for example.
        name: Name before the colon.
        text: Text after the colon, on one line.
    """

    section: str
    name: str
    text: str


@dataclass(frozen=True)
class Documented:
    """One module, class or function that may have a docstring.

    Attributes:
        place: Path of the file below the package and qualified name, for messages.
        is_public: Whether no part of the qualified name begins with an underscore.
        overrides: Whether it replaces a method of a base class that documents the parameters.
        parameters: Annotation of each parameter as written, by name, without ``self``.
        shapes: Parameters whose line has a comment with a shape.
        docstring: Cleaned docstring, empty if there is none.
    """

    place: str
    is_public: bool
    overrides: bool
    parameters: dict[str, str]
    shapes: frozenset[str] = field(default_factory=frozenset)
    docstring: str = ""

    def entries(self) -> list[Entry]:
        """Entries of the sections ``Args`` to ``Yields``, in order."""
        found: list[Entry] = []
        section = ""
        for line in self.docstring.splitlines():
            if heading := SECTION.match(line):
                section = heading[1]
            elif line and not line.startswith(" "):
                section = ""
            elif section and (entry := ENTRY.match(line[4:])) and line.startswith("    ") and line[4:5] != " ":
                found.append(Entry(section, entry[1], entry[2] or ""))
            elif section in ("Args", "Attributes", "Raises") and found and line.strip():
                last = found.pop()
                found.append(Entry(last.section, last.name, f"{last.text} {line.strip()}".strip()))
        return found


def documented(package: Path = PACKAGE) -> Iterator[Documented]:
    """All modules, classes and functions of ``package``, in the order of files and lines."""
    for path in sorted(package.rglob("*.py")):
        yield from of_source(path.read_text(), str(path.relative_to(package)))


def of_source(source: str, place: str) -> Iterator[Documented]:
    """Read one file.

    Args:
        source: Text of the file.
        place: Name of the file for messages.
    """
    tree = ast.parse(source)
    lines = source.splitlines()
    yield Documented(place, True, False, {}, docstring=_docstring(tree))
    yield from _below(tree, place, lines, is_public=True)


def _below(parent: ast.AST, place: str, lines: list[str], *, is_public: bool) -> Iterator[Documented]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.If | ast.Try):
            yield from _below(node, place, lines, is_public=is_public)
        elif isinstance(node, ast.ClassDef):
            public = is_public and not node.name.startswith("_")
            inside = f"{place}:{node.name}"
            yield Documented(inside, public, False, {}, docstring=_docstring(node))
            yield from _below(node, inside, lines, is_public=public)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield _of_function(node, place, lines, is_public=is_public)


def _of_function(
    node: ast.FunctionDef | ast.AsyncFunctionDef, place: str, lines: list[str], *, is_public: bool
) -> Documented:
    decorators = {ast.unparse(decorator).split(".")[-1].split("(")[0] for decorator in node.decorator_list}
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    parameters = {a.arg: ast.unparse(a.annotation) if a.annotation else "" for a in arguments}
    parameters.pop("self", None)
    parameters.pop("cls", None)
    with_shape = {a.arg for a in arguments if SHAPE.search(lines[a.lineno - 1].partition("#")[2])}
    return Documented(
        f"{place}:{node.name}",
        is_public and not node.name.startswith("_"),
        bool(decorators & {"override", "overload", "setter"}),
        parameters,
        frozenset(with_shape),
        _docstring(node),
    )


def _docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return inspect.cleandoc(ast.get_docstring(node, clean=False) or "")


def main() -> None:
    """Print entries drawn by a seed."""
    parser = argparse.ArgumentParser(prog="python -m tests.docs.docstrings", description=__doc__)
    parser.add_argument("--draw", type=int, default=30, help="number of entries (default: 30)")
    parser.add_argument("--seed", type=int, default=16, help="seed of the draw (default: 16)")
    options = parser.parse_args()
    entries = [(item.place, entry) for item in documented() for entry in item.entries()]
    for place, entry in random.Random(options.seed).sample(entries, options.draw):
        print(f"{place}: {entry.section}: {entry.name}: {entry.text}")


if __name__ == "__main__":
    main()
