"""`rcm evaluate folders`, and what all comparisons publish: the table, JSON, bars, sheets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rcm_megatron.errors import InputError
from rcm_megatron.evaluation.features import FEATURE_FILES, FeatureNetwork, VideoSet, feature_network, read_features
from rcm_megatron.evaluation.folders import Conform, ShapesSeen, conform_of, find_set, measure_folder
from rcm_megatron.evaluation.picture import draw_bars, draw_sheet
from rcm_megatron.evaluation.prompts import prompt_of
from rcm_megatron.evaluation.report import notes, rows_of, table, write_json
from rcm_megatron.evaluation.sets import neighbour_radius
from rcm_megatron.platform.device import this_device
from rcm_megatron.requests import EvaluateFoldersRequest

_COLUMNS = 5


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A picture of videos: rows of (label, one video a column)."""

    name: str
    title: str
    captions: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Path]]]


def evaluate_folders(request: EvaluateFoldersRequest) -> None:
    """Measure and compare; the reference is the first row. Raises UserError."""
    paths = [request.reference, *request.generated]
    for path in paths:
        _check(path, k=request.k)
    conform = conform_of(request.size, request.frames, request.fps)
    network = feature_network(request.features, weights=request.feature_weights, device=this_device())
    seen = ShapesSeen()
    for path in paths if conform is None else ():
        if path.is_dir():
            seen.note_sizes(path)
    sets = [read_set(path, network, conform=conform, seen=seen) for path in paths]
    sheets = _sheets([path for path in paths if path.is_dir()])
    facts = {"folders": [str(path) for path in paths]}
    facts |= {} if conform is None else {"cut_to": asdict(conform)}
    publish(
        request.output,
        _named_apart(sets, paths),
        reference=None,
        k=request.k,
        features=request.features,
        facts=facts,
        sheets=sheets,
    )


def read_set(
    path: Path,
    network: FeatureNetwork,
    *,
    conform: Conform | None = None,
    seen: ShapesSeen | None = None,
) -> VideoSet:
    """A folder of videos, measured, or a file of features. InputError for anything else."""
    if path.suffix in FEATURE_FILES and path.is_file():
        return read_features(path)
    return measure_folder(path, network, conform=conform, seen=ShapesSeen() if seen is None else seen)


def publish(
    output: Path,
    sets: Sequence[VideoSet],
    *,
    reference: VideoSet | None,
    k: int,
    features: str,
    facts: dict[str, Any],
    sheets: Sequence[Sheet],
) -> None:
    """Print the table; write report.md, report.json, figures.png and the sheets into ``output``."""
    rows = rows_of(sets, reference=reference, k=k)
    against = sets[0].name if reference is None else f"{reference.name} ({len(reference.features_NF)} videos)"
    text = f"{table(rows)}\n\n{notes(rows, features=features, reference=against, k=k)}\n"
    print(text)
    output.mkdir(parents=True, exist_ok=True)
    (output / "report.md").write_text(text)
    write_json(output / "report.json", rows, facts | {"features": features, "reference": against, "k": k})
    draw_bars(rows, output / "figures.png", title=f"{len(rows)} sets of videos; reference: {against}")
    for sheet in sheets:
        draw_sheet(sheet.rows, output / sheet.name, captions=sheet.captions, title=sheet.title)
    written = ", ".join(["report.md", "report.json", "figures.png", *(sheet.name for sheet in sheets)])
    print(f"{written} in {output}")


def _check(path: Path, *, k: int) -> None:
    """What can be refused before videos are read."""
    if path.suffix in FEATURE_FILES:
        if not path.is_file():
            raise InputError(f"got {path}, which is no file; need features; fix: check the path")
        return
    videos = find_set(path)
    if len(videos) <= k or k < 1:
        neighbour_radius(torch.zeros(len(videos), 1), k=k, name=str(path))


def _named_apart(sets: Sequence[VideoSet], paths: Sequence[Path]) -> list[VideoSet]:
    """By their folders' names, or whole paths where two have one name."""
    if len({each.name for each in sets}) == len(sets):
        return list(sets)
    return [replace(each, name=str(path)) for each, path in zip(sets, paths, strict=True)]


def _sheets(folders: Sequence[Path]) -> list[Sheet]:
    """The first video of some prompts that all folders have; else the first of each."""
    firsts: list[dict[str, Path]] = []
    for folder in folders:
        by_prompt: dict[str, Path] = {}
        for video in find_set(folder):
            by_prompt.setdefault(prompt_of(video), video)
        firsts.append(by_prompt)
    if not firsts:
        return []
    shared = [prompt for prompt in firsts[0] if all(prompt in each for each in firsts)][:_COLUMNS]
    count = min(_COLUMNS, *(len(each) for each in firsts), _COLUMNS)
    chosen = [[each[prompt] for prompt in shared] if shared else list(each.values())[:count] for each in firsts]
    captions = shared or [""] * count
    rows = [(folder.name, videos) for folder, videos in zip(folders, chosen, strict=True)]
    return [Sheet(name="sheet.png", title="one prompt a column", captions=captions, rows=rows)]
