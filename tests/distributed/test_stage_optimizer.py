"""Adam's second moments do not cross a change of objective: dCM's gradients are sqrt(N) times as large as sCM's normalised ones."""

import pytest

from tests.distributed.run_checks import LOSS_BOUND, Runs, assert_same_curves
from tests.distributed.tiny_run import flat_change

LAYOUTS = {"one": (1, []), "tp2_dp2": (4, ["parallel.tp=2"]), "pp2_dp2": (4, ["parallel.pp=2"])}
STAGES = "stages=[{name: dcm, steps: 6, losses: {dcm: 100000.0}}, {name: scm, steps: 4, losses: {scm: 100.0}%s}]"
ADAM = ["networks.student.optimizer.eps=1e-12", "networks.student.optimizer.weight_decay=0"]
LR = 1e-3


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("stage_optimizer"), LAYOUTS)


def start(runs, name, *extra, layout="one", stage=""):
    return runs.start(layout, name, STAGES % stage, *ADAM, *extra)


def first_update(runs, name, stage):
    """Mean change of a weight by the first sCM update, in units of lr, without warm-up."""
    constant = "networks.student.optimizer.lr_warmup_steps=0"
    before, after = (
        start(runs, f"{name}_{end}", constant, f"trainer.stop_after={end}", stage=stage)[0][0][1]["student"]
        for end in (6, 7)
    )
    return float(flat_change(after, before).abs().mean()) / LR


def test_the_first_update_of_a_new_objective_has_its_full_size(runs):
    anew, carried = first_update(runs, "anew", ""), first_update(runs, "carried", ", reset_optimizer: false")
    print(f"mean update / lr of the first sCM update after 6 of dCM: {anew:.2e} anew, {carried:.2e} with dCM's moments")
    assert anew == pytest.approx(1.0, abs=0.05)  # Adam's first update is the gradient's sign
    assert carried < 0.2


def test_warm_up_and_moments_begin_anew_on_every_layout_and_once(runs):
    """A run that is resumed in the middle of the stage, or exactly at its beginning, is the run that was not interrupted."""
    _, lines = start(runs, "whole")
    rates = [line["learning_rate"] for line in lines]
    assert rates[:4] == rates[6:10] == [LR * (i + 1) / 4 for i in range(4)] and rates[5] == LR
    for layout in ("tp2_dp2", "pp2_dp2"):
        assert_same_curves(lines, start(runs, layout, layout=layout)[1], rel=LOSS_BOUND)
    for end in (6, 8):
        start(runs, f"cut_{end}", f"trainer.stop_after={end}", layout="tp2_dp2")
        _, resumed = start(runs, f"cut_{end}", layout="pp2_dp2")
        assert_same_curves(lines, resumed, rel=LOSS_BOUND)
