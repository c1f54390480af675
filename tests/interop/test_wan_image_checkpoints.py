"""Wan's image-conditioned networks through every format: names, config.json of each release, bit-exact round trips."""

import json
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from rcm_megatron.checkpoint.models import gather_full, load_into, write_checkpoint
from rcm_megatron.checkpoint.recognise import check_same_network
from rcm_megatron.checkpoint.sources import open_checkpoint
from rcm_megatron.checkpoint.translate import entries_for, internal_shapes
from rcm_megatron.config import LatentConfig, ParallelConfig, load_config
from rcm_megatron.errors import CheckpointError
from rcm_megatron.registries import FAMILIES
from tests.distributed.harness import run_ranks
from tests.interop.conversion import convert
from tests.interop.wan_networks import CONFIG, assert_same_tensors, save_tiny
from tests.networks import config_of, model_of

CLIP = {"image_dim": 8, "added_kv_proj_dim": 24}
KINDS = {
    "wan2.1_i2v": ({"in_channels": 7, **CLIP}, {"condition_channels": 4, "image_dim": 8}),
    "flf2v": (
        {"in_channels": 7, **CLIP, "pos_embed_seq_len": 6},
        {"condition_channels": 4, "image_dim": 8, "image_positions": 6},
    ),
    "wan2.2_i2v": ({"in_channels": 8}, {"condition_channels": 5}),
    "ti2v": ({"in_channels": 48, "out_channels": 48}, {"conditional_frames": True}),
}
"""Name -> what it changes in the tiny text-to-video network of diffusers, and in ours."""


def save(name, folder):
    """(name, folder, state dict, our configuration)."""
    changes, wan = KINDS[name]
    channels = changes.get("out_channels", 3)
    config = replace(CONFIG, **wan, in_channels=channels, out_channels=channels)
    return name, folder, save_tiny(folder, **changes), config


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    return save(request.param, tmp_path_factory.mktemp(request.param) / "diffusers")


def test_wan_to_nvlabs_to_diffusers_to_wan_is_bit_exact(saved, tmp_path):
    name, folder, state, config = saved
    assert convert(folder, tmp_path / "original", "wan") == config
    assert convert(tmp_path / "original", tmp_path / "rcm.pt", "nvlabs") == config
    assert convert(tmp_path / "rcm.pt", tmp_path / "hf", "diffusers", num_heads=4) == config
    assert convert(tmp_path / "hf", tmp_path / "again", "wan") == config
    assert_same_tensors(state, WanTransformer3DModel.from_pretrained(tmp_path / "hf").state_dict())
    assert_same_tensors(dict(open_checkpoint(tmp_path / "original")), dict(open_checkpoint(tmp_path / "again")))
    files = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("original", "again")]
    assert files[0] == files[1] and files[0]["model_type"] == name.rpartition("_")[-1]
    loaded, original = (WanTransformer3DModel.load_config(path) for path in (tmp_path / "hf", folder))
    assert {k: v for k, v in loaded.items() if k[0] != "_"} == {k: v for k, v in original.items() if k[0] != "_"}


def test_internal_folder_keeps_the_configuration(saved, tmp_path):
    _, folder, state, config = saved
    assert convert(folder, tmp_path / "internal", "internal") == config
    assert convert(tmp_path / "internal", tmp_path / "back", "diffusers") == config
    assert_same_tensors(state, dict(open_checkpoint(tmp_path / "back")))


def test_every_map_is_a_bijection(saved):
    _, _, state, config = saved
    for form in ("diffusers", "wan", "nvlabs", "internal"):
        entries = entries_for(form, config)
        external = [name for entry in entries.values() for name in entry.external]
        assert len(external) == len(set(external)), form
        assert entries.keys() == internal_shapes(config).keys()
    shapes = {name: e.external_shape for e in entries_for("diffusers", config).values() for name in e.external}
    assert shapes == {name: tuple(value.shape) for name, value in state.items()}


def load_and_export(folder, target, config, parallel):
    from rcm_megatron.networks.build import build_chunks
    from rcm_megatron.parallel.groups import initialize_parallel

    parallel = ParallelConfig(**parallel)
    groups = initialize_parallel(parallel)
    latent = LatentConfig(channels=config.in_channels, frames=3, height=4, width=6)
    chunks = build_chunks(config, latent, parallel, groups=groups, params_dtype=torch.float32)
    place = {"tp_rank": groups.tp_rank, "tp_size": groups.tp_size, "partial": parallel.pp > 1}
    load_into(chunks, open_checkpoint(folder), model_config=config, **place)
    whole = gather_full(chunks, tp_group=groups.tp, pp_group=groups.pp)
    write_checkpoint(whole, config, target, is_writer=dist.get_rank() == 0)


def test_loaded_on_a_layout_and_exported_is_bit_exact(tmp_path):
    """diffusers -> the built network on tp=2, pp=2 -> diffusers, for the network that has all modules of the others."""
    _, folder, state, config = save("flf2v", tmp_path / "diffusers")
    run_ranks(load_and_export, 4, str(folder), str(tmp_path / "out"), config, {"tp": 2, "pp": 2})
    assert_same_tensors(state, dict(open_checkpoint(tmp_path / "out")))


# What the releases' config.json say, beside fields that all of them share.
RELEASED = {"_class_name": "WanModel", "eps": 1e-6, "freq_dim": 256, "text_len": 512, "out_dim": 16}
LARGE = {**RELEASED, "dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}
WITH_CLIP = {"img_emb.proj.1.weight": (1280, 1280)}
RELEASES = {
    "Wan2.1-I2V-14B": (
        LARGE | {"model_type": "i2v", "in_dim": 36},
        WITH_CLIP,
        {"condition_channels": 20, "image_dim": 1280},
    ),
    "Wan2.1-FLF2V-14B": (
        LARGE | {"model_type": "flf2v", "in_dim": 36},
        WITH_CLIP | {"img_emb.emb_pos": (1, 514, 1280)},
        {"condition_channels": 20, "image_dim": 1280, "image_positions": 514},
    ),
    "Wan2.2-T2V-A14B": (LARGE | {"model_type": "t2v", "in_dim": 16}, {}, {}),
    "Wan2.2-I2V-A14B": (LARGE | {"model_type": "i2v", "in_dim": 36}, {}, {"condition_channels": 20}),
    "Wan2.2-TI2V-5B": (
        RELEASED
        | {"dim": 3072, "ffn_dim": 14336, "num_heads": 24, "num_layers": 30}
        | {"model_type": "ti2v", "in_dim": 48, "out_dim": 48},
        {},
        {"conditional_frames": True},
    ),
}


@pytest.mark.parametrize("name", RELEASES)
def test_configurations_of_the_releases(name):
    released, shapes, wan = RELEASES[name]
    model = model_of("wan", "wan", released, shapes)
    assert {name: getattr(model, name) for name in wan} == wan
    assert model.image.channels == wan.get("condition_channels", 0)
    assert model.in_channels == model.out_channels == released["out_dim"]
    assert model.embedded_channels == released["in_dim"]
    written = config_of("wan", model)
    assert {key: written[key] for key in released} == released
    assert model_of("wan", "diffusers", config_of("diffusers", model)) == model


SHIPPED = {
    "wan2.1_i2v_14b_480p": "Wan2.1-I2V-14B",
    "wan2.2_t2v_a14b_480p": "Wan2.2-T2V-A14B",
    "wan2.2_i2v_a14b": "Wan2.2-I2V-A14B",
    "wan2.2_ti2v_5b": "Wan2.2-TI2V-5B",
}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configurations_are_the_releases(name):
    released, shapes, _ = RELEASES[SHIPPED[name]]
    model = load_config(f"model_configs/{name}.yaml").model
    found = model_of("wan", "wan", released, shapes)
    assert found == model
    check_same_network(found, model, where=name)


def test_heads_of_the_releases_are_known_from_their_width():
    for hidden, heads in ((3072, 24), (5120, 40)):
        shapes = {name: e.external_shape for e in entries_for("wan", CONFIG).values() for name in e.external}
        shapes["patch_embedding.weight"] = (hidden, 3, 1, 2, 2)
        assert FAMILIES["wan"].namings["wan"].read_shapes(shapes, {})["num_heads"] == heads


def test_other_kinds_of_wan_are_refused():
    with pytest.raises(CheckpointError, match="model_type='vace'; need one of t2v, i2v, flf2v, ti2v"):
        model_of("wan", "wan", LARGE | {"model_type": "vace"})


def test_the_norm_that_no_network_uses_is_passed_over(tmp_path):
    """diffusers' files of Wan2.1 I2V hold attn2.norm_added_q, which its class ignores."""
    _, copy, state, _ = save("wan2.1_i2v", tmp_path / "diffusers")
    (file,) = copy.glob("*.safetensors")
    save_file(load_file(file) | {"blocks.0.attn2.norm_added_q.weight": torch.ones(24)}, file)
    convert(copy, tmp_path / "back", "diffusers")
    assert_same_tensors(state, dict(open_checkpoint(tmp_path / "back")))
    save_file(load_file(file) | {"blocks.0.attn1.norm_added_q.weight": torch.ones(24)}, file)
    with pytest.raises(CheckpointError, match=r"unknown \(1\): 'blocks.0.attn1.norm_added_q.weight'"):
        convert(copy, tmp_path / "other", "diffusers")


def test_a_run_chooses_whether_frames_are_given(saved):
    """No weight shows it: the same file serves a run with given frames and one without. Any other difference is an error."""
    _, folder, _, config = saved
    found = open_checkpoint(folder).model_config()
    for given in (False, True):
        check_same_network(found, replace(config, conditional_frames=given), where="file")
    other = replace(config, condition_channels=config.condition_channels + 1)
    with pytest.raises(CheckpointError, match=r"file holds another network: condition_channels="):
        check_same_network(found, other, where="file")
