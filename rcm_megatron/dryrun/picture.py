"""The picture of a dry run: what holds the peak, where the FLOPs are, what goes over which link; a bar for each update of each rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from rcm_megatron.reports.bars import Bar, stack
from rcm_megatron.reports.colours import phase_colours

KIND_COLOURS = {
    "weights": "#1f4e79",
    "gradients": "#c00000",
    "optimizer": "#7f7f7f",
    "EMA": "#bfbfbf",
    "buffers": "#806000",
    "activations": "#548235",
    "messages": "#ed7d31",
    "temporary": "#ffc000",
}
"""In the order in which they are stacked; standing kinds over all networks."""
LINK_COLOURS = ("#1f4e79", "#2e75b6", "#7fb2e5", "#548235", "#a9d18e", "#c5b000", "#ed7d31", "#c00000")


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Write ``report`` (`report.report_of`) as a PNG."""
    named = list(_updates(report))
    figure, panels = pyplot.subplots(1, 3, figsize=(17, 2.6 + 0.55 * len(named)), layout="constrained", sharey=True)
    names = [name for name, _ in named]
    stack(panels[0], names, [_kinds(update) for _, update in named], KIND_COLOURS, "peak memory, GiB")
    flops = [_flops(update) for _, update in named]
    stack(panels[1], names, flops, phase_colours(phase for bar in flops for phase in bar), "TFLOP by phase")
    links = [_links(update) for _, update in named]
    keys = sorted({key for bar in links for key in bar})
    colours = {key: LINK_COLOURS[i % len(LINK_COLOURS)] for i, key in enumerate(keys)}
    stack(panels[2], names, links, colours, "sent by group and link, GiB")
    panels[0].invert_yaxis()
    figure.suptitle(f"{report['name']}, simulated: {report['layout']}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _updates(report: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for rank in report["ranks"]:
        for name, update in rank["updates"].items():
            yield f"rank {rank['rank']}\n{name.replace('; ', chr(10))}", update


def _kinds(update: Mapping[str, Any]) -> Bar:
    total: Counter[str] = Counter()
    for kind, size in update["at_peak"].items():
        total[kind.split()[0]] += size
    return {kind: total[kind] / 2**30 for kind in KIND_COLOURS if total[kind]}


def _flops(update: Mapping[str, Any]) -> Bar:
    return {phase: sum(of.values()) / 1e12 for phase, of in update["flops"].items()}


def _links(update: Mapping[str, Any]) -> Bar:
    total: Counter[str] = Counter()
    for route in update["traffic"]:
        if route["sent"]:
            total[f"{route['group']}, {route['link']}"] += route["sent"]
    return {key: size / 2**30 for key, size in total.items()}
