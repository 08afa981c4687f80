"""Text that exists on every machine: the source files of Python's standard library. Nothing is downloaded."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from recipes.data.sources.local_files import LocalFiles

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests"} | {
    "encodings",
    "pydoc_data",
}  # generated


def stdlib_text() -> LocalFiles:
    """The library's source files as a source of text; a few are old and not in UTF-8."""
    return LocalFiles(files=[str(path) for path in source_files()], encoding_errors="replace", name="stdlib")


def source_files() -> list[Path]:
    """The library's .py files without tests and installed packages, sorted.

    Raises:
        RuntimeError: If there are none, as in a library that is zipped or stripped to bytecode.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in library.rglob("*.py") if not SKIPPED_FOLDERS & set(p.relative_to(library).parts))
    if not files:
        raise RuntimeError(f"found no .py files of the standard library in {library}; use a Python that has them")
    return files
