"""A tiny random Wan2.1 network in diffusers' own class, saved once, with its state dict, and in every kind of file."""

import shutil

import pytest
import torch

from tests.interop.conversion import convert
from tests.interop.wan_networks import save_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """(folder, state dict) of a saved WanTransformer3DModel: 2 layers, 4 heads of 6, no two elements equal."""
    folder = tmp_path_factory.mktemp("tiny") / "diffusers"
    return folder, save_tiny(folder)


@pytest.fixture(scope="session")
def sources(tiny, tmp_path_factory):
    """A network in one file, in shards, as .pt and .pth of both kinds, and as torch_dist."""
    home = tmp_path_factory.mktemp("fuzz")
    save_tiny(home / "shards", max_shard_size="30KB")
    convert(tiny[0], home / "rcm.pt", to="nvlabs", max_shard_size=40_000)
    convert(tiny[0], home / "dist", to="torch_dist", max_shard_size=40_000)
    torch.save(torch.load(home / "rcm.pt"), home / "legacy.pth", _use_new_zipfile_serialization=False)
    shutil.copytree(tiny[0], home / "single")
    return home


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
