"""Several jobs in one process, as a sweep on one machine runs them (``python train.py -m ...``)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def one_job(overrides: Sequence[str]) -> Iterator[None]:
    """Leave the process as the job has found it, so that the next one can be started in it.

    Args:
        overrides: Those of this job alone. Lightning starts the other ranks by the command line, and that of a sweep
            would have each of them run the whole sweep.
    """
    arguments, environment = sys.argv[1:], dict(os.environ)
    sys.argv[1:] = overrides
    try:
        yield
    finally:
        sys.argv[1:] = arguments
        os.environ.clear()
        os.environ.update(environment)
        if dist.is_initialized():
            dist.destroy_process_group()
