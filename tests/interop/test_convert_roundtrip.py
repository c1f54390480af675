"""File to file through every format: bit-exact, loadable by the official class, streaming into shards."""

import json

import pytest
import torch
from diffusers import WanTransformer3DModel

from rcm_megatron.checkpoint.sources import open_checkpoint
from rcm_megatron.checkpoint.translate import entries_for, from_internal, internal_shapes, to_internal
from tests.helpers import GOLDEN
from tests.interop.conversion import convert
from tests.interop.wan_networks import CONFIG, TINY, assert_same_tensors, save_tiny
from tests.networks import config_of, model_of


def test_diffusers_to_internal_and_back_is_bit_exact_and_runs(tiny, tmp_path):
    folder, state = tiny
    config = convert(folder, tmp_path / "internal", "internal")
    assert config == CONFIG
    convert(tmp_path / "internal", tmp_path / "back", "diffusers")
    assert_same_tensors(state, dict(open_checkpoint(tmp_path / "back")))
    models = [WanTransformer3DModel.from_pretrained(path) for path in (folder, tmp_path / "back")]
    x, text = torch.randn(2, 3, 3, 4, 6), torch.randn(2, 5, 10)
    with torch.no_grad():
        v, v_back = [model(x, torch.tensor([17, 803]), text).sample for model in models]
    assert torch.isfinite(v).all()
    assert torch.equal(v, v_back)


def test_chain_through_all_formats_is_bit_exact(tiny, tmp_path):
    folder, state = tiny
    paths = [
        folder,
        tmp_path / "wan",
        tmp_path / "rcm.pt",
        tmp_path / "rcm.safetensors",
        tmp_path / "int",
        tmp_path / "hf",
    ]
    for source, target, form in zip(
        paths, paths[1:], ("wan", "nvlabs", "nvlabs", "internal", "diffusers"), strict=False
    ):
        heads = {"num_heads": 4} if source.suffix else {}
        assert convert(source, target, form, **heads) == CONFIG
    assert_same_tensors(state, dict(open_checkpoint(paths[-1])))
    wan, nvlabs = open_checkpoint(paths[1]), open_checkpoint(paths[2])
    assert wan.shape("patch_embedding.weight") == (24, 3, 1, 2, 2)
    assert wan.format == "wan"
    assert nvlabs.shape("patch_embedding.weight") == (24, 12)
    assert nvlabs.format == "nvlabs"
    assert all(name.startswith("net.") for name in torch.load(paths[2], weights_only=True))
    assert torch.equal(wan["blocks.1.norm3.bias"], state["blocks.1.norm2.bias"])


WAN_NAMES = """time_embedder.linear_1 time_embedding.0, time_embedder.linear_2 time_embedding.2, time_proj time_projection.1,
text_embedder.linear_1 text_embedding.0, text_embedder.linear_2 text_embedding.2, attn1 self_attn, attn2 cross_attn, to_out.0 o, to_q q,
to_k k, to_v v, add_k_proj k_img, add_v_proj v_img, norm_added_k norm_k_img, norm2 norm3, ffn.net.0.proj ffn.0, ffn.net.2 ffn.2,
scale_shift_table modulation, proj_out head.head"""
"""Parts of a key in diffusers and in the Wan release, where they differ: from the two classes, and not from our table."""


def test_wan_keys_hold_what_diffusers_keys_do(tmp_path):
    """The norms of q and k of cross-attention can change places without a change of any velocity: only names tell them apart."""
    state = save_tiny(tmp_path / "hf", in_channels=7, image_dim=8, added_kv_proj_dim=24)
    convert(tmp_path / "hf", tmp_path / "wan", "wan")
    renamed = {}
    for key, value in state.items():
        name = key.removeprefix("condition_embedder.") if "image_embedder" not in key else ""
        for theirs, wans in (pair.split() for pair in WAN_NAMES.split(",")):
            name = name.replace(theirs, wans)
        if name:
            renamed["head." * (name == "modulation") + name] = value
    wan = dict(open_checkpoint(tmp_path / "wan"))
    assert_same_tensors(renamed, {name: value for name, value in wan.items() if not name.startswith("img_emb.")})


def test_qkv_rows_are_interleaved_per_head(tiny):
    folder, state = tiny
    internal = dict(to_internal(open_checkpoint(folder), CONFIG))
    for kind in ("weight", "bias"):
        fused, fused_kv = (
            internal[f"blocks.1.self_attn.linear_qkv.{kind}"],
            internal[f"blocks.1.cross_attn.linear_kv.{kind}"],
        )
        for row in range(3 * 24):  # row = (head * 3 + which) * d + channel
            head, which, channel = row // 18, row // 6 % 3, row % 6
            expected = state[f"blocks.1.attn1.to_{'qkv'[which]}.{kind}"][head * 6 + channel]
            assert torch.equal(fused[row], expected), f"qkv row {row}"
        for row in range(2 * 24):
            head, which, channel = row // 12, row // 6 % 2, row % 6
            expected = state[f"blocks.1.attn2.to_{'kv'[which]}.{kind}"][head * 6 + channel]
            assert torch.equal(fused_kv[row], expected), f"kv row {row}"


def test_patch_embedding_linear_equals_the_convolution(tiny):
    folder, state = tiny
    internal = dict(to_internal(open_checkpoint(folder), CONFIG))
    x_BCTHW = torch.randn(2, 3, 2, 4, 6)
    conv = torch.nn.functional.conv3d(x_BCTHW, state["patch_embedding.weight"], stride=(1, 2, 2))
    tokens = x_BCTHW.view(2, 3, 2, 1, 2, 2, 3, 2).permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(2, -1, 12)
    linear = tokens @ internal["patch_embedding.weight"].T
    torch.testing.assert_close(linear, conv.flatten(2).transpose(1, 2))


def test_without_cross_attention_norm(tmp_path):
    state = save_tiny(tmp_path / "hf", cross_attn_norm=False)
    assert not any("norm2" in name for name in state)
    config = convert(tmp_path / "hf", tmp_path / "int", "internal")
    assert not config.cross_attn_norm
    assert not any("norm3" in name for name in internal_shapes(config))
    convert(tmp_path / "int", tmp_path / "rcm.pth", "nvlabs")
    convert(tmp_path / "rcm.pth", tmp_path / "back", "diffusers", num_heads=4)
    assert_same_tensors(state, dict(open_checkpoint(tmp_path / "back")))


def test_sharded_source_and_target(tmp_path):
    state = save_tiny(tmp_path / "hf", max_shard_size="30KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    convert(tmp_path / "hf", tmp_path / "int", "internal", max_shard_size=20_000)
    convert(tmp_path / "int", tmp_path / "back", "diffusers", max_shard_size=20_000)
    index = json.loads((tmp_path / "back" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 4 for tensor in state.values())
    shards = sorted(path.name for path in (tmp_path / "back").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == shards
    assert shards[0].endswith(f"-00001-of-{len(shards):05d}.safetensors")
    assert_same_tensors(state, WanTransformer3DModel.from_pretrained(tmp_path / "back").state_dict())


def test_dtype_is_kept_unless_asked_for(tiny, tmp_path):
    folder, state = tiny
    convert(folder, tmp_path / "bf16", "internal", dtype="bf16")
    convert(tmp_path / "bf16", tmp_path / "back", "diffusers")
    assert_same_tensors(
        {name: tensor.bfloat16() for name, tensor in state.items()}, dict(open_checkpoint(tmp_path / "back"))
    )
    assert open_checkpoint(tmp_path / "back").metadata["format"] == "pt"


def test_golden_weights_and_gradients_convert_with_one_map():
    weights = open_checkpoint(GOLDEN / "nvlabs_rcm_small.safetensors", prefix="student/")
    config = weights.model_config(overrides={"num_heads": 4})
    assert (config.hidden_size, config.num_layers, config.text_dim, config.freq_dim) == (64, 2, 32, 64)
    back = dict(from_internal(to_internal(weights, config), config, "nvlabs"))
    assert_same_tensors({f"net.{name}": tensor for name, tensor in weights.items()}, back)
    gradients = open_checkpoint(GOLDEN / "nvlabs_rcm_small.safetensors", prefix="scm/grad/")
    internal = dict(to_internal(weights, config))
    written = {name.removeprefix("net."): value for name, value in from_internal(internal, config, "nvlabs")}
    assert all(gradients.shape(name) == tuple(written[name].shape) for name in gradients)


@pytest.mark.parametrize("form", ["diffusers", "wan", "nvlabs", "internal"])
def test_every_map_is_a_bijection(form):
    entries = entries_for(form, CONFIG)
    external = [name for entry in entries.values() for name in entry.external]
    assert len(external) == len(set(external))
    assert set(entries) == set(internal_shapes(CONFIG))
    assert len(external) == 15 + 2 * (27 if form != "internal" else 21)


def test_configurations_translate_both_ways(tiny):
    folder, _ = tiny
    stored = json.loads((folder / "config.json").read_text())
    written = config_of("diffusers", CONFIG)
    assert {k: v for k, v in written.items() if k[0] != "_"} == {k: v for k, v in stored.items() if k[0] != "_"}
    assert model_of("wan", "diffusers", {**TINY, "_class_name": "WanTransformer3DModel"}) == CONFIG
    assert model_of("wan", "wan", config_of("wan", CONFIG)) == CONFIG
    released = {"_class_name": "WanModel", "dim": 1536, "eps": 1e-06, "ffn_dim": 8960, "freq_dim": 256, "in_dim": 16}
    released |= {"model_type": "t2v", "num_heads": 12, "num_layers": 30, "out_dim": 16, "text_len": 512}
    model = model_of("wan", "wan", released)
    assert model.text_dim == 4096
    assert model.patch_size == (1, 2, 2)
