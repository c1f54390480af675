"""A tiny random Wan2.1 network in diffusers' own class, saved once, with its state dict."""

import pytest
import torch

from tests.interop.wan_networks import save_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """(folder, state dict) of a saved WanTransformer3DModel: 2 layers, 4 heads of 6, no two elements equal."""
    folder = tmp_path_factory.mktemp("tiny") / "diffusers"
    return folder, save_tiny(folder)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
