"""PyTorch's distributed checkpoints as NVlabs/rcm trains to them: `iter_N/model` with student, EMA and fake score under their prefixes."""

import io

import pytest
import torch
import torch.distributed.checkpoint as dcp

from rcm_megatron.checkpoint.sources import open_checkpoint
from rcm_megatron.errors import CheckpointError
from tests.interop.conversion import convert
from tests.interop.wan_networks import assert_same_tensors

SCALES = {"net.": 1, "net_ema.": 2, "net_fake_score.": 3}


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """(state dict of diffusers, folder of an iteration); the networks are multiples of each other."""
    home = tmp_path_factory.mktemp("dcp")
    convert(tiny[0], home / "rcm.pt", to="nvlabs")
    weights = torch.load(home / "rcm.pt", weights_only=True)
    state = {
        key.replace("net.", prefix, 1): scale * value
        for key, value in weights.items()
        for prefix, scale in SCALES.items()
    }
    state["net.blocks.0.self_attn._extra_state"] = io.BytesIO(b"Transformer Engine's")
    dcp.save(state, checkpoint_id=home / "iter_000010000" / "model", no_dist=True)
    return tiny[1], home / "iter_000010000"


@pytest.mark.parametrize(("weights", "scale"), [("student", 1), ("ema", 2), ("fake_score", 3)])
def test_each_network_of_a_run_converts(trained, tmp_path, weights, scale):
    state, folder = trained
    options = {"weights": weights, "num_heads": 4}
    convert(folder, tmp_path / "hf", to="diffusers", **options)
    assert_same_tensors({name: scale * value for name, value in state.items()}, dict(open_checkpoint(tmp_path / "hf")))
    card = (tmp_path / "hf" / "README.md").read_text()
    assert f"| weights | `{weights}` |" in card and "| source format | `nvlabs` |" in card


def test_what_is_missing_is_named(trained, tmp_path):
    _, folder = trained
    with pytest.raises(CheckpointError, match="several networks: student, ema, fake_score; choose one"):
        open_checkpoint(folder / "model")
    (file,) = (folder / "model").glob("*.distcp")
    hidden = file.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"in the file '__0_0.distcp', which is not there"):
        open_checkpoint(folder, weights="ema")
    hidden.rename(file)


def test_a_file_keeps_where_it_came_from(tiny, tmp_path):
    """A single .safetensors has no model card beside it: its header says it."""
    convert(tiny[0], tmp_path / "rcm.safetensors", to="nvlabs", dtype="bf16")
    header = open_checkpoint(tmp_path / "rcm.safetensors").metadata
    assert header["source"] == str(tiny[0]) and header["source format"] == "diffusers" and header["dtype"] == "bf16"
