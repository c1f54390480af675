"""A new objective with a network of its own, defined here alone: through the trainer, its metrics, FLOPs, plot, checkpoints and checks.

`probed` trains the student as flow matching does and brings `probe` along, which trains a smaller network, with blocks, width and heads of
its own, to say what the student says. docs/EXTENDING.md has the list of places; both classes here are all of them.
"""

import json
import shutil
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import pytest
import torch
import yaml

from rcm_megatron.config import ConfigError, load_config
from rcm_megatron.config.declare import PositiveFloat
from rcm_megatron.diffusion import losses, trigflow
from rcm_megatron.objectives.base import Loss, Objective, Pass
from rcm_megatron.objectives.plan import plan_step
from rcm_megatron.registries import OBJECTIVES, settings_of
from rcm_megatron.reports.plot import panels, plot, read_run
from tests.distributed.harness import run_ranks
from tests.distributed.run_checks import LOSS_BOUND, assert_same_change, assert_same_curves
from tests.distributed.tiny_run import ADAM, command, model_config, records, tiny_config


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """What the probe is asked."""

    scale: PositiveFloat = 1.0
    """Of the student's velocity."""


class Probe(Objective):
    """A small network learns to say what the student says."""

    name, roles, trains = "probe", ("student", "probe"), "probe"
    Settings = ProbeSettings
    quantities = {"student_norm": "norm of the student's velocity"}  # noqa: RUF012
    phases = {"asking": "forward of the student", "probing": "forward of the probe"}  # noqa: RUF012

    def passes(self, settings, step, distillation):
        return Pass(role="student", forward=1), Pass(role="probe", forward=1, backward=1)

    def run(self, work):
        t = work.times("probe_time", work.distillation.p_d)
        xt = trigflow.add_noise(work.samples.x0_SBP, work.noise("probe_noise"), t)
        target = work.settings.scale * work.evaluate("student", xt, t, phase="asking").double()

        def loss(v, *, target):
            norm_1B1 = work.layout.sum_per_sample(target**2).sqrt()
            return Loss(elements_SBP=(v.double() - target) ** 2, quantities={"student_norm": norm_1B1})

        return work.train(work.network_input(xt, t), loss, phase="probing", target=target)


class Probed(Objective):
    """Flow matching of a student that a probe watches."""

    name, roles, trains, companions = "probed", ("student",), "student", ("probe",)
    phases = {"student": "forward of the student"}  # noqa: RUF012

    def passes(self, settings, step, distillation):
        return (Pass(role="student", forward=1, backward=1),)

    def check(self, run, settings, stage, path):
        if stage.steps % 2:
            yield f"{path}.steps={stage.steps} must be even for a student that a probe watches"

    def run(self, work):
        x0, noise = work.samples.x0_SBP, work.noise("probed_noise")
        t = work.times("probed_time", work.distillation.p_d)

        def loss(v, *, x0, noise):
            return Loss(elements_SBP=work.layout.mask(losses.flow_matching_loss(v, x0, noise)))

        given = work.network_input(trigflow.add_noise(x0, noise, t), t)
        return work.train(given, loss, phase="student", x0=x0, noise=noise)


STEPS = 12
LAYOUTS = {
    "one": (1, []),
    "tp2_ring2": (4, ["parallel.tp=2", "parallel.ring=2"]),
    "pp2": (2, ["parallel.pp=2"]),
}
PROBE = {"num_layers": 3, "hidden_size": 24, "num_heads": 2, "ffn_hidden_size": 40}


def registered():
    stack = ExitStack()
    for objective in (Probe(), Probed()):
        stack.enter_context(OBJECTIVES.registered(objective.name, objective))
    return stack


@pytest.fixture(autouse=True)
def toys():
    with registered():
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    from tools.quickstart.build_dataset import write_digits_dataset

    folder = tmp_path_factory.mktemp("toy")
    write_digits_dataset(folder / "data", num_samples=13, samples_per_shard=5, seed=0)
    given = tiny_config(folder)
    given["networks"] = {
        "student": {"optimizer": ADAM, "ema": {}},
        "probe": {"optimizer": ADAM, "ema": {}, "model": PROBE},
    }
    given["objectives"] = {"probe": {"scale": 2.0}}
    given["stages"] = [{"name": "toy", "steps": STEPS, "losses": {"probed": 0.5}, "student_update_freq": 2}]
    given["trainer"]["checkpoint_every"] = STEPS // 2
    (folder / "run.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
    return folder / "run.yaml"


def train(config_path, overrides):
    """On this rank: (counters by network, {role: whole weights})."""
    from rcm_megatron.platform.megatron import prepare_megatron

    prepare_megatron()
    from rcm_megatron.checkpoint.models import gather_full
    from rcm_megatron.parallel.groups import initialize_parallel
    from rcm_megatron.training.trainer import Trainer

    with registered():
        run = load_config(config_path, overrides)
        trainer = Trainer(run, initialize_parallel(run.parallel))
        trainer.train()
        trainer.close()
        groups, weights = trainer.groups, {}
        for role, chunks in trainer.state.networks.items():
            whole = gather_full(chunks, tp_group=groups.tp, pp_group=groups.pp)
            weights[role] = {name: None if value is None else value.clone() for name, value in whole}
        return {role: asdict(network.counters) for role, network in trainer.state.trained.items()}, weights


def started(config, layout, name, *overrides):
    processes, degrees = LAYOUTS[layout]
    output = config.parent / name
    results = run_ranks(train, processes, str(config), [*degrees, f"output_dir={output}", *overrides])
    return results, records(output)


@pytest.fixture(scope="module")
def runs(config):
    return {layout: started(config, layout, layout) for layout in LAYOUTS}


def initial_weights(role):
    from rcm_megatron.networks.weights import seeded_weights

    return dict(seeded_weights(model_config(**(PROBE if role == "probe" else {})), seed=3))


def assert_same_run(expected, got):
    assert len(expected[1]) == STEPS
    assert_same_curves(expected[1], got[1], rel=LOSS_BOUND)
    for role in ("student", "probe"):
        assert_same_change(initial_weights(role), expected[0], got[0], networks=(role,))


def test_both_networks_train(runs):
    """The probe gets nearer to a student that moves, and every parameter of both has moved."""
    results, lines = runs["one"]
    assert [line["trained"] for line in lines] == ["student", "probe"] * (STEPS // 2)
    counters = results[0][0]
    assert {role: (c["updates"], c["refused_updates"]) for role, c in counters.items()} == {
        "student": (STEPS // 2, 0),
        "probe": (STEPS // 2, 0),
    }
    shares = [line["probe/loss"] / line["probe/student_norm"] ** 2 for line in lines if "probe/loss" in line]
    assert shares[-1] < 0.8 * shares[0], shares
    for role in ("student", "probe"):
        initial = initial_weights(role)
        unmoved = [name for name, value in results[0][1][role].items() if torch.equal(value, initial[name])]
        assert not unmoved, f"{role}: {unmoved}"


@pytest.mark.parametrize("layout", ["tp2_ring2", "pp2"])
def test_layouts_give_the_same_run(runs, layout):
    assert_same_run(runs["one"], runs[layout])


def test_resume_on_another_layout(config, runs):
    """From the checkpoint of two stages to four ranks with token shards."""
    shutil.copytree(config.parent / "pp2", config.parent / "resumed")
    shutil.rmtree(config.parent / "resumed" / "checkpoints" / f"iter_{STEPS:07d}")
    assert_same_run(runs["one"], started(config, "tp2_ring2", "resumed"))


def test_metrics_phases_and_flops(config, runs):
    run = load_config(config)
    from rcm_megatron.training.flops import network_flops

    student, probe = (network_flops(run.model_of(role), run.latent) for role in ("student", "probe"))
    for line in map(json.loads, (config.parent / "pp2" / "metrics.jsonl").read_text().splitlines()):
        mine = {"probe/loss", "probe/student_norm", "probe/nan_samples", "seconds/asking", "seconds/probing"}
        theirs = {"probed/loss", "probed/nan_samples", "seconds/student"}
        mine, theirs = (mine, theirs) if line["trained"] == "probe" else (theirs, mine)
        assert mine <= line.keys() and not theirs & line.keys()
        flops = student.forward + 3 * probe.forward if line["trained"] == "probe" else 3 * student.forward
        expected = flops * line["samples_per_second"] / 2 / 1e12
        assert line["tflops_per_device"] == pytest.approx(expected)


def test_plot(config, runs, tmp_path):
    run = read_run(config.parent / "tp2_ring2")
    titles = [panel.title for panel in panels([run], {})]
    assert {"probed loss", "probe loss", "norm of the student's velocity", "probe step by phase"} <= set(titles)
    plot([run], tmp_path / "run.png")


def checked(argv):
    with registered():
        return command(argv)


def test_check(config):
    """The command knows the objectives, their settings, networks and own rules, and names what is near."""
    ((status, stderr),) = run_ranks(checked, 1, ["check", str(config), "--world-size", "4", "parallel.pp=2"])
    assert status == 0, stderr
    for override, message in {
        "stages.0.losses={probd: 1}": "stages.0.losses.probd: unknown key; did you mean stages.0.losses.probed?",
        "objectives.probe.scale=0": "objectives.probe.scale: got 0, need a finite number greater than 0",
        "objectives.probe.scal=1": "objectives.probe.scal: unknown key; did you mean objectives.probe.scale?",
        "stages.0.steps=5": "stages.0 (toy).steps=5 must be even for a student that a probe watches",
        "stages.0.student_update_freq=1": "never trains probe, which probed needs",
        "stages.0.lr={prob: 1}": "stages.0 (toy).lr.prob: the stage trains no such network; need one of probe, student",
        "networks.probe.optimizer=null": "networks.probe.optimizer=null, but a stage trains it",
        "networks.probe.model.num_heads=5": "num_heads",
    }.items():
        with pytest.raises(ConfigError) as error:
            load_config(config, [override], world_size=4)
        assert message in str(error.value), override


def test_its_settings_reach_it(config):
    run = load_config(config)
    assert settings_of("probe", run.objectives) == ProbeSettings(scale=2.0)
    steps = [plan_step(run.stages[0], i, max_rollout_steps=4) for i in range(4)]
    assert [step.objectives for step in steps] == [("probed",), ("probe",)] * 2
