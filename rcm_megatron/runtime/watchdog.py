"""Ends a process whose run makes no steps any more, and leaves behind where every thread of it stood.

All ranks finish a step together, so a rank that hangs stops all of them, and the watchdogs of all fire within moments: the file of
the rank that stands elsewhere than the others names the place. A collective's own timeout would end only the ranks that wait.
"""

import faulthandler
import os
import threading
import time
from pathlib import Path

HUNG = 86
"""Exit status of a process that its watchdog ended: start the run again."""

STARTUP_FACTOR = 3
"""Everything before the end of the first step (loading, compilation) may take this many times the timeout."""

LINGER = 3.0
"""Seconds between dump and exit: launchers kill all ranks once one is gone, and the others must have dumped by then."""

LAST_RESORT = 60.0
"""Seconds after which a C thread dumps and ends the process (status 1) if the watchdog could not: somebody holds the interpreter's lock."""


class Watchdog:
    """Watches from its construction until `close`; `beat` says that a step, or a checkpoint, is done."""

    def __init__(self, folder: Path, *, rank: int, timeout: float, last_resort: float = LAST_RESORT) -> None:
        """Stacks go to `folder`/rank_N.txt, NCCL's last collectives to `folder`/nccl_N where torch records them. `timeout` in s."""
        folder.mkdir(parents=True, exist_ok=True)
        self._trace = folder / f"nccl_{rank}"
        self._file = (folder / f"rank_{rank}.txt").open("a")
        self._timeout, self._last_resort = timeout, last_resort
        self._closed = threading.Event()
        self._arm(STARTUP_FACTOR * timeout)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self) -> None:
        """The run goes on: `timeout` seconds more from now."""
        self._arm(self._timeout)

    def close(self) -> None:
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()
        self._file.close()

    def _arm(self, seconds: float) -> None:
        self._allowed, self._deadline = seconds, time.monotonic() + seconds
        faulthandler.dump_traceback_later(seconds + self._last_resort, exit=True, file=self._file)

    def _watch(self) -> None:
        while not self._closed.wait(max(self._deadline - time.monotonic(), 0.0)):
            if time.monotonic() >= self._deadline:
                self._end()

    def _end(self) -> None:
        self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}: no step for {self._allowed:g} s\n")
        self._file.flush()
        faulthandler.dump_traceback(file=self._file, all_threads=True)
        if _records_collectives():
            from torch._C._distributed_c10d import _dump_fr_trace

            self._trace.write_bytes(_dump_fr_trace())  # for torchfrtrace
        time.sleep(LINGER)
        os._exit(HUNG)


def _records_collectives() -> bool:
    """Whether torch's flight recorder is on (launch/slurm/train.sbatch turns it on)."""
    return any(int(os.environ.get(name, "0")) for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"))
