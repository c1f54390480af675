"""The memory policies change bytes and seconds alone: every number of a step stays what it was.

Gradients of plain and dual passes under each recompute policy, with the teacher whole and in shards, on one rank and on layouts of
each kind; what a sharded teacher holds between passes; bytes saved for the backward; a run whose optimizer state waits elsewhere.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rcm_megatron.config import ParallelConfig, load_config
from tests.distributed import tiny_run
from tests.distributed.harness import run_ranks
from tests.helpers import assert_close

LAYOUTS = {
    "one": (1, {}, 2),
    "dp2": (2, {}, 2),
    "tp2": (2, {"tp": 2}, 2),
    "ring2": (2, {"ring": 2}, 2),
    "ulysses2": (2, {"ulysses": 2}, 2),
    "pp2": (2, {"pp": 2}, 3),
    "pp2_vpp2_dp2": (4, {"pp": 2, "vpp": 2}, 5),
}
"""Name -> (processes, parallel degrees, blocks)."""
POLICIES = ("none", "selective", "attention", "full")


def quantities_under_policies(parallel, num_layers):
    """{policy: quantities of an objective} of this rank, and what a sharded teacher held when."""
    from rcm_megatron.networks.sharding import shard_weights
    from rcm_megatron.parallel.pipeline import unwrapped
    from tests.distributed.test_parity import build, quantities_of

    networks, measured = build(ParallelConfig(**parallel), torch.float32, num_layers=num_layers), {}
    for policy in POLICIES:
        for chunk in networks["student"]:
            unwrapped(chunk).recompute = policy
        measured[policy] = {f"flow: {name}": value for name, value in quantities_of(networks, "flow", 2).items()}
        measured[policy] |= {f"scm: {name}": value for name, value in quantities_of(networks, "scm", 2).items()}
    measured["resident"] = quantities_of(networks, "scm", 2)
    whole, group = bytes_of(networks["teacher"]), networks.layout.groups.dp_cp
    shard_weights(networks["teacher"], group=group)
    gathered = watch_gathered_blocks(networks["teacher"])
    measured["sharded"] = quantities_of(networks, "scm", 2)
    return measured, {
        "ranks": group.size(),
        "whole": whole,
        "held": bytes_of(networks["teacher"]),
        "gathered": gathered,
    }


def bytes_of(chunks):
    """Bytes of this rank's parts of all parameters."""
    from torch.distributed.tensor import DTensor

    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    local = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    return sum(p.untyped_storage().nbytes() for p in local)


def watch_gathered_blocks(chunks):
    """The set of {how many blocks are whole} while a block computes; fills as passes run."""
    from torch.distributed.tensor import DTensor

    blocks = [block for chunk in chunks for block in chunk.blocks.values()]
    noted = set()

    def note(*_):
        noted.add(sum(not isinstance(block.modulation, DTensor) for block in blocks))

    for block in blocks:
        block.self_attn.register_forward_pre_hook(note)
    return noted


@pytest.mark.parametrize("layout", LAYOUTS)
def test_policies_change_no_number(layout):
    processes, parallel, num_layers = LAYOUTS[layout]
    for measured, teacher in run_ranks(quantities_under_policies, processes, parallel, num_layers):
        for policy in ("selective", "attention", "full"):
            assert measured[policy].keys() == measured["none"].keys()
            for name, value in measured[policy].items():
                assert_close(f"recompute={policy}: {name}", measured["none"][name], value, rel=1e-6)
        for name, value in measured["sharded"].items():
            assert torch.equal(value, measured["resident"][name]), f"weights=sharded: {name}"
        if teacher["ranks"] > 1:
            # a table of one row is not cut: the group's first rank has it, the others padding
            assert teacher["held"] <= 1.1 * teacher["whole"] / teacher["ranks"]
            assert teacher["gathered"] == {1}


def kept_and_repeated(parallel):
    """{policy: (bytes that a plain forward of 256 tokens keeps for its backward, operations of that backward that selective spares, runs of
    attention in that backward, and in a dual pass's)}."""
    from rcm_megatron.platform.megatron import prepare_megatron

    prepare_megatron()
    from torch.utils._python_dispatch import TorchDispatchMode

    from rcm_megatron.config import LatentConfig
    from rcm_megatron.dual import Dual
    from rcm_megatron.models.recompute import is_kept
    from rcm_megatron.networks.build import build_chunks
    from rcm_megatron.networks.weights import load_weights, seeded_weights
    from rcm_megatron.parallel.groups import initialize_parallel
    from tests.distributed.test_parity import MODEL
    from tools.measuring import PeakBytes

    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.repeated = self.attended = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func._schema.name
            self.repeated += is_kept(func) or name in ("c10d::_reduce_scatter_base_", "c10d::allreduce_")
            self.attended += "attention" in name and "backward" not in name
            return func(*args, **(kwargs or {}))

    parallel, latent = ParallelConfig(**parallel), LatentConfig(channels=3, frames=4, height=16, width=16)
    groups, kept, counts = initialize_parallel(parallel), {}, {}
    (network,) = build_chunks(MODEL, latent, parallel, groups=groups, params_dtype=torch.float32)
    load_weights([network], seeded_weights(MODEL, seed=1))
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    x = torch.randn(network.layout.local_tokens, 1, network.layout.patch_features)
    inputs = (x, torch.full((1, 1), 500.0), torch.randn(5, 1, 10))
    network(*inputs)  # makes what it caches
    for policy in POLICIES:
        network.recompute = policy
        with PeakBytes() as tracked:
            loss = network(*inputs).square().sum()
            kept[policy] = tracked.live
            with Count() as plain:
                loss.backward()
            del loss
            assert tracked.live < kept["none"] / 100, f"{policy}: {tracked.live} bytes outlive the backward"
        loss = network(Dual.pack(x, x), Dual.pack(inputs[1], inputs[1]), inputs[2]).primal.square().sum()
        with Count() as dual:
            loss.backward()
        counts[policy] = plain.repeated, plain.attended, dual.attended
    return {policy: (kept[policy], *counts[policy]) for policy in POLICIES}


@pytest.mark.parametrize("layout", ["one", "tp2", "ring2"])
def test_less_is_kept_for_the_backward(layout):
    """Selective recomputation repeats no matmul of a linear, no attention and no reduction; only `full` runs self-attention again, of a
    dual pass too. Cross-attention, one run a block, is kept by `selective` alone."""
    processes, parallel, num_layers = LAYOUTS[layout]
    for measured in run_ranks(kept_and_repeated, processes, parallel):
        none, selective, attention, full = (measured[policy] for policy in POLICIES)
        assert full[0] < attention[0] < 0.35 * selective[0] and selective[0] < 0.55 * none[0], measured
        assert none[1] == selective[1] < attention[1] < full[1], measured
        hops = parallel.get("ring", 1) * num_layers
        assert none[2] == selective[2] == 0 and attention[2] == num_layers and full[2] == num_layers + hops, measured
        assert [policy[3] for policy in (none, selective, attention)] == [num_layers] * 3, measured
        assert full[3] == num_layers + hops, measured


# ---- optimizer state and gradients


def train(config_path, overrides, away):
    """A tiny run of this rank; `away`: optimizer state waits on the host, which is where it was, and idle gradients are freed."""
    from rcm_megatron.platform.megatron import prepare_megatron

    prepare_megatron()
    from rcm_megatron.parallel.groups import initialize_parallel
    from rcm_megatron.training.memory import Residency
    from rcm_megatron.training.trainer import Trainer

    run = load_config(config_path, overrides)
    trainer, freed = Trainer(run, initialize_parallel(run.parallel)), 0
    if away:
        trained = trainer.state.trained
        trainer.state.residency = Residency(trained, offload=tuple(trained), free_idle_gradients=True)
        freed = away_bytes(trainer)
    trainer.train()
    trainer.close()
    with trainer.state.residency.state():
        ema = torch.cat([shard.flatten() for shard in trainer.state.trained["student"].ema.shards])
    return tiny_run.whole_weights(trainer), ema, freed


def away_bytes(trainer):
    """(bytes of state without storage, bytes that it has on the host, bytes of freed gradients)."""
    from rcm_megatron.parallel.optimizer_shards import owned_shards

    shards = [shard for trained in trainer.state.trained.values() for shard in owned_shards(trained.optimizer)]
    states = [[shard.main, *shard.adam_state().values()] for shard in shards]
    empty = sum(4 * t.numel() for state in states for t in state if t.untyped_storage().nbytes() == 0)
    host = sum(copy.numel() for offload in trainer.state.residency._offloads.values() for copy in offload._host)
    chunks = [chunk for trained in trainer.state.trained.values() for chunk in trained.chunks]
    gradients = [buffer.grad_data for chunk in chunks for buffer in chunk.buffers]
    return empty, host, sum(4 * g.numel() for g in gradients if g.untyped_storage().nbytes() == 0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_run.write_tiny_run(tmp_path_factory.mktemp("tiny"))


def test_a_run_with_every_policy_is_the_same(tiny, tmp_path):
    """Through steps of all kinds, checkpoints, and resuming, to the bit. In bf16 some main parameters are views of fp32 parameters, most
    not. (Of recomputation `test_policies_change_no_number`: a dual pass's attention rounds otherwise than a plain one's.)"""
    results = {}
    policies = ["networks.teacher.weights=sharded", "memory.free_idle_gradients=true"]
    for away in (False, True):
        overrides = [
            "precision.params_dtype=bf16",
            "memory.recompute=selective",
            f"output_dir={tmp_path / str(away)}",
            "trainer.checkpoint_every=4",
        ]
        overrides += policies if away else []
        for stop in (7, 8):
            results[away] = run_ranks(train, 2, str(tiny), [*overrides, f"trainer.stop_after={stop}"], away)
    for (weights, ema, _), (same_weights, same_ema, (empty, host, gradients)) in zip(*results.values(), strict=True):
        assert torch.equal(ema, same_ema)
        for network, tensors in weights.items():
            for name, value in tensors.items():
                assert torch.equal(value, same_weights[network][name]), f"{network}: {name}"
        parameters = sum(value.numel() for tensors in weights.values() for value in tensors.values())
        assert empty == host > 5 * parameters  # on each of two ranks; 6 with the main parameters that are views
        assert gradients >= 4 * parameters


def refusal(config_path, overrides):
    from rcm_megatron.platform.megatron import prepare_megatron

    prepare_megatron()
    from rcm_megatron.config import ConfigError
    from rcm_megatron.parallel.groups import initialize_parallel
    from rcm_megatron.training.state import build_networks

    run = load_config(config_path, overrides)
    nowhere = replace(run.networks["teacher"], init=str(Path(config_path).parent / "nowhere"))
    run = replace(run, networks={**run.networks, "teacher": nowhere})
    try:
        build_networks(run, initialize_parallel(run.parallel))
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["networks.teacher.weights=offloaded"], ["networks.teacher.weights=offloaded on a CPU", "need a CUDA device"]),
        (
            ["networks.student.offload_optimizer=true"],
            ["networks.student.offload_optimizer=true on a CPU", "fix: networks.student.offload_optimizer=false"],
        ),
    ],
)
def test_what_a_cpu_or_a_run_cannot_do_is_refused_before_weights_are_read(tiny, overrides, words):
    (message,) = run_ranks(refusal, 1, str(tiny), overrides)
    for word in words:
        assert word in message
