"""Files that are named by paths and patterns."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path


def matching_files(patterns: str | Sequence[str], *, key: str) -> list[Path]:
    """The files of ``patterns`` (paths, or patterns with ``*`` and ``**``), each once, sorted.

    Args:
        patterns: One or several paths or patterns.
        key: Key of the configuration that holds them, for errors.

    Raises:
        FileNotFoundError: If a pattern matches no file.
        ValueError: If there is no pattern.
    """
    given = [patterns] if isinstance(patterns, str) else list(patterns)
    if not given:
        raise ValueError(f"{key} is empty; name at least one file or pattern, as {key}='corpus/*.txt'")
    return sorted({path for pattern in given for path in _matches(pattern, key=key)})


def file_facts(paths: Sequence[Path]) -> list[list[str | int]]:
    """Path, size in bytes and modification time in nanoseconds of each file, to detect changes."""
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


def _matches(pattern: str, *, key: str) -> list[Path]:
    full = Path(pattern).expanduser().absolute()
    files = [full] if full.is_file() else [Path(found) for found in glob.glob(str(full), recursive=True)]
    files = [path for path in files if path.is_file()]
    if not files:
        hint = f"it is a folder: use {pattern}/**/*.txt" if full.is_dir() else f"looked in {Path.cwd()}"
        raise FileNotFoundError(f"{key}={pattern} matches no file; {hint}")
    return files
