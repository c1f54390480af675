"""A student and a fake score of two networks each, for their sides of a boundary in time: what an update trains, on every layout."""

from dataclasses import replace

import pytest
import torch

from rcm_megatron.config import ParallelConfig
from rcm_megatron.config.roles import first_of
from tests.distributed import test_parity
from tests.distributed.harness import run_ranks
from tests.distributed.test_parity import MICRO_BATCH, assert_equal_quantities
from tests.helpers import assert_close

BOUNDARY = 0.7
SEEDS = {
    "teacher": 2,
    "teacher_low_noise": 4,
    "student": 1,
    "student_low_noise": 5,
    "fake_score": 3,
    "fake_score_low_noise": 6,
}
STEPS = {
    "scm high": ({"scm": 100.0}, 4),
    "scm low": ({"scm": 100.0}, 5),
    "dcm low": ({"dcm": 1.0}, 5),
    "flow high": ({"flow": 1.0}, 4),
    "dmd high": ({"dmd": 1.0}, 4),
    "dmd low": ({"dmd": 1.0}, 6),
    "fake_score high": ({"dmd": 1.0}, 1),
    "fake_score low": ({"dmd": 1.0}, 3),
}
"""Losses of a stage and an iteration of it that trains the network."""
SAME = {"teacher_low_noise": 2, "fake_score_low_noise": 3}
"""Seeds with which the score of a sample does not depend on its side."""


def distillation_of():
    return replace(test_parity.distillation_of(), expert_boundary=BOUNDARY)


def build(parallel, seeds=SEEDS, *, in_pieces=False):
    """Networks of ``seeds`` on this rank."""
    networks = dict.fromkeys(seeds, (test_parity.MODEL, ParallelConfig(**parallel)))
    return test_parity.build_of(networks, torch.float32, seeds, in_pieces=in_pieces)


def step_of(name):
    from rcm_megatron.objectives.plan import plan_step

    losses, iteration = STEPS[name]
    choices = distillation_of().rollout_choices
    sides = {
        "student": {side: choices(side) for side in ("high", "low")},
        "fake_score": dict.fromkeys(("high", "low"), choices()),
    }
    stage = test_parity.stage_of(losses)
    return stage, plan_step(stage, iteration, max_rollout_steps=3, sides=sides)


def quantities_of(networks, name, step=None):
    """Loss of each sample, what the losses report of each, and the raw gradient of each parameter of the trained network."""
    from rcm_megatron.checkpoint.models import gather_full
    from rcm_megatron.parallel.pipeline import reduce_gradients
    from rcm_megatron.training.optimizer import gather_main_grads
    from rcm_megatron.training.step import accumulate_step

    stage, planned = step_of(name)
    step = step or planned
    chunks, groups = networks[step.trained], networks.layout.groups
    for network in networks.values():
        for chunk in network:
            if hasattr(chunk, "zero_grad_buffer"):
                chunk.zero_grad_buffer()
    samples = test_parity.samples_of(networks, STEPS[name][1], MICRO_BATCH)
    settings = {"stage": stage, "distillation": distillation_of(), "objectives": test_parity.objectives_of()}
    (result,) = accumulate_step(step, networks, samples, **settings).values()
    reduce_gradients(chunks)
    found = {"loss": test_parity.whole_batch(groups, result.loss_B, MICRO_BATCH)}
    gradients = gather_main_grads(chunks)
    whole = gather_full(chunks, tp_group=groups.tp, pp_group=groups.pp, getter=gradients.__getitem__)
    return found | {f"gradient of {key}": value for key, value in whole if value is not None}


def measure(parallel, in_pieces=False):
    networks = build(parallel, in_pieces=in_pieces)
    return {name: quantities_of(networks, name) for name in STEPS}


@pytest.fixture(scope="module")
def one_rank():
    return run_ranks(measure, 1, {})[0]


@pytest.mark.parametrize(
    ("ranks", "parallel", "in_pieces"),
    [(4, {"tp": 2}, False), (2, {"pp": 2}, False), (4, {"ring": 2}, False), (2, {}, True)],
    ids=["tp2_dp2", "pp2", "ring2_dp2", "dp2_in_pieces"],
)
def test_layout(one_rank, ranks, parallel, in_pieces):
    """Data-parallel ranks ask the two networks for different numbers of micro-batches."""
    assert_equal_quantities(one_rank, run_ranks(measure, ranks, parallel, in_pieces))


def against_one_network():
    """{step: (its times by purpose, its quantities, those of one network at the same times, gradients of the networks beside it)}."""
    from rcm_megatron.networks.roles import Networks
    from rcm_megatron.objectives.work import Work

    built, found, times_of = build({}, SEEDS | SAME), {}, Work._times
    for name in STEPS:
        times, (_, step), networks = {}, step_of(name), built
        if name == "dmd low":  # whose rollout begins in the other network
            networks = built.replace(student=built["student_low_noise"])

        def noted(work, purpose, distribution, *, side=None, times=times):
            return times.setdefault(purpose, times_of(work, purpose, distribution, side=side))

        Work._times = noted
        two = quantities_of(networks, name)
        beside = {
            role: sum(float(chunk.buffers[0].grad_data.abs().sum()) for chunk in chunks)
            for role, chunks in networks.items()
            if not role.startswith("teacher") and chunks is not networks[step.trained]
        }
        role = first_of(step.trained)
        first = {name: chunks for name, chunks in networks.items() if first_of(name) == name}
        plain = Networks(layout=networks.layout, **first | {role: networks[step.trained]})
        Work._times = lambda work, purpose, distribution, *, side=None, times=times: times[purpose]
        one = quantities_of(plain, name, step=replace(step, trained=role, side=None)) if "dcm" not in name else None
        Work._times = times_of
        found[name] = times, two, one, beside
    return found


@pytest.fixture(scope="module")
def compared():
    return run_ranks(against_one_network, 1)[0]


@pytest.mark.parametrize("name", [name for name in STEPS if "dcm" not in name])
def test_an_update_is_that_of_one_network_at_times_of_its_side(compared, name):
    """Losses and raw gradients; the networks beside the trained one get none."""
    times, two, one, beside = compared[name]
    assert two.keys() == one.keys() and len(two) > 20
    for key, expected in one.items():
        assert_close(f"{name}: {key}", expected, two[key], rel=1e-5)
    assert float(sum(v.abs().sum() for k, v in two.items() if k.startswith("gradient"))) > 0
    assert len(beside) >= 2 and not any(beside.values()), beside
    trained_at = {"scm": "time", "flow": "flow_time", "fake_score": "score_time", "dmd": "rollout_time"}
    at = [t for purpose, t in times.items() if purpose.startswith(trained_at[name.split()[0]])]
    if name == "dmd high":
        assert not at or all(bool((s_of(t) >= BOUNDARY).all()) for t in at)
    else:
        assert bool(((s_of(at[-1]) >= BOUNDARY) == name.endswith("high")).all()), s_of(at[-1])


def s_of(t):
    return torch.sin(t) / (torch.sin(t) + torch.cos(t)) + 1e-15


def test_the_score_of_a_sample_comes_from_the_network_of_its_time():
    ((routed, high, low, is_high),) = run_ranks(scores, 1)
    assert is_high.any() and not is_high.all()
    for b, of_high in enumerate(is_high.tolist()):
        assert_close(f"sample {b}", (high if of_high else low)[:, b], routed[:, b], rel=1e-6)
        assert float((high[:, b] - low[:, b]).norm()) > 1e-2 * float(high[:, b].norm())


def scores():
    networks = build({})
    samples = test_parity.samples_of(networks, 4, MICRO_BATCH)
    work = test_parity.work_of("dmd", networks, samples, distillation=distillation_of())
    xt, t = work.noise_again(samples.x0_SBP)

    def alone(role):
        one = replace(work, networks=networks.replace(fake_score=networks[role], fake_score_low_noise=networks[role]))
        return one.evaluate("fake_score", xt, t, phase="fake_score")

    routed = work.evaluate("fake_score", xt, t, phase="fake_score")
    return routed, alone("fake_score"), alone("fake_score_low_noise"), s_of(t)[0, :, 0] >= BOUNDARY
