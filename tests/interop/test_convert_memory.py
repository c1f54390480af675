"""Conversions stream: what they hold is bounded by a shard and the tensors of one row of the key map, not by the checkpoint."""

import pytest

from tools.benchmark_convert import largest_group, network, run_chain

SHARD = 6_000_000
NOISE = {"wan": 1_500_000, "torch_dist": 4_000_000, "diffusers": 5_000_000}
"""Bytes that interpreter and libraries take meanwhile, whatever the size: PyTorch's reader and writer are loaded at their first use.
Less than a shard, so that a second one in memory is noticed."""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A 14B with all 40 layers and heads of 4: 55 MB in diffusers' format -> Wan's -> torch_dist -> diffusers'."""
    return run_chain(tmp_path_factory.mktemp("memory"), network(6), max_shard_bytes=SHARD)


@pytest.mark.parametrize("index", range(3), ids=["wan", "torch_dist", "diffusers"])
def test_a_conversion_holds_a_shard_and_a_group(results, index):
    result = results[index]
    assert result["bytes"] > 8 * SHARD
    shard = 0 if result["conversion"].endswith("torch_dist") else SHARD  # written tensor by tensor
    bound = shard + largest_group(network(6)) + NOISE[result["conversion"].split()[-1]]
    assert 0 < result["anonymous_bytes"] <= bound, result
    assert result["resident_bytes"] < 0.8 * result["bytes"], "pages of a mapped source leave with its tensors"
