"""One colour for each phase of a step, in all pictures."""

from __future__ import annotations

from collections.abc import Iterable

COLOURS = {
    "data": "#d9d9d9",
    "backward": "#7f6084",
    "stages": "#c00000",
    "reduce": "#ed7d31",
    "gather": "#ffc000",
    "optimizer": "#7f7f7f",
    "other": "#bfbfbf",
}
"""Phases that every step has, in the order in which they are stacked, forward passes after the first; communication between ranks in
red to yellow."""

PASS_COLOURS = ("#1f4e79", "#548235", "#a9d18e", "#2e75b6", "#7fb2e5", "#c5b000", "#806000")
"""Of the objectives' forward passes, as they come."""


def phase_colours(phases: Iterable[str]) -> dict[str, str]:
    """Those of ``phases`` that are drawn, in the order in which they are stacked: sample videos are no part of a step."""
    named = list(dict.fromkeys(phases))
    passes = [phase for phase in named if phase not in (*COLOURS, "preview")]
    colours = {phase: PASS_COLOURS[i % len(PASS_COLOURS)] for i, phase in enumerate(passes)}
    order = ["data", *passes, *(phase for phase in COLOURS if phase != "data")]
    return {phase: (COLOURS | colours)[phase] for phase in order if phase in named}
