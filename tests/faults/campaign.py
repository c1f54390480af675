"""Harm runs in every way that a cluster does, and count what they lose: nothing but the steps since a checkpoint, or the report says so.

    python tests/faults/campaign.py [--minutes 60] [--seed 0] [--kills 50] [--report docs/faults.md]

Runs of 12 iterations on 2 and 4 ranks (data, tensor and pipeline parallel), a checkpoint every 2, in the background and not, each
compared in every metric of every iteration and in the bits of its final state with an undisturbed run of the same layout. Kinds take
turns, so that a campaign that runs out of its minutes has done some of each.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from tests.faults.trials import KINDS, Laboratory, Trial  # noqa: E402
from tools.measuring import provenance  # noqa: E402


@dataclass
class Tally:
    """All trials of one kind."""

    faults: int = 0
    survived: int = 0
    wrong: int = 0
    steps_lost: list[int] = field(default_factory=list)
    recovery_seconds: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, trial: Trial) -> None:
        self.faults += trial.faults
        self.survived += trial.survived
        self.wrong += trial.wrong
        self.steps_lost += trial.steps_lost
        self.recovery_seconds += trial.recovery_seconds
        self.notes += [trial.note] if trial.note else []


def run_campaign(folder: Path, *, seed: int, faults: dict[str, int], seconds: float) -> dict[str, Tally]:
    """Trials of each kind in `faults` until it has had that many, in turn; {kind as the report names it: tally}."""
    end, lab = time.monotonic() + seconds, Laboratory(folder, Random(seed))
    trials = {name: KINDS[name](lab) for name in faults}
    done, tallies = dict.fromkeys(faults, 0), {}
    while (left := [name for name in faults if done[name] < faults[name]]) and time.monotonic() < end:
        name = min(left, key=lambda name: done[name] / faults[name])
        trial = next(trials[name])
        done[name] += trial.faults
        tallies.setdefault(trial.kind, Tally()).add(trial)
        print(
            f"{trial.kind}: {trial.survived} of {trial.faults} survived, {trial.wrong} wrong {trial.note}", flush=True
        )
    return tallies


def table(tallies: dict[str, Tally]) -> str:
    """Markdown."""
    lines = [
        "| fault | injected | survived | wrong results | steps lost: each, most | seconds to recover: median, most |"
    ]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    for kind, tally in tallies.items():
        lost, seconds = tally.steps_lost, tally.recovery_seconds
        lost_text = f"{statistics.mean(lost):.1f}, {max(lost)}" if lost else "–"
        seconds_text = f"{statistics.median(seconds):.1f}, {max(seconds):.1f}" if seconds else "–"
        lines.append(f"| {kind} | {tally.faults} | {tally.survived} | {tally.wrong} | {lost_text} | {seconds_text} |")
    return "\n".join(lines)


def report(tallies: dict[str, Tally], *, minutes: float, source: dict) -> str:
    """docs/faults.md."""
    failures = [f"- {kind}: {note.splitlines()[-1]}" for kind, tally in tallies.items() for note in tally.notes]
    what_failed = "\n## What did not survive\n\n" + "\n".join(failures) + "\n" if failures else ""
    injected, survived = (sum(getattr(tally, name) for tally in tallies.values()) for name in ("faults", "survived"))
    return f"""# What faults cost a run, measured

{injected} faults, {survived} survived, {sum(tally.wrong for tally in tallies.values())} wrong results. This file is written by

    {source["command"]}

in {minutes:.0f} minutes: {source["cpu"]}, {source["cores"]} cores, {source["memory_gib"]} GiB, 1 thread a rank; torch {source["torch"]},
Megatron-Core {source["megatron_core"]}; commit {source["commit"]}{" with uncommitted changes" if source["uncommitted_changes"] else ""};
when it ended, `uptime` said `{source["uptime"]}`. The same in figures: faults.json.

Runs of 12 iterations on 2 and 4 Gloo ranks (dp=2; tp=2; pp=2 with dp=2), a checkpoint every 2 iterations, half of them in the background.
*Wrong results*: iterations whose loss, norms or counters differ in any bit from those of an undisturbed run of the same layout, and
final weights, EMA or counters that do. *Steps lost*: iterations that had to be done again. *Recover*: from the fault until the run is past
the iteration where it was, new processes included (forked from a warm one here; a cluster adds its own start).

{table(tallies)}

- *kill*: SIGKILL of a random rank, then all ranks start again, up to three times a run. *At any moment*: after random seconds, from
  outside. *While saving or resuming*: at a random one of the moments in which that rank opens, writes, renames, lists or deletes
  something in the folder of checkpoints.
- *torn*: a random file of the newest checkpoint (its manifest and the pointer `latest` included) is cut, has a bit flipped, or is gone;
  survived means: named, set aside, and the one before it taken.
- *full disk*: a file system of their own under the checkpoints fills up to a random number of bytes for two saves, or until the end.
  The run goes on when a save fails; when the last one fails, it ends with an error, and is started again with room.
- *skip*: the run is killed as well, and compared with an undisturbed one on the same damaged data. *raise*: an error that names the
  shard or the sample; the data is restored and the run started again.
- *NaN gradients*: a NaN behind the loader; that one update is refused on all ranks; the run is killed as well.
{what_failed}"""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="no trial begins after this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=50, help="half of them while saving or resuming")
    parser.add_argument(
        "--others", type=int, default=8, help="faults of each other kind; of torn checkpoints three times as many"
    )
    parser.add_argument("--report", type=Path, default=ROOT / "docs" / "faults.md", help="and .json beside it")
    given = parser.parse_args()
    faults = {"kills": given.kills // 2, "kills_while_saving": given.kills - given.kills // 2, "torn": 3 * given.others}
    faults |= {name: given.others for name in KINDS if name not in faults}
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rcm_faults_") as folder:
        tallies = run_campaign(Path(folder), seed=given.seed, faults=faults, seconds=60 * given.minutes)
    source = provenance()
    text = report(tallies, minutes=(time.monotonic() - start) / 60, source=source)
    given.report.write_text(text)
    figures = {"source": source, "kinds": {kind: vars(tally) for kind, tally in tallies.items()}}
    given.report.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
    print(table(tallies))
    if any(tally.survived < tally.faults or tally.wrong for tally in tallies.values()):
        sys.exit(f"not every run survived; see {given.report}")


if __name__ == "__main__":
    main()
