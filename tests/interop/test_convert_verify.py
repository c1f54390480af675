"""`convert --verify`: source and target run on the same input, each in its library, before the target appears."""

import re

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers import transformer_cosmos

from rcm_megatron.checkpoint import convert as conversion
from rcm_megatron.checkpoint.sources import open_checkpoint
from rcm_megatron.cli.main import main
from rcm_megatron.errors import CheckpointError
from rcm_megatron.inference import verify
from rcm_megatron.registries import FORMATS
from rcm_megatron.requests import ExportRequest
from tests.distributed.harness import run_ranks
from tests.distributed.tiny_run import write_tiny_run
from tests.interop.conversion import convert as convert_unverified
from tests.interop.test_convert_pairs import KINDS, save
from tests.interop.wan_networks import TINY

SMALL = {**TINY, "attention_head_dim": 12, "text_dim": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A network whose output depends on all of its weights."""
    torch.manual_seed(1)
    model, folder = WanTransformer3DModel(**SMALL), tmp_path_factory.mktemp("verify") / "hf"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def convert(source, target, form, *options):
    return main(["convert", str(source), str(target), "--to", form, "--verify", *options])


def test_every_format_of_a_chain_is_verified_in_its_library(folder, tmp_path, capsys):
    heads = ("--num-heads", "4")
    convert(folder, tmp_path / "wan", "wan")
    convert(tmp_path / "wan", tmp_path / "rcm.pt", "nvlabs")
    convert(tmp_path / "rcm.pt", tmp_path / "dist", "torch_dist", *heads)
    convert(tmp_path / "dist", tmp_path / "internal", "internal")
    convert(tmp_path / "internal", tmp_path / "back", "diffusers", "--dtype", "bf16")
    convert(tmp_path / "back", tmp_path / "again", "diffusers", "--max-shard-size", "40kB")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("verified")]
    libraries = [
        ("rcm_megatron", "diffusers"),
        *[("rcm_megatron", "rcm_megatron")] * 3,
        ("diffusers", "rcm_megatron"),
        ("diffusers", "diffusers"),
    ]
    assert len(lines) == len(libraries)
    for line, (target, source) in zip(lines, libraries, strict=True):
        assert f"the target in {target} against the source in {source}" in line
        assert 0 <= float(line.split("velocity ")[1].split()[0]) <= 1e-5
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_is_verified_against_diffusers(kind, tmp_path, capsys, monkeypatch):
    """There and back; Cosmos' class too, which resizes a mask with torchvision where that is installed."""
    monkeypatch.delattr(transformer_cosmos, "transforms", raising=False)
    save(kind, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "internal", "internal")
    convert(tmp_path / "internal", tmp_path / "back", "diffusers")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("verified")]
    assert ["in diffusers:" in lines[0], "in diffusers against" in lines[1]] == [True, True]
    assert all(float(line.split("velocity ")[1].split()[0]) <= 1e-5 for line in lines)
    assert not hasattr(transformer_cosmos, "transforms")


QUERY_AND_KEY = {
    "diffusers": [f"blocks.1.attn1.to_{name}.weight" for name in "qk"],
    "torch_dist": ["blocks.1.self_attn.linear_qkv.weight"] * 2,
    "nvlabs": [f"net.blocks.1.self_attn.{name}.weight" for name in "qk"],
}
"""Where the projections of a block are; torch_dist has them in one tensor."""


@pytest.mark.parametrize("form", QUERY_AND_KEY)
def test_a_conversion_that_errs_leaves_nothing(folder, tmp_path, monkeypatch, capsys, form):
    """q and k of one block exchanged: every key and shape is right."""
    original = conversion.translate

    def exchanged(source, model_config, target):
        tensors = dict(original(source, model_config, target))
        q, k = QUERY_AND_KEY[target]
        if q == k:
            tensors[q] = tensors[q].view(4, 3, 12, 48)[:, [1, 0, 2]].reshape(144, 48)
        else:
            tensors[q], tensors[k] = tensors[k], tensors[q]
        return iter(tensors.items())

    monkeypatch.setattr(conversion, "translate", exchanged)
    assert convert(folder, tmp_path / ("out.pt" if form == "nvlabs" else "out"), form) == 1
    message = r"differs from the source in diffusers: relative error of the velocity .*it was not kept"
    assert re.search(message, capsys.readouterr().err, re.DOTALL)
    assert not list(tmp_path.iterdir())


def test_rounding_is_not_an_error_and_what_is_beside_it_is(folder, tmp_path, monkeypatch):
    """The reference is the source rounded to the dtype: an error far below bf16's own is found."""
    source = open_checkpoint(folder)
    model = source.model_config()
    check = verify.verify_conversion(source, model, torch.bfloat16)
    convert_unverified(folder, tmp_path / "bf16", "diffusers", dtype="bf16")
    check(tmp_path / "bf16")
    convert_unverified(folder, tmp_path / "fp32", "diffusers")
    with pytest.raises(CheckpointError, match="differs from the source"):
        check(tmp_path / "fp32")


def test_memory_that_is_not_there_is_said_before_anything_is_written(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(verify, "_free_memory", lambda: 1000)
    assert convert(folder, tmp_path / "out", "internal") == 1
    assert "got 0.0 GiB of free memory; need 0.0 GiB to verify; fix" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ---- `export --verify` on two ranks


def export_with_other_numbers(config, target):
    """Export the teacher where diffusers' forward is not the network's; returns the message of this rank's error."""
    from rcm_megatron.config import load_config
    from rcm_megatron.inference import export

    other = torch.ones(2, 1, 4, 16, 16, dtype=torch.float64)
    FORMATS["diffusers"].forward = lambda *_, **__: other
    run = load_config(config, ["parallel.pp=2"])
    with pytest.raises(CheckpointError) as caught:
        export.export(run, ExportRequest(weights="teacher", output=target, verify=True))
    return str(caught.value)


def test_an_export_that_differs_fails_on_all_ranks_and_leaves_nothing(tmp_path):
    config = write_tiny_run(tmp_path / "run")
    messages = run_ranks(export_with_other_numbers, 2, str(config), tmp_path / "out" / "student")
    assert len(messages) == 2
    for message in messages:
        assert "differs from the trained network on 1 rank(s)" in message
    assert not list((tmp_path / "out").iterdir())
