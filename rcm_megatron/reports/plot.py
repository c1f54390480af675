"""Draw one or several training runs from their metrics.jsonl: losses, norms, rates, seconds by phase, memory, counters.

    rcm plot runs/quickstart                             # writes runs/quickstart/run.png
    rcm plot runs/a runs/b runs/c --output compared.png  # a colour a run

Iterations that train different networks are drawn apart. Grey lines are stage boundaries, red ones restarts (of a single run). What a run
did not record is left out, and so are torn lines; of an iteration that stands twice in a file the last record counts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, groupby
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter

from rcm_megatron.errors import InputError
from rcm_megatron.registries import OBJECTIVES
from rcm_megatron.reports.colours import phase_colours
from rcm_megatron.requests import PlotRequest

Record = dict[str, Any]
RUN_COLOURS = ("#2e75b6", "#c55a11", "#548235", "#7030a0", "#bf9000", "#7f7f7f")
KIND_LINES = ("-", "--", ":", "-.")
"""Of the networks that steps train, as they come; their colours are those of runs."""
COUNTERS = {"nan_samples": "masked samples", "refused_updates": "refused updates", "skipped_samples": "skipped samples"}
PREVIEW_STATISTICS = {
    "saturation": "saturation of previews",
    "contrast": "contrast of previews",
    "motion": "motion of previews, pixels a frame",
}
"""Of sample videos written during training: a student that collapses shows here first."""
TOTAL_LINES = ("-", "--", ":")
BINS = 60
"""Most points of a smoothed curve in one stage."""


@dataclass(frozen=True)
class Run:
    """Records by rising iteration."""

    name: str
    records: list[Record]

    def of(self, kind: str) -> list[Record]:
        """The records of steps that train the network ``kind``; "student" where a record does not say."""
        return [record for record in self.records if record.get("trained", "student") == kind]

    def stretches(self, kind: str) -> list[list[Record]]:
        """The records of one kind of step, stage by stage: a curve that runs on from one to the next would show what never was."""
        return [list(group) for _, group in groupby(self.of(kind), key=lambda record: record.get("stage"))]

    def changes(self, key: str) -> Iterator[tuple[int, Any]]:
        """(iteration, value) where ``key`` has another value than before."""
        for value, group in groupby((r for r in self.records if key in r), key=lambda record: record[key]):
            yield next(group)["iteration"], value


def kinds_of(runs: Sequence[Run]) -> list[str]:
    """The networks that steps train, in the order in which they come."""
    return list(dict.fromkeys(record.get("trained", "student") for run in runs for record in run.records))


def phases_of(runs: Sequence[Run]) -> dict[str, str]:
    """The phases of steps that some run recorded -> colour."""
    keys = (key for run in runs for record in run.records for key in record if key.startswith("seconds/"))
    names = (key.removeprefix("seconds/") for key in keys)
    return phase_colours(name for name in names if name not in ("step", "communication") and "/" not in name)


def read_run(folder: Path) -> Run:
    """Raises InputError if there is nothing to draw."""
    path = folder if folder.suffix == ".jsonl" else folder / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"got no {path}; need a run's folder or its metrics.jsonl; fix: name output_dir of the run")
    by_iteration: dict[int, Record] = {}
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        by_iteration[record["iteration"]] = record
    if not by_iteration:
        raise InputError(f"got no record in {path}; need at least one; fix: wait for the run's first iteration")
    return Run(path.parent.name, [by_iteration[iteration] for iteration in sorted(by_iteration)])


def points(records: Sequence[Record], key: str) -> tuple[list[int], list[float]]:
    """Iterations and values of ``key``, where it is a finite number."""
    found = [(r["iteration"], r[key]) for r in records if isinstance(r.get(key), int | float) and math.isfinite(r[key])]
    return [iteration for iteration, _ in found], [float(value) for _, value in found]


def smoothed(xs: Sequence[int], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """Means of at most BINS stretches of equal length."""
    size = max(1, math.ceil(len(xs) / BINS))
    pieces = [slice(start, start + size) for start in range(0, len(xs), size)]
    return [sum(xs[p]) / len(xs[p]) for p in pieces], [sum(ys[p]) / len(ys[p]) for p in pieces]


# ---- panels


def draw_curves(axis, runs: Sequence[Run], key: str, *, log: bool = False) -> None:
    """``key`` of the steps of each kind, smoothed, over the faint values themselves."""
    drawn: list[float] = []
    for number, run in enumerate(runs):
        for place, kind in enumerate(kinds_of(runs)):
            line = KIND_LINES[place % len(KIND_LINES)]
            colour = RUN_COLOURS[(number if len(runs) > 1 else place) % len(RUN_COLOURS)]
            for records in run.stretches(kind):
                xs, ys = points(records, key)
                drawn += ys
                if len(xs) > BINS // 2:
                    axis.plot(xs, ys, linewidth=0.6, alpha=0.3, color=colour)
                    xs, ys = smoothed(xs, ys)
                axis.plot(xs, ys, line, linewidth=1.5, marker="." if len(xs) == 1 else None, color=colour)
    if log and min(drawn) > 0 and max(drawn) > 5 * min(drawn):
        axis.set_yscale("log")
        if max(drawn) > 20 * min(drawn):
            axis.yaxis.set_minor_formatter(NullFormatter())
        return
    axis.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4), useOffset=False)
    if not log:
        axis.set_ylim(bottom=0)


def draw_totals(axis, runs: Sequence[Run], keys: Mapping[str, str]) -> None:
    """Values that only rise, of all steps: {key: label}."""
    for number, run in enumerate(runs):
        for i, (key, label) in enumerate(keys.items()):
            xs, ys = points(run.records, key)
            if xs:
                colour = RUN_COLOURS[(number if len(runs) > 1 else i) % len(RUN_COLOURS)]
                axis.step(xs, ys, TOTAL_LINES[i], where="post", color=colour, label=label if number == 0 else None)
    if len(keys) > 1:
        axis.legend(fontsize=8, frameon=False, loc="upper left")
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylim(bottom=0, top=max(1.1 * axis.get_ylim()[1], 1.0 if len(keys) > 1 else 0.0))


def draw_previews(axis, *, runs: Sequence[Run], keys: Sequence[str]) -> None:
    """A statistic of sample videos, `preview/<weights>_<n>_steps/<statistic>`: a line for each sampler, or a run's colour of several."""
    for number, run in enumerate(runs):
        for place, key in enumerate(keys):
            xs, ys = points(run.records, key)
            colour = RUN_COLOURS[(number if len(runs) > 1 else place) % len(RUN_COLOURS)]
            name, line = key.split("/")[1].replace("_", " "), KIND_LINES[place % len(KIND_LINES)]
            axis.plot(xs, ys, line, marker=".", linewidth=1.2, color=colour, label=name if number == 0 else None)
    axis.legend(fontsize=6, frameon=False, ncols=2)
    axis.set_ylim(bottom=0)


def draw_phases(axis, run: Run, kind: str, used: dict[str, Any]) -> None:
    """Seconds of a step by phase, stacked, over the iterations."""
    colours = phases_of([run])
    for records in run.stretches(kind):
        size = max(1, math.ceil(len(records) / BINS))
        parts = [records[start : start + size] for start in range(0, len(records), size)]
        places = [sum(r["iteration"] for r in part) / len(part) for part in parts]
        seconds = {phase: [mean_seconds(part, phase) for part in parts] for phase in colours}
        areas = axis.stackplot(places, list(seconds.values()), colors=list(colours.values()), linewidth=0)
        used |= {phase: area for (phase, values), area in zip(seconds.items(), areas, strict=True) if any(values)}


def draw_mean_phases(axis, runs: Sequence[Run], kind: str, used: dict[str, Any]) -> None:
    """The means of several runs."""
    stacks = {run.name: run.of(kind) for run in runs if run.of(kind)}
    bottom = [0.0] * len(stacks)
    for phase, colour in phases_of(runs).items():
        heights = [mean_seconds(records, phase) for records in stacks.values()]
        bars = axis.bar(range(len(stacks)), heights, 0.7, bottom=bottom, color=colour)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        used |= {phase: bars} if any(heights) else {}
    axis.set_xticks(range(len(stacks)), stacks)


def mean_seconds(records: Sequence[Record], phase: str) -> float:
    return sum(record.get(f"seconds/{phase}", 0.0) for record in records) / len(records)


def mark(axis, run: Run) -> None:
    """Stage boundaries and restarts."""
    for iteration, _ in list(run.changes("stage"))[1:]:
        axis.axvline(iteration - 0.5, color="#7f7f7f", linewidth=0.8, linestyle="--")
    for iteration, restarts in run.changes("restarts"):
        if restarts:
            axis.axvline(iteration - 0.5, color="#c00000", linewidth=0.8, linestyle=":")


def name_stages(axis, run: Run) -> None:
    for iteration, stage in run.changes("stage"):
        axis.annotate(
            f" {stage}", (iteration, 1.0), xycoords=("data", "axes fraction"), va="top", fontsize=8, color="#595959"
        )


# ---- the figure


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    draw: Callable[[Any], None]
    over_iterations: bool = True


def panels(runs: Sequence[Run], used: dict[str, Any]) -> Iterator[Panel]:
    """What these runs recorded something for."""
    keys = {key for run in runs for record in run.records for key in record if points([record], key)[0]}

    def curves(title: str, unit: str, key: str, *, log: bool = False) -> Iterator[Panel]:
        if key in keys:
            yield Panel(title, unit, lambda axis: draw_curves(axis, runs, key, log=log))

    objectives = objectives_in(keys)
    for name in objectives:
        yield from curves(f"{name} loss", "sum over a sample", f"{name}/loss", log=True)
    yield from curves("gradient norm", "", "gradient_norm", log=True)
    for name in objectives:
        for key, title in quantities_in(keys, name).items():
            yield from curves(title, "", key, log=True)
    yield from curves("learning rate", "", "learning_rate")
    yield from curves("throughput", "samples/s", "samples_per_second")
    if "mfu" in keys:
        yield from curves("MFU", "share of the peak", "mfu")
    else:
        yield from curves("arithmetic", "TFLOP/s a device", "tflops_per_device")
    if "peak_memory_gib" in keys:
        yield Panel("peak memory, rank 0", "GiB", lambda axis: draw_totals(axis, runs, {"peak_memory_gib": ""}))
    if keys & COUNTERS.keys():
        yield Panel("counted since the start", "", lambda axis: draw_totals(axis, runs, COUNTERS))
    for statistic, title in PREVIEW_STATISTICS.items():
        if found := sorted(key for key in keys if key.startswith("preview/") and key.endswith(f"/{statistic}")):
            yield Panel(title, "", partial(draw_previews, runs=runs, keys=found))
    for kind in kinds_of(runs):
        if any(key.startswith("seconds/") for run in runs for record in run.of(kind) for key in record):
            several = partial(draw_mean_phases, runs=runs, kind=kind, used=used)
            one = partial(draw_phases, run=runs[0], kind=kind, used=used)
            title = f"{kind} step by phase"
            yield Panel(title, "seconds", several, False) if len(runs) > 1 else Panel(title, "seconds", one)


def objectives_in(keys: Collection[str]) -> list[str]:
    """The objectives that some record has a loss of, this program's first and in its order."""
    found = {key.removesuffix("/loss") for key in keys if key.endswith("/loss")}
    return [*(name for name in OBJECTIVES if name in found), *sorted(found - set(OBJECTIVES))]


def quantities_in(keys: Collection[str], objective: str) -> dict[str, str]:
    """What else an objective reported of a sample: key -> title."""
    titles = OBJECTIVES[objective].quantities if objective in OBJECTIVES else {}
    names = sorted(key.removeprefix(f"{objective}/") for key in keys if key.startswith(f"{objective}/"))
    others = [name for name in names if name not in (*titles, "loss", "nan_samples")]
    titles = dict(titles) | {name: f"{name.replace('_', ' ')} ({objective})" for name in others}
    return {f"{objective}/{name}": title for name, title in titles.items()}


def plot(runs: Sequence[Run], target: Path) -> None:
    """Write the picture. Raises InputError for records without metrics."""
    used: dict[str, Any] = {}
    shown = list(panels(runs, used))
    if not shown:
        raise InputError("got records without metrics; need those of a training run; fix: name its output_dir")
    columns = min(4, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.4 * columns, 2.9 * rows + 0.8), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for panel, axis in zip(shown, axes.flat, strict=False):
        panel.draw(axis)
        axis.set_title(panel.title, fontsize=10)
        axis.set_ylabel(panel.unit, fontsize=9)
        axis.tick_params(which="both", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        if panel.over_iterations:
            axis.set_xlabel("iteration", fontsize=8)
            axis.set_xlim(0, max(1, *(run.records[-1]["iteration"] for run in runs)))
            if len(runs) == 1:
                mark(axis, runs[0])
    if len(runs) == 1:
        name_stages(axes.flat[0], runs[0])
    figure.suptitle(describe(runs[0]) if len(runs) == 1 else f"{len(runs)} runs", fontsize=12)
    add_legends(figure, runs, used)
    figure.savefig(target, dpi=110)
    pyplot.close(figure)


def describe(run: Run) -> str:
    last = run.records[-1]
    counted = {key: f"updates of {key.removeprefix('updates/')}" for key in last if key.startswith("updates/")}
    counted["restarts"] = "restarts"
    parts = [f"{last[key]} {label}" for key, label in counted.items() if key in last]
    return ", ".join([f"{run.name}: {last['iteration'] + 1} iterations", *parts])


def add_legends(figure, runs: Sequence[Run], used: dict[str, Any]) -> None:
    """Kinds of steps or runs, marks and phases, below all panels."""
    line, kinds = Line2D, kinds_of(runs)
    if len(runs) == 1:
        handles = {
            f"{kind} step": line([], [], color=colour, linestyle=style)
            for kind, colour, style in zip(kinds, RUN_COLOURS, cycle(KIND_LINES), strict=False)
        }
        handles["stage"] = line([], [], color="#7f7f7f", linewidth=0.8, linestyle="--")
        handles["restart"] = line([], [], color="#c00000", linewidth=0.8, linestyle=":")
    else:
        handles = {run.name: line([], [], color=RUN_COLOURS[i % len(RUN_COLOURS)]) for i, run in enumerate(runs)}
        handles |= {
            f"{kind} step": line([], [], color="#404040", linestyle=style)
            for kind, style in zip(kinds, cycle(KIND_LINES), strict=False)
        }
    names = {phase: f"{phase} pass" if phase in kinds else phase for phase in phases_of(runs)}
    handles |= {name: used[phase] for phase, name in names.items() if phase in used}
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=9, frameon=False, fontsize=9)


def plot_runs(request: PlotRequest) -> None:
    """Draw the runs into one picture and print its path. Raises InputError for a run without records."""
    first = request.runs[0]
    target = request.output or (first.parent if first.suffix == ".jsonl" else first) / "run.png"
    runs = [read_run(folder) for folder in request.runs]
    if len({run.name for run in runs}) < len(runs):
        runs = [replace(run, name=str(folder)) for run, folder in zip(runs, request.runs, strict=True)]
    plot(runs, target)
    print(target)
