"""Table, CSV, Markdown and plot of a scaling benchmark's result. Imports no torch; matplotlib when it plots."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rcm_megatron.reports.colours import phase_colours

MIB = 2**20


_SHARED = ("series", "layout", "ranks", "tokens", "token_shards", "global_batch_size", "micro_batches")


def summarise(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per point and step: medians over repeats, and comparison with the first layout of the series.

    ``speedup`` is the ratio of tokens per second, ``efficiency`` that by the ratio of ranks. ``phases`` are means over ranks."""
    rows: list[dict[str, Any]] = []
    for point in result["points"]:
        for step, repeats in point["repeats"].items():
            seconds = [repeat["seconds"] for repeat in repeats]
            median = statistics.median(seconds)
            row = {key: point[key] for key in _SHARED}
            row |= {"step": step, "seconds": median, "seconds_min": min(seconds), "seconds_max": max(seconds)}
            row["tokens_per_second"] = point["tokens"] * point["global_batch_size"] / median
            first = next((r for r in rows if (r["series"], r["step"]) == (row["series"], step)), row)
            row["speedup"] = row["tokens_per_second"] / first["tokens_per_second"]
            row["efficiency"] = row["speedup"] * first["ranks"] / row["ranks"]
            row |= {
                f"{key}_mib": max(rank[f"{key}_bytes"] for rank in point["memory"]) / MIB
                for key in ("peak", "held", "resident")
            }
            row["phases"] = _median_phases(repeats, "phases")
            row["phases_max"] = _median_phases(repeats, "phases_max")
            rows.append(row)
    return rows


def _median_phases(repeats: Sequence[dict[str, Any]], key: str) -> dict[str, float]:
    return {phase: statistics.median(repeat[key][phase] for repeat in repeats) for phase in repeats[0][key]}


def write_report(result: dict[str, Any], prefix: Path | None) -> Iterator[str]:
    """Write PREFIX.json, .csv, .md and .png; yields lines to print: the tables and what was written."""
    rows = summarise(result)
    for series, steps in _by_series(rows).items():
        yield ""
        for step, of_step in steps.items():
            yield f"{series}, {step} step"
            yield from _times_table(of_step)
            yield from _phases_table(of_step)
        yield "memory of the fullest rank"
        yield from _memory_table(next(iter(steps.values())))
    if prefix is None:
        return
    prefix.parent.mkdir(parents=True, exist_ok=True)
    paths = {suffix: prefix.with_name(f"{prefix.name}.{suffix}") for suffix in ("json", "csv", "md", "png")}
    paths["json"].write_text(json.dumps(result, indent=1) + "\n")
    _write_csv(rows, paths["csv"])
    _plot(rows, paths["png"])
    paths["md"].write_text(markdown(result, rows, image=paths["png"].name))
    yield "wrote " + ", ".join(str(path) for path in paths.values())


def _by_series(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """series -> step -> rows."""
    grouped: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        grouped.setdefault(row["series"], {}).setdefault(row["step"], []).append(row)
    return grouped


# ---- tables


def _times_table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    head = ["layout", "ranks", "tokens", "batch", "seconds", "min–max", "tokens/s", "speed-up", "efficiency"]
    body = [
        [
            f"`{row['layout']}`",
            str(row["ranks"]),
            str(row["tokens"]),
            str(row["global_batch_size"]),
            _number(row["seconds"]),
            f"{_number(row['seconds_min'])}–{_number(row['seconds_max'])}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['speedup']:.2f}",
            f"{row['efficiency']:.0%}",
        ]
        for row in rows
    ]
    yield from _table(head, body)


def _phases_table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Seconds of the phases that take 1% of some layout's step."""
    phases = [
        phase for phase in _colours(rows) if any(row["phases"].get(phase, 0) >= 0.01 * row["seconds"] for row in rows)
    ]
    body = [[f"`{row['layout']}`", *(_number(row["phases"].get(phase, 0.0)) for phase in phases)] for row in rows]
    yield from _table(["layout", *phases], body)


def _memory_table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    head = ["layout", "ranks", "tokens", "tokens/rank", "held MiB", "peak MiB", "beyond held MiB", "resident MiB"]
    body = [
        [
            f"`{row['layout']}`",
            str(row["ranks"]),
            str(row["tokens"]),
            str(-(-row["tokens"] // row["token_shards"])),
            *(
                f"{value:,.0f}"
                for value in (row["held_mib"], row["peak_mib"], row["peak_mib"] - row["held_mib"], row["resident_mib"])
            ),
        ]
        for row in rows
    ]
    yield from _table(head, body)


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    for line in [head, ["-" * width for width in widths], *body]:
        yield "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"


def _number(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    flat = []
    for row in rows:
        line = {key: value for key, value in row.items() if not isinstance(value, dict)}
        line |= {f"seconds/{phase}": value for phase, value in row["phases"].items()}
        flat.append(line | {f"seconds/max/{phase}": value for phase, value in row["phases_max"].items()})
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(flat[0]))
        writer.writeheader()
        writer.writerows(flat)


# ---- document

_HEAD = """# Scaling

Written by `tools/benchmark_scaling.py`; the one command that measures and writes all of this page is

    {command}

{machine}.

Medians of {repeats} repeats that take turns over all layouts, after two steps of warm-up. Networks, objectives, schedule and optimizer
are those of training; weights and data are random. A student step is sCM and DMD together, a fake score step trains the fake score.

![seconds by phase and memory by rank]({image})
"""

_SERIES = {
    "strong": """## One global size, {ranks} processes

The whole step at the same tokens and global batch. `vpp` aside, a layout's ranks are the product of its degrees.""",
    "weak_tokens": """## Tokens and ranks grow together

Tokens per rank stay the same under context parallelism, so should what a rank holds beyond weights, gradients and optimizer
state; those shrink as the distributed optimizer has more ranks to shard over. Attention's work grows with the square of the tokens:
an efficiency that counts tokens falls for that reason alone.""",
    "weak_batch": """## Global batch and ranks grow together""",
}

_NOTES = """## How to read it

- Phases exclude each other and add up to the step; they are means over ranks (`seconds/<phase>` of a training run's metrics are rank 0's,
  `seconds/max/<phase>` the slowest rank's). `rcm_megatron/runtime/timers.py` says what is in each.
- `stages` is time between pipeline stages: messages, and waiting for other stages (the bubble). `reduce` and `gather` are what
  gradient reduction and parameter gathering leave uncovered.
- Collectives of tensor and context parallelism are inside the pass that waits for them (`teacher`, `dual`, `backward`, …): their cost
  is how much less than 1/ranks of the first layout's seconds such a phase takes.
- `held` are the bytes of tensors that live between two steps (weights, fp32 gradients, optimizer, EMA), `peak` the most during a
  step of each kind: {memory}. `resident` is the process as the system sees it, interpreter and libraries included.
- Processes talk over {backend} and share one machine's memory bandwidth: the figures compare layouts, they do not predict a cluster.
"""


def markdown(result: dict[str, Any], rows: Sequence[dict[str, Any]], *, image: str) -> str:
    """The page docs/scaling.md."""
    source, sections = result["provenance"], []
    for series, steps in _by_series(rows).items():
        ranks = sorted({row["ranks"] for of_step in steps.values() for row in of_step})
        sections.append(_SERIES[series].format(ranks=" → ".join(map(str, ranks))))
        if source["device"] == "cpu" and ranks[-1] > source["cores"]:
            sections.append(
                f"More than {source['cores']} ranks share the {source['cores']} cores: read their memory, not their seconds."
            )
        for step, of_step in steps.items():
            sections.append(f"{step.replace('_', ' ').capitalize()} step:\n\n" + "\n".join(_times_table(of_step)))
            sections.append("\n".join(_phases_table(of_step)))
        sections.append("Memory of the fullest rank:\n\n" + "\n".join(_memory_table(next(iter(steps.values())))))
    repeats = {len(r) for point in result["points"] for r in point["repeats"].values()}
    cuda = source["device"] != "cpu"
    head = _HEAD.format(
        command=source["command"],
        machine=_machine(source),
        repeats=min(repeats),
        image=image,
    )
    notes = _NOTES.format(
        backend=source["backend"].upper() if cuda else "Gloo",
        memory="of the device's allocator" if cuda else "counted tensor by tensor",
    )
    return "\n\n".join([head.rstrip(), *sections, notes])


_LOADS = ("load_average_before", "load_average_after")


def _machine(source: dict[str, Any]) -> str:
    where = f"{source['cores']} cores of {source['cpu']}" + (
        "" if source["device"] == "cpu" else f", {source['device']}"
    )
    load = " before, ".join(f"{source[key]:.1f}" for key in _LOADS if key in source) + (
        " after" if _LOADS[1] in source else " before"
    )
    commit = source["commit"] + (" with uncommitted changes" if source["uncommitted_changes"] else "")
    return (
        f"{where}; {source['threads_per_rank']} thread(s) a process; torch {source['torch']}, Megatron-Core {source['megatron_core']}, "
        f"Python {source['python']}; commit {commit}; {source['date']}; load average {load}"
    )


# ---- plot


def _plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    grouped = _by_series(rows)
    columns = max(len(steps) for steps in grouped.values()) + 1
    figure, axes = pyplot.subplots(
        len(grouped), columns, figsize=(4.6 * columns, 3.6 * len(grouped)), squeeze=False, layout="constrained"
    )
    used: dict[str, Any] = {}
    colours = _colours(rows)
    for line, (series, steps) in zip(axes, grouped.items(), strict=True):
        for axis, (step, of_step) in zip(line, steps.items(), strict=False):
            _plot_phases(axis, of_step, f"{series.replace('_', ' ')}: {step} step", used, colours)
        _plot_memory(line[len(steps)], next(iter(steps.values())))
        for axis in line[len(steps) + 1 :]:
            axis.set_visible(False)
    shown = [phase for phase in colours if phase in used]
    figure.legend(
        [used[phase] for phase in shown], shown, loc="outside lower center", ncols=len(shown), frameon=False, fontsize=8
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _colours(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    return phase_colours(phase for row in rows for phase in row["phases"])


def _plot_phases(
    axis: Any, rows: Sequence[dict[str, Any]], title: str, used: dict[str, Any], colours: dict[str, str]
) -> None:
    bottom = [0.0] * len(rows)
    for phase, colour in colours.items():
        heights = [row["phases"].get(phase, 0.0) for row in rows]
        if max(heights) < 0.003 * max(row["seconds"] for row in rows):
            continue
        used[phase] = axis.bar(range(len(rows)), heights, bottom=bottom, color=colour, width=0.7)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    for i, row in enumerate(rows):
        axis.annotate(
            f"×{row['speedup']:.2f}", (i, max(bottom[i], row["seconds"])), ha="center", va="bottom", fontsize=8
        )
    _finish(axis, rows, title, "seconds")


def _plot_memory(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    held = [row["held_mib"] for row in rows]
    beyond = [row["peak_mib"] - row["held_mib"] for row in rows]
    axis.bar(range(len(rows)), held, color="#7f7f7f", width=0.7, label="held between steps")
    axis.bar(range(len(rows)), beyond, bottom=held, color="#2e75b6", width=0.7, label="during a step")
    axis.legend(fontsize=7, frameon=False, loc="upper right")
    axis.set_ylim(top=1.3 * max(h + b for h, b in zip(held, beyond, strict=True)))
    _finish(axis, rows, "peak memory of the fullest rank", "MiB")


def _finish(axis: Any, rows: Sequence[dict[str, Any]], title: str, unit: str) -> None:
    sizes = {(row["tokens"], row["global_batch_size"]) for row in rows}
    labels = [
        row["layout"] + ("" if len(sizes) == 1 else f"\n{row['tokens']} tokens\nbatch {row['global_batch_size']}")
        for row in rows
    ]
    axis.set_xticks(range(len(rows)), labels, fontsize=8)
    axis.set_title(title, fontsize=10)
    axis.set_ylabel(unit)
    axis.margins(y=0.12)
    axis.spines[["top", "right"]].set_visible(False)
