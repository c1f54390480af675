"""Which file of a folder is read: the canonical one beside variants, adapters and shadows; a lone variant; a cache's snapshot."""

import json
import shutil

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from rcm_megatron.checkpoint.sources import open_checkpoint
from rcm_megatron.errors import CheckpointError
from tests.interop.conversion import convert
from tests.interop.test_convert_nvidia import SCALE
from tests.interop.test_convert_nvidia import tiny as cosmos  # noqa: F401 (a fixture)
from tests.interop.wan_networks import TINY, assert_same_tensors, save_tiny

NAME = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny, tmp_path):
    return shutil.copytree(tiny[0], tmp_path / "folder")


@pytest.mark.parametrize(
    "other", ["diffusion_pytorch_model.bf16.safetensors", "pytorch_lora_weights.safetensors", "model.safetensors"]
)
def test_the_canonical_file_is_taken_and_the_other_named(tiny, folder, other, caplog):
    save_file({"blocks.0.attn1.to_q.weight": torch.zeros(2)}, folder / other)
    (folder / f"._{NAME}").write_bytes(b"\0\5\x16\7")
    (folder / "._model.pt").write_bytes(b"\0\5\x16\7")
    assert_same_tensors(tiny[1], dict(open_checkpoint(folder)))
    assert_same_tensors(tiny[1], dict(open_checkpoint(folder / NAME)))
    assert f"read {NAME}, left alone ['{other}']" in caplog.text


def test_shadows_beside_shards(tmp_path):
    state = save_tiny(tmp_path / "sharded", max_shard_size="30KB")
    for file in list((tmp_path / "sharded").iterdir()):
        (file.parent / f"._{file.name}").write_bytes(b"\0\5\x16\7")
    assert_same_tensors(state, dict(open_checkpoint(tmp_path / "sharded")))


@pytest.mark.parametrize("size", ["30KB", "10GB"])
@pytest.mark.parametrize("variant", ["fp16", "bf16", "ema"])
def test_a_lone_variant(tmp_path, variant, size):
    """As diffusers saves it, in one file and in shards; and older files' place of the variant in an index' name."""
    model = WanTransformer3DModel(**TINY)
    model.half().save_pretrained(tmp_path / "half", variant=variant, max_shard_size=size)
    assert_same_tensors(model.state_dict(), dict(open_checkpoint(tmp_path / "half")))
    for index in (tmp_path / "half").glob("*.index.*"):
        assert_same_tensors(model.state_dict(), dict(open_checkpoint(index)))
        index.rename(index.with_name(f"diffusion_pytorch_model.{variant}.safetensors.index.json"))
        assert_same_tensors(model.state_dict(), dict(open_checkpoint(tmp_path / "half")))
        save_file({"lora_A": torch.zeros(2)}, tmp_path / "half" / "style.safetensors")
        assert_same_tensors(model.state_dict(), dict(open_checkpoint(tmp_path / "half")))


def test_two_variants_and_a_message_that_leads_on(tmp_path):
    model = WanTransformer3DModel(**TINY)
    model.save_pretrained(tmp_path / "both", variant="fp32")
    model.half().save_pretrained(tmp_path / "both", variant="fp16", max_shard_size="30KB")
    with pytest.raises(CheckpointError, match="got .*index.fp16.json.*; pass one of them, as ") as raised:
        shutil.copy(tmp_path / "both" / "diffusion_pytorch_model.fp32.safetensors", tmp_path / "both" / "x.safetensors")
        (tmp_path / "both" / "diffusion_pytorch_model.safetensors.index.bf16.json").write_text("{}")
        open_checkpoint(tmp_path / "both")
    advice = str(raised.value).split("pass one of them, as ")[1]
    (tmp_path / "both" / "diffusion_pytorch_model.safetensors.index.bf16.json").unlink()
    advice = advice.replace("bf16", "fp16")
    assert_same_tensors(model.state_dict(), dict(open_checkpoint(advice)))


def test_shards_without_an_index_and_one_of_them(tmp_path):
    save_tiny(tmp_path / "sharded", max_shard_size="30KB")
    (tmp_path / "sharded" / f"{NAME}.index.json").unlink()
    with pytest.raises(CheckpointError, match="got none; these are shards without their index: add the"):
        open_checkpoint(tmp_path / "sharded")
    with pytest.raises(CheckpointError, match=r"is one of \d shards; pass their folder"):
        open_checkpoint(next((tmp_path / "sharded").glob("*-00001-of-*")))


def test_a_link_to_nowhere(folder):
    (folder / NAME).rename(folder / "elsewhere")
    (folder / NAME).symlink_to(folder / "gone")
    with pytest.raises(CheckpointError, match=f"{NAME} is a link to nowhere; download it again"):
        open_checkpoint(folder)


def hub(root, revisions, *, main):
    """A repository in a Hugging Face cache: links into `blobs`."""
    repository = root / "models--Wan-AI--Wan2.1-T2V-1.3B-Diffusers"
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(main)
    for revision in revisions:
        inner = repository / "snapshots" / revision / "transformer"
        save_tiny(root / revision)
        inner.mkdir(parents=True)
        for file in (root / revision).iterdir():
            blob = repository / "blobs" / f"{revision}{file.name}"
            file.rename(blob)
            (inner / file.name).symlink_to(blob)
    return repository


def test_the_root_of_a_hugging_face_cache(tiny, tmp_path):
    one = hub(tmp_path / "one", ["abc"], main="abc")
    for path in (one, one / "snapshots", one / "snapshots" / "abc", one / "snapshots" / "abc" / "transformer" / NAME):
        opened = open_checkpoint(path)
        assert_same_tensors(tiny[1], dict(opened))
        assert opened.model_config().num_heads == 4
    two = hub(tmp_path / "two", ["abc", "def"], main="def")
    with pytest.raises(
        CheckpointError, match="2 snapshots; refs/main is def; pass one of them: .*/snapshots/abc, .*def"
    ):
        open_checkpoint(two)


@pytest.mark.parametrize("name", [NAME, "renamed.safetensors", "weights.pt"])
def test_one_network_however_it_is_named(tmp_path, name):
    """Heads and eps of config.json count for the file itself too."""
    state = save_tiny(tmp_path / "hf", eps=1e-3, num_attention_heads=2, attention_head_dim=12)
    tensors = load_file(tmp_path / "hf" / NAME)
    (tmp_path / "hf" / NAME).unlink()
    torch.save(tensors, tmp_path / "hf" / name) if name.endswith(".pt") else save_file(tensors, tmp_path / "hf" / name)
    models = [open_checkpoint(path).model_config() for path in (tmp_path / "hf", tmp_path / "hf" / name)]
    assert models[0] == models[1]
    assert (models[0].num_heads, models[0].eps) == (2, 1e-3)
    assert_same_tensors(state, dict(open_checkpoint(tmp_path / "hf" / name)))
    with pytest.raises(CheckpointError, match="config.json says num_heads=2; drop the override"):
        open_checkpoint(tmp_path / "hf" / name).model_config(overrides={"num_heads": 4})


def test_a_config_in_another_naming_than_the_weights(tmp_path):
    """A release's or NVlabs' file beside diffusers' config.json."""
    save_tiny(tmp_path / "hf", eps=1e-3)
    expected = open_checkpoint(tmp_path / "hf").model_config()
    for form in ("wan", "nvlabs"):
        target = tmp_path / ("out" if form == "wan" else "out.safetensors")
        convert(tmp_path / "hf", target, to=form)
        file = target / NAME if form == "wan" else target
        (tmp_path / form).mkdir()
        shutil.copy(file, tmp_path / form / "x.safetensors")
        shutil.copy(tmp_path / "hf" / "config.json", tmp_path / form)
        assert open_checkpoint(tmp_path / form / "x.safetensors").model_config() == expected, form
    (tmp_path / "wan" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan"}))
    with pytest.raises(CheckpointError, match="_class_name='AutoencoderKLWan'"):
        open_checkpoint(tmp_path / "wan" / "x.safetensors").model_config(overrides={"num_heads": 4})


def test_what_a_file_alone_does_not_say(tmp_path, caplog):
    """The message's flags read it as it was."""
    save_tiny(tmp_path / "hf", eps=1e-3, patch_size=(1, 1, 3))
    convert(tmp_path / "hf", tmp_path / "x.pt", to="nvlabs")
    flags = "--num-heads 4 --patch-size 1 1 3 --eps 0.001"
    assert f"x.pt: nvlabs does not say this: read it with {flags}" in caplog.text
    from rcm_megatron.__main__ import main

    assert main(["convert", str(tmp_path / "x.pt"), str(tmp_path / "back"), "--to", "diffusers", *flags.split()]) == 0
    models = [open_checkpoint(tmp_path / name).model_config() for name in ("hf", "back")]
    assert models[0] == models[1]


def test_counters_in_shards(cosmos, tmp_path):  # noqa: F811
    state, file = cosmos
    tensors = torch.load(file, weights_only=True)
    for index in range(3):
        tensors[f"net.blocks.{index}.cross_attn.k_norm._extra_state"] = torch.zeros(0)
    tensors |= {"net.accum_train_in_hours": torch.tensor(1.0), "net.pos_embedder.dim_temporal_range": torch.zeros(4)}
    names, weight_map = sorted(tensors), {}
    (tmp_path / "sharded").mkdir()
    for number in range(4):
        shard = f"model-{number + 1:05d}-of-00004.safetensors"
        save_file({name: tensors[name] for name in names[number::4]}, tmp_path / "sharded" / shard)
        weight_map |= dict.fromkeys(names[number::4], shard)
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert(tmp_path / "sharded", tmp_path / "back", to="diffusers", **SCALE)
    assert_same_tensors(state, dict(open_checkpoint(tmp_path / "back")))
