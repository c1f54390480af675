"""A teacher of two networks, each for its own times: against a choice by hand, on several layouts, in training and in sampling."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from rcm_megatron.config import ParallelConfig
from tests.distributed import test_parity
from tests.distributed.harness import run_ranks
from tests.distributed.tiny_run import command, model_config, records, train, write_tiny_run
from tests.helpers import assert_close

BOUNDARY = 0.7
"""Between the times of a micro-batch, and of the times of others on one side."""
OBJECTIVES = ("scm", "dcm", "dmd")


def distillation_of(plain=test_parity.distillation_of):
    return replace(plain(), expert_boundary=BOUNDARY)


def build(parallel, dtype=torch.float32, *, num_layers=2, sharded=False, plain=test_parity.build):
    """The three networks of test_parity and a second teacher."""
    from rcm_megatron.networks.build import build_chunks
    from rcm_megatron.networks.sharding import shard_weights
    from rcm_megatron.networks.weights import load_weights, seeded_weights

    networks = plain(parallel, dtype, num_layers=num_layers)
    model, groups = replace(test_parity.MODEL, num_layers=num_layers), networks.layout.groups
    chunks = build_chunks(model, test_parity.LATENT, parallel, groups=groups, params_dtype=dtype)
    load_weights(chunks, seeded_weights(model, seed=4))
    low_noise = [chunk.requires_grad_(False) for chunk in chunks]
    if sharded:
        for teacher in (networks["teacher"], low_noise):
            shard_weights(teacher, group=groups.dp_cp)
    return networks.replace(teacher_low_noise=low_noise)


def measure(parallel, sharded=False):
    # In this rank's own process.
    test_parity.build = lambda *args, **options: build(*args, sharded=sharded, **options)
    test_parity.distillation_of = distillation_of
    return test_parity.measure(parallel, test_parity.MICRO_BATCH, torch.float32, OBJECTIVES)


@pytest.fixture(scope="module")
def one_rank():
    return run_ranks(measure, 1, {})[0]


@pytest.mark.parametrize(
    ("ranks", "parallel", "sharded"),
    [(4, {"tp": 2}, False), (2, {"pp": 2}, False), (2, {}, True)],
    ids=["tp2_dp2", "pp2", "dp2_sharded"],
)
def test_layout(one_rank, ranks, parallel, sharded):
    """Data-parallel ranks ask the two networks for different numbers of micro-batches."""
    test_parity.assert_equal_quantities(one_rank, run_ranks(measure, ranks, parallel, sharded))


def by_hand():
    """v of both networks at all samples, what the objectives get, and how many micro-batches each network saw."""
    from rcm_megatron.diffusion import trigflow
    from rcm_megatron.networks.roles import Networks

    networks = build(ParallelConfig())
    samples = test_parity.samples_of(networks, 4, test_parity.MICRO_BATCH)
    s = torch.tensor([0.9, 0.8, 0.2, 0.71, 0.6, 0.1, 0.9, 0.72], dtype=torch.float64)
    t, xt, teachers = (
        trigflow.to_trigflow(s)[None, :, None],
        samples.x0_SBP,
        (networks["teacher"], networks["teacher_low_noise"]),
    )
    alone = []
    for chunks in teachers:
        one = Networks(layout=networks.layout, teacher=chunks)
        alone.append(test_parity.work_of("scm", one, samples, distillation=distillation_of()).teacher(xt, t))
    calls = [0, 0]

    def note(which):
        def hook(*_):
            calls[which] += 1

        return hook

    for which, chunks in enumerate(teachers):
        chunks[0].register_forward_hook(note(which))
    got = test_parity.work_of("scm", networks, samples, distillation=distillation_of()).teacher(xt, t)
    return s, *alone, got, calls


def test_each_sample_is_seen_by_the_network_of_its_time():
    ((s, high, low, got, calls),) = run_ranks(by_hand, 1)
    assert calls == [3, 2], "5 samples of one network and 3 of the other, 2 at a time"
    for b, time in enumerate(s.tolist()):
        expected = high if time >= BOUNDARY else low
        assert_close(f"sample {b}, s={time}", expected[:, b], got[:, b], rel=1e-6)
        assert float((high[:, b] - low[:, b]).norm()) > 1e-2 * float(high[:, b].norm())


def sampled():
    from rcm_megatron.diffusion import samplers
    from rcm_megatron.diffusion.noise import SeededDraws
    from rcm_megatron.inference.sampler import LowNoiseExpert, Sampler

    networks = build(ParallelConfig())
    draws = SeededDraws(3, 0, range(2))
    text, null = (draws.normal(name, (5, 10)).transpose(0, 1).contiguous() for name in ("text", "null"))

    def sampler(chunks):
        return Sampler(chunks, networks.layout, text, null, 0, range(2))

    high, low = sampler(networks["teacher"]), sampler(networks["teacher_low_noise"])
    options = {"steps": 4, "guidance": 2.0, "shift": 3.0, "method": "euler"}
    times = []

    def velocity(x, s):
        times.append(float(s))
        return (high if s >= BOUNDARY else low)._guided_velocity(x, s, guidance=2.0)

    expected = samplers.euler_sample(velocity, high._noise("sample_noise"), steps=4, shift=3.0)
    expert = {at: LowNoiseExpert(networks["teacher_low_noise"], at) for at in (0.0, BOUNDARY, 1.1)}
    return times, {
        "expected": networks.layout.gather(expected).float(),
        "high": high.teacher(**options),
        "low": low.teacher(**options),
        **{at: replace(high, low_noise=found).teacher(**options) for at, found in expert.items()},
    }


def test_sampling_changes_over_at_the_boundary():
    ((times, videos),) = run_ranks(sampled, 1)
    assert min(times) < BOUNDARY < max(times)
    assert torch.equal(videos[0.0], videos["high"]) and torch.equal(videos[1.1], videos["low"])
    assert torch.equal(videos[BOUNDARY], videos["expected"])
    for name in ("high", "low"):
        assert float((videos[name] - videos[BOUNDARY]).norm()) > 1e-3 * float(videos[name].norm()), name


# ---- a whole run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """run.yaml of a run whose folder holds a second teacher."""
    from rcm_megatron.checkpoint.models import write_checkpoint
    from rcm_megatron.networks.weights import seeded_weights

    folder = tmp_path_factory.mktemp("tiny")
    config, model = write_tiny_run(folder), model_config()
    write_checkpoint(seeded_weights(model, seed=6).items(), model, folder / "low_noise")
    return config


def test_training_with_two_teachers_on_two_layouts(tiny):
    """The same losses; and others than those of one teacher."""
    lines = {}
    both = [f"networks.teacher_low_noise.init={tiny.parent / 'low_noise'}", f"distillation.expert_boundary={BOUNDARY}"]
    short = ["trainer.stop_after=7", "stages.0.tangent_warmup=0"]
    for name, ranks, overrides in (("one", 1, both), ("tp2", 2, [*both, "parallel.tp=2"]), ("plain", 1, [])):
        output = tiny.parent / name
        run_ranks(train, ranks, str(tiny), [*short, *overrides, f"output_dir={output}"])
        lines[name] = records(output)
    losses = {
        name: [v for line in found for k, v in line.items() if k.endswith("/loss")] for name, found in lines.items()
    }
    assert len(losses["one"]) >= 7
    assert losses["tp2"] == pytest.approx(losses["one"], rel=1e-4)
    assert losses["plain"] != pytest.approx(losses["one"], rel=1e-2)


def test_the_command_samples_from_both(tiny):
    """Of boundaries at either end it is the one network, or the other."""
    low_noise, videos = tiny.parent / "low_noise", {}
    cases = {
        "high": [],
        "low": [f"networks.teacher.init={low_noise}"],
        "all high": [f"networks.teacher_low_noise.init={low_noise}", "distillation.expert_boundary=1e-3"],
        "all low": [f"networks.teacher_low_noise.init={low_noise}", "distillation.expert_boundary=0.99999"],
    }
    for name, overrides in cases.items():
        output = tiny.parent / "samples" / name
        argv = ["sample", str(tiny), *overrides, "--weights", "teacher", "--steps", "2", "--prompt", "two moving right"]
        ((status, stderr),) = run_ranks(command, 1, [*argv, "--output", str(output)])
        assert status == 0, stderr
        (file,) = output.glob("*.safetensors")
        (videos[name],) = load_file(file).values()
    assert torch.equal(videos["high"], videos["all high"])
    first_step_is_high = not torch.equal(videos["low"], videos["all low"])  # s = 1 is above every boundary
    assert first_step_is_high and not torch.equal(videos["high"], videos["all low"])
