"""`rcm evaluate vbench-scores`."""

from __future__ import annotations

import json

from rcm_megatron.evaluation.vbench import read_scores, require_same_protocol, scores_table
from rcm_megatron.files import write_atomically
from rcm_megatron.requests import VBenchScoresRequest


def print_scores(request: VBenchScoresRequest) -> None:
    """Print the table, and write it as JSON where that is asked. InputError for results that are none, or of different protocols."""
    scores = [read_scores(source) for source in request.results]
    require_same_protocol(scores)
    print(scores_table(scores))
    for each in scores:
        if each.missing:
            print(f"{each.name}: no score of {', '.join(each.missing)}, so no total")
        if unknown := [dimension for dimension in each.raw if dimension not in each.videos]:
            print(
                f"{each.name}: {len(unknown)} dimensions do not say which videos were scored, so their protocol was not compared"
            )
    if request.json is not None:
        record = {
            each.name: {"raw": dict(each.raw), "quality": each.quality, "semantic": each.semantic, "total": each.total}
            for each in scores
        }
        write_atomically(request.json, (json.dumps(record, indent=1) + "\n").encode())
