"""The picture of a plan: what takes the time of the fastest options, and what fills their memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from rcm_megatron.planner.report import policies_text
from rcm_megatron.reports.bars import stack

SECONDS_COLOURS = {
    "linear": "#1f4e79",
    "attention": "#2e75b6",
    "attention jvp": "#c5b000",
    "attention backward": "#7fb2e5",
    "norms and gates": "#a9d18e",
    "tensor parallel": "#ed7d31",
    "context parallel": "#c00000",
    "stages": "#806000",
    "pipeline fills and drains": "#bfbfbf",
    "launches": "#ffc000",
    "sharded weights": "#7030a0",
    "gradients and weights": "#548235",
    "optimizer and offload": "#7f7f7f",
}
MEMORY_COLOURS = {
    "weights": "#1f4e79",
    "gradients": "#c00000",
    "optimizer": "#7f7f7f",
    "EMA": "#bfbfbf",
    "a pass": "#548235",
}


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Write ``report`` (`report.report_of`) as a PNG."""
    options = list(report["options"])
    if report["as_configured"] is not None:
        options.append(report["as_configured"] | {"own": True})
    names = [_name(option) for option in options]
    figure, panels = pyplot.subplots(1, 2, figsize=(16, 2.2 + 0.7 * len(names)), layout="constrained", sharey=True)
    stack(
        panels[0],
        names,
        [option.get("seconds", {}) for option in options],
        SECONDS_COLOURS,
        "seconds of a mean iteration",
    )
    stack(
        panels[1], names, [_memory(option) for option in options], MEMORY_COLOURS, "GiB of tensors on the fullest rank"
    )
    panels[1].axvline(report["usable_gib"], color="black", linestyle="--")
    panels[0].invert_yaxis()
    figure.suptitle(f"{report['name']} on {report['gpus']} x {report['hardware']['name']}, simulated")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _name(option: Mapping[str, Any]) -> str:
    at = option["layout"]
    degrees = " ".join(f"{name}{at[name]}" for name in ("tp", "ulysses", "ring", "pp", "vpp", "dp") if at[name] > 1)
    return f"{'as configured: ' if 'own' in option else ''}{degrees or 'one GPU'}\n{policies_text(option['policies'])}"


def _memory(option: Mapping[str, Any]) -> dict[str, float]:
    """By kind, over all networks; what has a role's name alone is the weights of one that does not train."""
    found = dict.fromkeys(MEMORY_COLOURS, 0.0)
    for name, size in option["standing_gib"].items():
        kind = name.rpartition(" ")[2]
        found[kind if kind in found else "weights"] += size
    found["optimizer" if option["peak_phase"] == "optimizer" else "a pass"] += option["working_gib"]
    return found
