"""Cosmos-Predict2 between diffusers and this program: bit-exact both ways, every key once, each layout, config.json."""

import json
import math

import pytest
import torch
import torch.distributed as dist
from diffusers import CosmosTransformer3DModel
from safetensors.torch import load_file, save_file

from rcm_megatron.checkpoint.models import gather_full, load_into, write_checkpoint
from rcm_megatron.checkpoint.sources import open_checkpoint
from rcm_megatron.checkpoint.translate import entries_for, from_internal, to_internal
from rcm_megatron.config import LatentConfig, ParallelConfig, load_config
from rcm_megatron.errors import CheckpointError
from tests.distributed.harness import run_ranks
from tests.interop.conversion import convert
from tests.interop.wan_networks import assert_same_tensors
from tests.networks import config_of, cosmos, model_of

TINY = {
    "in_channels": 4,
    "out_channels": 3,
    "num_attention_heads": 4,
    "attention_head_dim": 12,
    "num_layers": 3,
    "mlp_ratio": 1.5,
    "text_embed_dim": 10,
    "adaln_lora_dim": 5,
    "max_size": (3, 4, 6),
    "rope_scale": (1.0, 4.0, 3.0),
    "extra_pos_embed_type": "learnable",
}
CONFIG = cosmos(
    num_layers=3,
    adaln_lora_dim=5,
    max_size=(3, 4, 6),
    conditional_frames=True,
    learnable_positions=True,
    rope_max_seq_len=3,
)


def save_tiny(folder, **changes):
    """Save a CosmosTransformer3DModel of which no two elements are equal; returns its state dict."""
    model, start = CosmosTransformer3DModel(**{**TINY, **changes}), 0
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.arange(start, start + parameter.numel(), dtype=torch.float32)
            parameter.copy_(values.view(parameter.shape).sub_(60_000).mul_(1e-5))
            start += parameter.numel()
    model.save_pretrained(folder)
    return model.state_dict()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(folder, state dict) of a saved network."""
    folder = tmp_path_factory.mktemp("cosmos") / "diffusers"
    return folder, save_tiny(folder)


def test_there_and_back_is_bit_exact_and_from_pretrained_loads_it(tiny, tmp_path):
    folder, state = tiny
    assert convert(folder, tmp_path / "internal", "internal") == CONFIG
    assert convert(tmp_path / "internal", tmp_path / "back", "diffusers", max_shard_size=40_000) == CONFIG
    back = open_checkpoint(tmp_path / "back")
    assert back.format == "diffusers"
    assert_same_tensors(state, dict(back))
    loaded = CosmosTransformer3DModel.from_pretrained(tmp_path / "back")
    assert_same_tensors(state, loaded.state_dict())
    original = CosmosTransformer3DModel.from_pretrained(folder)
    ours, theirs = (
        {k: tuple(v) if isinstance(v, list) else v for k, v in model.config.items() if not k.startswith("_")}
        for model in (loaded, original)
    )
    assert ours == theirs


def test_every_external_key_is_used_once(tiny):
    folder, state = tiny
    internal = list(to_internal(open_checkpoint(folder), CONFIG))
    external = [name for name, _ in from_internal(internal, CONFIG, "diffusers")]
    assert len(external) == len(set(external)) == len(state)
    assert sum(value.numel() for _, value in internal) == sum(value.numel() for value in state.values())


@pytest.mark.parametrize("change", ["missing", "unknown", "misshaped", "wan"])
def test_a_wrong_key_is_named(tiny, tmp_path, change):
    folder, _ = tiny
    (file,) = folder.glob("*.safetensors")
    tensors, key = load_file(file), "transformer_blocks.1.norm2.linear_1.weight"
    if change == "missing":
        del tensors[key]
    elif change == "unknown":
        tensors[key.replace("linear_1", "linear_3")] = tensors[key].clone()
    elif change == "misshaped":
        tensors[key] = tensors[key][:, :-1].contiguous()
    (tmp_path / "bad").mkdir()
    save_file(tensors, tmp_path / "bad" / file.name)
    (tmp_path / "bad" / "config.json").write_text((folder / "config.json").read_text())
    target = "wan" if change == "wan" else "internal"
    with pytest.raises(CheckpointError, match=r"Cosmos-Predict2 network" if change == "wan" else r"norm2\.linear"):
        convert(tmp_path / "bad", tmp_path / "out", target)
    assert not (tmp_path / "out").exists()


def test_a_foreign_network_is_refused(tiny):
    config = json.loads((tiny[0] / "config.json").read_text())
    assert model_of("cosmos", "diffusers", config) == CONFIG
    for change in ({"img_context_dim_in": 7}, {"use_crossattn_projection": True}, {"in_channels": 9}):
        with pytest.raises(CheckpointError, match=next(iter(change))):
            model_of("cosmos", "diffusers", config | change)


def test_released_configurations():
    """What diffusers' conversion script writes for the releases."""
    released = {"num_attention_heads": 16, "rope_scale": [1.0, 4.0, 4.0], "extra_pos_embed_type": None}
    config = {"_class_name": "CosmosTransformer3DModel", **released}
    model = model_of("cosmos", "diffusers", config)
    assert (model.hidden_size, model.ffn_hidden_size, model.num_layers, model.text_dim) == (2048, 8192, 28, 1024)
    assert model.embedded_channels == 17
    video = model_of("cosmos", "diffusers", {**config, "in_channels": 17})
    assert video.embedded_channels == 18
    assert video.in_channels == 16
    assert video.conditional_frames


RELEASED = {
    "cosmos_predict2_2b_text2image": ({"num_attention_heads": 16, "rope_scale": (1.0, 4.0, 4.0)}, 1.96e9),
    "cosmos_predict2_14b_text2image": (
        {"num_attention_heads": 40, "num_layers": 36, "rope_scale": (1.0, 4.0, 4.0)},
        14.3e9,
    ),
    "cosmos_predict2_2b_video2world": (
        {"num_attention_heads": 16, "in_channels": 17, "rope_scale": (1.0, 3.0, 3.0)},
        1.96e9,
    ),
    "cosmos_predict2_14b_video2world": (
        {"num_attention_heads": 40, "num_layers": 36, "in_channels": 17, "rope_scale": (20 / 24, 2.0, 2.0)},
        14.3e9,
    ),
}
"""Shipped configuration -> what diffusers' conversion script sets of the release beside the class's defaults, and its parameters."""


@pytest.mark.parametrize("name", RELEASED)
def test_shipped_configurations_are_the_releases(name):
    options, parameters = RELEASED[name]
    with torch.device("meta"):
        network = CosmosTransformer3DModel(**options, extra_pos_embed_type=None)
    model = load_config(f"model_configs/{name}.yaml").model
    entries = entries_for("diffusers", model).values()
    shapes = {key: entry.external_shape for entry in entries for key in entry.external}
    assert shapes == {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    assert sum(math.prod(shape) for shape in shapes.values()) == pytest.approx(parameters, rel=0.03)
    assert model.rope_fps is None, "rope_enable_fps_modulation=False in cosmos_predict2/configs/base"
    written = config_of("diffusers", model)
    for key, value in network.config.items():
        if key in written and not key.startswith("_"):
            assert written[key] == (list(value) if isinstance(value, tuple) else value), key


def load_and_export(folder, target, parallel):
    from rcm_megatron.networks.build import build_chunks
    from rcm_megatron.parallel.groups import initialize_parallel

    parallel = ParallelConfig(**parallel)
    groups = initialize_parallel(parallel)
    latent = LatentConfig(channels=3, frames=3, height=4, width=6)
    chunks = build_chunks(CONFIG, latent, parallel, groups=groups, params_dtype=torch.float32)
    place = {"tp_rank": groups.tp_rank, "tp_size": groups.tp_size, "partial": parallel.pp > 1}
    load_into(chunks, open_checkpoint(folder), model_config=CONFIG, **place)
    whole = gather_full(chunks, tp_group=groups.tp, pp_group=groups.pp)
    write_checkpoint(whole, CONFIG, target, is_writer=dist.get_rank() == 0)


@pytest.mark.parametrize("parallel", [{"tp": 2}, {"tp": 2, "pp": 2}], ids=["tp2", "tp2_pp2"])
def test_loaded_on_a_layout_and_exported_is_bit_exact(tiny, tmp_path, parallel):
    folder, state = tiny
    ranks = ParallelConfig(**parallel).model_parallel_size
    run_ranks(load_and_export, ranks, str(folder), str(tmp_path / "out"), parallel)
    assert_same_tensors(state, dict(open_checkpoint(tmp_path / "out")))
