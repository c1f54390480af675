"""rCM distillation of tiny Wan networks that are given an image, through the trainer: the same run on one rank and on others."""

import math

import pytest

from tests.distributed import tiny_run
from tests.distributed.harness import run_ranks
from tests.distributed.test_training_run import LOSS_BOUND, assert_same_curves
from tests.distributed.wan_run import write_wan_run

STEPS = ["stages.0.steps=3", "stages.1.steps=5", "stages.0.tangent_warmup=2"]
LAYOUTS = {"tp2_ring2": (4, ["parallel.tp=2", "parallel.ring=2"]), "pp2": (2, ["parallel.pp=2"])}


@pytest.fixture(scope="module", params=["i2v", "ti2v"])
def trained(request, tmp_path_factory):
    """A run's folder, and what a run on one rank recorded."""
    folder = tmp_path_factory.mktemp(request.param)
    write_wan_run(folder, request.param)
    counters, lines = start(folder, "one", 1, [])
    assert len(lines) == 8 and counters["refused_updates"] == 0
    assert counters["student_updates"] + counters["fake_score_updates"] == 8
    return folder, lines


def start(folder, name, ranks, overrides):
    """(counters of rank 0, records) of a run of `folder`."""
    overrides = [*STEPS, *overrides, f"output_dir={folder / name}"]
    results = run_ranks(tiny_run.train, ranks, str(folder / "run.yaml"), overrides, timeout=280)
    return results[0][0], tiny_run.records(folder / name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_losses_on_every_layout(trained, layout):
    folder, lines = trained
    assert {"scm/loss", "dmd/loss", "critic/loss"} < set().union(*lines)
    assert all(math.isfinite(v) for line in lines for v in line.values() if isinstance(v, float))
    _, others = start(folder, layout, *LAYOUTS[layout])
    assert_same_curves(lines, others, rel=LOSS_BOUND)
