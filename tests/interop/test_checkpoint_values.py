"""Numbers on their way from one file to another: dtypes kept, float8 read, what is not finite or does not fit refused."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from rcm_megatron.__main__ import main
from rcm_megatron.checkpoint.sources import open_checkpoint
from rcm_megatron.checkpoint.values import rounded
from rcm_megatron.dtypes import common_dtype
from rcm_megatron.errors import CheckpointError
from rcm_megatron.finite import find_nonfinite
from tests.interop.conversion import convert
from tests.interop.wan_networks import assert_same_tensors

NAME = "diffusion_pytorch_model.safetensors"
HEADS = {"num_heads": 4}
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.fixture
def wan(tiny, tmp_path):
    """The network's tensors in bf16 in the naming of the Wan release, and a function that saves and converts changed ones."""
    convert(tiny[0], tmp_path / "bf16", to="wan", dtype="bf16")
    return dict(open_checkpoint(tmp_path / "bf16"))


def through(tensors, tmp_path, target="diffusers", **options):
    """Tensors of a file that was converted to another naming and back."""
    save_file(tensors, tmp_path / "x.safetensors")
    convert(
        tmp_path / "x.safetensors",
        tmp_path / "there",
        to=target,
        **HEADS,
        force=True,
        **options,
    )
    convert(tmp_path / "there", tmp_path / "back", to="wan", force=True)
    return load_file(tmp_path / "back" / NAME)


@pytest.mark.parametrize(
    "changes",
    [
        {"blocks.1.self_attn.v.weight": torch.float32},
        {"blocks.0.cross_attn.k.bias": torch.float16, "head.head.weight": torch.float32},
        {"blocks.0.self_attn.q.weight": FP8[0], "blocks.0.self_attn.k.weight": FP8[1]},
        {"blocks.1.cross_attn.v.weight": FP8[0], "blocks.1.cross_attn.k.weight": torch.float16},
        {f"blocks.0.self_attn.{part}.weight": FP8[0] for part in "qkvo"},
    ],
)
def test_every_tensor_keeps_its_dtype(wan, changes, tmp_path):
    mixed = wan | {name: wan[name].to(dtype) for name, dtype in changes.items()}
    got = through(mixed, tmp_path)
    assert {name: t.dtype for name, t in got.items()} == {name: t.dtype for name, t in mixed.items()}
    assert_same_tensors({k: v.float() for k, v in mixed.items()}, {k: v.float() for k, v in got.items()})


def test_what_is_joined_holds_all_of_its_parts_and_is_said(wan, tmp_path, caplog):
    mixed = wan | {"blocks.1.self_attn.v.weight": wan["blocks.1.self_attn.v.weight"].to(FP8[1])}
    mixed["blocks.0.cross_attn.k.bias"] = wan["blocks.0.cross_attn.k.bias"].float()
    save_file(mixed, tmp_path / "x.safetensors")
    command = [
        "convert",
        str(tmp_path / "x.safetensors"),
        str(tmp_path / "own"),
        "--to",
        "internal",
        "--num-heads",
        "4",
    ]
    assert main(command) == 0
    assert "dtypes as they were, but for 2 tensors that join parts of several" in caplog.text
    own = open_checkpoint(tmp_path / "own")
    assert own["blocks.1.self_attn.linear_qkv.weight"].dtype == torch.bfloat16
    assert own["blocks.0.cross_attn.linear_kv.bias"].dtype == torch.float32
    convert(tmp_path / "own", tmp_path / "back", to="wan")
    back = load_file(tmp_path / "back" / NAME)
    assert_same_tensors({k: v.float() for k, v in mixed.items()}, {k: v.float() for k, v in back.items()})


def test_common_dtypes_hold_every_value():
    every = torch.arange(256, dtype=torch.uint8)
    for a in (*FP8, torch.float16, torch.bfloat16, torch.float32):
        for b in (*FP8, torch.float16, torch.bfloat16):
            for dtype in (a, b):
                values = (every.view(dtype) if dtype in FP8 else every.to(dtype)).float()
                assert torch.equal(values.nan_to_num(), values.to(common_dtype(a, b)).float().nan_to_num()), (a, b)


@pytest.mark.parametrize("style", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("scales", ["one", "rows", "blocks"])
def test_scaled_float8(wan, style, scales, tmp_path, caplog):
    """ComfyUI's fp8_scaled files, below its wrapper: the weights are those that it computes with."""
    expected, stored = dict(wan), {}
    for name in [f"blocks.{i}.{part}.weight" for i in (0, 1) for part in ("self_attn.q", "cross_attn.v", "ffn.2")]:
        scale = {"one": torch.tensor(0.37), "rows": torch.rand(24, 1), "blocks": torch.rand(24, 4, 1)}[scales] + 0.1
        fp8 = (wan[name].float() / 0.5).to(FP8[0])
        wide = fp8.float().unflatten(1, (4, -1)) * scale if scales == "blocks" else fp8.float() * scale
        expected[name] = wide.flatten(1) if scales == "blocks" else wide
        base = name.removesuffix("weight")
        stored |= {name: fp8, base + style: scale}
        stored[base + ("scale_input" if style == "scale_weight" else "input_scale")] = torch.tensor(1.0)
        if style == "weight_scale":
            stored[base + "comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    marks = {"scaled_fp8": torch.zeros(2, dtype=FP8[0])} if style == "scale_weight" else {}
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in (wan | stored | marks).items()}
    save_file(tensors, tmp_path / "x.safetensors")
    opened = open_checkpoint(tmp_path / "x.safetensors")
    assert_same_tensors(expected, dict(opened))
    assert torch.equal(
        opened.read("blocks.0.self_attn.q.weight", dim=1, start=3, stop=9),
        expected["blocks.0.self_attn.q.weight"][:, 3:9],
    )
    assert "6 float8 weights are multiplied by their scales" in caplog.text
    convert(tmp_path / "x.safetensors", tmp_path / "out", to="wan", **HEADS)
    assert_same_tensors(expected, load_file(tmp_path / "out" / NAME))


def test_other_quantisations_are_refused_by_name(wan, tmp_path):
    def refused(changes, match):
        save_file(wan | changes, tmp_path / "x.safetensors")
        with pytest.raises(CheckpointError, match=match):
            convert(tmp_path / "x.safetensors", tmp_path / "out", to="wan", **HEADS)

    name = "blocks.1.ffn.0.weight"
    int8 = wan[name].to(torch.int8)
    refused({name: int8}, f"'{name}' holds torch.int8; need floating-point")
    refused(
        {name: int8, "blocks.1.ffn.0.weight_scale": torch.tensor(2.0)},
        f"'{name}' is quantised to torch.int8; need float8",
    )
    refused(
        {name: wan[name].to(FP8[0]), "blocks.1.ffn.0.weight_scale": torch.zeros(40, 3)}, f"scale of '{name}' has shape"
    )


def change(tensors, name, value, dtype=torch.float32):
    changed = tensors[name].to(dtype).clone()
    changed.view(-1)[5] = value
    return tensors | {name: changed}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_refused_where_they_are_read(wan, value, dtype, tmp_path):
    with pytest.raises(
        CheckpointError, match=rf"'blocks.1.cross_attn.k.bias' holds {value} at \[5\], 1 of 24 values are"
    ):
        through(change(wan, "blocks.1.cross_attn.k.bias", value, dtype), tmp_path)
    assert not (tmp_path / "there").exists()


def test_large_sums_are_finite():
    huge = torch.full((40,), 3e38)
    assert find_nonfinite(huge) is None
    assert find_nonfinite(torch.full((3, 5), 6e4, dtype=torch.float16)) is None
    assert (
        find_nonfinite(torch.tensor([[1.0, 2.0], [float("nan"), float("nan")]]))
        == "nan at [1, 0], 2 of 4 values are not finite"
    )
    assert "nan at [1]" in find_nonfinite(torch.tensor([0.0, float("nan")]).to(FP8[0]))


@pytest.mark.parametrize(("form", "value"), [("diffusers", 65520.0), ("torch_dist", -7e4), ("nvlabs", 1e30)])
def test_overflow_in_half_precision(wan, form, value, tmp_path):
    """65519 is the last that rounds to a number of fp16; the values stay whole in bf16."""
    name = "blocks.0.ffn.2.bias"
    target = tmp_path / ("out.pt" if form == "nvlabs" else "out")
    options = {"to": form, **HEADS}
    save_file(change(wan, name, value), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"holds values up to .*; float16 ends at 65504; take --dtype bf16"):
        convert(tmp_path / "x.safetensors", target, dtype="fp16", **options)
    assert not target.exists()
    convert(tmp_path / "x.safetensors", target, dtype="bf16", **options)
    save_file(change(wan, name, 65503.0), tmp_path / "x.safetensors")
    convert(tmp_path / "x.safetensors", target, dtype="fp16", force=True, **options)


def test_overflow_names_the_key():
    with pytest.raises(CheckpointError, match="'a.b' holds values up to 700000; float16 ends at 65504"):
        rounded("a.b", torch.tensor([1.0, -7e5]), torch.float16)
    assert rounded("a.b", torch.tensor([1e-9]), torch.float16).item() == 0.0


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(tiny, umask, tmp_path):
    before = os.umask(umask)
    try:
        convert(tiny[0], tmp_path / "x.safetensors", to="nvlabs")
        convert(tiny[0], tmp_path / "folder", to="internal", max_shard_size=20_000)
    finally:
        os.umask(before)
    for file in [tmp_path / "x.safetensors", *(tmp_path / "folder").iterdir()]:
        assert file.stat().st_mode & 0o777 == 0o666 & ~umask, file.name
