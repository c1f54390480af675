"""Stopping before time: a signal to any rank, agreed on by all at the end of a step.

SLURM sends SIGUSR1 ahead of a time limit or a preemption (`--signal`), SIGTERM when it ends a job, a terminal SIGINT for Ctrl-C. A
handler only notes it, so that neither the first signal nor a second one interrupts a step or a checkpoint; a second Ctrl-C alone does.
"""

import contextlib
import os
import signal
from collections.abc import Iterator

import torch
import torch.distributed as dist

from rcm_megatron.errors import UserError
from rcm_megatron.platform.device import this_device

PREEMPTED = 85
"""Exit status of a run that was told to stop and has saved a checkpoint: start it again."""

INTERRUPTED = 130
"""Exit status of a process that a second Ctrl-C ended, or one before the first step: what a shell gives for SIGINT."""

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class Preempted(UserError):
    """The run stopped before its end, because a signal asked for it; a checkpoint of the last step is on disk."""

    status = PREEMPTED


class StopRequest:
    """Whether this run was asked to stop."""

    def __init__(self) -> None:
        self.noted = False
        """A signal has reached this rank."""
        self._interrupts = 0

    def agreed(self) -> bool:
        """Whether a signal has reached any rank: one answer on all. Call it on all ranks, at the end of a step."""
        noted = torch.tensor(int(self.noted), device=this_device())
        dist.all_reduce(noted, op=dist.ReduceOp.MAX)
        return bool(noted)

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Note SIGNALS instead of dying of them. Main thread only.

        They stay ignored afterwards, but a second Ctrl-C: a launcher sends SIGTERM to all ranks when the first has left, and the others
        are to keep their own exit status.
        """
        for number in SIGNALS:
            signal.signal(number, self._note)
            signal.siginterrupt(number, False)  # system calls of other threads (NCCL, DALI) go on
        try:
            yield
        finally:
            for number in SIGNALS:
                if number != signal.SIGINT:
                    signal.signal(number, signal.SIG_IGN)

    def _note(self, number, frame) -> None:
        again = number == signal.SIGINT or "TORCHELASTIC_RUN_ID" in os.environ
        if self._interrupts and again:  # torchrun passes the first Ctrl-C on, and makes SIGTERM of the second
            os._exit(INTERRUPTED)  # nothing waits for threads, other ranks or a file server
        if number == signal.SIGINT:
            self._interrupts += 1
            os.write(2, b"\nCtrl-C: the step is finished and a checkpoint saved; Ctrl-C again ends at once\n")
        self.noted = True
