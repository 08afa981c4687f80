"""Paths of checkpoints: paths on a file system, and URLs of stores that fsspec has a driver for.

Both are used as ``pathlib`` paths; the functions here know the differences.
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
    """Parse a path or URL that a user has given.

    Args:
        given: A path, which may begin with ``~``, or a URL such as ``s3://bucket/folder``. The driver finds the store's
            endpoint and credentials in its own environment variables and files.

    Raises:
        ValueError: If fsspec does not know the URL's protocol, or the URL has lost a slash.
        ImportError: If the driver of the protocol is not installed.
    """
    if isinstance(given, Path):
        given = str(given)
    cut = re.match(r"(\w{2,}):/(?!/)", given) if isinstance(given, str) else None
    if cut:
        raise ValueError(
            f"{given!r} has lost a slash, as URLs do that are converted to a Path; pass {cut[1]}://... as a str"
        )
    if isinstance(given, str) and "://" not in given:
        return Path(given).expanduser()
    path = UPath(given)
    try:
        path.fs  # noqa: B018  # finds and loads the driver
    except ImportError as missing:
        raise ImportError(f"{given} needs a driver of fsspec that is not installed: {missing}") from missing
    return Path(path.path) if path.protocol in ("file", "local") else path


def is_local(path: StoragePath) -> bool:
    """Whether ``path`` is on a file system, where a rename is atomic."""
    return isinstance(path, Path)


def has_folders(path: StoragePath) -> bool:
    """Whether folders must be made before files; in a bucket they are only prefixes of names."""
    return not isinstance(path, CloudPath)


def forget_listings(path: StoragePath) -> None:
    """Drop the driver's cached listings, since other ranks may have changed files."""
    if isinstance(path, UPath):
        path.fs.invalidate_cache()


def exists(path: StoragePath) -> bool:
    """Whether ``path`` exists. A store that does not answer is an error, where fsspec's own methods return False."""
    if isinstance(path, Path):
        return path.exists()
    try:
        path.fs.info(path.path)
    except FileNotFoundError:
        return False
    return True


def size_and_etag(file: StoragePath) -> tuple[int, str | None]:
    """The length of ``file`` in bytes, and its ETag if its store has ETags."""
    if isinstance(file, Path):
        return file.stat().st_size, None
    facts: dict[str, Any] = file.fs.info(file.path)
    return int(facts["size"]), facts.get("ETag") or facts.get("etag") or None
