"""An error that another start would raise again ends the launcher, which would start all ranks again and again.

torchrun starts ranks again whatever has ended them, as often as ``--max-restarts`` says, and nothing that a rank
returns tells it that there is no point in it (torch 2.13). At SIGTERM it ends, with a status other than zero. So a rank
that such an error ends sends it that signal, once the error is in the output; a script that handles the error goes on.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from functools import lru_cache
from types import TracebackType

OTHERS_SECONDS = 1.0  # for the other ranks of the node to report the same error: the launcher ends them as well
PROCESS = "MICS_LAUNCHER_PROCESS"  # for ranks that `warm` forks, which are not children of the launcher


@lru_cache(maxsize=1)
def end_launcher_with_this_rank(launcher: int) -> None:
    """Let an error of this rank that is marked by ``comes_again = True``, and not handled, end its launcher as well.

    Args:
        launcher: Process of torchrun on this node.
    """
    report = sys.excepthook

    def end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        report(kind, error, trace)
        if getattr(error, "comes_again", False):
            print(
                f"in-memory checkpoints: another start of the ranks would end in the same {kind.__name__}, so torchrun "
                f"(process {launcher}) is ended by SIGTERM. To begin anew instead of resuming, start the job with "
                "another MICS_KEEPER_TOKEN",
                file=sys.stderr,
                flush=True,
            )
            time.sleep(OTHERS_SECONDS)
            with suppress(OSError):
                os.kill(launcher, signal.SIGTERM)

    sys.excepthook = end
