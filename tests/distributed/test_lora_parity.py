"""A LoRA on student and fake score of one shared base: raw gradients of every adapter parameter on layouts against one rank."""

import hashlib
from dataclasses import replace

import pytest
import torch

from rcm_megatron.config import LoraConfig, NetworkConfig, OptimizerConfig, ParallelConfig
from tests.distributed.harness import run_ranks
from tests.distributed.layouts import MICRO_BATCH, Layout
from tests.distributed.test_parity import assert_equal_quantities, quantities_of, run_of, weights_of
from tests.helpers import assert_close

OBJECTIVES = ("scm", "dmd", "fake_score")
EVERYWHERE = (
    "self_attn",
    "cross_attn",
    "mlp",
    "time_embedding",
    "text_embedding",
    "time_projection",
    "patch_embedding",
    "head",
)
LAYOUTS = {
    "tp2_ring2": (Layout(tp=2, ring=2), "resident"),
    "pp2": (Layout(pp=2), "resident"),
    "ulysses2_sharded": (Layout(ulysses=2), "sharded"),
    "dp2_sharded": (Layout(dp=2), "sharded"),
}


def lora_run(parallel, *, num_layers, weights="resident", lora=None):
    """Teacher, student and fake score of one base."""
    optimizer = OptimizerConfig(lr=1e-3, lr_warmup_steps=1)
    run = run_of(ParallelConfig(**parallel), {"scm": 100.0, "dmd": 0.3}, optimizer=optimizer, num_layers=num_layers)
    lora = lora or LoraConfig(rank=3, alpha=6.0, targets=EVERYWHERE)
    trained = NetworkConfig(optimizer=optimizer, lora=lora, weights=weights)
    return replace(run, networks={"teacher": NetworkConfig(weights=weights), "student": trained, "fake_score": trained})


def fill(run, role, chunks):
    from rcm_megatron.networks.weights import load_weights

    load_weights(chunks, weights_of(run.model_of(role), 1))


def build(run):
    """The run's networks, and B not zero: else A had no gradient."""
    from rcm_megatron.platform.megatron import prepare_megatron

    prepare_megatron()
    from rcm_megatron.parallel.groups import initialize_parallel
    from rcm_megatron.training.state import build_networks

    networks = build_networks(run, initialize_parallel(run.parallel), fill=fill)
    for role in ("student", "fake_score"):
        for chunk in networks[role]:
            set_b(chunk.module, role)
    return networks


@torch.no_grad()
def set_b(network, role):
    from rcm_megatron.models.lora import adapters_of

    group = network.layout.groups.tp
    for name, _, adapter in adapters_of(network):
        seed = int.from_bytes(hashlib.blake2b(f"{role}/{name}".encode(), digest_size=7).digest(), "little")
        split = getattr(adapter.B, "tensor_model_parallel", False)
        rows = adapter.B.shape[0] * (group.size() if split else 1)
        whole = 0.1 * torch.randn(rows, adapter.B.shape[1], generator=torch.Generator().manual_seed(seed))
        start = adapter.B.shape[0] * group.rank() if split else 0
        adapter.B.copy_(whole[start : start + adapter.B.shape[0]])


def measure(parallel, micro_batch_size, num_layers, weights):
    networks = build(lora_run(parallel, num_layers=num_layers, weights=weights))
    return {name: quantities_of(networks, name, micro_batch_size) for name in OBJECTIVES}


@pytest.fixture(scope="module")
def references():
    return {n: run_ranks(measure, 1, {}, MICRO_BATCH, n, "resident")[0] for n in (2, 3)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_one_rank(references, name):
    layout, weights = LAYOUTS[name]
    reference = references[layout.num_layers]
    ranks = run_ranks(measure, layout.processes, layout.parallel, layout.micro_batch_size, layout.num_layers, weights)
    for objective in OBJECTIVES:
        gradients = [key for key in reference[objective] if key.startswith("gradient of ")]
        assert all(".lora." in key for key in gradients) and len(gradients) > 20 * layout.num_layers // 2
        assert all(float(reference[objective][key].norm()) > 0 for key in gradients if "text_embedding" not in key)
    error, what = assert_equal_quantities(reference, ranks)
    print(f"{name}: at most {error:.1e} ({what})")


def one_base():
    """Storages of three roles, and each role's output against a network of its own with the LoRA merged."""
    from rcm_megatron.models.lora import merge_adapters, view_of
    from rcm_megatron.networks.adapters import adapt
    from rcm_megatron.networks.build import build_network, frozen
    from rcm_megatron.parallel.pipeline import unwrapped
    from rcm_megatron.training.footprint import held_on_rank, standing_bytes
    from tests.distributed.test_parity import bare_network

    run = lora_run({}, num_layers=2)
    networks = build(run)
    chunks = {role: unwrapped(networks[role][0]) for role in networks}
    base = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in chunks["teacher"].parameters()}
    held = {
        p.untyped_storage().data_ptr()
        for chunk in chunks.values()
        for n, p in chunk.named_parameters()
        if ".lora." not in n
    }
    said = standing_bytes(run, held_on_rank(run, networks.layout.groups), shards=1)
    assert said["teacher"] == sum(base.values()), "the footprint's bytes of the base are those of its storages"
    assert said["student base"] == said["fake_score base"] == 0
    assert said["student weights"] == sum(4 * p.numel() for _, p in chunks["student"].stored_parameters())
    outputs = {}
    for role in networks:
        own = frozen(build_network(run, role, networks.layout.groups))
        fill(run, role, own)
        if run.networks[role].lora is not None:
            views = [view_of(chunk) for chunk in own]
            adapt(views, run, role)
            set_b(views[0], role)
            merge_adapters(views)
        both = [networks.replace(student=networks[role]), networks.replace(student=own)]
        outputs[role] = [bare_network(one) for one in both]
    return len(base), held == set(base), outputs


def test_three_roles_hold_one_base():
    ((count, shared, outputs),) = run_ranks(one_base, 1)
    assert shared and count > 30
    for role, (got, expected) in outputs.items():
        for quantity in expected:
            assert_close(f"{role} {quantity}", expected[quantity], got[quantity], rel=1e-5)
    assert float((outputs["student"][0]["v"] - outputs["teacher"][0]["v"]).norm()) > 1e-2
