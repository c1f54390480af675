"""Losses, tangents and the raw gradient of every parameter, for every objective, on every layout, against one rank.

CI runs a selection that holds every pair of degrees; `bash tests/run.sh tests/distributed/test_parity.py --all-layouts` runs
all legal layouts of at most 8 processes. 45 tokens need padding on 2, 4 and 8 ranks, stages have different numbers of blocks, a
micro-batch holds 2 samples, a step 8: four micro-batches, or two on each of two data-parallel ranks.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist

from rcm_megatron.config import (
    DataConfig,
    DistillationConfig,
    EncodersConfig,
    LatentConfig,
    NetworkConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    StageConfig,
    TimeDistribution,
    TrainerConfig,
)
from rcm_megatron.diffusion.noise import SeededDraws
from tests.distributed.harness import run_ranks
from tests.distributed.layouts import (
    ALL,
    HEADS,
    MICRO_BATCH,
    SAMPLES,
    SELECTED,
)
from tests.helpers import assert_close
from tests.networks import wan

MODEL = wan(num_heads=HEADS, text_len=5)
SEEDS = {"student": 1, "teacher": 2, "fake_score": 3}
LATENT = LatentConfig(channels=3, frames=3, height=6, width=10)

# name: (weights, jvp_kind, iteration); iteration 5 of a stage with student_update_freq 2 trains the fake score
OBJECTIVES = {
    "scm": ({"scm": 100.0}, "exact", 4),
    "scm_semicontinuous": ({"scm": 100.0}, "semicontinuous", 4),
    "scm_finite_difference": ({"scm": 100.0}, "finite_difference", 4),
    "dcm": ({"dcm": 1.0}, "exact", 4),
    "dmd": ({"dmd": 1.0}, "exact", 4),
    "scm_and_dmd": ({"scm": 100.0, "dmd": 0.3}, "exact", 2),
    "fake_score": ({"dmd": 1.0}, "exact", 5),
    "flow": ({"flow": 1.0}, "exact", 0),
}
CORE = ("scm", "dmd", "fake_score", "dcm")
FURTHER = frozenset(layout for layout in SELECTED if layout.processes <= 4)
"""The layouts on which all objectives run; elsewhere CORE."""
BOUND = 1e-5  # measured 2.0e-6 at most (a finite difference), 8.6e-7 for CORE, on all layouts
NEGLIGIBLE = 1e-6
"""A parameter's error is measured against its gradient's norm, but at least against this part of the norm of them all."""


def distillation_of():
    return DistillationConfig(
        teacher_guidance=3.0,
        p_g=TimeDistribution(kind="lognormal", mean=0.7, std=1.6),
        p_d=TimeDistribution(kind="uniform_shift", shift=5.0),
        max_rollout_steps=3,
    )


def objectives_of(kind="exact"):
    """Settings by objective."""
    from rcm_megatron.objectives.dcm import DcmSettings
    from rcm_megatron.objectives.flow import FlowSettings
    from rcm_megatron.objectives.scm import ScmSettings

    return {
        "scm": ScmSettings(jvp_kind=kind, fd_size=1e-2),
        "dcm": DcmSettings(total_steps=12, skip=2, shift=5.0),
        "flow": FlowSettings(caption_dropout=0.5),
    }


def stage_of(weights):
    return StageConfig(name="test", steps=9, losses=weights, student_update_freq=2 if "dmd" in weights else 1)


def run_of(parallel, weights, *, optimizer, kind="exact", num_layers=MODEL.num_layers):
    """The run that the steps of these tests belong to; it reads and writes nothing."""
    return RunConfig(
        name="parity",
        output_dir="",
        model=replace(MODEL, num_layers=num_layers),
        latent=LATENT,
        parallel=parallel,
        precision=PrecisionConfig(params_dtype="fp32"),
        networks={
            "teacher": NetworkConfig(),
            "student": NetworkConfig(optimizer=optimizer),
            "fake_score": NetworkConfig(optimizer=optimizer),
        },
        distillation=distillation_of(),
        objectives=objectives_of(kind),
        stages=(stage_of(weights),),
        encoders=EncodersConfig(video="none", text="none"),
        data=DataConfig(folder=""),
        trainer=TrainerConfig(global_batch_size=SAMPLES, micro_batch_size=MICRO_BATCH, checkpoint_every=1),
    )


def build(parallel, dtype, *, num_layers, in_pieces=False):
    """Three different networks of one size on this rank, student and fake score under DDP or in pieces."""
    return build_of(dict.fromkeys(SEEDS, (replace(MODEL, num_layers=num_layers), parallel)), dtype, in_pieces=in_pieces)


def build_of(networks, dtype, seeds=None, *, in_pieces=False):
    """The networks of {role: (architecture, how it is cut over ranks)}, with weights of ``seeds`` (SEEDS)."""
    from rcm_megatron.platform.megatron import prepare_megatron

    prepare_megatron()
    from rcm_megatron.networks.build import build_chunks, frozen
    from rcm_megatron.networks.roles import Networks
    from rcm_megatron.networks.weights import load_weights
    from rcm_megatron.parallel.groups import initialize_parallel
    from rcm_megatron.training.optimizer import cut_in_pieces, wrap_ddp

    groups, built = initialize_parallel(networks["student"][1]), {}
    for role, (model, parallel) in networks.items():
        build, frozen_role = (
            partial(build_chunks, model, LATENT, parallel, groups=groups, params_dtype=dtype),
            role.startswith("teacher"),
        )
        chunks = cut_in_pieces(build, group=groups.dp_cp) if in_pieces and not frozen_role else build()
        load_weights(chunks, weights_of(model, (seeds or SEEDS)[role]))
        if frozen_role or not in_pieces:
            chunks = frozen(chunks) if frozen_role else wrap_ddp(chunks, chunks[0].config)
        built[role] = chunks
    return Networks(layout=built["student"][0].module.layout, **built)


def weights_of(model, seed):
    """Random weights of a whole network in internal names; seeded weights leave norms at one, these do not."""
    from rcm_megatron.networks.weights import seeded_weights

    weights, generator = dict(seeded_weights(model, seed=seed)), torch.Generator().manual_seed(seed)
    for name, value in weights.items():
        if "norm" in name:
            weights[name] = value + 0.3 * torch.randn(value.shape, generator=generator)
    return weights


def rows_of(groups, micro_batch_size):
    """The samples of this rank's micro-batches, as the loader deals them out."""
    from rcm_megatron.data.dali import micro_batch_indices

    place = {"micro_batch_size": micro_batch_size, "dp_rank": groups.dp_rank, "dp_size": groups.dp_size}
    count = SAMPLES // (micro_batch_size * groups.dp_size)
    return [row for m in range(count) for row in micro_batch_indices(first=0, micro_batch=m, **place)]


def samples_of(networks, iteration, micro_batch_size):
    """This rank's samples of the global batch."""
    from rcm_megatron.objectives.samples import Samples

    data = SeededDraws(99, 0, range(SAMPLES))
    latents = data.normal("latent", LATENT.shape_CTHW)
    text, null = data.normal("text", (5, 10)).transpose(0, 1), data.normal("null", (5, 10)).transpose(0, 1)
    rows = rows_of(networks.layout.groups, micro_batch_size)
    parts = (networks.layout.shard(latents[rows]), text[:, rows].contiguous(), null[:, rows].contiguous())
    return Samples(*parts, SeededDraws(7, iteration, rows), micro_batch_size=micro_batch_size)


def measure(
    parallel,
    micro_batch_size=MICRO_BATCH,
    dtype=torch.float32,
    objectives=tuple(OBJECTIVES),
    num_layers=MODEL.num_layers,
):
    """{objective: {quantity: whole tensor}} that this rank has: losses, dF, gradients; and the bare network's v and t_v."""
    networks = build(ParallelConfig(**parallel), dtype, num_layers=num_layers)
    measured = {name: quantities_of(networks, name, micro_batch_size) for name in objectives}
    return measured | {"network": bare_network(networks)}


def quantities_of(networks, name, micro_batch_size):
    """What one objective computes: each sample's loss and dF, the raw gradient of each parameter."""
    from rcm_megatron.checkpoint.models import gather_full
    from rcm_megatron.objectives.plan import plan_step
    from rcm_megatron.parallel.pipeline import reduce_gradients
    from rcm_megatron.training.optimizer import gather_main_grads
    from rcm_megatron.training.step import accumulate_step

    weights, kind, iteration = OBJECTIVES[name]
    distillation, stage, layout = distillation_of(), stage_of(weights), networks.layout
    step = plan_step(stage, iteration, max_rollout_steps=distillation.max_rollout_steps)
    assert step.trained == ("fake_score" if name.startswith("fake_score") else "student")
    chunks = networks[step.trained]
    for chunk in chunks:
        chunk.zero_grad_buffer()
    samples = samples_of(networks, iteration, micro_batch_size)
    settings = {"stage": stage, "distillation": distillation, "objectives": objectives_of(kind)}
    results = accumulate_step(step, networks, samples, **settings)
    assert len(results) == (1 if step.trained == "fake_score" else len(weights))
    reduce_gradients(chunks)
    found = {}
    for objective, result in results.items():
        found[f"loss of {objective}"] = whole_batch(layout.groups, result.loss_B, micro_batch_size)
        for quantity, value_B in result.quantities.items():
            found[f"{quantity} of {objective}"] = whole_batch(layout.groups, value_B, micro_batch_size)
        if "dF" in result.outputs:  # on the last stage
            dF = layout.gather(result.outputs["dF"])
            found[f"dF of {objective}"] = whole_batch(layout.groups, dF, micro_batch_size)
    gradients, groups = gather_main_grads(chunks), layout.groups
    whole = gather_full(chunks, tp_group=groups.tp, pp_group=groups.pp, getter=gradients.__getitem__)
    return found | {f"gradient of {key}": value for key, value in whole if value is not None}


def work_of(name, networks, samples, *, iteration=0, distillation=None):
    """What objective ``name`` works with."""
    from rcm_megatron.objectives.plan import plan_step
    from rcm_megatron.objectives.work import Work
    from rcm_megatron.registries import OBJECTIVES as REGISTRY

    distillation = distillation or distillation_of()
    return Work(
        objective=REGISTRY[name],
        settings=objectives_of().get(name),
        distillation=distillation,
        step=plan_step(stage_of({name: 1.0}), iteration, max_rollout_steps=distillation.max_rollout_steps),
        weight=1.0,
        networks=networks,
        samples=samples,
    )


def whole_batch(groups, values, micro_batch_size):
    """Values [b, ...] of this rank's samples, put at their places in the global batch."""
    whole = torch.zeros(SAMPLES, *values.shape[1:], dtype=torch.float64)
    whole[rows_of(groups, micro_batch_size)] = values.double()
    dist.all_reduce(whole, group=groups.dp)
    return whole


def bare_network(networks):
    """v and t_v of the student for random dual inputs, on every rank."""
    from rcm_megatron.dual import Dual
    from rcm_megatron.inputs import NetworkInput
    from rcm_megatron.parallel.pipeline import evaluate

    layout, draws = networks.layout, SeededDraws(98, 0, range(3))
    x, t_x = (layout.shard(draws.normal(name, LATENT.shape_CTHW)) for name in ("x", "t_x"))
    timestep, t_timestep = 1000 * draws.uniform("t")[None], 1000 * draws.normal_scalar("t_t")[None]
    text = draws.normal("text", (5, 10)).transpose(0, 1).contiguous()
    v = evaluate(networks["student"], NetworkInput(Dual.pack(x, t_x), Dual.pack(timestep, t_timestep), text))
    return {"v": layout.gather(v.primal), "t_v": layout.gather(v.tangent)}


class References:
    """What one rank measures with networks of a depth, each objective when it is first asked for."""

    def __init__(self):
        self.by_depth = {}

    def of(self, num_layers, objectives):
        measured = self.by_depth.setdefault(num_layers, {})
        absent = tuple(name for name in objectives if name not in measured)
        if absent:
            (new,) = run_ranks(measure, 1, {}, MICRO_BATCH, torch.float32, absent, num_layers)
            measured |= new
        return measured


@pytest.fixture(scope="module")
def references():
    return References()


@pytest.fixture(scope="module")
def one_rank(references):
    return references.of(MODEL.num_layers, tuple(OBJECTIVES))


def assert_equal_quantities(reference, ranks):
    """Each rank's quantities within BOUND of the reference's, and each of the reference's measured on some rank.

    Returns the largest error and what it is of.
    """
    worst = (0.0, "")
    for objective in ranks[0]:
        expected = reference[objective]
        gradients = [g.double().norm() for name, g in expected.items() if name.startswith("gradient of ")]
        floor = NEGLIGIBLE * float(torch.stack(gradients).norm()) if gradients else 0.0
        for rank, measured in enumerate(ranks):
            for name, value in measured[objective].items():
                scale = max(float(expected[name].double().norm()), floor)
                error = float((value.double() - expected[name].double()).norm()) / scale
                assert error <= BOUND, f"{objective}: {name}: relative error {error:.2e} > {BOUND:.0e} (rank {rank})"
                worst = max(worst, (error, f"{objective}: {name}"))
        absent = expected.keys() - set().union(*(measured[objective] for measured in ranks))
        assert not absent, f"{objective}: {sorted(absent)} were measured on no rank"
    return worst


def test_the_reference_has_every_loss_tangent_and_gradient(one_rank):
    for objective, quantities in one_rank.items():
        for name, value in quantities.items():
            assert bool(torch.isfinite(value).all()) and float(value.norm()) > 0, f"{objective}: {name}"
    assert {"loss of scm", "dF of scm", "tangent_norm of scm"} < one_rank["scm"].keys()
    assert {"loss of scm", "dF of scm", "loss of dmd"} < one_rank["scm_and_dmd"].keys()


def test_a_student_step_adds_the_gradients_of_scm_and_dmd(one_rank):
    """The same iteration's sCM and DMD apart: sums of the objectives of one step, weighted."""
    (apart,) = run_ranks(scm_and_dmd_apart, 1)
    for name, value in apart.items():
        assert_close(name, value, one_rank["scm_and_dmd"][name], rel=1e-5)


def scm_and_dmd_apart():
    weights, kind, iteration = OBJECTIVES["scm_and_dmd"]
    networks, total = build(ParallelConfig(), torch.float32, num_layers=MODEL.num_layers), {}
    for name, weight in weights.items():
        OBJECTIVES["alone"] = ({name: weight}, kind, iteration)
        for quantity, value in quantities_of(networks, "alone", MICRO_BATCH).items():
            total[quantity] = total.get(quantity, 0) + value
    return total


@pytest.mark.parametrize("micro_batch_size", [1, 8])
def test_another_micro_batch_size(one_rank, micro_batch_size):
    assert_equal_quantities(one_rank, run_ranks(measure, 1, {}, micro_batch_size))


def pytest_generate_tests(metafunc):
    if "layout" in metafunc.fixturenames:
        layouts = ALL if metafunc.config.getoption("--all-layouts") else SELECTED
        metafunc.parametrize("layout", layouts, ids=[layout.name for layout in layouts])


def test_equals_one_rank(references, layout):
    objectives = tuple(OBJECTIVES) if layout in FURTHER else CORE
    arguments = (layout.parallel, layout.micro_batch_size, torch.float32, objectives, layout.num_layers)
    ranks = run_ranks(measure, layout.processes, *arguments)
    error, name = assert_equal_quantities(references.of(layout.num_layers, objectives), ranks)
    print(f"{layout.name}: at most {error:.1e} ({name})")


@pytest.mark.parametrize("name", ["tp2", "ring2", "pp2", "pp2_vpp2"])
def test_bf16_runs_and_points_the_same_way(references, name):
    """bf16 parameters, activations and messages, fp32 gradients: finite, and close in direction to fp32."""
    layout = next(x for x in ALL if x.name == name)
    objectives = ("scm", "dmd", "fake_score", "flow")
    arguments = (layout.parallel, layout.micro_batch_size, torch.bfloat16, objectives, layout.num_layers)
    measured, reference = (
        run_ranks(measure, layout.processes, *arguments)[0],
        references.of(layout.num_layers, objectives),
    )
    for objective in objectives:
        names = [key for key in reference[objective] if key.startswith("gradient of ")]
        expected, got = (torch.cat([d[objective][key].flatten() for key in names]) for d in (reference, measured))
        assert got.dtype == torch.float32 and bool(torch.isfinite(got).all()), objective
        cosine = float(torch.nn.functional.cosine_similarity(expected, got, dim=0))
        assert cosine > 0.95, f"{objective}: cosine {cosine:.3f}"
