"""Every damaged or unfitting checkpoint is an error that names what is wrong; nothing half-written looks complete."""

import json
import pickle
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from rcm_megatron.checkpoint.formats.base import WriteOptions
from rcm_megatron.checkpoint.models import write_checkpoint
from rcm_megatron.checkpoint.sources import open_checkpoint, source_from_tensors
from rcm_megatron.checkpoint.translate import from_internal, internal_shapes, to_internal
from rcm_megatron.errors import CheckpointError, UserError
from tests.interop.conversion import convert
from tests.interop.wan_networks import CONFIG, assert_same_tensors, save_tiny

WEIGHTS = "diffusion_pytorch_model.safetensors"
EXPERTS = ("transformer", "transformer_2")


@pytest.fixture
def broken(tiny, tmp_path):
    """A copy of the folder that a test may damage."""
    return shutil.copytree(tiny[0], tmp_path / "broken")


def fails(path, match, target=None, **options):
    target = target or path.parent / "target"
    with pytest.raises(CheckpointError, match=match):
        convert(path, target, to="internal", **options)
    assert not list(path.parent.glob(".*incomplete*"))


def change_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def test_missing_and_unknown_keys_name_the_nearest(broken):
    change_weights(broken, lambda t: t.update({"blocks.1.attn1.to_qq.weight": t.pop("blocks.1.attn1.to_q.weight")}))
    fails(broken, r"missing \(1\): 'blocks.1.attn1.to_q.weight' \(nearest: 'blocks.1.attn1.to_qq.weight'\)")
    fails(broken, r"unknown \(1\): 'blocks.1.attn1.to_qq.weight' \(nearest: 'blocks.1.attn1.to_q.weight'\)")


def test_missing_key_alone_and_extra_layer(broken):
    change_weights(broken, lambda tensors: tensors.pop("proj_out.bias"))
    fails(broken, r"missing \(1\): 'proj_out.bias'")
    change_weights(
        broken, lambda t: t.update({"proj_out.bias": torch.zeros(12), "blocks.2.norm2.bias": torch.zeros(24)})
    )
    fails(broken, r"unknown \(1\): 'blocks.2.norm2.bias' \(nearest: 'blocks.\d.norm2.bias'\)")


def test_wrong_shape_says_got_and_need(broken):
    change_weights(broken, lambda t: t.update({"blocks.0.ffn.net.2.weight": torch.zeros(24, 41)}))
    fails(broken, r"'blocks.0.ffn.net.2.weight': got shape \[24, 41\], need \[24, 40\]")


@pytest.mark.parametrize("keep", [0, 5, 700, 0.5, 0.999])
def test_truncated_safetensors(broken, keep):
    content = (broken / WEIGHTS).read_bytes()
    (broken / WEIGHTS).write_bytes(content[: keep if keep > 1 or keep == 0 else int(len(content) * keep)])
    fails(broken, rf"{WEIGHTS}: truncated or not a safetensors file")


class Malicious:
    """Unpickling it creates a file."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (open, (self.trace, "w"))


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_code_is_refused(tmp_path, legacy):
    path, trace = tmp_path / "evil.pt", tmp_path / "executed"
    content = {"net.patch_embedding.weight": torch.zeros(2), "x": Malicious(str(trace))}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    fails(path, "evil.pt: refused")
    path.write_bytes(pickle.dumps(content, protocol=2))
    fails(path, "evil.pt: ")
    assert not trace.exists()


def test_truncated_and_nested_pt(tiny, tmp_path):
    path = tmp_path / "rcm.pt"
    convert(tiny[0], path, to="nvlabs")
    path.write_bytes(path.read_bytes()[:4000])
    fails(path, "rcm.pt: ")
    torch.save({"model": {"a": torch.zeros(1)}}, path)
    fails(path, r"not a Wan or Cosmos-Predict2 network; keys look like \['model.a'\]")
    torch.save({"model": {"a": {1, 2}}}, path)
    fails(path, "'model.a' is a set; need tensors, in dicts or in none")
    torch.save([torch.zeros(1)], path)
    fails(path, "holds a list")


def test_legacy_pt_and_several_networks(tiny, tmp_path):
    convert(tiny[0], tmp_path / "rcm.pt", to="nvlabs")
    weights = torch.load(tmp_path / "rcm.pt", weights_only=True)
    torch.save(weights, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    both = weights | {name.replace("net.", "net_ema.", 1): tensor * 2 for name, tensor in weights.items()}
    torch.save(both, tmp_path / "both.pt")
    assert len(dict(to_internal(open_checkpoint(tmp_path / "legacy.pth"), CONFIG))) == len(internal_shapes(CONFIG))
    fails(tmp_path / "both.pt", "several networks: student, ema; choose one: `convert")
    fails(tmp_path / "both.pt", "does not hold 'fake_score', but student, ema", weights="fake_score")
    fails(tmp_path / "rcm.pt", "does not hold 'ema', but student", weights="ema")
    fails(tiny[0], "does not hold 'ema', but one network without a name", weights="ema", target=tmp_path / "target")
    ema = dict(to_internal(open_checkpoint(tmp_path / "both.pt", weights="ema"), CONFIG))
    assert torch.equal(ema["head.linear.bias"], 2 * weights["net.head.head.bias"])
    fails(tmp_path / "legacy.pth", "hidden_size=24: the number of heads shows in no weight; pass num_heads")
    with pytest.raises(CheckpointError, match="unknown model field 'num_head' .nearest: 'num_heads'"):
        open_checkpoint(tmp_path / "legacy.pth").model_config(overrides={"num_head": 4})


def test_tensors_that_do_not_hold_their_values(tiny, tmp_path):
    """A megabyte file must not become a terabyte, nor weights without values an unexplained failure."""
    convert(tiny[0], tmp_path / "rcm.pt", to="nvlabs")
    weights, name = torch.load(tmp_path / "rcm.pt", weights_only=True), "net.blocks.0.ffn.0.weight"
    values = {
        "expanded": torch.zeros(1).expand(10**6, 10**6),
        "meta": weights[name].to("meta"),
        "sparse": weights[name].to_sparse(),
        "quantized": torch.quantize_per_tensor(weights[name], 0.1, 0, torch.qint8),
    }
    for kind, value in values.items():
        torch.save(weights | {name: value}, tmp_path / f"{kind}.pt")
        fails(tmp_path / f"{kind}.pt", f"{kind}.pt: refused, '{name}' is no plain tensor")
    torch.save({key: torch.nn.Parameter(value) for key, value in weights.items()}, tmp_path / "parameters.pt")
    assert_same_tensors({f"net.{k}": v.data for k, v in open_checkpoint(tmp_path / "parameters.pt").items()}, weights)


def test_index_that_does_not_match(tmp_path):
    folder = tmp_path / "hf"
    save_tiny(folder, max_shard_size="30KB")
    index_path = folder / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    first = sorted(set(index["weight_map"].values()))[0]

    def with_map(changes):
        index_path.write_text(json.dumps({**index, "weight_map": {**index["weight_map"], **changes}}))

    moved = next(name for name, file in index["weight_map"].items() if file != first)
    with_map({moved: first})
    fails(folder, rf"listed in the index but not in {first} \(1\): '{moved}'")
    with_map({moved: "a-nowhere.safetensors"})
    fails(folder, "names the file 'a-nowhere.safetensors', which is not in")
    with_map({moved: f"../hf/{first}"})
    fails(folder, "names the file '../hf/")
    index_path.write_text("{")
    fails(folder, "not readable as JSON")
    index_path.unlink()
    fails(folder, "need one set of weights, got")


def test_configurations_that_are_not_this_network(broken, tiny):
    stored = json.loads((broken / "config.json").read_text())

    def with_config(**changes):
        (broken / "config.json").write_text(json.dumps({**stored, **changes}))

    with_config(qk_norm="rms_norm")
    fails(broken, "qk_norm='rms_norm'; need 'rms_norm_across_heads'")
    with_config(image_dim=1280, added_kv_proj_dim=24)
    fails(broken, r"missing .*'blocks.0.attn2.add_k_proj.bias'")
    with_config(image_dim=1280)
    fails(broken, "added_kv_proj_dim=None; need 24: keys of images see the hidden size")
    with_config(in_channels=36)
    fails(broken, r"'patch_embedding.weight': got shape \[24, 3, 1, 2, 2\], need \[24, 36, 1, 2, 2\]")
    with_config(in_channels=2)
    fails(broken, "in_channels=2 must be at least out_channels=3")
    with_config(_class_name="WanVACETransformer3DModel")
    fails(broken, "WanVACETransformer3DModel")
    with_config(cross_attn_norm=False)
    fails(broken, r"unknown \(4\): 'blocks.0.norm2.bias'")
    tensors = {**tiny[1], "blocks.0.attn2.add_k_proj.weight": torch.zeros(24, 24)}
    with pytest.raises(CheckpointError, match=r"unknown \(1\): 'blocks.0.attn2.add_k_proj.weight'"):
        to_internal(source_from_tensors(tensors), CONFIG)


def test_heads_that_do_not_match(tiny):
    three = replace(CONFIG, num_heads=3)
    with pytest.raises(CheckpointError, match=r"num_heads=4 \(the run has 3\)"):
        to_internal(open_checkpoint(tiny[0]), three)
    five = replace(CONFIG, num_heads=5)
    with pytest.raises(CheckpointError, match="hidden_size=24 must divide by num_heads=5"):
        from_internal({}, five, "wan")
    fails(tiny[0], "config.json says num_heads=4; drop the override", num_heads=3)


def test_internal_tensors_exactly_once():
    full = {name: torch.zeros(shape) for name, shape in internal_shapes(CONFIG).items()}
    pairs = list(full.items())
    with pytest.raises(CheckpointError, match="'head.linear.bias' came twice"):
        list(from_internal([*pairs, pairs[-1]], CONFIG, "wan"))
    with pytest.raises(CheckpointError, match=r"missing \(1\): 'head.linear.bias'"):
        list(from_internal(pairs[:-1], CONFIG, "wan"))
    with pytest.raises(CheckpointError, match="'head.linear.bais' is not a parameter .*nearest: 'head.linear.bias'"):
        list(from_internal({"head.linear.bais": torch.zeros(12)}, CONFIG, "wan"))
    with pytest.raises(CheckpointError, match=r"'head.linear.bias': got shape \[11\], need \[12\]"):
        list(from_internal({"head.linear.bias": torch.zeros(11)}, CONFIG, "wan"))
    assert len(list(from_internal(pairs[:3], CONFIG, "wan", partial=True))) == 3
    with pytest.raises(UserError, match="unknown checkpoint format 'difusers'; did you mean diffusers"):
        from_internal(full, CONFIG, "difusers")


def test_existing_output_is_kept_without_force(tiny, tmp_path):
    target = tmp_path / "out"
    convert(tiny[0], target, to="internal")
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    fails(tiny[0], "exists; choose another target, or pass force", target=target)
    assert before == {path.name: path.read_bytes() for path in target.iterdir()}
    convert(tiny[0], target, to="internal", force=True, dtype="bf16")
    assert open_checkpoint(target)["head.linear.bias"].dtype == torch.bfloat16
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    fails(target, "is the source or holds it", target=target, force=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    fails(tiny[0], "is no checkpoint folder", target=tmp_path / "home", force=True)
    with pytest.raises(CheckpointError, match="end its name in .pt, .pth or .safetensors"):
        convert(tiny[0], tmp_path / "rcm", to="nvlabs")
    with pytest.raises(CheckpointError, match=r"rcm.pt: wan is a folder; leave .pt out of its name"):
        convert(tiny[0], tmp_path / "rcm.pt", to="wan")


@pytest.mark.parametrize("force", [False, True])
def test_interrupted_export_leaves_nothing(tiny, tmp_path, force):
    target = tmp_path / "out"
    if force:
        convert(tiny[0], target, to="diffusers")
    before = {path.name: path.read_bytes() for path in target.iterdir()} if force else {}

    def interrupted():
        yield from list(to_internal(open_checkpoint(tiny[0]), CONFIG))[:20]
        hidden = list(tmp_path.glob(".out.incomplete-*"))
        assert hidden
        assert not list(hidden[0].glob("config.json"))
        with pytest.raises(CheckpointError):
            to_internal(open_checkpoint(hidden[0]), CONFIG)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(interrupted(), CONFIG, target, WriteOptions(max_shard_bytes=10_000, force=force))
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if force else [])
    assert before == ({path.name: path.read_bytes() for path in target.iterdir()} if force else {})


def test_paths_that_hold_no_checkpoint(tmp_path):
    fails(tmp_path / "none", "no such file or folder")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "need one set of weights, got none")
    (tmp_path / "a.bin").write_bytes(b"x")
    fails(tmp_path / "a.bin", "need a folder, or a file that ends in")
    save_file({"unet.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    fails(tmp_path / "other.safetensors", "not a Wan or Cosmos-Predict2 network")
    save_file({}, tmp_path / "nothing.safetensors")
    fails(tmp_path / "nothing.safetensors", "not a Wan or Cosmos-Predict2 network")


def test_the_wan22_release_has_two_experts(tmp_path):
    """Beside the files of VAE and text encoder, which are no networks."""
    release = tmp_path / "Wan2.2-T2V-A14B"
    for name in ("high_noise_model", "low_noise_model"):
        save_tiny(tmp_path / name, cross_attn_norm=name == "high_noise_model")
        convert(tmp_path / name, release / name, to="wan")
    torch.save({}, release / "Wan2.1_VAE.pth")
    fails(
        release,
        r"experts: high_noise_model \(high noise\) and low_noise_model \(low noise\); choose one with --subfolder",
    )
    convert(release, tmp_path / "low", to="internal", subfolder="low_noise_model")
    assert not open_checkpoint(tmp_path / "low").config["cross_attn_norm"]


def test_a_pipeline_with_two_experts(tmp_path):
    """Wan2.2: either transformer, never one of them by chance."""
    states = {name: save_tiny(tmp_path / "pipe" / name, cross_attn_norm=name == "transformer") for name in EXPERTS}
    fails(tmp_path / "pipe", r"two experts: transformer .*transformer_2 .*choose one with --subfolder")
    fails(
        tmp_path / "pipe",
        "has no folder 'transformer_3'; it has .'transformer', 'transformer_2'",
        subfolder="transformer_3",
    )
    for name, state in states.items():
        convert(tmp_path / "pipe", tmp_path / name, to="diffusers", subfolder=name)
        assert_same_tensors(state, dict(open_checkpoint(tmp_path / name)))
    shutil.rmtree(tmp_path / "pipe" / "transformer")
    assert_same_tensors(states["transformer_2"], dict(open_checkpoint(tmp_path / "pipe")))
