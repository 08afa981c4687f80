"""What makes a checkpoint whole: the list of its files with their sizes and checksums.

It is the last file that is written: see [Note: How a checkpoint becomes visible]. A checkpoint without a file of the
list, or with one that is shorter or other than it was, is damaged, and the error says which file. Where a store names
contents (its ETag), a file whose name is as it was is not read again; a copy elsewhere, which has another name, is.
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
from lightning_mics.checkpoint.progress import unseen
from lightning_mics.checkpoint.storage.path import StoragePath, size_and_etag

MANIFEST_FILE = "manifest.json"


FORMAT = 1


_CHUNK_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """What a file was when it was written.

    Attributes:
        size_bytes: Its length.
        sha256: Its checksum, as ``sha256sum`` prints it.
        etag: What an object store called its content.
    """

    size_bytes: int
    sha256: str
    etag: str | None = None

    @classmethod
    def of(cls, file: StoragePath, *, advance: Callable[[int], object] = unseen) -> FileFacts:
        """Read ``file``; ``advance`` is told of bytes as they are read."""
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
                advance(len(chunk))
            return cls(size_bytes=stream.tell(), sha256=digest.hexdigest())

    def are_facts(self) -> bool:
        """Whether they can be what was written: they may come from anywhere."""
        strings = isinstance(self.sha256, str) and isinstance(self.etag, str | None)
        return isinstance(self.size_bytes, int) and strings


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The files of one checkpoint.

    Attributes:
        files: By name inside the checkpoint's directory.
        world_size: Ranks that wrote it.
        saved: When, in UTC, as ISO 8601 has it.
        folder: Where the files are, if not beside the manifest: the name of a folder beside it.
    """

    files: Mapping[str, FileFacts]
    world_size: int
    saved: str
    folder: str = ""

    @classmethod
    def now(cls, files: Mapping[str, FileFacts], *, world_size: int) -> Manifest:
        """The manifest of files that have just been written."""
        return cls(files=files, world_size=world_size, saved=datetime.now(timezone.utc).isoformat(timespec="seconds"))

    def write(self, path: Path) -> None:
        """Write it into a checkpoint's directory."""
        (path / MANIFEST_FILE).write_text(self.text())

    @classmethod
    def read(cls, path: StoragePath) -> Manifest:
        """The manifest in a checkpoint's directory.

        Raises:
            DamagedCheckpointError: If it is missing, or is no manifest.
        """
        try:
            text = (path / MANIFEST_FILE).read_text()
            manifest = cls._parse(json.loads(text))
            if text != manifest.text():
                raise ValueError("it was altered")
        except FileNotFoundError:
            raise DamagedCheckpointError(f"checkpoint {path} is damaged: {MANIFEST_FILE} is missing") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedCheckpointError(f"checkpoint {path} is damaged: {MANIFEST_FILE}: {error!r}") from None
        return manifest

    def content(self, path: StoragePath) -> StoragePath:
        """The folder that holds the files of the checkpoint at ``path``."""
        return path / self.folder if self.folder else path

    def problems(
        self, path: StoragePath, names: Iterable[str] | None = None, *, advance: Callable[[int], object] = unseen
    ) -> list[str]:
        """What is wrong with these files of the checkpoint at ``path``, or all, in a few words each."""
        return [
            f"{name} {problem}"
            for name in (self.files if names is None else names)
            if (problem := _problem(self.content(path) / name, self.files[name], advance)) is not None
        ]

    def text(self) -> str:
        """What is written."""
        files = {name: _without_nothing(asdict(facts)) for name, facts in self.files.items()}
        content = {"format": FORMAT, "saved": self.saved, "world_size": self.world_size, "files": files}
        if self.folder:
            content["folder"] = self.folder
        checksum = hashlib.sha256(json.dumps(content).encode()).hexdigest()  # of what the others are checked with
        return json.dumps({**content, "sha256": checksum}, indent=1) + "\n"

    @classmethod
    def _parse(cls, content: Any) -> Manifest:
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r} is not the one that this version reads, {FORMAT}")
        files = {name: FileFacts(**facts) for name, facts in content["files"].items()}
        for name, facts in files.items():
            if not (_is_plain(name) and facts.are_facts()):
                raise ValueError(f"{name!r} with {facts} is no file of a checkpoint")
        folder = content.get("folder", "")
        if folder and not _is_plain(folder):
            raise ValueError(f"{folder!r} is no folder of a checkpoint")
        world_size, saved = int(content["world_size"]), str(content["saved"])
        return cls(files=files, world_size=world_size, saved=saved, folder=folder)


def _is_plain(name: Any) -> bool:
    """Whether it names something inside of the checkpoint."""
    return isinstance(name, str) and name == PurePosixPath(name).name and name not in ("", "..")


def _without_nothing(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if value is not None}


def refuse_damaged(path: StoragePath, problems: Sequence[str]) -> None:
    """Raise a DamagedCheckpointError that names the first of these :meth:`Manifest.problems`, if there are any."""
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise DamagedCheckpointError(f"checkpoint {path} is damaged: {', '.join(problems[:3])}{more}")


def _problem(file: StoragePath, written: FileFacts, advance: Callable[[int], object]) -> str | None:
    try:
        size_bytes, etag = size_and_etag(file)
        if size_bytes != written.size_bytes:
            return f"has {size_bytes} of {written.size_bytes} bytes"
        if etag is not None and etag == written.etag:
            return None
        same = FileFacts.of(file, advance=advance).sha256 == written.sha256
        return None if same else "was altered: its checksum is another"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
