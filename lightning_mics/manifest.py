"""What makes a checkpoint whole: the list of its files with their sizes and checksums.

It is the last file that is written. A checkpoint without a file of the list, or with one that is shorter or other than
it was, is damaged, and the error says which file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

MANIFEST_FILE = "manifest.json"
FORMAT = 1
_CHUNK_BYTES = 2**20


class DamagedCheckpointError(RuntimeError):
    """A checkpoint has lost a file or a part of one, or a file is not what was written."""


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """What a file was when it was written.

    Attributes:
        size_bytes: Its length.
        sha256: Its checksum, as ``sha256sum`` prints it.
    """

    size_bytes: int
    sha256: str

    @classmethod
    def of(cls, file: Path) -> FileFacts:
        """Read ``file``."""
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
            return cls(size_bytes=stream.tell(), sha256=digest.hexdigest())


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The files of one checkpoint.

    Attributes:
        files: By name inside the checkpoint's directory.
        world_size: Ranks that wrote it.
        saved: When, in UTC, as ISO 8601 has it.
    """

    files: Mapping[str, FileFacts]
    world_size: int
    saved: str

    @classmethod
    def now(cls, files: Mapping[str, FileFacts], *, world_size: int) -> Manifest:
        """The manifest of files that have just been written."""
        return cls(files=files, world_size=world_size, saved=datetime.now(timezone.utc).isoformat(timespec="seconds"))

    def write(self, folder: Path) -> None:
        """Write it into a checkpoint's directory."""
        (folder / MANIFEST_FILE).write_text(self._text())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest in a checkpoint's directory.

        Raises:
            DamagedCheckpointError: If it is missing, or is no manifest.
        """
        try:
            text = (folder / MANIFEST_FILE).read_text()
            manifest = cls._parse(json.loads(text))
            if text != manifest._text():
                raise ValueError("it was altered")
        except FileNotFoundError:
            raise DamagedCheckpointError(f"checkpoint {folder} is damaged: {MANIFEST_FILE} is missing") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedCheckpointError(f"checkpoint {folder} is damaged: {MANIFEST_FILE}: {error!r}") from None
        return manifest

    def problems(self, folder: Path, names: Iterable[str] | None = None) -> list[str]:
        """What is wrong with these files, or all, in a few words each; reads them."""
        return [
            f"{name} {problem}"
            for name in (self.files if names is None else names)
            if (problem := _problem(folder / name, self.files[name])) is not None
        ]

    def _text(self) -> str:
        files = {name: asdict(facts) for name, facts in self.files.items()}
        content = {"format": FORMAT, "saved": self.saved, "world_size": self.world_size, "files": files}
        checksum = hashlib.sha256(json.dumps(content).encode()).hexdigest()  # of what the others are checked with
        return json.dumps({**content, "sha256": checksum}, indent=1) + "\n"

    @classmethod
    def _parse(cls, content: Any) -> Manifest:
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r} is not the one that this version reads, {FORMAT}")
        files = {name: FileFacts(**facts) for name, facts in content["files"].items()}
        for name, facts in files.items():
            if name != Path(name).name or not isinstance(facts.size_bytes, int) or not isinstance(facts.sha256, str):
                raise ValueError(f"{name!r} with {facts} is no file of a checkpoint")
        return cls(files=files, world_size=int(content["world_size"]), saved=str(content["saved"]))


def _problem(file: Path, written: FileFacts) -> str | None:
    try:
        size_bytes = file.stat().st_size
        if size_bytes != written.size_bytes:
            return f"has {size_bytes} of {written.size_bytes} bytes"
        return None if FileFacts.of(file) == written else "was altered: its checksum is another"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
