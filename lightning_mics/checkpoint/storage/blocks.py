"""Checksums of the blocks of a file, so that each byte is checked as it is read, and read once.

A file's manifest entry has a CRC-32 for each MiB. Whoever reads a part of the file reads the blocks that hold it, and
values of a block that was altered are never returned. Reading a whole file for its checksum first would read it twice.
"""

from __future__ import annotations

import io
import re
import zlib
from collections import OrderedDict
from typing import Any

from lightning_mics.checkpoint.errors import DamagedCheckpointError

BLOCK_BYTES = 2**20
AT_ONCE_BLOCKS = 8  # in one read
RECENT_BLOCKS = 4  # first and last ones of reads: torch reads the end of a value, its beginning, and then all of it

_DIGITS = 8  # of a CRC-32 in hexadecimal


class BlockChecksums:
    """The checksums of a file that is written from its beginning to its end."""

    def __init__(self) -> None:
        self._complete: list[str] = []
        self._crc = 0
        self._filled_bytes = 0  # of the block that is being written

    def update(self, content: Any) -> None:
        """Add the bytes of ``content``, which follow those before it."""
        left = memoryview(content).cast("B")
        while left.nbytes:
            of_block = left[: BLOCK_BYTES - self._filled_bytes]
            self._crc = zlib.crc32(of_block, self._crc)
            self._filled_bytes += of_block.nbytes
            if self._filled_bytes == BLOCK_BYTES:
                self._complete.append(_in_digits(self._crc))
                self._crc = self._filled_bytes = 0
            left = left[of_block.nbytes :]

    def text(self) -> str:
        """The checksums so far: eight hexadecimal digits for each block."""
        return "".join(self._complete) + (_in_digits(self._crc) if self._filled_bytes else "")


def are_checksums(text: Any, *, size_bytes: int) -> bool:
    """Whether ``text`` can be the checksums of a file: a manifest may come from anywhere.

    Args:
        text: What may be from :meth:`BlockChecksums.text`.
        size_bytes: Length of the file.
    """
    blocks = -(-size_bytes // BLOCK_BYTES)
    return isinstance(text, str) and re.fullmatch(f"[0-9a-f]{{{_DIGITS * blocks}}}", text) is not None


class CheckedFile(io.RawIOBase):
    """A file whose blocks are checked as they are read, from any position.

    Args:
        file: Stream of the file; closed by whoever has opened it.
        checkpoint: Path or URL of the checkpoint, in errors.
        name: Name of the file, in errors.
        size_bytes: Length of the file when it was written.
        checksums: From :meth:`BlockChecksums.text`.

    Attributes:
        failure: Error of a block that was altered or of a read, or None. torch.load hides it.
    """

    def __init__(self, file: Any, *, checkpoint: Any, name: str, size_bytes: int, checksums: str) -> None:
        super().__init__()
        self.failure: Exception | None = None
        self._file = file
        self._words = f"checkpoint {checkpoint} is corrupted: {name}"
        self._size_bytes = size_bytes
        self._checksums = checksums
        self._position = 0
        self._recent: OrderedDict[int, bytes] = OrderedDict()  # blocks by number, the oldest first
        self._scratch = bytearray()

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position; returns it.

        Args:
            offset: Distance in bytes.
            whence: Where it begins: ``io.SEEK_SET``, ``io.SEEK_CUR`` or ``io.SEEK_END``.
        """
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size_bytes}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` from the position on; returns the number of bytes, which is less only at the end of the file.

        Raises:
            DamagedCheckpointError: If a block was altered.
            OSError: If the file cannot be read.
        """
        target = memoryview(buffer).cast("B")
        target = target[: max(0, self._size_bytes - self._position)]
        begin, end = self._position, self._position + target.nbytes
        ends = (begin // BLOCK_BYTES, (end - 1) // BLOCK_BYTES)
        try:
            while self._position < end:
                start, content = self._blocks(self._position // BLOCK_BYTES, ends)
                there = content[self._position - start : end - start]
                target[self._position - begin : self._position - begin + len(there)] = there
                self._position += len(there)
        except Exception as failure:
            self.failure = failure
            raise
        return target.nbytes

    def _blocks(self, first: int, ends: tuple[int, int]) -> tuple[int, memoryview]:
        """Some blocks from ``first`` on, of a read with these first and last ones; before them, their first byte."""
        start = first * BLOCK_BYTES
        if first in self._recent:
            self._recent.move_to_end(first)
            return start, memoryview(self._recent[first])
        count = 1
        while count < AT_ONCE_BLOCKS and first + count <= ends[1] and first + count not in self._recent:
            count += 1
        if len(self._scratch) < count * BLOCK_BYTES:
            self._scratch = bytearray(count * BLOCK_BYTES)
        content = memoryview(self._scratch)[: min(count * BLOCK_BYTES, self._size_bytes - start)]
        self._read(start, content)
        for number in range(first, first + count):
            block = content[(number - first) * BLOCK_BYTES :][:BLOCK_BYTES]
            if _in_digits(zlib.crc32(block)) != self._checksums[number * _DIGITS :][:_DIGITS]:
                raise DamagedCheckpointError(
                    f"{self._words} was altered: its checksum is another; other tensors may be loaded already, so load "
                    "another checkpoint before you go on"
                )
            if number in ends:
                self._recent[number] = bytes(block)
        while len(self._recent) > RECENT_BLOCKS:
            self._recent.popitem(last=False)
        return start, content

    def _read(self, start: int, content: memoryview) -> None:
        self._file.seek(start)
        done = 0
        while done < content.nbytes:
            count = self._file.readinto(content[done:])
            if not count:
                raise DamagedCheckpointError(f"{self._words} has {start + done} of {self._size_bytes} bytes")
            done += count


def _in_digits(crc: int) -> str:
    return f"{crc:0{_DIGITS}x}"
