"""Cosmos-Predict2 on several layouts against one rank: losses, tangents and raw gradients, as test_parity does for Wan.

45 tokens need padding on 2 and 4 ranks; stages have different numbers of blocks. Learned positions are on: they are replicated over stages
and token shards.
"""

import pytest
import torch

from rcm_megatron.config import CosmosConfig, ModelConfig
from tests.distributed import test_parity
from tests.distributed.harness import run_ranks
from tests.distributed.layouts import Layout

COSMOS = CosmosConfig(
    adaln_lora_dim=6, rope_scale=(1.0, 4.0, 3.0), rope_fps=16.0, max_size=(4, 8, 12), learnable_positions=True
)
MODEL = ModelConfig(
    family="cosmos",
    cosmos=COSMOS,
    num_layers=3,
    hidden_size=48,
    num_heads=4,
    ffn_hidden_size=96,
    in_channels=3,
    out_channels=3,
    patch_size=(1, 2, 2),
    text_dim=10,
    text_len=5,
    freq_dim=48,
    cross_attn_norm=False,
)
OBJECTIVES = ("scm", "dmd", "critic")
LAYOUTS = (Layout(tp=2, ring=2), Layout(pp=2))


def measure(parallel):
    test_parity.MODEL = MODEL  # in this rank's own process
    micro_batch, layers = test_parity.MICRO_BATCH, MODEL.num_layers
    return test_parity.measure(parallel, micro_batch, torch.float32, OBJECTIVES, layers)


@pytest.fixture(scope="module")
def one_rank():
    return run_ranks(measure, 1, {})[0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=[layout.name for layout in LAYOUTS])
def test_layout(one_rank, layout):
    ranks = run_ranks(measure, layout.processes, layout.parallel, timeout=280)
    test_parity.assert_equal_quantities(one_rank, ranks)
