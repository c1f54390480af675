"""What a run is said to hold on its ranks, against the bytes of the tensors that are there after a step."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from rcm_megatron.config import NetworkConfig, ParallelConfig
from tests.distributed.harness import run_ranks

SIZES = {"hidden": 64, "head_dim": 32, "layers": 2, "tokens": 256, "ranks": 2, "ring": False}
LAYOUTS = {"dp2_bf16": ({}, "bf16"), "tp2_fp32": ({"tp": 2}, "fp32"), "pp2_bf16": ({"pp": 2}, "bf16")}
NAMES = {
    "student weights": "weights of the student",
    "student gradients": "gradients of the student",
    "student optimizer": "main parameters and moments of the student",
    "fake_score weights": "weights of the fake score",
    "fake_score gradients": "gradients of the fake score",
    "fake_score optimizer": "main parameters and moments of the fake score",
    "student EMA": "EMA of the student",
}


def with_network(run, role, **fields):
    """`run` with other fields of a network, or one more."""
    network = replace(run.networks.get(role, NetworkConfig()), **fields)
    return replace(run, networks={**run.networks, role: network})


def said_and_held(parallel, dtype):
    """(bytes said with a resident teacher, with a sharded one, bytes held, parameters) of one rank."""
    from rcm_megatron.training.footprint import held_on_rank, standing_bytes
    from tools.benchmark_memory import Rank, run_config

    run = run_config(SimpleNamespace(**SIZES, dtype=dtype))
    batch = ParallelConfig(**parallel).dp(SIZES["ranks"])
    run = replace(run, parallel=ParallelConfig(**parallel), trainer=replace(run.trainer, global_batch_size=batch))
    rank = Rank(run)
    rank.step("full", "resident")
    own, held, shards = held_on_rank(run, rank.groups), rank.standing(), rank.groups.dp_cp.size()
    said = standing_bytes(run, own, shards=shards)
    sharded = with_network(run, "teacher", weights="sharded")
    return said, standing_bytes(sharded, own, shards=shards), held, sum(len(list(c.parameters())) for c in rank.student)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bytes_are_those_of_the_tensors(layout):
    """Exact on each rank, or over its dp*cp group; Megatron pads gradients by up to 64 elements a parameter and 128 a bucket."""
    reports = run_ranks(said_and_held, SIZES["ranks"], *LAYOUTS[layout])
    groups = [reports] if layout.startswith("dp") else [[report] for report in reports]
    for group in groups:

        def total(index, name, group=group):
            return sum(report[index][name] for report in group)

        assert total(0, "teacher") == total(2, "weights of the resident teacher")
        assert total(1, "teacher") == pytest.approx(total(2, "weights of the sharded teacher"), abs=len(group))
        for said, held in NAMES.items():
            padding = 4 * 192 * sum(report[3] for report in group) if "gradients" in said else 0
            need = total(2, held)
            assert need - padding - len(group) < total(0, said) <= need, (said, total(0, said), need)


def held_whole(family):
    """Matrices that a rank of tp=2 holds whole, without the number of their block."""
    import re

    import torch

    from rcm_megatron.config import LatentConfig
    from rcm_megatron.networks.build import build_chunks
    from rcm_megatron.parallel.groups import initialize_parallel
    from rcm_megatron.platform.megatron import prepare_megatron
    from tests import networks

    prepare_megatron()
    parallel, latent = ParallelConfig(tp=2), LatentConfig(channels=3, frames=3, height=6, width=10)
    options = {"groups": initialize_parallel(parallel), "params_dtype": torch.float32}
    (chunk,) = build_chunks(getattr(networks, family)(), latent, parallel, **options)
    matrices = ((name, p) for name, p in chunk.named_parameters() if name.endswith("weight") and p.ndim == 2)
    whole = {name for name, p in matrices if not getattr(p, "tensor_model_parallel", False)}
    return {re.sub(r"blocks\.\d+\.", "", name).removesuffix(".weight") for name in whole}


@pytest.mark.parametrize("family", ["wan", "cosmos"])
def test_tensor_parallel_ranks_hold_whole_what_is_small_alone(family):
    linears = {"linear_1", "linear_2"}
    small = {"patch_embedding", "head.linear", "time_embedding.linear_1"}
    if family == "wan":
        small |= {"time_embedding.linear_2"} | {f"text_embedding.{linear}" for linear in linears}
    else:
        of = ("self_attn_modulation", "cross_attn_modulation", "mlp_modulation", "head.modulation")
        small |= {f"{modulation}.linear_1" for modulation in of}
    assert run_ranks(held_whole, 2, family) == [small, small]


def test_policies_leave_out_what_they_free():
    import torch

    from rcm_megatron.training.footprint import held_by, standing_bytes
    from tools.benchmark_memory import run_config

    run = run_config(SimpleNamespace(**SIZES, dtype="bf16"))
    held = held_by([torch.nn.Parameter(torch.zeros(100, dtype=torch.bfloat16))])
    chunks = dict.fromkeys((*run.roles, "teacher_low_noise"), held)
    found = standing_bytes(run, chunks, shards=2)
    assert found["teacher"] == 200 and found["fake_score optimizer"] == 600 and found["student EMA"] == 200
    freed = with_network(with_network(run, "teacher", weights="offloaded"), "fake_score", offload_optimizer=True)
    less = standing_bytes(replace(freed, memory=replace(run.memory, free_idle_gradients=True)), chunks, shards=2)
    assert less["teacher"] == less["fake_score optimizer"] == 0 and less["student optimizer"] == 600
    assert "fake_score gradients" not in less and less["student gradients"] == 400
    two = standing_bytes(with_network(run, "teacher_low_noise", init="elsewhere"), chunks, shards=2)
    assert two == found | {"teacher_low_noise": 200}
    # one that begins as another that stays as it is is held once
    alike = standing_bytes(with_network(run, "teacher_low_noise"), chunks, shards=2)
    assert alike == found | {"teacher_low_noise": 0}
