"""One attempt of a run on real processes, with faults: what a rank does, and a run's folder seen from outside.

`Run.start` forks the ranks (tests/distributed/harness.py), which end together when one of them dies, as torchrun ends them; calling
it again is the restart. Ranks leave two diaries in the run's folder: `clock.jsonl`, when each iteration ended, and `deaths.jsonl`, when
a rank was about to be killed.
"""

import hashlib
import json
import os
import resource
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from tests.distributed.faults import nan_gradient
from tests.distributed.harness import RankError, run_ranks
from tests.distributed.tiny_run import records

LAYOUTS = {
    "dp2": (2, []),
    "tp2": (2, ["parallel.tp=2"]),
    "pp2_dp2": (4, ["parallel.pp=2", "trainer.micro_batch_size=1"]),
}
STEPS, EVERY = 12, 2
"""Iterations of a run, and of them between checkpoints."""
_DISK_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree"}
"""What Python's audit hooks tell of; writes are counted beside them."""


@dataclass(frozen=True, kw_only=True)
class Kill:
    """SIGKILL of one rank, after some seconds, or at the n-th time that it touches the folder of checkpoints."""

    rank: int
    seconds: float | None = None
    disk_event: int | None = None

    def install(self, trainer_folder):
        if dist.get_rank() != self.rank:
            return
        if self.seconds is not None:
            _kill_from_outside(trainer_folder, self.seconds)
        else:
            _watch_disk(lambda count: count == self.disk_event and _die(trainer_folder, os.getpid()))

    def watch(self, trainer):
        """Nothing to do when the trainer is there."""


@dataclass(frozen=True, kw_only=True)
class FullDisk:
    """No room between the ends of two iterations: the file system of the checkpoints is filled up to `room` bytes, or, where there is no
    file system of their own, a file may have `room` bytes at most."""

    first: int
    last: int
    room: int
    own_file_system: bool

    def install(self, trainer_folder):
        """Nothing to do before the trainer is there."""

    def watch(self, trainer):
        folder = Path(trainer.run.output_dir) / "checkpoints"
        _after_each_iteration(trainer, lambda done: self._fill(folder, trainer) if done == self.first else None)
        _after_each_iteration(trainer, lambda done: self._free(folder) if done == self.last else None)
        _after_each_iteration(trainer, lambda done: _note_failed_save(trainer))

    def _fill(self, folder, trainer):
        trainer._report_save()  # what is being written now may take the room that is to be filled
        if not self.own_file_system:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.room, resource.RLIM_INFINITY))
        elif dist.get_rank() == 0:
            found = os.statvfs(folder)
            with open(folder / "ballast", "wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(found.f_bavail * found.f_frsize - self.room, 4096))
        dist.barrier()

    def _free(self, folder):
        if not self.own_file_system:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        elif dist.get_rank() == 0:
            (folder / "ballast").unlink(missing_ok=True)
        dist.barrier()


@dataclass(frozen=True, kw_only=True)
class NanGradient:
    """A NaN in the student's backward of one iteration, on one rank."""

    iteration: int

    def install(self, trainer_folder):
        """Nothing to do before the trainer is there."""

    def watch(self, trainer):
        nan_gradient(trainer, self.iteration)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of an attempt: `error` of the first rank that failed, or `ranks`, a digest and a count of disk events of each."""

    error: str | None = None
    ranks: tuple[tuple[str, int], ...] = ()


@dataclass
class Run:
    """A run's folder, attempts in it, and its diaries."""

    config: Path
    folder: Path
    layout: str
    overrides: list[str] = field(default_factory=list)

    def start(self, *faults, steps=STEPS):
        """An attempt, from the newest checkpoint on."""
        ranks, parallel = LAYOUTS[self.layout]
        fixed = [f"output_dir={self.folder}", f"trainer.stop_after={steps}", f"trainer.checkpoint_every={EVERY}"]
        try:
            results = run_ranks(attempt, ranks, str(self.config), [*parallel, *fixed, *self.overrides], faults)
        except RankError as error:
            return Outcome(error=str(error))
        return Outcome(ranks=tuple(results))

    def deaths(self):
        """Times at which a rank was killed."""
        return [line["time"] for line in _diary(self.folder / "deaths.jsonl")]

    def failed_saves(self):
        """Errors of saves after which the run went on."""
        return {line["error"] for line in _diary(self.folder / "failed_saves.jsonl")}

    def clock(self):
        """[(time, iterations done, whether an attempt began there)]"""
        return [(line["time"], line["done"], line["began"]) for line in _diary(self.folder / "clock.jsonl")]

    def records(self):
        """Metrics of every iteration, without what depends on the machine."""
        return records(self.folder) if (self.folder / "metrics.jsonl").exists() else []


def attempt(config_path, overrides, faults):
    """Train on this rank; (digest of its weights and counters, how often it touched the folder of checkpoints)."""
    from rcm_megatron.platform.megatron import prepare_megatron

    prepare_megatron()
    from rcm_megatron.config import load_config
    from rcm_megatron.parallel.groups import initialize_parallel
    from rcm_megatron.training.trainer import Trainer

    run, touched = load_config(config_path, overrides), [0]
    folder = Path(run.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    _watch_disk(lambda count: touched.__setitem__(0, count))
    for fault in faults:
        fault.install(folder)
    trainer = Trainer(run, initialize_parallel(run.parallel))
    _keep_clock(trainer, folder)
    for fault in faults:
        fault.watch(trainer)
    try:
        trainer.train()
    finally:
        trainer.close()
    return _digest(trainer), touched[0]


def _digest(trainer):
    digest = hashlib.blake2b(repr((trainer.progress, trainer.state.counters)).encode(), digest_size=8)
    for network in trainer.state.trained.values():
        for chunk in network.chunks:
            for parameter in chunk.parameters():
                digest.update(parameter.detach().numpy().tobytes())
    for average in trainer.state.trained["student"].ema.shards:
        digest.update(average.numpy().tobytes())
    return digest.hexdigest()


def _note_failed_save(trainer):
    if trainer.save_error is not None and dist.get_rank() == 0:
        _note(Path(trainer.run.output_dir) / "failed_saves.jsonl", error=trainer.save_error)


def _after_each_iteration(trainer, act):
    iterate = trainer.iterate

    def iterate_and_act():
        iterate()
        act(trainer.progress.iteration)

    trainer.iterate = iterate_and_act


def _keep_clock(trainer, folder):
    if dist.get_rank() == 0:
        clock = folder / "clock.jsonl"
        _note(clock, done=trainer.progress.iteration, began=True)
        _after_each_iteration(trainer, lambda done: _note(clock, done=done, began=False))


def _watch_disk(act):
    """Calls `act` with the count of events in the folder of checkpoints, at each of them."""
    from rcm_megatron.checkpoint.integrity import ChecksummedWriter

    count, write = [0], ChecksummedWriter.write

    def step():
        count[0] += 1
        act(count[0])

    def hook(event, arguments):
        if (
            event in _DISK_EVENTS
            and isinstance(arguments[0], str | os.PathLike)
            and "/checkpoints" in str(arguments[0])
        ):
            step()

    def counted(stream, data):
        step()
        return write(stream, data)

    sys.addaudithook(hook)
    ChecksummedWriter.write = counted


def _kill_from_outside(folder, seconds):
    """A process beside the rank that kills it, whatever it is doing then."""
    rank = os.getpid()
    if os.fork() == 0:
        time.sleep(seconds)
        _die(folder, rank)
        os._exit(0)


def _die(folder, process):
    _note(folder / "deaths.jsonl")
    os.kill(process, signal.SIGKILL)


def _note(path, **values):
    line = json.dumps({"time": time.time(), **values}) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(descriptor, line.encode())
    os.close(descriptor)


def _diary(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
