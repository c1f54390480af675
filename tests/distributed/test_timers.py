"""The breakdown of a step in metrics.jsonl, on one rank and on two pipeline stages."""

import json

import pytest

from rcm_megatron.runtime.timers import COMMUNICATION
from tests.distributed.harness import run_ranks
from tests.distributed.tiny_run import train, write_tiny_run

STUDENT = {"data", "teacher", "rollout", "fake_score", "dual", "student", "backward", "reduce", "optimizer", "other"}
FAKE_SCORE = {"data", "rollout", "fake_score", "backward", "reduce", "optimizer", "other"}
SCM_ONLY, RCM, FAKE_SCORE_STEP = 4, 5, 6
"""Iterations: the last of the first stage; the first two of the second."""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_tiny_run(tmp_path_factory.mktemp("tiny"))


def breakdowns(config, ranks, *overrides):
    """seconds/* of each iteration."""
    out = config.parent / f"ranks{ranks}"
    overrides = [*overrides, f"output_dir={out}", "trainer.stop_after=7", "trainer.checkpoint_every=100"]
    run_ranks(train, ranks, str(config), overrides)
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{key.removeprefix("seconds/"): v for key, v in r.items() if key.startswith("seconds/")} for r in lines]


def phases_of(seconds):
    sums = ("step", "communication")
    return {name: value for name, value in seconds.items() if name not in sums and not name.startswith("max/")}


@pytest.mark.parametrize(("ranks", "overrides"), [(1, []), (2, ["parallel.pp=2"])])
def test_metrics_hold_the_phases_of_every_step(config, ranks, overrides):
    records = breakdowns(config, ranks, *overrides)
    assert len(records) == 7
    for iteration, seconds in enumerate(records):
        phases = phases_of(seconds)
        expected = FAKE_SCORE if iteration == FAKE_SCORE_STEP else STUDENT
        if iteration <= SCM_ONLY:
            expected = STUDENT - {"rollout", "fake_score", "student"}
        assert phases.keys() - {"stages", "gather"} == expected, iteration
        assert sum(phases.values()) == pytest.approx(seconds["step"])
        assert seconds["communication"] == pytest.approx(sum(phases.get(name, 0.0) for name in COMMUNICATION))
        slowest = {name.removeprefix("max/"): value for name, value in seconds.items() if name.startswith("max/")}
        assert bool(slowest) == (ranks > 1)
        assert all(slowest[name] >= value for name, value in phases.items() if slowest)


def test_stages_wait_for_each_other(config):
    """With two stages a rank waits for the other one's half of every pass."""
    layouts = [(1, []), (2, ["parallel.pp=2"])]
    alone, staged = (breakdowns(config, ranks, *overrides)[RCM] for ranks, overrides in layouts)
    assert staged["stages"] / staged["step"] > alone["stages"] / alone["step"]
