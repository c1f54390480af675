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
    assert counters["updates/student"] + counters["updates/fake_score"] == 8
    return folder, lines


def start(folder, name, ranks, overrides):
    """(counters of rank 0, records) of a run of `folder`."""
    overrides = [*STEPS, *overrides, f"output_dir={folder / name}"]
    results = run_ranks(tiny_run.train, ranks, str(folder / "run.yaml"), overrides)
    return results[0][0], tiny_run.records(folder / name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_losses_on_every_layout(trained, layout):
    folder, lines = trained
    assert {"scm/loss", "dmd/loss", "fake_score/loss"} < set().union(*lines)
    assert all(math.isfinite(v) for line in lines for v in line.values() if isinstance(v, float))
    _, others = start(folder, layout, *LAYOUTS[layout])
    assert_same_curves(lines, others, rel=LOSS_BOUND)


EVERY_OBJECTIVE = [
    {"name": "scm", "steps": 1, "losses": {"scm": 1.0}},
    {"name": "dmd", "steps": 2, "losses": {"dmd": 1.0}, "student_update_freq": 2},
    {"name": "dcm", "steps": 1, "losses": {"dcm": 1.0}},
    {"name": "flow", "steps": 1, "losses": {"flow": 1.0}},
]


def calls_of_networks(config):
    """Of each call of a network in a run: (network, stacked tangent or not, rows by micro-batch, whether its condition is the samples')."""
    import torch

    from rcm_megatron.config import load_config
    from rcm_megatron.dual import Dual
    from rcm_megatron.parallel.groups import initialize_parallel
    from rcm_megatron.parallel.pipeline import unwrapped
    from rcm_megatron.platform.megatron import prepare_megatron
    from rcm_megatron.training.trainer import Trainer

    prepare_megatron()
    run = load_config(config, [f"stages={EVERY_OBJECTIVE}", "trainer.global_batch_size=2"])
    trainer = Trainer(run, initialize_parallel(run.parallel))
    given, calls = [], []
    update = trainer.state.update

    def watched(step, samples, **settings):
        assert samples.count == samples.at_a_time, "more than one micro-batch"
        given[:] = [samples]
        return update(step, samples, **settings)

    def record(name):
        def hook(module, args, options):
            x, timestep, text = args[:3]
            condition = options["condition"] if "condition" in options else args[3]
            mine, rows = given[0].condition, (x.batch if isinstance(x, Dual) else x.shape[1]) // 2
            whole = mine if rows == 1 else mine.repeated(rows)
            same = all(
                torch.equal(a, b) for (_, a, _), (_, b, _) in zip(whole._present(), condition._present(), strict=True)
            )
            calls.append((name, isinstance(x, Dual), rows, same))
            if isinstance(x, Dual):
                still = [Dual.pack(value.primal, torch.zeros_like(value.primal)) for value in (x, timestep)]
                with torch.no_grad():
                    v = module.forward(*still, text, condition)
                assert v.primal.any() and not v.tangent.any(), "the condition has a tangent of its own"

        return hook

    trainer.state.update = watched
    for name in ("student", "teacher", "fake_score"):
        for chunk in trainer.state.networks[name]:
            unwrapped(chunk).register_forward_pre_hook(record(name), with_kwargs=True)
    trainer.train()
    trainer.close()
    return calls


def test_every_pass_is_given_the_samples_own_images(trained):
    """Teacher's two branches too. A dual pass whose latents and time stand still has no tangent, so the condition brings none."""
    folder, _ = trained
    (calls,) = run_ranks(calls_of_networks, 1, str(folder / "run.yaml"))
    assert all(same for *_, same in calls), calls
    kinds = {call[:3] for call in calls}
    assert kinds == {("teacher", False, 2), ("student", True, 1), ("student", False, 1), ("fake_score", False, 1)}
