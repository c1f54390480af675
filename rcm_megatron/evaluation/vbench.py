"""VBench's result files: scores side by side, with its own normalisation.

Constants, weights and the total: Vchitect/VBench 45e79ec, scripts/constant.py and scripts/cal_final_score.py (arXiv 2311.17982).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from rcm_megatron.errors import InputError, nearest
from rcm_megatron.evaluation.report import aligned
from rcm_megatron.text import TextError, read_text

QUALITY = {
    "subject_consistency": (0.1462, 1.0),
    "background_consistency": (0.2615, 1.0),
    "temporal_flickering": (0.6293, 1.0),
    "motion_smoothness": (0.706, 0.9975),
    "aesthetic_quality": (0.0, 1.0),
    "imaging_quality": (0.0, 1.0),
    "dynamic_degree": (0.0, 1.0),
}
SEMANTIC = {
    "object_class": (0.0, 1.0),
    "multiple_objects": (0.0, 1.0),
    "human_action": (0.0, 1.0),
    "color": (0.0, 1.0),
    "spatial_relationship": (0.0, 1.0),
    "scene": (0.0, 0.8222),
    "appearance_style": (0.0009, 0.2855),
    "temporal_style": (0.0, 0.364),
    "overall_consistency": (0.0, 0.364),
}
"""Dimension -> (min, max) of its normalisation."""
DIMENSIONS = QUALITY | SEMANTIC
_HALF = "dynamic_degree"
"""Weighs ½, all others 1."""
_QUALITY_WEIGHT, _SEMANTIC_WEIGHT = 4, 1
_ENDING = "_eval_results.json"


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One model's results."""

    name: str
    raw: Mapping[str, float]
    """Dimension -> score as VBench writes it, a share."""
    videos: Mapping[str, frozenset[str]]
    """Dimension -> names of the videos that were scored, where the file says."""

    @property
    def missing(self) -> list[str]:
        return [dimension for dimension in DIMENSIONS if dimension not in self.raw]

    @property
    def quality(self) -> float | None:
        """None where a dimension of it is missing."""
        return self._weighted(QUALITY)

    @property
    def semantic(self) -> float | None:
        return self._weighted(SEMANTIC)

    @property
    def total(self) -> float | None:
        """(4 quality + semantic)/5."""
        if self.quality is None or self.semantic is None:
            return None
        return (_QUALITY_WEIGHT * self.quality + _SEMANTIC_WEIGHT * self.semantic) / (
            _QUALITY_WEIGHT + _SEMANTIC_WEIGHT
        )

    def _weighted(self, dimensions: Mapping[str, tuple[float, float]]) -> float | None:
        if any(dimension not in self.raw for dimension in dimensions):
            return None
        weights = {dimension: 0.5 if dimension == _HALF else 1.0 for dimension in dimensions}
        normalised = {name: (self.raw[name] - low) / (high - low) for name, (low, high) in dimensions.items()}
        return sum(weights[name] * normalised[name] for name in dimensions) / sum(weights.values())


def read_scores(source: str) -> Scores:
    """``source``: a results file, or a folder with those of one model, perhaps as NAME=PATH. InputError for what is no result of VBench."""
    name, _, rest = source.rpartition("=") if not Path(source).exists() else ("", "", source)
    path = Path(rest)
    raw: dict[str, float] = {}
    videos: dict[str, frozenset[str]] = {}
    for file in _files(path):
        for dimension, (score, scored) in _read(file).items():
            if dimension in raw and raw[dimension] != score:
                raise InputError(
                    f"{path} holds two scores of {dimension}, {raw[dimension]} and {score} ({file.name}); need one; fix: name a file"
                )
            raw[dimension] = score
            if scored is not None:
                videos[dimension] = scored
    return Scores(name=name or path.name.removesuffix(_ENDING), raw=raw, videos=videos)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = sorted(
        file
        for file in path.glob("*.json")
        if not file.name.startswith(".") and not file.name.endswith("_full_info.json")
    )
    if not found:
        raise InputError(f"got no *{_ENDING} in {path}, need VBench's results; fix: name its output folder, or a file")
    return found


def _read(path: Path) -> dict[str, tuple[float, frozenset[str] | None]]:
    try:
        content = json.loads(read_text(path))
    except (TextError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read as JSON ({error}); fix: name a file that VBench has finished"
        ) from error
    if not isinstance(content, dict) or not content:
        raise InputError(
            f'{path}: got no {{"dimension": [score, [videos]]}}, need VBench\'s results; fix: name its *{_ENDING}'
        )
    return {key.replace(" ", "_"): _entry(path, key.replace(" ", "_"), value) for key, value in content.items()}


def _entry(path: Path, dimension: str, value: object) -> tuple[float, frozenset[str] | None]:
    if dimension not in DIMENSIONS:
        raise InputError(
            f"{path}: got the dimension {dimension}{nearest(dimension, DIMENSIONS)}, need those of VBench's 16; fix: leave it out"
        )
    score = value[0] if isinstance(value, list) and value else value
    score = float(score) if isinstance(score, int | float) else math.nan
    if not 0 <= score <= 1:
        raise InputError(
            f"{path}: got {value if isinstance(value, int | float) else str(value)[:60]} as {dimension}, need a share between 0 and 1; "
            "fix: score it again (old versions of VBench gave imaging_quality in percent)"
        )
    return score, _videos(value)


def _videos(value: object) -> frozenset[str] | None:
    """Names of the videos in a result's list."""
    details = value[1] if isinstance(value, list) and len(value) > 1 else None
    if not isinstance(details, list) or not details:
        return None
    paths = [each.get("video_path") for each in details if isinstance(each, dict)]
    return frozenset(PurePath(path).name for path in paths if isinstance(path, str)) or None


def require_same_protocol(scores: Sequence[Scores]) -> None:
    """InputError where a dimension was scored on other videos (prompts, seeds) than the first model's: such scores are no comparison."""
    first = scores[0]
    for other in scores[1:]:
        for dimension in DIMENSIONS:
            ours, theirs = first.videos.get(dimension), other.videos.get(dimension)
            if ours is None or theirs is None or ours == theirs:
                continue
            only = sorted(ours ^ theirs)
            raise InputError(
                f"{dimension}: got {len(ours)} videos of {first.name} and {len(theirs)} of {other.name}, e.g. {only[0]!r} of one alone; "
                "need the same prompts and seeds of both; fix: sample and score both by one protocol (rcm evaluate vbench-sample)"
            )


def scores_table(scores: Sequence[Scores]) -> str:
    """Percent of each, and the difference to the first."""
    head = [
        "VBench",
        *(part for each in scores for part in ((each.name,) if each is scores[0] else (each.name, "difference"))),
    ]
    lines = [[dimension, *_line([each.raw.get(dimension) for each in scores])] for dimension in DIMENSIONS]
    for name in ("quality", "semantic", "total"):
        lines.append([name, *_line([getattr(each, name) for each in scores])])
    return aligned([head, *lines])


def _line(values: Sequence[float | None]) -> list[str]:
    cells = ["" if values[0] is None else f"{100 * values[0]:.2f}"]
    for value in values[1:]:
        cells.append("" if value is None else f"{100 * value:.2f}")
        cells.append("" if value is None or values[0] is None else f"{100 * (value - values[0]):+.2f}")
    return cells
