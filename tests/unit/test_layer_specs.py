"""Which linears a run gets, what the configuration refuses, and that Megatron's Transformer Engine wrappers fit where ours stand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rcm_megatron.config import (
    ConfigError,
    LatentConfig,
    ParallelConfig,
    PrecisionConfig,
    load_config,
    validate,
)
from rcm_megatron.dual import Dual
from rcm_megatron.models import layer_specs
from rcm_megatron.models.layer_specs import (
    LayerSpec,
    choose_layer_spec,
    local_layer_spec,
    transformer_engine_layer_spec,
)
from rcm_megatron.platform.device import init_distributed
from rcm_megatron.platform.megatron import prepare_megatron
from tests.helpers import relative_error
from tests.networks import wan

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "model_configs" / "quickstart.yaml"
MODEL = wan(hidden_size=64, ffn_hidden_size=96, text_len=16)
LATENT = LatentConfig(channels=3, frames=3, height=6, width=10)
LINEARS_OF_A_BLOCK = 7


# ---- choosing


def chosen(monkeypatch, missing: str | None, *, fp8_role: str | None = None, **precision) -> LayerSpec:
    monkeypatch.setattr(layer_specs, "_missing_for_transformer_engine", lambda: missing)
    monkeypatch.setattr(layer_specs, "_check_fp8_device", lambda role: None)
    monkeypatch.setattr(layer_specs, "transformer_engine_layer_spec", lambda *, fp8: LayerSpec(int, str, fp8=fp8))
    return choose_layer_spec(PrecisionConfig(**{"params_dtype": "bf16"} | precision), fp8_role=fp8_role)


@pytest.mark.parametrize(
    ("precision", "missing", "is_local"),
    [
        ({}, None, False),
        ({}, "there is no CUDA device", True),
        ({"params_dtype": "fp32"}, None, True),
        ({"linear_layers": "local"}, None, True),
        ({"linear_layers": "transformer_engine"}, None, False),
    ],
)
def test_which_linears_a_run_gets(monkeypatch, precision, missing, is_local):
    spec = chosen(monkeypatch, missing, **precision)
    assert (spec == local_layer_spec()) == is_local and not spec.fp8


def test_fp8_is_for_the_networks_that_ask_for_it(monkeypatch):
    specs = {role: chosen(monkeypatch, None, fp8_role=role) for role in (None, "teacher")}
    assert {role: spec.fp8 for role, spec in specs.items()} == {None: False, "teacher": True}
    assert all(spec.column_linear is int for spec in specs.values())


@pytest.mark.parametrize("asked", [{"linear_layers": "transformer_engine"}, {"fp8_role": "teacher"}])
def test_what_is_asked_for_and_missing_is_an_error(monkeypatch, asked):
    with pytest.raises(ConfigError, match="not installed; need Transformer Engine 2.9 or newer.*fix: pip install"):
        chosen(monkeypatch, "Transformer Engine is not installed", **asked)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_run_in_fp8_is_refused_before_its_weights_are_read(monkeypatch):
    from rcm_megatron.networks import weights
    from rcm_megatron.training.state import build_networks

    monkeypatch.setattr(weights, "open_checkpoint", lambda path: pytest.fail("weights were opened"))
    run = load_config(QUICKSTART, ["precision.params_dtype=bf16", "networks.teacher.fp8=true"])
    with pytest.raises(ConfigError, match="need Transformer Engine"):
        build_networks(run, groups=None)


def test_the_choice_is_logged_once(monkeypatch, caplog):
    layer_specs._log_once.cache_clear()
    with caplog.at_level("INFO", logger=layer_specs.__name__):
        for _ in range(3):
            chosen(monkeypatch, "there is no CUDA device")
    assert [record.getMessage() for record in caplog.records] == [
        "linear layers: Megatron-Core's own (there is no CUDA device)"
    ]


# ---- configuration

FITS = (
    "precision.params_dtype=bf16",
    "model.text_len=16",
    "encoders.text=none",
    "data.negative_embedding=none.safetensors",
)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["precision.linear_layers=transformer_engine", "precision.params_dtype=fp32"], ["TF32", "auto or local"]),
        (
            ["networks.teacher.fp8=true", "precision.linear_layers=local"],
            ["networks.teacher.fp8=true needs Transformer Engine"],
        ),
        (["networks.teacher.fp8=true", "precision.params_dtype=fp32"], ["needs precision.params_dtype=bf16, got fp32"]),
        (
            ["networks.fake_score.fp8=true", 'stages=[{"name": "a", "steps": 1, "losses": {"scm": 1}}]'],
            ["no stage of this run uses"],
        ),
        (["networks.teacher.fp8=true", "model.text_len=8"], ["model.text_len=8 must divide by 16"]),
        (
            ["networks.teacher.fp8=true", "model.ffn_hidden_size=584"],
            ["ffn_hidden_size=584 must divide by 16*parallel.tp = 16"],
        ),
        (
            [
                "networks.teacher.fp8=true",
                "parallel.ring=1",
                "parallel.tp=2",
                "model.hidden_size=208",
                "model.num_heads=2",
            ],
            ["hidden_size=208 must divide by 16*parallel.tp = 32"],
        ),
        (["networks.student.fp8=true"], ["networks.student.fp8=true, but a stage takes a tangent"]),
    ],
)
def test_precisions_that_cannot_work_are_refused(overrides, parts):
    with pytest.raises(ConfigError) as caught:
        validate(load_config(QUICKSTART, [*FITS, *overrides]), 2)
    for part in parts:
        assert part in str(caught.value)


def test_fp8_of_both_networks_is_accepted_and_pads_tokens():
    run = load_config(QUICKSTART, [*FITS, "networks.teacher.fp8=true", "networks.fake_score.fp8=true"])
    validate(run, 2)
    assert run.token_multiple == 16
    assert load_config(QUICKSTART, FITS).token_multiple == 1


@pytest.mark.parametrize(
    ("shards", "multiple", "local"), [(1, 1, 45), (2, 1, 23), (1, 16, 48), (2, 16, 32), (4, 16, 16)]
)
def test_tokens_of_a_rank_are_a_multiple(shards, multiple, local):
    from types import SimpleNamespace

    from rcm_megatron.models.tokens import TokenLayout

    layouts = [
        TokenLayout(
            LATENT.shape_CTHW,
            MODEL.patch_size,
            groups=SimpleNamespace(token_shards=shards, token_shard=i),
            multiple_of=multiple,
        )
        for i in range(shards)
    ]
    assert {layout.local_tokens for layout in layouts} == {local}
    assert {layout.padded_tokens for layout in layouts} == {local * shards}
    assert sum(layout.valid_local for layout in layouts) == 45
    x = torch.randn(2, *LATENT.shape_CTHW)
    tokens = torch.cat([layout.shard(x) for layout in layouts])
    assert torch.equal(layouts[0].unpatchify(tokens[:45]), x) and not tokens[45:].any()


# ---- Megatron's wrappers of Transformer Engine on a double of it


def build(spec: LayerSpec, groups, *, token_multiple: int = 16) -> list:
    from rcm_megatron.networks.build import build_chunks
    from rcm_megatron.networks.weights import load_weights, seeded_weights

    layout = {"groups": groups, "token_multiple": token_multiple}
    chunks = build_chunks(MODEL, LATENT, ParallelConfig(), params_dtype=torch.float32, spec=spec, **layout)
    return load_weights(chunks, dict(seeded_weights(MODEL, seed=1)))


def inputs(network) -> tuple[Tensor | Dual, Tensor | Dual, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, t_x = (network.layout.shard(torch.randn(1, *LATENT.shape_CTHW, generator=generator)) for _ in range(2))
    text = torch.randn(MODEL.text_len, 1, MODEL.text_dim, generator=generator)
    return Dual.pack(x, t_x), Dual.pack(torch.full((1, 1), 700.0), torch.full((1, 1), 30.0)), text


def measure(spec: LayerSpec, groups, calls: list) -> dict:
    """Everything that must not depend on whose linears they are, and (in FP8, with gradient) of each call of a double's linear."""
    from rcm_megatron.training.optimizer import gather_main_grads, wrap_ddp

    chunks = build(spec, groups)
    ddp = wrap_ddp(chunks, chunks[0].config)
    (network,) = chunks
    x, timestep, text = inputs(network)
    found = {}
    if not spec.fp8:
        with torch.no_grad():
            found["tangent"] = network(x, timestep, text).tangent
    ddp[0].zero_grad_buffer()
    calls.clear()
    with ddp[0].no_sync():
        v = ddp[0](x.primal, timestep.primal, text)
        forward = list(calls)
        v.square().sum().backward()
    recomputed = calls[len(forward) :]
    by_parameter = gather_main_grads(ddp)
    found |= {"output": v.detach()} | {name: by_parameter[p] for name, p in network.named_parameters()}
    marks = ("tensor_model_parallel", "partition_dim", "sequence_parallel", "pipeline_parallel")
    return {
        "numbers": found,
        "calls": (forward, recomputed),
        "marks": {name: [getattr(p, mark, None) or 0 for mark in marks] for name, p in network.named_parameters()},
        "checkpoint": sorted(network.sharded_state_dict()),
    }


def padding_errors(groups) -> dict[str, float]:
    """Of output and tangent with 3 tokens of padding against none."""
    outputs = {}
    for multiple in (1, 16):
        (network,) = build(local_layer_spec(), groups, token_multiple=multiple)
        with torch.no_grad():
            v = network(*inputs(network))
        outputs[multiple] = {"output": network.layout.gather(v.primal), "tangent": network.layout.gather(v.tangent)}
    return {name: relative_error(outputs[1][name], outputs[16][name]) for name in outputs[1]}


def report() -> None:
    """In a process where the double is Transformer Engine: print what the test below asserts."""
    from rcm_megatron.parallel.groups import initialize_parallel
    from tests.unit import transformer_engine_double as double

    prepare_megatron()
    init_distributed()
    groups = initialize_parallel(ParallelConfig())
    local = measure(local_layer_spec(), groups, double.CALLS)
    result = {}
    for name, fp8 in (("bf16", False), ("fp8", True)):
        spec = transformer_engine_layer_spec(fp8=fp8)
        engine = measure(spec, groups, double.CALLS)
        result[name] = {
            "errors": {key: relative_error(local["numbers"][key], value) for key, value in engine["numbers"].items()},
            "calls": engine["calls"],
            "differing_marks": {
                k: [v, engine["marks"][k]] for k, v in local["marks"].items() if v != engine["marks"][k]
            },
            "same_checkpoint": local["checkpoint"] == engine["checkpoint"],
        }
    (network,) = build(spec, groups)
    teacher = network.requires_grad_(False)  # outside DDP there is no main_grad
    x, timestep, text = inputs(network)
    teacher(x.primal, timestep.primal, text)
    try:
        teacher(x, timestep, text)
    except TypeError as error:
        result["dual"] = str(error)
    result["fp8_left_on"] = bool(double.FP8_ON)
    result["padding"] = padding_errors(groups)
    print(json.dumps(result))


@pytest.fixture(scope="module")
def reported():
    code = "from tests.unit import transformer_engine_double as d; d.install(); from tests.unit.test_layer_specs import report; report()"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_wrappers_keep_the_contract_of_the_local_linears(reported, name):
    found = reported[name]
    assert {"output", "patch_embedding.weight", "blocks.1.mlp.linear_fc2.bias"} < found["errors"].keys()
    for key, error in found["errors"].items():
        assert error < 1e-5, f"{key}: {error:.1e}"
    assert found["differing_marks"] == {}
    assert found["same_checkpoint"], "_extra_state must not enter checkpoints"


def test_padding_for_fp8_changes_no_number(reported):
    for name, error in reported["padding"].items():
        assert error < 1e-6, f"{name}: {error:.1e}"


def test_tangents_go_through_the_wrappers(reported):
    assert "tangent" in reported["bf16"]["errors"]


@pytest.mark.parametrize(("name", "in_fp8"), [("bf16", False), ("fp8", True)])
def test_where_fp8_is_on(reported, name, in_fp8):
    """In the forward, and again in what the backward recomputes."""
    linears = MODEL.num_layers * LINEARS_OF_A_BLOCK
    assert reported[name]["calls"] == [[[in_fp8, False]] * linears, [[in_fp8, True]] * linears]
    assert not reported["fp8_left_on"]


def test_a_dual_in_an_fp8_network_raises(reported):
    assert "got a Dual in a network that runs in FP8; need bf16" in reported["dual"]
