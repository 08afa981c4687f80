"""Errors that say which weights were used in a way that sharded training cannot serve, where, and what to do."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

MIXED = "got mixed torch.Tensor and DTensor"
FREED = ("storage of size 0", "requiring a storage size")
FRAMEWORKS = ("torch", "lightning", "lightning_fabric", "pytorch_lightning", "accelerate", "transformers")

_paths = sysconfig.get_paths()
_not_users = (
    *(f"{Path(_paths['purelib'], name)}/" for name in FRAMEWORKS),
    f"{Path(__file__).parents[2]}/",
    f"{_paths['stdlib']}/",
    "<",
)


@contextmanager
def described_errors() -> Iterator[None]:
    """Replace torch's errors about sharded and freed weights by ones that say what to do.

    Raises:
        RuntimeError: In place of torch's.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if MIXED in text:
            raise mixed(text, names=[], place=_line(_frames(error.__traceback__))) from error
        if all(part in text for part in FREED):
            raise freed(_line(_frames(error.__traceback__))) from error
        raise


def mixed(text: str, *, names: Sequence[str], place: str = "") -> RuntimeError:
    """The error of an operation that mixes sharded and unsharded tensors.

    Args:
        text: Message of torch, which begins with the name of the operation.
        names: Names of the sharded tensors among the operands, such as "parameter 'blocks.1.up.weight'".
        place: Line of the user's code; empty for the one that runs now.
    """
    operation = text.split()[0].rstrip(":").removesuffix(".default")
    subject = " and ".join(names) + ", sharded," if names else "a sharded tensor"
    return RuntimeError(
        f"{place or _line(_running())}: {operation} changes or combines {subject} with an unsharded tensor, which only "
        "its own rows could take; use `parameter.full_tensor()` on all ranks, or call the module that holds it"
    )


def freed(place: str) -> RuntimeError:
    """The error of a backward that needs weights which were freed after an earlier use.

    Args:
        place: Line of the user's code.
    """
    return RuntimeError(
        f"{place}: a backward needs weights of a block outside of the block's own backward, where they are freed: "
        "return the tensor that the loss is made of from the block's forward, do not keep gathered parameters beyond "
        'it, or set cache_parameters="rank", which keeps them until the optimizer\'s step'
    )


def _running() -> list[tuple[str, int]]:
    frame: FrameType | None = sys._getframe(1)
    lines = []
    while frame is not None:
        lines.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    return lines


def _frames(traceback: TracebackType | None) -> list[tuple[str, int]]:
    """The lines of a traceback, innermost first, and those that run now."""
    lines: list[tuple[str, int]] = []
    while traceback is not None:
        lines.insert(0, (traceback.tb_frame.f_code.co_filename, traceback.tb_lineno))
        traceback = traceback.tb_next
    return lines + _running()


def _line(lines: Any) -> str:
    """The innermost line that is neither torch's, nor a framework's, nor this package's, as "file.py:12"."""
    users = (f"{name}:{line}" for name, line in lines if not name.startswith(_not_users))
    return next(users, "unknown line")
