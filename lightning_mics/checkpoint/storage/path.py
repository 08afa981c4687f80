"""Paths to where checkpoints are: a path on a file system, or the URL of a store that fsspec has a driver for.

Both are used as ``pathlib`` paths. What only one of them can do is asked here.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, TypeAlias

from upath import UPath
from upath.implementations.cloud import CloudPath

StoragePath: TypeAlias = Path | UPath


def storage_path(given: str | os.PathLike[str] | UPath) -> StoragePath:
    """The path that a user means by ``given``.

    Args:
        given: A path, or a URL such as ``s3://bucket/folder``. Where the store is and who may use it is for the driver
            to find, in its environment variables and files.

    Raises:
        ValueError: If fsspec knows no such kind of URL, or it has lost a slash.
        ImportError: If the driver for it is not installed.
    """
    if isinstance(given, Path):
        given = str(given)
    cut = re.match(r"(\w{2,}):/(?!/)", given) if isinstance(given, str) else None
    if cut:
        raise ValueError(f"{given!r} has lost a slash, as a URL does that is made a Path; pass {cut[1]}://... as a str")
    if isinstance(given, str) and "://" not in given:
        return Path(given)
    path = UPath(given)
    try:
        path.fs  # noqa: B018  # finds and loads the driver
    except ImportError as missing:
        raise ImportError(f"{given} needs a driver of fsspec that is not installed: {missing}") from missing
    return Path(path.path) if path.protocol in ("file", "local") else path


def is_local(path: StoragePath) -> bool:
    """Whether ``path`` is on a file system, where a rename is all or nothing."""
    return isinstance(path, Path)


def has_folders(path: StoragePath) -> bool:
    """Whether folders must be made before files are; in a bucket they are the beginnings of names only."""
    return not isinstance(path, CloudPath)


def forget_listings(path: StoragePath) -> None:
    """Look anew at what other ranks may have changed: drivers keep listings."""
    if isinstance(path, UPath):
        path.fs.invalidate_cache()


def exists(path: StoragePath) -> bool:
    """Whether there is anything. A store that does not answer is an error, where fsspec's own methods would say no."""
    if isinstance(path, Path):
        return path.exists()
    try:
        path.fs.info(path.path)
    except FileNotFoundError:
        return False
    return True


def size_and_etag(file: StoragePath) -> tuple[int, str | None]:
    """The length of ``file`` in bytes, and the name that its store gives to its content, if it gives one."""
    if isinstance(file, Path):
        return file.stat().st_size, None
    facts: dict[str, Any] = file.fs.info(file.path)
    return int(facts["size"]), facts.get("ETag") or facts.get("etag") or None
