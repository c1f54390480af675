"""Raw gradient of every parameter, for every objective, on every layout, against one rank.

45 tokens need padding on 2 and on 4 ranks; a micro-batch holds 2 samples, a step 4: two micro-batches, or one on each of two
data-parallel ranks.
"""

import pytest
import torch

from rcm_megatron.config import (
    DcmConfig,
    DistillationConfig,
    FlowConfig,
    LatentConfig,
    LossWeights,
    ModelConfig,
    ParallelConfig,
    StageConfig,
    TimeDistribution,
)
from rcm_megatron.diffusion.noise import SeededDraws
from tests.distributed.conformance import LAYOUTS as GOLDEN_LAYOUTS
from tests.distributed.harness import run_ranks
from tests.helpers import assert_close

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=48,
    num_heads=4,
    ffn_hidden_size=72,
    in_channels=3,
    out_channels=3,
    patch_size=(1, 2, 2),
    text_dim=10,
    text_len=5,
    freq_dim=26,
)
LATENT = LatentConfig(channels=3, frames=3, height=6, width=10)
SAMPLES, MICRO_BATCH_SIZE = 4, 2

LAYOUTS = GOLDEN_LAYOUTS | {"tp2_dp2": (4, {"tp": 2})}

# name: (weights, jvp_kind, iteration); iterations 3 and 5 of a stage with student_update_freq 2 train the critic
OBJECTIVES = {
    "scm": (LossWeights(scm=100.0), "exact", 4),
    "scm_semicontinuous": (LossWeights(scm=100.0), "semicontinuous", 4),
    "scm_finite_difference": (LossWeights(scm=100.0), "finite_difference", 4),
    "dcm": (LossWeights(dcm=1.0), "exact", 4),
    "dmd": (LossWeights(dmd=1.0), "exact", 4),
    "scm_and_dmd": (LossWeights(scm=100.0, dmd=0.3), "exact", 2),
    "critic": (LossWeights(dmd=1.0), "exact", 5),
    "flow": (LossWeights(flow=1.0), "exact", 0),
}
BOUND = 1e-5  # measured 1.4e-6 at most
NEGLIGIBLE = 1e-6
"""A parameter's error is measured against its gradient's norm, but at least against this part of the norm of them all."""


def settings_of(kind):
    return DistillationConfig(
        teacher_guidance=3.0,
        p_g=TimeDistribution(kind="lognormal", mean=0.7, std=1.6),
        p_d=TimeDistribution(kind="uniform_shift", shift=5.0),
        max_rollout_steps=3,
        jvp_kind=kind,
        fd_size=1e-2,
        dcm=DcmConfig(total_steps=12, skip=2, shift=5.0),
        flow=FlowConfig(caption_dropout=0.5),
    )


def stage_of(weights):
    return StageConfig(name="test", steps=9, losses=weights, student_update_freq=2 if weights.dmd else 1)


def build(parallel, dtype):
    """Three different networks on this rank, student and fake score under DDP."""
    from rcm_megatron import platform

    platform.install()
    from rcm_megatron.parallel.groups import initialize_parallel
    from rcm_megatron.training.networks import build_chunks, load_weights, seeded_weights
    from rcm_megatron.training.objectives import Networks
    from rcm_megatron.training.optimizer import wrap_ddp

    groups = initialize_parallel(parallel)

    def network(seed, *, trained):
        chunks = build_chunks(MODEL, LATENT, parallel, groups=groups, params_dtype=dtype)
        weights = seeded_weights(MODEL, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for name, value in weights.items():
            if "norm" in name:  # seeded weights leave norms at one
                value += 0.3 * torch.randn(value.shape, generator=generator)
        load_weights(chunks, weights)
        return wrap_ddp(chunks, chunks[0].config) if trained else [chunk.requires_grad_(False) for chunk in chunks]

    student = network(1, trained=True)
    return Networks(
        layout=student[0].module.layout,
        student=student,
        teacher=network(2, trained=False),
        fake_score=network(3, trained=True),
    )


def micro_batches(networks, iteration, micro_batch_size):
    """This rank's micro-batches of the global batch, as the loader deals them out."""
    from rcm_megatron.data.dali import micro_batch_indices
    from rcm_megatron.training.objectives import MicroBatch

    data = SeededDraws(99, 0, range(SAMPLES))
    latents = data.normal("latent", LATENT.shape_CTHW)
    text, null = data.normal("text", (5, 10)).transpose(0, 1), data.normal("null", (5, 10)).transpose(0, 1)
    groups = networks.layout.groups
    batches = []
    for m in range(SAMPLES // (micro_batch_size * groups.dp_size)):
        place = {"micro_batch_size": micro_batch_size, "dp_rank": groups.dp_rank, "dp_size": groups.dp_size}
        rows = list(micro_batch_indices(first=0, micro_batch=m, **place))
        parts = (latents[rows], text[:, rows].contiguous(), null[:, rows].contiguous())
        draws = SeededDraws(7, iteration, rows)
        batches.append(MicroBatch(networks.layout.shard(parts[0]), *parts[1:], draws))
    return batches


def all_gradients(parallel, micro_batch_size=MICRO_BATCH_SIZE, dtype=torch.float32, objectives=tuple(OBJECTIVES)):
    """{objective: {parameter: whole raw gradient}}; None for a parameter on tensor-parallel ranks other than 0."""
    networks = build(ParallelConfig(**parallel), dtype)
    return {name: gradients_of(networks, name, micro_batch_size) for name in objectives}


def gradients_of(networks, name, micro_batch_size):
    from rcm_megatron.checkpoint.convert import gather_full
    from rcm_megatron.parallel.pipeline import reduce_gradients
    from rcm_megatron.training.optimizer import gather_main_grads
    from rcm_megatron.training.step import accumulate_step, plan_step

    weights, kind, iteration = OBJECTIVES[name]
    settings, stage = settings_of(kind), stage_of(weights)
    step = plan_step(stage, iteration, max_rollout_steps=settings.max_rollout_steps)
    assert step.trained == ("fake_score" if name == "critic" else "student")
    chunks = getattr(networks, step.trained)
    for chunk in chunks:
        chunk.zero_grad_buffer()
    batches = micro_batches(networks, iteration, micro_batch_size)
    results = accumulate_step(step, networks, batches, stage=stage, settings=settings)
    assert len(results) == (2 if name == "scm_and_dmd" else 1)
    reduce_gradients(chunks)
    gradients, groups = gather_main_grads(chunks), networks.layout.groups
    return dict(gather_full(chunks, tp_group=groups.tp, pp_group=groups.pp, getter=gradients.__getitem__))


@pytest.fixture(scope="module")
def one_rank():
    (reference,) = run_ranks(all_gradients, 1, {})
    return reference


def assert_equal_gradients(reference, ranks):
    holders = [gradients for gradients in ranks if all(g is not None for g in gradients["scm"].values())]
    assert holders, "no rank holds whole gradients"
    for gradients in holders:
        for objective, expected in reference.items():
            assert gradients[objective].keys() == expected.keys()
            total = torch.stack([g.double().norm() for g in expected.values()]).norm()
            for name, gradient in expected.items():
                got, scale = gradients[objective][name], max(gradient.double().norm(), NEGLIGIBLE * total)
                error = float((got.double() - gradient.double()).norm() / scale)
                assert error <= BOUND, f"{objective}: gradient of {name}: relative error {error:.2e} > {BOUND:.0e}"


def test_every_parameter_of_the_reference_has_a_gradient(one_rank):
    for objective, gradients in one_rank.items():
        for name, gradient in gradients.items():
            assert bool(torch.isfinite(gradient).all()) and float(gradient.norm()) > 0, f"{objective}: {name}"


def test_a_student_step_adds_the_gradients_of_scm_and_dmd(one_rank):
    """The same iteration's sCM and DMD apart: sums of the objectives of one step, weighted."""
    (apart,) = run_ranks(scm_and_dmd_apart, 1)
    for name, gradient in one_rank["scm_and_dmd"].items():
        assert_close(f"gradient of {name}", apart[name], gradient, rel=1e-5)


def scm_and_dmd_apart():
    from dataclasses import replace

    weights, kind, iteration = OBJECTIVES["scm_and_dmd"]
    networks, total = build(ParallelConfig(), torch.float32), {}
    for alone in (replace(weights, dmd=0.0), replace(weights, scm=0.0)):
        OBJECTIVES["alone"] = (alone, kind, iteration)
        for name, gradient in gradients_of(networks, "alone", MICRO_BATCH_SIZE).items():
            total[name] = total.get(name, 0) + gradient
    return total


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_another_micro_batch_size(one_rank, micro_batch_size):
    assert_equal_gradients(one_rank, run_ranks(all_gradients, 1, {}, micro_batch_size))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(one_rank, layout):
    ranks, parallel = LAYOUTS[layout]
    micro_batch_size = 1 if layout == "tp2_dp2" else MICRO_BATCH_SIZE
    assert_equal_gradients(one_rank, run_ranks(all_gradients, ranks, parallel, micro_batch_size, timeout=250))


@pytest.mark.parametrize("layout", ["tp2", "ring2"])
def test_bf16_runs_and_points_the_same_way(one_rank, layout):
    """bf16 parameters and activations, fp32 gradients: finite, and close in direction to fp32."""
    ranks, parallel = LAYOUTS[layout]
    objectives = ("scm", "dmd", "critic", "flow")
    gradients = run_ranks(all_gradients, ranks, parallel, MICRO_BATCH_SIZE, torch.bfloat16, objectives)[0]
    for objective in objectives:
        expected, got = (torch.cat([g.flatten() for g in d[objective].values()]) for d in (one_rank, gradients))
        assert got.dtype == torch.float32 and bool(torch.isfinite(got).all()), objective
        cosine = float(torch.nn.functional.cosine_similarity(expected, got, dim=0))
        assert cosine > 0.95, f"{objective}: cosine {cosine:.3f}"
