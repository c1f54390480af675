"""A tiny run that makes a two-time student of a one-time teacher, by all three objectives and DMD along its map; resume, samples."""

import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rcm_megatron.config import ConfigError, load_config
from tests.distributed.harness import run_ranks
from tests.distributed.run_checks import LOSS_BOUND, assert_same_curves
from tests.distributed.tiny_run import command, records, train, write_tiny_run

STEPS = 8
STAGES = [
    {"name": "map", "steps": 2, "losses": {"emd": 100.0}, "tangent_warmup": 2},
    {"name": "both", "steps": 2, "losses": {"lmd": 100.0, "mean_flow": 0.1}},
    {"name": "rcm", "steps": 4, "losses": {"emd": 100.0, "dmd": 1.0}, "student_update_freq": 2},
]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("maps")
    path = write_tiny_run(folder)
    given = yaml.safe_load(path.read_text())
    given["networks"]["student"]["model"] = {"second_time": True}
    given["distillation"]["rollout"] = "flow_map"
    given["stages"] = STAGES
    given["sampling"] = {"student_sampler": "flow_map", "student_steps": [1, 7], "num_samples": 2}
    given["trainer"] |= {"checkpoint_every": 4, "sample_every": 8}
    path.write_text(yaml.safe_dump(given, sort_keys=False))
    return path


def run(config, name, ranks, *overrides):
    output = config.parent / name
    results = run_ranks(train, ranks, str(config), [*overrides, f"output_dir={output}"])
    return results, records(output)


@pytest.fixture(scope="module")
def one(config):
    return run(config, "one", 1)


def test_it_trains_what_the_second_time_adds(config, one):
    results, lines = one
    assert len(lines) == STEPS and results[0][0]["refused_updates"] == 0
    assert {"emd/loss", "emd/tangent_norm"} <= lines[0].keys() and {"lmd/loss", "mean_flow/tangent_norm"} <= lines[
        2
    ].keys()
    weights = results[0][1]["student"]
    added = {name: value for name, value in weights.items() if name.startswith("interval_")}
    assert len(added) == 6 and all(value.any() for value in added.values())
    assert not any(name.startswith("interval_") for name in results[0][1]["fake_score"])


def test_resume_on_another_layout_is_the_same_run(config, one):
    shutil.copytree(config.parent / "one", config.parent / "resumed")
    shutil.rmtree(config.parent / "resumed" / "checkpoints" / f"iter_{STEPS:07d}")
    _, lines = run(config, "resumed", 4, "parallel.tp=2", "parallel.pp=2")
    assert_same_curves(one[1], lines, rel=LOSS_BOUND)


def test_previews_are_maps_of_any_number_of_steps(config, one):
    folder = config.parent / "one" / "previews" / "0000008"
    assert {path.stem for path in folder.glob("*.safetensors")} == {
        f"{w}_{n}_steps" for w in ("student", "ema") for n in (1, 7)
    }
    latents = [load_file(folder / f"student_{n}_steps.safetensors")["latents"] for n in (1, 7)]
    assert not torch.equal(*latents)


def test_sample_in_nine_steps_and_what_cannot_hold_it(config, one):
    folder = config.parent
    settings = [str(config), f"output_dir={folder / 'one'}"]
    sample = [
        "sample",
        *settings,
        "--prompt",
        "three moving right",
        "--steps",
        "9",
        "--output",
        str(folder / "samples"),
    ]
    ((status, stderr),) = run_ranks(command, 1, sample)
    assert status == 0, stderr
    (path,) = (folder / "samples").glob("*.safetensors")
    assert bool(torch.isfinite(load_file(path)["latent"]).all())
    ((status, stderr),) = run_ranks(command, 1, ["export", *settings, "--output", str(folder / "export")])
    assert status == 1 and "second_time=true" in stderr and "convert --to internal" in stderr, stderr
    convert = ["convert", str(folder / "one"), str(folder / "internal"), "--to", "internal", "--weights", "student"]
    convert += ["--config", str(config)]
    ((status, stderr),) = run_ranks(command, 1, convert)
    assert status == 0, stderr
    held = load_file(folder / "internal" / "model.safetensors")
    assert any(name.startswith("interval_projection") for name in held)


def test_check(config):
    for overrides, message in {
        (
            "networks.student.model={second_time: false}",
        ): "trains a flow map of two times; set networks.student.model: {second_time: true}",
        (
            "stages=[{name: a, steps: 1, losses: {scm: 1}}]",
        ): "networks.student.model.second_time=true, but scm of stages.0 (a) trains a network of one time",
        (
            "networks.fake_score.model={second_time: true}",
        ): "networks.fake_score.model.second_time=true, but fake_score of",
        ("objectives.emd={share_equal: 0.6, share_zero: 0.5}",): "must be at most 1 together",
        ("objectives.lmd={min_time: -1}",): "objectives.lmd.min_time",
        (
            "networks.student.model={second_time: false}",
            "stages=[{name: a, steps: 1, losses: {scm: 1}}]",
        ): "sampling.student_sampler=flow_map follows a student of two times",
    }.items():
        with pytest.raises(ConfigError) as error:
            load_config(config, list(overrides), world_size=1)
        assert message in str(error.value), (overrides, str(error.value))


def test_flops_count_what_it_adds(config):
    from rcm_megatron.training.flops import network_flops

    run = load_config(config)
    student, teacher = (network_flops(run.model_of(role), run.latent) for role in ("student", "teacher"))
    hidden, frequencies = run.model.hidden_size, run.model.freq_dim
    assert student.forward - teacher.forward == 2 * (frequencies * hidden + hidden * hidden + 6 * hidden * hidden)
