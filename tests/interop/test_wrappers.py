"""Networks below the wrappers of other programs, and beside what those save with them, convert as they do alone."""

import re

import pytest
import torch
from safetensors.torch import save_file

from rcm_megatron.__main__ import main
from rcm_megatron.checkpoint.recognise import parameter_names
from rcm_megatron.checkpoint.sources import open_checkpoint
from rcm_megatron.checkpoint.wrappers import find_roots
from rcm_megatron.errors import CheckpointError
from tests.interop.conversion import convert
from tests.interop.test_cosmos_checkpoints import save_tiny as save_cosmos
from tests.interop.wan_networks import assert_same_tensors

HEADS = {"num_heads": 4}


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory):
    """The tiny network's tensors in the naming of the Wan release and of diffusers, and Cosmos' in NVIDIA's and diffusers'."""
    home = tmp_path_factory.mktemp("plain")
    convert(tiny[0], home / "wan", to="wan")
    state = save_cosmos(home / "cosmos")
    convert(home / "cosmos", home / "nvidia.safetensors", to="nvidia")
    nvidia = dict(open_checkpoint(home / "nvidia.safetensors"))
    return {"wan": dict(open_checkpoint(home / "wan")), "diffusers": tiny[1], "nvidia": nvidia, "cosmos": state}


WRAPPERS = [
    "model.diffusion_model.",
    "transformer.",
    "generator.model.",
    "generator.",
    "module.dit.",
    "_orig_mod.model.",
    "net.module._orig_mod.",
    "pipe.dit.model._fsdp_wrapped_module.",
    "_fsdp_wrapped_module.",
]


@pytest.mark.parametrize("naming", ["wan", "diffusers", "nvidia", "cosmos"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_any_nesting_is_removed_and_said(plain, naming, wrapper, tmp_path, caplog):
    save_file({wrapper + name: tensor for name, tensor in plain[naming].items()}, tmp_path / "x.safetensors")
    opened = open_checkpoint(tmp_path / "x.safetensors")
    assert_same_tensors(plain[naming], dict(opened))
    open_checkpoint(tmp_path / "x.safetensors")
    said = [record.message for record in caplog.records]
    assert len(said) == len(set(said)) and all("x.safetensors" in message for message in said)
    for part in re.findall(r"_\w+(?=\.)|model|dit|generator", wrapper):
        assert any(part in message for message in said), f"{part} not in {said}"


@pytest.mark.parametrize(
    "inner", ["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module._checkpoint_wrapped_module"]
)
def test_wrappers_inside_names(plain, inner, tmp_path):
    tensors = {f"module.{re.sub(r'^(blocks[.]1[.])', rf'blocks.1.{inner}.', k)}": v for k, v in plain["wan"].items()}
    assert any(inner in name for name in tensors)
    torch.save(tensors, tmp_path / "x.pt")
    assert_same_tensors(plain["wan"], dict(open_checkpoint(tmp_path / "x.pt")))
    first = next(iter(plain["wan"]))
    torch.save(plain["wan"] | {f"_orig_mod.{first}": plain["wan"][first]}, tmp_path / "two.pt")
    with pytest.raises(CheckpointError, match=f"two keys are '{first}' without _orig_mod"):
        open_checkpoint(tmp_path / "two.pt")


def test_a_trainers_dicts(plain, tmp_path, caplog):
    """Weights in a dict in a dict, with optimizer, step and settings."""
    wan = {f"net.{name}": tensor for name, tensor in plain["wan"].items()}
    state = {
        "state": {0: {"exp_avg": torch.zeros(3), "step": torch.tensor(5.0)}, 1: {"exp_avg": torch.zeros(2)}},
        "param_groups": [{"lr": 1e-4}],
    }
    torch.save({"state_dict": wan, "optimizer": state, "step": 7, "args": {"lr": 0.1, "name": None}}, tmp_path / "x.pt")
    opened = open_checkpoint(tmp_path / "x.pt")
    assert_same_tensors(plain["wan"], dict(opened))
    assert opened.facts == {"weights": "student"}
    assert "'state_dict.net.'; left out: training state (3 keys)" in caplog.text


def test_the_networks_of_self_forcing(plain, tmp_path):
    """{"generator": {"model.…"}, "generator_ema": …, "critic": …}."""
    scales = {"generator": 1, "generator_ema": 2, "critic": 3}
    networks = {name: {f"model.{k}": k_scale * v for k, v in plain["wan"].items()} for name, k_scale in scales.items()}
    torch.save(networks, tmp_path / "x.pt")
    with pytest.raises(
        CheckpointError, match="several networks: student, ema, fake_score; choose one: .* --weights NAME"
    ):
        open_checkpoint(tmp_path / "x.pt")
    for weights, scale in (("student", 1), ("ema", 2), ("fake_score", 3)):
        opened = open_checkpoint(tmp_path / "x.pt", weights=weights)
        assert_same_tensors({k: scale * v for k, v in plain["wan"].items()}, dict(opened))


def test_an_all_in_one_file_of_comfyui(plain, tmp_path, caplog):
    """VAE, text and image encoder beside the network, with names like its own."""
    others = {
        "vae.decoder.conv1.weight": torch.zeros(2, 2),
        "vae.decoder.head.0.gamma": torch.zeros(2),
        "text_encoders.umt5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(2, 2),
        "clip_vision.vision_model.embeddings.patch_embedding.weight": torch.zeros(2, 2),
        "text_encoders.t5.blocks.0.norm2.weight": torch.zeros(2),
    }
    wrapped = {f"model.diffusion_model.{name}": tensor for name, tensor in plain["wan"].items()}
    save_file(wrapped | others, tmp_path / "x.safetensors")
    assert_same_tensors(plain["wan"], dict(open_checkpoint(tmp_path / "x.safetensors")))
    assert (
        "'model.diffusion_model.'; left out: VAE (2 keys), image encoder (1 keys), text encoder (2 keys)" in caplog.text
    )


def test_a_foreign_key_is_named_and_the_fix_works(plain, tmp_path, capsys):
    wrapped = {f"module.{name}": tensor for name, tensor in plain["wan"].items()}
    save_file(wrapped | {"logvar.weight": torch.zeros(3)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"begin with 'module.':\n  unknown beside them \(1\): 'logvar.weight'"):
        open_checkpoint(tmp_path / "x.safetensors")
    command = ["convert", str(tmp_path / "x.safetensors"), str(tmp_path / "out"), "--to", "wan", "--num-heads", "4"]
    assert main([*command, "--prefix", "module."]) == 0
    assert_same_tensors(plain["wan"], dict(open_checkpoint(tmp_path / "out")))


def test_two_networks_without_names(plain, tmp_path):
    both = {f"{side}.{name}": tensor.clone() for side in ("high", "low") for name, tensor in plain["wan"].items()}
    save_file(both, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="several networks: high., low.; choose one: .* --prefix BEGINNING"):
        open_checkpoint(tmp_path / "x.safetensors")
    assert_same_tensors(plain["wan"], dict(open_checkpoint(tmp_path / "x.safetensors", prefix="low.")))


def test_damage_below_a_wrapper_is_named_as_ever(plain, tmp_path):
    wrapped = {f"model.{name}": tensor for name, tensor in plain["wan"].items()}
    wrapped["model.blocks.1.ffn.0.wieght"] = wrapped.pop("model.blocks.1.ffn.0.weight")
    wrapped["model.blocks.1.extra"] = torch.zeros(2)
    save_file(wrapped, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="missing .1.: 'blocks.1.ffn.0.weight' .nearest: 'blocks.1.ffn.0.wieght'"):
        convert(tmp_path / "x.safetensors", tmp_path / "out", to="internal", **HEADS)


def test_a_lora_is_called_by_its_name(tmp_path):
    keys = ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", "diffusion_model.blocks.0.ffn.0.lora_B.weight")
    save_file({key: torch.zeros(2, 2) for key in keys}, tmp_path / "style.safetensors")
    with pytest.raises(
        CheckpointError, match="but a LoRA, which changes one: pass its network, and this file as --lora"
    ):
        convert(tmp_path / "style.safetensors", tmp_path / "out", to="internal")


def test_roots_are_found_from_parameters_names():
    known = parameter_names()
    assert {"blocks.#.self_attn.q.weight", "transformer_blocks.#.ff.net.2.weight", "head.modulation"} <= known
    names = [f"a.b.blocks.{i}.self_attn.{p}.weight" for i in range(12) for p in "qkv"]
    assert find_roots([*names, "clip.patch_embedding.weight", "x.y"], known) == ["a.b."]
    assert find_roots(["blocks.0.attn.q.weight", "token_embedding.weight"], known) == [], "UMT5 of the Wan release"
