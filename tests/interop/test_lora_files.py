"""LoRA files: merging in every naming against diffusers with peft, extraction against numpy, and what is refused."""

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders import WanLoraLoaderMixin
from safetensors.torch import load_file, save_file

from rcm_megatron.checkpoint.lora.extract import extract_lora
from rcm_megatron.checkpoint.lora.naming import naming_to_write
from rcm_megatron.checkpoint.lora.write import write_lora
from rcm_megatron.checkpoint.sources import open_checkpoint
from rcm_megatron.errors import CheckpointError
from rcm_megatron.requests import ExtractLoraRequest
from tests.helpers import assert_close
from tests.interop.conversion import convert
from tests.interop.wan_networks import CONFIG, TINY


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A diffusers folder of random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base") / "network"
    WanTransformer3DModel(**TINY).save_pretrained(folder, max_shard_size="20KB")
    return folder


def inputs():
    draw = torch.Generator().manual_seed(3)
    return {
        "hidden_states": torch.randn(2, 3, 2, 4, 6, generator=draw),
        "timestep": torch.tensor([300.0, 900.0]),
        "encoder_hidden_states": torch.randn(2, 5, 10, generator=draw),
        "return_dict": False,
    }


@torch.no_grad()
def output_of(network):
    return network.eval()(**inputs())[0]


def factors_of(naming, *, ranks=(4,), seed=5):
    """Random factors of all that a naming holds, of ranks in turn."""
    draw, found = torch.Generator().manual_seed(seed), {}
    for internal, entry in naming.entries(CONFIG).items():
        for index in range(len(entry.external)):
            if naming.holds(internal, entry):
                out, *rest = entry.external_shape
                rank, into = ranks[len(found) % len(ranks)], int(np.prod(rest))
                down, up = torch.randn(rank, into, generator=draw), torch.randn(out, rank, generator=draw)
                found[(internal, index)] = (0.1 * down, 0.1 * up)
    return found


def with_lora(base, file, scale=1.0):
    """diffusers' network with the file loaded as `WanPipeline.load_lora_weights` does."""
    network = WanTransformer3DModel.from_pretrained(base)
    state, metadata = WanLoraLoaderMixin.lora_state_dict(str(file), return_lora_metadata=True)
    WanLoraLoaderMixin.load_lora_into_transformer(state, network, adapter_name="a", metadata=metadata)
    network.set_adapters(["a"], [scale])
    return network


@pytest.mark.parametrize("name", ["diffusers", "native", "musubi"])
@pytest.mark.parametrize("format", ["diffusers", "internal"])
def test_merged_equals_peft(base, tmp_path, name, format):
    """Mixed ranks; convert's target in the separate q, k, v of diffusers and in the fused qkv of this program; sharded source."""
    naming, file = naming_to_write(name, CONFIG), tmp_path / "lora.safetensors"
    write_lora(file, factors_of(naming, ranks=(4, 2, 6)), CONFIG, naming, dtype=torch.float32, metadata={})
    source = base
    if format == "internal":
        source = tmp_path / "internal"
        convert(base, source, "internal")
    convert(source, tmp_path / "merged", "diffusers", loras=(f"{file}:0.7",))
    got, expected = output_of(WanTransformer3DModel.from_pretrained(tmp_path / "merged")), with_lora(base, file, 0.7)
    assert_close(name, output_of(expected), got, rel=1e-5)
    change = float((got - output_of(WanTransformer3DModel.from_pretrained(base))).norm() / got.norm())
    assert change > 1e-2, "the LoRA must matter"


def test_alphas_wrappers_differences_and_peft_settings(base, tmp_path):
    """Alpha scales, `model.` and torch.compile's wrapper are seen through, a bias' and a norm's difference are added."""
    weights = WanTransformer3DModel.from_pretrained(base).state_dict()
    down, up = torch.randn(4, 24), torch.randn(24, 4)
    key = "model.diffusion_model._orig_mod.blocks.1"
    tensors = {
        f"{key}.self_attn.k.lora_A.weight": down,
        f"{key}.self_attn.k.lora_B.weight": up,
        f"{key}.self_attn.k.alpha": torch.tensor(2.0),
        f"{key}.self_attn.k.diff_b": torch.ones(24),
        f"{key}.norm3.diff": torch.full((24,), 0.5),
        f"{key}.diff_m": torch.full((1, 6, 24), 0.25),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    convert(base, tmp_path / "merged", "diffusers", loras=(str(tmp_path / "a.safetensors"),))
    expected = dict(weights)
    expected["blocks.1.attn1.to_k.weight"] = weights["blocks.1.attn1.to_k.weight"] + 0.5 * up @ down
    expected["blocks.1.attn1.to_k.bias"] = weights["blocks.1.attn1.to_k.bias"] + 1
    expected["blocks.1.norm2.weight"] = weights["blocks.1.norm2.weight"] + 0.5
    expected["blocks.1.scale_shift_table"] = weights["blocks.1.scale_shift_table"] + 0.25
    got = load_file(tmp_path / "merged" / "diffusion_pytorch_model.safetensors")
    for name, value in expected.items():
        assert_close(name, value, got[name], rel=1e-6)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"transformer.blocks.7.attn1.to_q.lora_A.weight": (4, 24)}, "block 7, the last one here is 1"),
        ({"transformer.blocks.0.attn1.to_q.lora_A.weight": (4, 24)}, "up missing"),
        (
            {
                "transformer.blocks.0.attn1.to_q.lora_A.weight": (4, 48),
                "transformer.blocks.0.attn1.to_q.lora_B.weight": (48, 4),
            },
            r"got a change of \[48, 48\], need \[24, 24\]",
        ),
        ({"transformer.blocks.0.attn1.to_q.dora_scale": (24,)}, "no plain LoRA"),
        ({"lora_te_layers_0.lora_down.weight": (4, 24)}, "unknown"),
        ({"transformer.blocks.0.attn2.add_k_proj.lora_A.weight": (4, 24)}, "add_k_proj"),
    ],
)
def test_refused(base, tmp_path, keys, message):
    save_file({key: torch.zeros(shape) for key, shape in keys.items()}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=message):
        convert(base, tmp_path / "merged", "diffusers", loras=(str(tmp_path / "a.safetensors"),))
    assert not (tmp_path / "merged").exists()


@pytest.fixture(scope="module")
def student(base, tmp_path_factory):
    """The base with every tensor changed."""
    network = WanTransformer3DModel.from_pretrained(base)
    draw = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for value in network.parameters():
            value.add_(0.05 * torch.randn(value.shape, generator=draw))
    folder = tmp_path_factory.mktemp("student") / "network"
    network.save_pretrained(folder)
    return folder


def extracted(base, student, file, **options):
    request = ExtractLoraRequest(teacher=str(base), student=str(student), output=file, dtype="fp32", **options)
    return extract_lora(request, progress=False)


@pytest.mark.parametrize("name", ["diffusers", "native"])
def test_full_rank_is_the_student(base, student, tmp_path, name):
    file = tmp_path / "lora.safetensors"
    extracted(base, student, file, rank=1000, naming=name, differences=name == "native")
    convert(base, tmp_path / "merged", "diffusers", loras=(str(file),))
    got, expected = open_checkpoint(tmp_path / "merged"), open_checkpoint(student)
    linears = [key for key in expected if key.endswith(".weight") and len(expected.shape(key)) > 1]
    block_linears = [key for key in linears if "blocks." in key]
    for key in expected if name == "native" else linears:
        if name == "native" and key in linears and key not in block_linears:
            continue
        assert_close(key, expected[key], got[key], rel=1e-5)


def test_energy_and_factors_are_numpys(base, student, tmp_path, caplog):
    layers = {layer.name: layer for layer in extracted(base, student, tmp_path / "a.safetensors", rank=5)}
    assert any("no low rank holds" in record.message for record in caplog.records)
    key = "blocks.1.attn2.to_v.weight"
    weights = [open_checkpoint(path)[key].double().numpy() for path in (base, student)]
    u, s, v = np.linalg.svd(weights[1] - weights[0])
    assert abs(layers[key].energy - (s[:5] ** 2).sum() / (s**2).sum()) < 1e-5
    file = load_file(tmp_path / "a.safetensors")
    up, down = (file[f"transformer.blocks.1.attn2.to_v.lora_{x}.weight"].double() for x in "BA")
    assert_close("best approximation", torch.from_numpy(u[:, :5] * s[:5] @ v[:5]), up @ down, rel=1e-5)
    few = extracted(base, student, tmp_path / "b.safetensors", rank=24, energy=0.5)
    ranks = {layer.rank for layer in few if layer.rank}
    assert len(ranks) > 1 and all(layer.energy >= 0.5 for layer in few if layer.rank)
    padded = load_file(tmp_path / "b.safetensors")
    assert {value.shape[0] for name, value in padded.items() if ".lora_A." in name} == {max(ranks)}
