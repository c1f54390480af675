"""The figures of an evaluation: rows, the table, JSON.

Shapes: N videos, F features, P prompts, S seeds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rcm_megatron.data.video_statistics import STATISTICS, mean_statistics
from rcm_megatron.evaluation.features import VideoSet, require_same_features
from rcm_megatron.evaluation.sets import Comparison, Estimate, bootstrap_ratio, compare, spread, vendi_score
from rcm_megatron.files import write_atomically


@dataclass(frozen=True, kw_only=True)
class Row:
    """One set of videos. None is what could not be said of it."""

    name: str
    videos: int
    evaluations: int | None = None
    compared: Comparison | None = None
    """With the reference set."""
    prompts: int = 0
    """That have at least two videos."""
    spread: Estimate | None = None
    """Mean distance between two videos of one prompt."""
    diversity: Estimate | None = None
    """Spread over the first row's, of the prompts that both have."""
    vendi: float | None = None
    """Of the videos of one prompt, mean over prompts."""
    vendi_all: float | None
    """Of all videos."""
    statistics: Mapping[str, float] | None = None


def rows_of(sets: Sequence[VideoSet], *, reference: VideoSet | None, k: int) -> list[Row]:
    """A row for each of ``sets``; without ``reference`` the first one is what the others are compared with. InputError as `compare`."""
    require_same_features([*sets, *([reference] if reference is not None else [])])
    against = sets[0] if reference is None else reference
    first = sets[0].by_prompt()
    return [_row(each, against=None if each is against else against, first=first, k=k) for each in sets]


def _row(videos: VideoSet, *, against: VideoSet | None, first: Mapping[str, Any], k: int) -> Row:
    own = videos.by_prompt()
    shared = [prompt for prompt in first if prompt in own]
    spread_P = spread(list(own.values())) if own else None
    ratio = None
    if shared:
        mine, theirs = (spread([vectors[prompt] for prompt in shared]) for vectors in (own, first))
        ratio = bootstrap_ratio(mine, reference_P=theirs)
    each = videos.statistics
    return Row(
        name=videos.name,
        videos=len(videos.features_NF),
        evaluations=videos.facts.get("evaluations"),
        compared=None if against is None else compare(videos.features_NF, reference_MF=against.features_NF, k=k),
        prompts=len(own),
        spread=None if spread_P is None else bootstrap_ratio(spread_P),
        diversity=ratio,
        vendi=_mean_vendi(list(own.values())),
        vendi_all=_mean_vendi([videos.features_NF]),
        statistics=None if each is None else mean_statistics(each),
    )


def _mean_vendi(sets: Sequence[Tensor]) -> float | None:
    """None where there is no set, or a vector of length 0, which has no direction: hours of sampling are not to end at it."""
    if not sets or any(bool((vectors == 0).all(dim=1).any()) for vectors in sets):
        return None
    return sum(map(vendi_score, sets)) / len(sets)


def table(rows: Sequence[Row]) -> str:
    """Markdown, aligned for a terminal too."""
    head = [
        "videos of",
        "evaluations",
        "number",
        "precision",
        "recall",
        "density",
        "coverage",
        "Fréchet",
        "diversity",
        "95 %",
        "Vendi",
    ]
    return aligned([[*head, *STATISTICS], *map(_cells, rows)])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells of a head and of rows as a Markdown table; empty columns are left out."""
    kept = [i for i in range(len(lines[0])) if any(line[i] for line in lines[1:])]
    lines = [[line[i] for i in kept] for line in lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(kept))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [
        [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))] for line in lines
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in (padded[0], rule, *padded[1:]))


def _cells(row: Row) -> list[str]:
    compared, diversity = row.compared, row.diversity
    sets = (
        [""] * 5
        if compared is None
        else [f"{getattr(compared, n):.2f}" for n in ("precision", "recall", "density", "coverage")]
    )
    sets = sets if compared is None else [*sets, f"{compared.frechet:.4g}"]
    ratio = (
        ["", ""] if diversity is None else [f"{diversity.value:.2f}", f"{diversity.low:.2f} to {diversity.high:.2f}"]
    )
    vendi = "" if row.vendi is None else f"{row.vendi:.2f}"
    seen = [""] * len(STATISTICS) if row.statistics is None else [f"{row.statistics[name]:.3f}" for name in STATISTICS]
    evaluations = "" if row.evaluations is None else str(row.evaluations)
    return [row.name, evaluations, str(row.videos), *sets, *ratio, vendi, *seen]


def notes(rows: Sequence[Row], *, features: str, reference: str, k: int) -> str:
    """What the columns are, in two lines."""
    prompts = rows[0].prompts
    diverse = (
        f"spread over seeds within a prompt, over that of {rows[0].name}, bootstrap over {prompts} prompts"
        if prompts
        else ("none, for no prompt has two videos")
    )
    return (
        f"Features: {features}. Reference: {reference}. Precision, recall, density, coverage: k = {k}, radius compared by <.\n"
        f"Diversity: {diverse}; noise is varied too, so read it beside precision. Vendi: effective number of different "
        "videos of a prompt, none where a feature vector is 0."
    )


def write_json(path: Path, rows: Sequence[Row], facts: Mapping[str, Any]) -> None:
    """{"facts", "rows"}; numbers in full, NaN as null."""
    record = {"facts": dict(facts), "rows": [asdict(row) for row in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(_finite(record), indent=1) + "\n").encode())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value
