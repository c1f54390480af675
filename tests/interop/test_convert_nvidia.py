"""NVIDIA's own Cosmos-Predict2 files: names, what is in them beside weights, the network that no config.json describes."""

import io
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from rcm_megatron.checkpoint.sources import CheckpointSource, LazyTensor, open_checkpoint
from rcm_megatron.checkpoint.translate import entries_for
from rcm_megatron.cli.main import main
from rcm_megatron.config import load_config
from rcm_megatron.errors import CheckpointError
from tests.interop.conversion import convert
from tests.interop.test_cosmos_checkpoints import CONFIG, save_tiny
from tests.interop.wan_networks import assert_same_tensors

SCALE = {"rope_scale": (1.0, 4.0, 3.0)}
NAMES = """x_embedder.proj.1 t_embedder.1.linear_1 t_embedder.1.linear_2 t_embedding_norm
final_layer.adaln_modulation.1 final_layer.adaln_modulation.2 final_layer.linear"""
BLOCK_NAMES = """adaln_modulation_self_attn.1 adaln_modulation_self_attn.2 adaln_modulation_cross_attn.1 adaln_modulation_cross_attn.2
adaln_modulation_mlp.1 adaln_modulation_mlp.2 mlp.layer1 mlp.layer2
self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.q_norm self_attn.k_norm self_attn.output_proj
cross_attn.q_proj cross_attn.k_proj cross_attn.v_proj cross_attn.q_norm cross_attn.k_norm cross_attn.output_proj"""
"""Modules with a weight in MinimalV1LVGDiT of nvidia-cosmos/cosmos-predict2, read from its source."""
RELEASES = ("cosmos_predict2_2b_text2image", "cosmos_predict2_14b_text2image", "cosmos_predict2_2b_video2world")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(state dict of diffusers, NVIDIA's file)."""
    home = tmp_path_factory.mktemp("nvidia")
    state = save_tiny(home / "diffusers")
    convert(home / "diffusers", home / "model.pt", "nvidia")
    return state, home / "model.pt"


def test_names_are_those_of_nvidias_modules(tiny):
    names = [f"net.{name}.weight" for name in NAMES.split()]
    names += [f"net.blocks.{index}.{name}.weight" for index in range(3) for name in BLOCK_NAMES.split()]
    names += [f"net.extra_pos_embedder.pos_emb_{axis}" for axis in "thw"]
    assert sorted(torch.load(tiny[1], weights_only=True)) == sorted(names)


def test_the_rows_of_a_file(tiny):
    state, path = tiny
    weights = torch.load(path, weights_only=True)
    pairs = {
        "blocks.1.self_attn.k_proj": "transformer_blocks.1.attn1.to_k",
        "blocks.2.cross_attn.v_proj": "transformer_blocks.2.attn2.to_v",
        "blocks.0.adaln_modulation_cross_attn.2": "transformer_blocks.0.norm2.linear_2",
        "blocks.2.mlp.layer2": "transformer_blocks.2.ff.net.2",
        "final_layer.adaln_modulation.1": "norm_out.linear_1",
    }
    for nvidia, diffusers in pairs.items():
        assert torch.equal(weights[f"net.{nvidia}.weight"], state[f"{diffusers}.weight"]), nvidia


def with_more(path, target):
    """The file as NVIDIA leaves it: counters, RoPE's constants, Transformer Engine's states (bytes or empty tensors)."""
    weights = torch.load(path, weights_only=True)
    weights["net.blocks.0.self_attn.q_norm._extra_state"] = io.BytesIO(b"\x80\x04cos\nsystem\n.")
    weights["net.blocks.0.self_attn.k_norm._extra_state"] = torch.empty(0, dtype=torch.uint8)
    weights["net.pos_embedder.seq"] = torch.arange(240.0)
    weights |= {f"net.pos_embedder.dim_{kind}_range": torch.arange(8.0) for kind in ("spatial", "temporal")}
    weights |= {f"net.accum_{kind}": torch.tensor(3) for kind in ("iteration", "image_sample_counter")}
    torch.save(weights, target)
    return weights


def test_what_is_no_weight_is_left_out(tiny, tmp_path):
    weights = with_more(tiny[1], tmp_path / "model.pt")
    tensors = {name: value for name, value in weights.items() if isinstance(value, torch.Tensor)}
    save_file(tensors, tmp_path / "model.safetensors")
    for name in ("model.pt", "model.safetensors"):
        convert(tmp_path / name, tmp_path / "back", "diffusers", **SCALE, force=True)
        assert_same_tensors(tiny[0], dict(open_checkpoint(tmp_path / "back")))
    weights["net.blocks.0.self_attn.q_norm.bias"] = torch.zeros(12)
    torch.save(weights, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"unknown \(1\): 'blocks.0.self_attn.q_norm.bias' \(nearest: 'blocks.0"):
        convert(tmp_path / "model.pt", tmp_path / "out", "diffusers", **SCALE)


def test_which_of_several_networks(tiny, tmp_path, capsys):
    weights = torch.load(tiny[1], weights_only=True)
    ema = {name.replace("net.", "net_ema.", 1): 2 * value for name, value in weights.items()}
    torch.save(weights | ema, tmp_path / "both.pt")
    options = ["--to", "diffusers", "--rope-scale", "1", "4", "3"]
    assert main(["convert", str(tmp_path / "both.pt"), str(tmp_path / "out"), *options]) == 1
    assert "several networks: student, ema; choose one: `convert" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "both.pt"), str(tmp_path / "out"), "--weights", "ema", *options]) == 0
    assert_same_tensors({name: 2 * value for name, value in tiny[0].items()}, dict(open_checkpoint(tmp_path / "out")))
    assert "| weights | `ema` |" in (tmp_path / "out" / "README.md").read_text()


def test_the_network_is_read_off_the_shapes(tiny):
    model = open_checkpoint(tiny[1]).model_config(overrides=SCALE)
    assert model.qk_norm_eps == 1e-6, "as the release computes"
    assert replace(model, qk_norm_eps=CONFIG.qk_norm_eps) == CONFIG
    with pytest.raises(CheckpointError, match=r"hidden_size=48: RoPE's scale shows in no weight; pass rope_scale"):
        open_checkpoint(tiny[1]).model_config()
    with pytest.raises(CheckpointError, match=r"takes 20 numbers a token and final_layer.linear gives 12"):
        open_checkpoint(tiny[1]).model_config(overrides=SCALE | {"patch_size": (1, 1, 1)})
    with pytest.raises(CheckpointError, match="unknown model field 'rope_scales' .nearest: 'rope_scale'"):
        open_checkpoint(tiny[1]).model_config(overrides={"rope_scales": 1})


@pytest.mark.parametrize("name", RELEASES)
def test_released_sizes_are_recognised(name):
    """From shapes alone comes the shipped configuration of each release."""
    model = load_config(f"model_configs/{name}.yaml").model
    shapes = {key: e.external_shape for e in entries_for("nvidia", model).values() for key in e.external}
    source = CheckpointSource("shapes", {key: LazyTensor(shape, None) for key, shape in shapes.items()})
    got = source.model_config()
    free = {"qk_norm_eps": got.qk_norm_eps, "condition_sigma": got.condition_sigma}
    assert got == replace(model, **free)
