"""What the campaign does to runs: each kind of fault is a generator of trials, and a trial says what came of it."""

import math
import os
import shutil
import subprocess
import tarfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, cycle
from pathlib import Path
from random import Random

import torch

from tests.distributed.tiny_run import write_tiny_run
from tests.faults.attempts import EVERY, LAYOUTS, STEPS, FullDisk, Kill, NanGradient, Run

_MOST_ATTEMPTS = 12
"""Of one run; one that needs more has not survived."""


@dataclass
class Trial:
    """A run that met faults, and what it was compared with."""

    kind: str
    faults: int
    survived: int
    steps_lost: list[int] = field(default_factory=list)
    """Iterations that had to be done again, of each fault."""
    recovery_seconds: list[float] = field(default_factory=list)
    """From a fault until the run stood again where it had been."""
    wrong: int = 0
    """Iterations whose metrics differ from the undisturbed run's in any bit, and 1 more where the final state does."""
    note: str = ""


class Laboratory:
    """The tiny run, its data sets sound and unsound, and undisturbed runs of each layout, done when first asked for."""

    def __init__(self, folder, rng: Random):
        self.folder, self.rng, self._numbers, self._undisturbed = Path(folder), rng, count(), {}
        self.config = write_tiny_run(self.folder)

    def new_run(self, layout, *overrides, background=True):
        overrides = [f"trainer.async_checkpoint={str(background).lower()}", *overrides]
        return Run(self.config, self.folder / f"run{next(self._numbers)}", layout, overrides)

    def undisturbed(self, layout, *overrides, faults=()):
        """(run, outcome) without any kill; `faults` are those that belong to the run, as a NaN in its data."""
        key = (layout, overrides, faults)
        if key not in self._undisturbed:
            run = self.new_run(layout, *overrides)
            outcome = run.start(*faults)
            assert outcome.error is None, outcome.error
            self._undisturbed[key] = (run, outcome)
        return self._undisturbed[key]

    def wrong(self, run, outcome, reference):
        """How many iterations of `run` differ from the reference's, missing ones and the final state included."""
        expected, got = reference[0].records(), run.records()
        differing = sum(a != b for a, b in zip(expected, got, strict=False)) + abs(len(expected) - len(got))
        same_end = [digest for digest, _ in outcome.ranks] == [digest for digest, _ in reference[1].ranks]
        return differing + (not same_end)

    def copy_of_data(self):
        folder = self.folder / f"data{next(self._numbers)}"
        shutil.copytree(self.folder / "data", folder)
        return folder


def recover(run, *faults, attempts=_MOST_ATTEMPTS):
    """Start again until the run has ended well; the last outcome."""
    for _ in range(attempts):
        outcome = run.start(*faults)
        if outcome.error is None:
            break
    return outcome


def losses_and_recoveries(run, times):
    """Of each moment in `times`: iterations that the next attempt did again, and seconds until the run was past it."""
    clock, lost, seconds = run.clock(), [], []
    for moment in times:
        reached = [done for time, done, _ in clock if time <= moment]
        after = [(time, done, began) for time, done, began in clock if time > moment]
        begun = next((done for _, done, began in after if began), None)
        if reached and begun is not None:
            lost.append(max(reached[-1] - begun, 0))
            past = [time for time, done, began in after if done > reached[-1] or (done == STEPS and not began)]
            seconds += [past[0] - moment] if past else []
    return lost, seconds


def kills(lab, *, during_saves):
    """Runs whose ranks are killed again and again, each at another moment; then they may finish."""
    for number, layout in zip(count(), cycle(["dp2", "tp2", "dp2", "tp2", "pp2_dp2"])):
        background = number % 2 == 0
        reference, run = lab.undisturbed(layout), lab.new_run(layout, background=background)
        for _ in range(3):
            rank = lab.rng.randrange(LAYOUTS[layout][0])
            if during_saves:
                fault = Kill(rank=rank, disk_event=lab.rng.randint(1, reference[1].ranks[rank][1]))
            else:
                clock = reference[0].clock()
                fault = Kill(rank=rank, seconds=lab.rng.uniform(0.0, 1.5 + clock[-1][0] - clock[0][0]))
            if run.start(fault).error is None:
                break  # it was through before the moment came
        outcome, deaths = recover(run), run.deaths()
        right = outcome.error is None and (wrong := lab.wrong(run, outcome, reference)) == 0
        lost, seconds = losses_and_recoveries(run, deaths)
        yield Trial(
            kind="kill while saving or resuming" if during_saves else "kill at any moment",
            faults=len(deaths),
            survived=len(deaths) if right else 0,
            steps_lost=lost,
            recovery_seconds=seconds,
            wrong=wrong if outcome.error is None else 0,
            note=outcome.error or "",
        )


def _truncate(path, rng):
    os.truncate(path, rng.randrange(path.stat().st_size))


def _flip_bit(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def torn_checkpoints(lab):
    """A file of the newest checkpoint is cut, changed by a bit, or gone, and the run is started again."""
    stopped = {}
    for harm, layout in zip(cycle([_truncate, _flip_bit, None]), cycle(["dp2", "tp2", "tp2", "dp2", "pp2_dp2"])):
        if layout not in stopped:
            stopped[layout] = lab.new_run(layout)
            assert stopped[layout].start(steps=8).error is None
        run = lab.new_run(layout)
        shutil.copytree(stopped[layout].folder, run.folder)
        newest = run.folder / "checkpoints" / "iter_0000008"
        path = lab.rng.choice([*sorted(newest.iterdir()), newest.parent / "latest"])
        harm(path, lab.rng) if harm else path.unlink()
        outcome = run.start()
        begun = [done for _, done, began in run.clock() if began]
        wrong = lab.wrong(run, outcome, lab.undisturbed(layout)) if outcome.error is None else 0
        back = 8 if path.name == "latest" else 6
        yield Trial(
            kind="torn, changed or missing checkpoint file",
            faults=1,
            survived=int(outcome.error is None and wrong == 0 and begun[-1] == back),
            steps_lost=[8 - begun[-1]],
            recovery_seconds=_time_past(run, 8),
            wrong=wrong,
            note=outcome.error or "",
        )


def _time_past(run, iteration):
    """From the beginning of the newest attempt until it was past `iteration`."""
    clock = run.clock()
    began = [time for time, _, began in clock if began][-1]
    past = [time for time, done, _ in clock if time > began and done > iteration]
    return [past[0] - began] if past else []


@contextmanager
def _small_file_system(folder, size):
    """A tmpfs there, for root; yields whether there is one."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _says_why(error):
    return "RuntimeError(" not in error and ("No space left on device" in error or "File too large" in error)


def full_disks(lab):
    """The disk fills up for two saves and is freed again; or it is full until the end: then the run fails and is started again."""
    for number, layout in zip(count(), cycle(["dp2", "tp2", "pp2_dp2"])):
        reference, until_the_end = lab.undisturbed(layout), number % 3 == 2
        newest = reference[0].folder / "checkpoints" / f"iter_{STEPS:07d}"
        size = sum(path.stat().st_size for path in newest.iterdir())
        run = lab.new_run(layout, background=number % 2 == 0)
        with _small_file_system(run.folder / "checkpoints", 4 * size + 2**20) as own:
            room = lab.rng.randrange(0 if own else 2**15, size // (1 if own else LAYOUTS[layout][0] * 2))
            first = lab.rng.choice([4, 6])
            last = STEPS + 1 if until_the_end else first + 3
            outcome = run.start(FullDisk(first=first, last=last, room=room, own_file_system=own))
            told = bool(run.failed_saves()) and all(map(_says_why, run.failed_saves()))
            if until_the_end:
                told = outcome.error is not None and "WAS NOT SAVED" in outcome.error and _says_why(outcome.error)
                (run.folder / "checkpoints" / "ballast").unlink(missing_ok=True)
                outcome = recover(run)
            begun = [done for _, done, began in run.clock() if began]
            wrong = lab.wrong(run, outcome, reference) if outcome.error is None else 0
        yield Trial(
            kind="full disk while saving" if own else "full disk while saving (limit of file size)",
            faults=1,
            survived=int(told and outcome.error is None and wrong == 0),
            steps_lost=[STEPS - begun[-1] if until_the_end else 0],
            recovery_seconds=_time_past(run, STEPS - 1) if until_the_end else [],
            wrong=wrong,
            note=outcome.error or ("" if told else f"no save failed, or none said why: {run.failed_saves()}"),
        )


def truncated_shards(lab):
    """A shard loses its end: an error that names it, for its manifest says otherwise. `raise`: the shard is restored. `skip`: the manifest
    is deleted, as the error advises, and a killed run becomes what an undisturbed one on that data is."""
    for number, layout in zip(count(), cycle(["dp2", "tp2", "pp2_dp2"])):
        data = lab.copy_of_data()
        shard = lab.rng.choice(sorted(data.glob("*.tar")))
        whole = shard.read_bytes()
        os.truncate(shard, lab.rng.randrange(1024, len(whole) - 10240))
        yield _unsound_data(
            lab,
            layout,
            data,
            "truncated shard",
            shard.name,
            repair=lambda s=shard, w=whole: s.write_bytes(w),
            skip=number % 2 == 0,
        )


def nan_samples(lab):
    """A sample of the data set has a NaN in its latents."""
    for number, layout in zip(count(), cycle(["tp2", "dp2", "pp2_dp2"])):
        data = lab.copy_of_data()
        shard = lab.rng.choice(sorted(data.glob("*.tar")))
        whole = shard.read_bytes()
        key = _put_nan_into(shard, lab.rng)
        yield _unsound_data(
            lab,
            layout,
            data,
            "NaN in a sample",
            key,
            repair=lambda s=shard, w=whole: s.write_bytes(w),
            skip=number % 2 == 0,
        )


def _put_nan_into(shard, rng):
    """Overwrite one number of one latent in place, past the head of its .pt file; returns the sample's key."""
    with tarfile.open(shard) as tar:
        members = [member for member in tar.getmembers() if ".latent." in member.name]
        member = rng.choice(members)
        latent = torch.load(tar.extractfile(member), weights_only=True)
    pattern = latent.contiguous().numpy().tobytes()
    data = bytearray(shard.read_bytes())
    start = data.index(pattern, member.offset_data, member.offset_data + member.size)
    width = latent.element_size()
    place = start + width * rng.randrange(latent.numel())
    data[place : place + width] = torch.tensor([math.nan], dtype=latent.dtype).numpy().tobytes()
    shard.write_bytes(data)
    return member.name.split(".")[0]


def _unsound_data(lab, layout, data, kind, name, *, repair, skip):
    overrides, refused = [f"data.folder={data}"], True
    if skip and kind == "truncated shard":
        error = lab.new_run(layout, *overrides, "data.on_error=skip").start().error or ""
        refused = name in error and "StaleManifestError" in error and "delete manifest.json" in error
        (data / "manifest.json").unlink()
    if skip:
        reference = lab.undisturbed(layout, *overrides, "data.on_error=skip")
        run = lab.new_run(layout, *overrides, "data.on_error=skip")
        run.start(Kill(rank=0, disk_event=lab.rng.randint(reference[1].ranks[0][1] // 4, reference[1].ranks[0][1])))
        outcome = recover(run)
        lines = run.records()
        # A manifest built again leaves the samples out that cannot be read: then none is skipped in training.
        skipped = lines[-1]["skipped_samples"] > 0 or kind == "truncated shard" if lines else False
        told = refused and skipped and lines[-1]["nan_samples"] == 0
    else:
        reference, run = lab.undisturbed(layout), lab.new_run(layout, *overrides)
        error = run.start().error
        told = error is not None and name in error and ("SampleError" in error or "StaleManifestError" in error)
        repair()
        outcome = recover(run)
    wrong = lab.wrong(run, outcome, reference) if outcome.error is None else 0
    lost, seconds = losses_and_recoveries(run, run.deaths())
    return Trial(
        kind=f"{kind}, {'skip' if skip else 'raise'}",
        faults=1,
        survived=int(told and outcome.error is None and wrong == 0),
        steps_lost=lost,
        recovery_seconds=seconds,
        wrong=wrong,
        note=outcome.error or ("" if told else f"it was not told that {name} cannot be used"),
    )


def nan_gradients(lab):
    """A NaN in a backward: its update is refused, and the run, killed afterwards, goes on as if it had not been killed."""
    for layout, background in zip(cycle(["dp2", "tp2"]), cycle([True, True, False])):
        faults = (NanGradient(iteration=7),)
        reference, run = lab.undisturbed(layout, faults=faults), lab.new_run(layout, background=background)
        rank = lab.rng.randrange(2)
        run.start(*faults, Kill(rank=rank, disk_event=lab.rng.randint(1, reference[1].ranks[rank][1])))
        outcome = recover(run, *faults)
        wrong = lab.wrong(run, outcome, reference) if outcome.error is None else 0
        lines = run.records()
        refused = [line["iteration"] for line in lines if not line["updated"]]
        lost, seconds = losses_and_recoveries(run, run.deaths())
        yield Trial(
            kind="NaN gradients",
            faults=1,
            survived=int(outcome.error is None and wrong == 0 and refused == [7] and lines[-1]["refused_updates"] == 1),
            steps_lost=lost,
            recovery_seconds=seconds,
            wrong=wrong,
            note=outcome.error or ("" if refused == [7] else f"refused updates in iterations {refused}, need [7]"),
        )


KINDS = {
    "kills": lambda lab: kills(lab, during_saves=False),
    "kills_while_saving": lambda lab: kills(lab, during_saves=True),
    "torn": torn_checkpoints,
    "full_disk": full_disks,
    "shards": truncated_shards,
    "nan_samples": nan_samples,
    "nan_gradients": nan_gradients,
}
"""Name -> the trials of a kind, without end."""
assert STEPS > 8 and EVERY == 2
