"""Which objectives an iteration runs and which network it trains, against runs that are written out as lists."""

from contextlib import ExitStack
from dataclasses import replace

import pytest

from rcm_megatron.config import StageConfig
from rcm_megatron.config.stages import stage_problems
from rcm_megatron.objectives.base import Objective
from rcm_megatron.objectives.plan import companions_of, optimizer_resets, plan_step
from rcm_megatron.registries import OBJECTIVES


def stage_of(**fields):
    return StageConfig(name="test", steps=40, **({"losses": {"scm": 100.0, "dmd": 1.0}} | fields))


def steps_of(stage, count, max_rollout_steps=4):
    return [plan_step(stage, i, max_rollout_steps=max_rollout_steps) for i in range(count)]


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("freq", [2, 5])
def test_rcm_against_a_list(warmup, freq):
    """The warm-up without DMD, then a student step and freq - 1 of the fake score, in turn; each counts its own rollouts."""
    run = [("scm",)] * warmup + ([("scm", "dmd")] + [("fake_score",)] * (freq - 1)) * 6
    done = {"student": 0, "fake_score": 0}
    for i, step in enumerate(steps_of(stage_of(tangent_warmup=warmup, student_update_freq=freq), len(run))):
        assert step.objectives == run[i] and step.iteration == i
        assert step.trained == ("fake_score" if run[i] == ("fake_score",) else "student")
        assert step.rollout_steps == done[step.trained] % 4 + 1
        assert step.warmup_ratio == (min(1.0, i / warmup) if warmup else 1.0)
        done[step.trained] += 1


def test_a_stage_without_companions_trains_one_network():
    steps = steps_of(stage_of(losses={"dcm": 1.0}), 6)
    assert {(step.trained, step.objectives) for step in steps} == {("student", ("dcm",))}


def test_the_order_of_gradients_is_not_the_files():
    weights = {"dmd": 1.0, "scm": 1.0, "dcm": 1.0}
    assert plan_step(stage_of(losses=weights, student_update_freq=2), 0, max_rollout_steps=4).objectives == (
        "dcm",
        "scm",
        "dmd",
    )


class Judge(Objective):
    """Another companion, of a network of its own."""

    name, roles, trains = "judge", ("judge",), "judge"


class Critique(Judge):
    name = "critique"


class Adversarial(Objective):
    name, roles, trains, companions = "adversarial", ("student", "judge"), "student", ("judge", "fake_score")


def test_several_companions_take_turns(monkeypatch):
    """Two objectives of one network share its turn; every network counts its own updates."""
    with ExitStack() as stack:
        for objective in (Judge(), Critique(), Adversarial()):
            stack.enter_context(OBJECTIVES.registered(objective.name, objective))
        monkeypatch.setattr(Adversarial, "companions", ("critique", "judge", "fake_score"))
        assert companions_of(["adversarial"]) == {"fake_score": ("fake_score",), "judge": ("judge", "critique")}
        stage = stage_of(losses={"adversarial": 1.0}, student_update_freq=4)
        steps = steps_of(stage, 9)
        assert [step.trained for step in steps] == [
            "student",
            "fake_score",
            "judge",
            "fake_score",
            "student",
            "judge",
            "fake_score",
            "judge",
            "student",
        ]
        assert steps[2].objectives == ("judge", "critique")
        assert [step.rollout_steps for step in steps] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
        assert not list(stage_problems(stage, "stages.0"))
        (problem,) = stage_problems(replace(stage, student_update_freq=1), "stages.0")
        assert problem.startswith(
            "stages.0.student_update_freq=1 never trains fake_score, judge, which adversarial needs"
        )
        (problem,) = stage_problems(stage_of(losses={"scm": 1.0, "judge": 1.0}), "stages.0")
        assert "must train one network, got scm trains student, judge trains judge" in problem


@pytest.mark.parametrize(
    ("losses", "wish", "anew"),
    [
        (({"dcm": 1.0}, {"scm": 1.0}), None, ("student",)),
        (({"scm": 1.0}, {"scm": 9.0}), None, ()),
        (({"scm": 1.0}, {"scm": 1.0, "dmd": 1.0}), None, ("student",)),
        (({"scm": 1.0, "dmd": 1.0}, {"dmd": 1.0}), None, ("student",)),
        (({"scm": 1.0}, {"scm": 9.0}), True, ("student",)),
        (({"dcm": 1.0}, {"scm": 1.0}), False, ()),
        (({"dmd": 1.0}, {"scm": 1.0}, {"dmd": 2.0}), None, ("student",)),
        (({"dmd": 1.0}, {"scm": 1.0}, {"dmd": 2.0}), True, ("student", "fake_score")),
    ],
)
def test_an_optimizer_begins_anew_where_its_objectives_change(losses, wish, anew):
    """The fake score keeps its moments over a stage that does not train it; nothing begins anew that has not trained."""
    stages = [stage_of(losses=of_stage, student_update_freq=2 if "dmd" in of_stage else 1) for of_stage in losses]
    stages[-1] = replace(stages[-1], reset_optimizer=wish)
    assert optimizer_resets(stages, len(stages) - 1) == anew
    assert optimizer_resets(stages, 0) == ()


def test_two_networks_of_a_role_take_turns_and_count_their_own_updates():
    """fixed times 1.5 | 1.4, 1.0 around the boundary 0.875 (t = 1.429): rollouts of 1 and 2 steps end above it, of 3 and 4 below."""
    sides = {"student": {"high": (1, 2), "low": (3, 4)}, "fake_score": dict.fromkeys(("high", "low"), (1, 2, 3, 4))}
    stage = stage_of(losses={"scm": 1.0, "dmd": 1.0}, student_update_freq=3)
    steps = [plan_step(stage, i, max_rollout_steps=4, sides=sides) for i in range(24)]
    students = [step for step in steps if step.trained.startswith("student")]
    scores = [step for step in steps if step.trained.startswith("fake_score")]
    assert [step.trained for step in students] == ["student", "student_low_noise"] * 4
    assert [step.side for step in students] == ["high", "low"] * 4
    assert [step.rollout_steps for step in students] == [1, 3, 2, 4, 1, 3, 2, 4]
    assert [step.trained for step in scores] == ["fake_score", "fake_score_low_noise"] * 8
    assert [step.rollout_steps for step in scores[::2]] == [1, 2, 3, 4] * 2
    assert {step.objectives for step in students} == {("scm", "dmd")}
