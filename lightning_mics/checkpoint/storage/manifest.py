"""The manifest: the list of a checkpoint's files with their sizes and checksums, by which it is complete or corrupted.

It is the last file that is written: see [Note: How a checkpoint becomes visible]. A checkpoint is corrupted if a file
of the list is missing, shorter or altered, and the error names the file. A file in a store whose ETag is unchanged is
not read again; a copy elsewhere, which has another ETag, is. Files of tensors need not be read for that: they are
checked block by block as they are loaded (:mod:`~lightning_mics.checkpoint.storage.blocks`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import Any

from lightning_mics.checkpoint.errors import DamagedCheckpointError
from lightning_mics.checkpoint.storage.blocks import are_checksums
from lightning_mics.checkpoint.storage.path import StoragePath, size_and_etag
from lightning_mics.checkpoint.storage.progress import no_progress

MANIFEST_FILE = "manifest.json"
FORMATS = (1, 2)  # 2 has checksums of blocks
SHARDS = ".distcp"  # how the names of files end that are read in parts

_CHUNK_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """The facts of a file when it was written.

    Attributes:
        size_bytes: Length of the file.
        sha256: Checksum of the file, as ``sha256sum`` prints it.
        blocks: Checksums of its blocks; None in a manifest of an earlier version.
        etag: ETag of the file in an object store, or None.
    """

    size_bytes: int
    sha256: str
    blocks: str | None = None
    etag: str | None = None

    @classmethod
    def of(cls, file: StoragePath, *, advance: Callable[[int], object] = no_progress) -> FileFacts:
        """Read the facts of a file, without its ETag and the checksums of its blocks.

        Args:
            file: Path or URL of the file.
            advance: Function to call with the number of bytes of each read.
        """
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
                advance(len(chunk))
            return cls(size_bytes=stream.tell(), sha256=digest.hexdigest())

    def are_facts(self) -> bool:
        """Whether the types are right: a manifest may come from anywhere."""
        strings = isinstance(self.sha256, str) and isinstance(self.etag, str | None)
        if not strings or not isinstance(self.size_bytes, int):
            return False
        return self.blocks is None or are_checksums(self.blocks, size_bytes=self.size_bytes)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The files of one checkpoint.

    Attributes:
        files: Facts of the files, by name inside their folder.
        world_size: Number of ranks that wrote the checkpoint.
        saved: Time of saving in UTC, in ISO 8601.
        folder: Name of the folder of the files, beside the manifest; "" if they are beside the manifest themselves.
    """

    files: Mapping[str, FileFacts]
    world_size: int
    saved: str
    folder: str = ""

    @classmethod
    def now(cls, files: Mapping[str, FileFacts], *, world_size: int) -> Manifest:
        """Make the manifest of files that have just been written.

        Args:
            files: Facts of the files, by name.
            world_size: Number of ranks that have written them.
        """
        return cls(files=files, world_size=world_size, saved=datetime.now(timezone.utc).isoformat(timespec="seconds"))

    def write(self, path: Path) -> None:
        """Write the manifest into the directory ``path``."""
        (path / MANIFEST_FILE).write_text(self.text())

    @classmethod
    def read(cls, path: StoragePath) -> Manifest:
        """Read the manifest in a checkpoint's directory.

        Raises:
            DamagedCheckpointError: If it is missing, or is not a manifest.
        """
        try:
            text = (path / MANIFEST_FILE).read_text()
            manifest = cls._parse(json.loads(text))
            if text != manifest.text():
                raise ValueError("it was altered")
        except FileNotFoundError:
            raise DamagedCheckpointError(f"checkpoint {path} is corrupted: {MANIFEST_FILE} is missing") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedCheckpointError(f"checkpoint {path} is corrupted: {MANIFEST_FILE}: {error!r}") from None
        return manifest

    def content(self, path: StoragePath) -> StoragePath:
        """The folder that holds the files of the checkpoint at ``path``."""
        return path / self.folder if self.folder else path

    def is_checked_as_read(self, name: str) -> bool:
        """Whether whoever loads a part of the file ``name`` checks it at the same time."""
        return name.endswith(SHARDS) and self.files[name].blocks is not None

    def problems(
        self,
        path: StoragePath,
        names: Iterable[str] | None = None,
        *,
        before_loading: bool = False,
        advance: Callable[[int], object] = no_progress,
    ) -> list[str]:
        """Compare files with the manifest.

        Args:
            path: Directory of the checkpoint.
            names: Names of the files; None for all.
            before_loading: Whether files that are checked as they are read are only measured.
            advance: Function to call with the number of bytes of each read.

        Returns:
            A few words for each file that is missing, cut short or altered.
        """
        return [
            f"{name} {problem}"
            for name in (self.files if names is None else names)
            if (
                problem := _problem(
                    self.content(path) / name,
                    self.files[name],
                    advance,
                    measured=before_loading and self.is_checked_as_read(name),
                )
            )
            is not None
        ]

    def text(self) -> str:
        """The content of the manifest's file."""
        files = {name: _without_none(asdict(facts)) for name, facts in self.files.items()}
        with_blocks = any(facts.blocks is not None for facts in self.files.values())
        content = {"format": FORMATS[with_blocks], "saved": self.saved, "world_size": self.world_size, "files": files}
        if self.folder:
            content["folder"] = self.folder
        checksum = hashlib.sha256(json.dumps(content).encode()).hexdigest()  # of the manifest itself
        return json.dumps({**content, "sha256": checksum}, indent=1) + "\n"

    @classmethod
    def _parse(cls, content: Any) -> Manifest:
        if content["format"] not in FORMATS:
            raise ValueError(f"format {content['format']!r} is not supported; this version reads formats {FORMATS}")
        files = {name: FileFacts(**facts) for name, facts in content["files"].items()}
        for name, facts in files.items():
            if not (_is_plain(name) and facts.are_facts()):
                raise ValueError(f"{name!r} with {facts} is not a file of a checkpoint")
        folder = content.get("folder", "")
        if folder and not _is_plain(folder):
            raise ValueError(f"{folder!r} is not a folder of a checkpoint")
        world_size, saved = int(content["world_size"]), str(content["saved"])
        return cls(files=files, world_size=world_size, saved=saved, folder=folder)


def raise_if_corrupted(path: StoragePath, problems: Sequence[str]) -> None:
    """Raise an error if there are problems.

    Args:
        path: Directory of the checkpoint.
        problems: Problems from :meth:`Manifest.problems`.

    Raises:
        DamagedCheckpointError: If there are any; the message names the first three.
    """
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise DamagedCheckpointError(f"checkpoint {path} is corrupted: {', '.join(problems[:3])}{more}")


def _problem(file: StoragePath, written: FileFacts, advance: Callable[[int], object], *, measured: bool) -> str | None:
    try:
        size_bytes, etag = size_and_etag(file)
        if size_bytes != written.size_bytes:
            return f"has {size_bytes} of {written.size_bytes} bytes"
        if measured or (etag is not None and etag == written.etag):
            return None
        same = FileFacts.of(file, advance=advance).sha256 == written.sha256
        return None if same else "was altered: its checksum is another"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def _is_plain(name: Any) -> bool:
    """Whether ``name`` is a name inside the checkpoint's folder."""
    return isinstance(name, str) and name == PurePosixPath(name).name and name not in ("", "..")


def _without_none(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if value is not None}
