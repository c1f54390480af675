"""One run at a time in an output folder: a job that was submitted twice would write over its own checkpoints and metrics."""

import contextlib
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from rcm_megatron.errors import InputError
from rcm_megatron.parallel.broadcast import computed_once
from rcm_megatron.platform.device import this_device

log = logging.getLogger(__name__)

LOCK_FILE = "run.lock"
PATIENCE = 150.0
"""Seconds in which the run before may end, or a file server notice that its node is dead (NFS takes 90)."""


@contextlib.contextmanager
def run_lock(folder: Path, *, patience: float | None = None) -> Iterator[None]:
    """Hold ``folder`` while a run is in it; call it on all ranks. However rank 0's process ends, the lock goes with it.

    Raises InputError on all ranks if another process holds it for longer than ``patience`` seconds (PATIENCE).
    """
    held: list[TextIO] = []

    def take() -> Tensor:
        held.append(_locked(folder / LOCK_FILE, PATIENCE if patience is None else patience))
        return torch.zeros(())

    computed_once(take, device=this_device())
    try:
        yield
    finally:
        for file in held:
            file.close()


def _locked(path: Path, patience: float) -> TextIO:
    """The open file, locked, with who holds it as its content."""
    file = path.open("a+")  # to be written: NFS locks nothing else
    deadline = time.monotonic() + patience
    while not _lock(file):
        if time.monotonic() > deadline:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise InputError(
                f"got output_dir {path.parent}, in which {owner} is training; need a folder of this run's own; "
                "fix: end that run, or set output_dir to another folder"
            )
        time.sleep(min(1.0, patience / 4))
    with contextlib.suppress(OSError):  # a full disk: the name is only for messages
        file.truncate(0)
        file.write(_this_process())
        file.flush()
    return file


def _lock(file: TextIO) -> bool:
    """Whether there is no reason to wait; a file system without locks is said to be one."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        log.warning("%s cannot be locked (%s): nothing keeps a second run out of its folder", file.name, error.strerror)
    return True


def _this_process() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    what = f"process {os.getpid()} of {socket.gethostname()}"
    return f"SLURM job {job} ({what})" if job else what
