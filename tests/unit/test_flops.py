"""FLOPs of networks against PyTorch's own count of what runs, and passes of objectives against the calls that they make."""

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from rcm_kernels.flash_attention.backends import select_backend
from rcm_megatron.checkpoint.translate import internal_shapes
from rcm_megatron.config import (
    LatentConfig,
    ParallelConfig,
    RunConfig,
    build,
    load_config,
)
from rcm_megatron.diffusion.noise import SeededDraws
from rcm_megatron.dual import Dual
from rcm_megatron.families.cosmos.settings import CosmosModelConfig
from rcm_megatron.inputs import Condition
from rcm_megatron.networks.build import build_chunks
from rcm_megatron.networks.weights import load_weights, seeded_weights
from rcm_megatron.objectives.plan import plan_step
from rcm_megatron.objectives.samples import Samples
from rcm_megatron.parallel.groups import initialize_parallel
from rcm_megatron.parallel.pipeline import unwrapped
from rcm_megatron.platform.device import init_distributed
from rcm_megatron.platform.megatron import prepare_megatron
from rcm_megatron.registries import FAMILIES, OBJECTIVES, settings_of
from rcm_megatron.training.flops import NetworkFlops, Throughput, network_flops, peak_tflops, step_flops
from rcm_megatron.training.state import build_networks
from rcm_megatron.training.step import accumulate_step
from tests.distributed.tiny_run import tiny_config
from tests.networks import cosmos, wan

CONFIGS = sorted((Path(__file__).parents[2] / "model_configs").glob("*.yaml"))
SIZES = {"num_layers": 3, "ffn_hidden_size": 88, "channels": 5, "text_dim": 18, "text_len": 7}
MODELS = {
    "wan": wan(**SIZES, freq_dim=34),
    "wan_image2video": wan(condition_channels=3, image_dim=22, **SIZES, freq_dim=34),
    "wan_first_and_last": wan(image_dim=22, image_positions=514, **SIZES, freq_dim=34),
    "wan_frames": wan(conditional_frames=True, **SIZES, freq_dim=34),
    "cosmos_video2world": cosmos(rope_scale=(1.0, 2.0, 2.0), conditional_frames=True, **SIZES),
}
LATENT = LatentConfig(channels=5, frames=3, height=6, width=10)
BATCH = 2


@pytest.fixture(scope="module")
def groups():
    """Process groups of one rank, in this process, and the attention whose products PyTorch counts."""
    prepare_megatron()
    from megatron.core import parallel_state

    init_distributed()
    select_backend("reference")
    yield initialize_parallel(ParallelConfig())
    select_backend("auto")
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@contextmanager
def counted():
    """PyTorch's count; of itself it overlooks products that are added in place."""

    def in_place(total, first, second, **_):
        return 2 * prod(first) * second[-1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: in_place}) as counter:
        yield counter


def network(model, groups):
    (chunk,) = build_chunks(
        model, LATENT, ParallelConfig(), groups=groups, params_dtype=torch.float32, recompute="none"
    )
    return load_weights([chunk], seeded_weights(model, seed=0))[0]


def inputs_of(chunk):
    """(x, timestep, text, condition) of a batch, from nowhere in particular."""
    layout, model = chunk.layout, chunk.model
    x = torch.randn(layout.local_tokens, BATCH, layout.patch_features)
    given = {"x0_SBP": torch.zeros_like(x), "frames_B": torch.tensor([1] * BATCH)} if model.conditional_frames else {}
    if model.image.channels:
        given["channels_SBE"] = torch.randn(*x.shape[:2], model.image.channels * model.patch_volume)
    if model.image.dim:
        given["image_LBD"] = torch.randn(model.image.tokens, BATCH, model.image.dim)
    condition = Condition(**given) if given else None
    return x, torch.full((1, BATCH), 500.0), torch.randn(model.text_len, BATCH, model.text_dim), condition


@pytest.mark.parametrize("name", MODELS)
def test_forward_and_dual_are_what_pytorch_counts(name, groups):
    chunk, expected = network(MODELS[name], groups), network_flops(MODELS[name], LATENT)
    x, t, text, condition = inputs_of(chunk)
    with torch.no_grad(), counted() as plain:
        chunk(x, t, text, condition)
    assert plain.get_total_flops() == BATCH * expected.forward
    with torch.no_grad(), counted() as dual:
        chunk(Dual.pack(x, x), Dual.pack(t, t), text, condition)
    assert dual.get_total_flops() == BATCH * expected.dual


@pytest.mark.parametrize("name", MODELS)
def test_backward_is_what_pytorch_counts_less_what_is_computed_again(name, groups):
    """Again: attention's scores, and what is recomputed under every policy. Of given inputs PyTorch computes no gradient."""
    model = MODELS[name]
    chunk, expected = network(model, groups), network_flops(model, LATENT)
    tokens, times = chunk.layout.num_tokens, LATENT.frames if model.conditional_frames else 1
    given = {"patch_embedding": tokens, "time_embedding.linear_1": times}
    again = {"patch_embedding": tokens, "time_embedding": times, "time_projection": times, "head.linear": tokens}
    again |= {"head.modulation": times}
    given |= {} if isinstance(model, CosmosModelConfig) else {"text_embedding.linear_1": model.text_len}
    shapes = {
        key: shape for key, shape in internal_shapes(model).items() if key.endswith(".weight") and len(shape) == 2
    }

    def flops(rows_of):
        return sum(
            2 * rows * prod(s)
            for start, rows in rows_of.items()
            for key, s in shapes.items()
            if key.startswith(start + ".")
        )

    scores = (expected.self_attention + expected.cross_attention) // 2
    x, t, text, condition = inputs_of(chunk)
    output = chunk(x, t, text, condition)
    with counted() as backward:
        output.sum().backward()
    assert backward.get_total_flops() == BATCH * (expected.backward + scores + flops(again) - flops(given))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_networks_are_counted(path):
    """Every linear is known, and the count is near the rule of thumb, two FLOPs a token and parameter and 4 S D of attention."""
    run = load_config(path)
    model, tokens = run.model, run.latent.num_tokens(run.model.patch_size)
    parameters = sum(prod(shape) for name, shape in internal_shapes(model).items() if name.startswith("blocks."))
    thumb = 2 * tokens * parameters + 4 * tokens * model.hidden_size * model.num_layers * (tokens + model.text_len)
    assert 0.7 < network_flops(model, run.latent).forward / thumb < 1.05


def test_an_unknown_linear_is_an_error(monkeypatch):
    monkeypatch.delitem(FAMILIES["wan"].flop_rows, "cross_attn.linear_q")
    with pytest.raises(KeyError, match=r"got a linear blocks\.0\.cross_attn\.linear_q\.weight; need one of .*; fix: "):
        network_flops(MODELS["wan"], LATENT)


# ---- steps

STAGES = {
    "flow": {"losses": {"flow": 1.0}},
    "dcm": {"losses": {"dcm": 100.0}},
    "rcm": {"losses": {"scm": 100.0, "dmd": 1.0}, "student_update_freq": 2},
    "dmd": {"losses": {"dmd": 1.0}, "student_update_freq": 2},
}
SETTINGS = {"dcm": {"skip": 2, "total_steps": 8}}
CASES = [
    ("flow", {}, 0, ("flow",)),
    ("dcm", {}, 0, ("dcm",)),
    ("dcm", {"teacher_guidance": 1.0}, 0, ("dcm",)),
    *(("rcm", {"jvp_kind": kind}, 0, ("scm", "dmd")) for kind in ("exact", "semicontinuous", "finite_difference")),
    ("rcm", {}, 1, ("fake_score",)),
    ("dmd", {}, 4, ("dmd",)),
    ("dmd", {"teacher_guidance": 1.0}, 5, ("fake_score",)),
]


def run_of(tmp_path, stage, changes):
    given = tiny_config(tmp_path) | {"stages": [{"name": stage, "steps": 9} | STAGES[stage]]}
    given["networks"]["teacher"]["init"] = None
    given["objectives"] = SETTINGS | {"scm": {key: value for key, value in changes.items() if key == "jvp_kind"}}
    given["distillation"] |= {key: value for key, value in changes.items() if key != "jvp_kind"}
    given["memory"] = {"recompute": "none"}
    return build(RunConfig, given)


def samples_of(run, layout):
    draws = SeededDraws(0, 0, [4, 5])
    latent = draws.normal("latent", run.latent.shape_CTHW)
    text = draws.normal("text", (run.model.text_len, run.model.text_dim)).transpose(0, 1)
    return Samples(layout.shard(latent), text, torch.zeros_like(text), draws)


@pytest.mark.parametrize(("stage", "changes", "iteration", "objectives"), CASES, ids=lambda case: str(case))
def test_passes_of_a_step_are_the_calls_of_the_networks(stage, changes, iteration, objectives, groups, tmp_path):
    """A batch of two, in the guided teacher of four, counts by rows. DMD's second forward of the last step is no use."""
    run = run_of(tmp_path, stage, changes)
    step = plan_step(run.stages[0], iteration, max_rollout_steps=run.distillation.max_rollout_steps)
    networks = build_networks(run, groups)
    calls = {role: Counter() for role in networks}

    def note(role, module, inputs, output):
        x = inputs[0]
        rows = (x.batch if isinstance(x, Dual) else x.shape[1]) // 2
        calls[role]["dual" if isinstance(x, Dual) else "forward"] += rows
        calls[role]["backward"] += rows * torch.is_grad_enabled()

    for role, chunks in networks.items():
        for chunk in chunks:
            unwrapped(chunk).register_forward_hook(partial(note, role))
    settings = {"distillation": run.distillation, "objectives": run.objectives}
    accumulate_step(step, networks, samples_of(run, networks.layout), stage=run.stages[0], **settings)
    expected = {role: Counter() for role in networks}
    for name in step.objectives:
        for p in OBJECTIVES[name].passes(settings_of(name, run.objectives), step, run.distillation):
            expected[p.role].update(forward=p.forward, dual=p.dual, backward=p.backward)
    expected["student"]["forward"] += "dmd" in step.objectives
    assert calls == expected and step.objectives == objectives
    one = {
        role: NetworkFlops(linears=100, context_linears=20, self_attention=3, cross_attention=7) for role in networks
    }
    of_use = sum(expected.values(), Counter()) - Counter(forward="dmd" in step.objectives)
    assert (
        step_flops(one, step, **settings) == of_use["forward"] * 130 + of_use["dual"] * 243 + of_use["backward"] * 260
    )


# ---- rates


def test_rates_leave_out_previews_and_share_over_devices(tmp_path):
    run = run_of(tmp_path, "rcm", {})
    run = replace(run, logging=replace(run.logging, peak_tflops=2e-6))
    step = plan_step(run.stages[0], 1, max_rollout_steps=3)
    assert step.trained == "fake_score" and step.rollout_steps == 1
    rates = Throughput(run, devices=4).rates(step, {"seconds/step": 3.0, "seconds/preview": 1.0})
    samples = run.trainer.global_batch_size / 2.0
    expected = samples * (2 + 2) * network_flops(run.model, run.latent).forward / 4 / 1e12
    assert rates == pytest.approx(
        {
            "samples_per_second": samples,
            "tokens_per_second": samples * 64,
            "tflops_per_device": expected,
            "mfu": expected / 2e-6,
        }
    )


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peak_of_a_gpu_by_its_name(tmp_path, monkeypatch, caplog, device, peak):
    caplog.set_level("INFO")
    run = run_of(tmp_path, "rcm", {})
    bf16 = replace(run, precision=replace(run.precision, params_dtype="bf16"))
    assert peak_tflops(bf16) is None, "a CPU has none"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: device)
    assert peak_tflops(bf16) == peak
    assert peak_tflops(run) is None, "fp32 has another"
    assert (peak is None) == ("fix: logging.peak_tflops" in caplog.text)
    step = plan_step(run.stages[0], 0, max_rollout_steps=3)
    rates = Throughput(bf16, devices=1).rates(step, {"seconds/step": 1.0})
    assert ("mfu" in rates) == (peak is not None)
