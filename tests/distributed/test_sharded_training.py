"""Networks that train in pieces (`networks.ROLE.weights: sharded`): every number of a step is one rank's, no rank holds a whole network."""

import shutil
from contextlib import nullcontext

import pytest
import torch

from rcm_megatron.config import ParallelConfig, load_config
from tests.distributed import tiny_run
from tests.distributed.harness import run_ranks
from tests.distributed.test_parity import (
    References,
    assert_equal_quantities,
    build,
    quantities_of,
)
from tests.helpers import assert_close

OBJECTIVES = ("scm", "dmd", "fake_score", "scm_and_dmd")
LAYOUTS = {
    "dp2": (2, {}, 4),
    "ring2": (2, {"ring": 2}, 2),
    "ulysses2_dp2": (4, {"ulysses": 2}, 2),
    "tp2_dp2": (4, {"tp": 2}, 2),
    "pp2_dp2": (4, {"pp": 2}, 3),
    "pp2_vpp2_ring2": (4, {"pp": 2, "vpp": 2, "ring": 2}, 5),
}
"""Name -> (processes, parallel degrees, blocks)."""


def in_pieces(parallel, num_layers, objectives=OBJECTIVES, policies=("none", "selective")):
    """Quantities of objectives of this rank, and under each recompute policy those of plain passes; what it held when."""
    networks = build(ParallelConfig(**parallel), torch.float32, num_layers=num_layers, in_pieces=True)
    most = watch(networks["student"])
    measured = {name: quantities_of(networks, name, 2) for name in objectives}
    by_policy = {}
    for policy in policies:
        for chunk in networks["fake_score"]:
            chunk.module.recompute = policy
        by_policy[policy] = {"fake_score": quantities_of(networks, "fake_score", 2)}
    assert not any(storages(flat) for chunk in networks["student"] for flat in chunk.flats)
    return measured, by_policy, (*most, sum(len(chunk.module.blocks) for chunk in networks["student"]))


def storages(flat):
    """Bytes of what a flat tensor has whole: weights, gradient."""
    return sum(tensor.untyped_storage().nbytes() for tensor in (flat.whole, flat.whole_gradient))


def watch(chunks):
    """The most blocks whose (weights, gradients) were whole while attention computed; fills as passes run."""
    most = [0, 0]

    def note(*_):
        for i, name in enumerate(("whole", "whole_gradient")):
            flats = [unit.flats[0] for chunk in chunks for unit in chunk.units[1:]]
            most[i] = max(most[i], sum(getattr(flat, name).untyped_storage().nbytes() > 0 for flat in flats))

    for chunk in chunks:
        for block in chunk.module.blocks.values():
            block.self_attn.register_forward_pre_hook(note)
    return most


@pytest.fixture(scope="module")
def references():
    return References()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_one_rank(references, layout):
    processes, parallel, num_layers = LAYOUTS[layout]
    reference = references.of(num_layers, OBJECTIVES)
    ranks = run_ranks(in_pieces, processes, parallel, num_layers)
    assert_equal_quantities(reference, [measured for measured, _, _ in ranks])
    for policy in ("none", "selective"):
        assert_equal_quantities(reference, [by_policy[policy] for _, by_policy, _ in ranks])
    # the block that computes and the next; in a backward its gradient, and that of the one before on its way
    for _, _, (weights, gradients, blocks) in ranks:
        assert 1 <= weights <= min(2, blocks) and 1 <= gradients <= min(2, blocks)


def bf16_and_updates():
    """In bf16, whole and in pieces: quantities, (whether NaNs made an update, whether nothing changed), norm, weights after clipping."""
    from megatron.core import parallel_state

    from rcm_megatron.config import OptimizerConfig
    from rcm_megatron.parallel.optimizer_shards import owned_shards
    from rcm_megatron.training.optimizer import build_optimizer, optimizer_step

    found = []
    for pieces in (False, True):
        networks = build(ParallelConfig(), torch.bfloat16, num_layers=2, in_pieces=pieces)
        chunks, groups = networks["student"], networks.layout.groups
        optimizer = build_optimizer(chunks, OptimizerConfig(lr=1e-2))
        measured = quantities_of(networks, "scm_and_dmd", 2)
        shards = owned_shards(optimizer)
        before = torch.cat([shard.main.detach().flatten() for shard in shards])
        last = shards[-1].gradient[-1:]
        held = last.clone()
        last.fill_(float("nan") if groups.dp_rank == 1 else held.item())
        refused = optimizer_step(optimizer, groups)
        same = torch.equal(before, torch.cat([shard.main.detach().flatten() for shard in shards]))
        last.copy_(held)
        updated = optimizer_step(optimizer, groups, clip_grad=1e-3)
        with chunks[0].gathered() if pieces else nullcontext():
            weights = {name: p.detach().clone() for name, p in chunks[0].module.named_parameters()}
        found.append((measured, (refused.updated, same), updated.gradient_norm, weights))
        parallel_state.destroy_model_parallel()
    return found


def test_mixed_dtypes_norm_clipping_and_refusal_are_those_of_whole_networks():
    for (measured, refused, norm, weights), pieces in run_ranks(bf16_and_updates, 2):
        assert_equal_quantities({"both": measured}, [{"both": pieces[0]}])
        assert refused == pieces[1] == (False, True)
        assert pieces[2] == pytest.approx(norm, rel=1e-6) and norm > 1e-2
        for name, value in weights.items():
            assert value.dtype == pieces[3][name].dtype
            assert_close(
                name, value.float(), pieces[3][name].float(), rel=1e-5 if value.dtype == torch.float32 else 1e-3
            )
        assert len({value.dtype for value in weights.values()}) == 2


# ---- runs

IN_PIECES = ["networks.student.weights=sharded", "networks.fake_score.weights=sharded"]


def train(config_path, overrides):
    """A tiny run of this rank: (its networks' whole weights, how its student is held)."""
    from rcm_megatron.platform.megatron import prepare_megatron

    prepare_megatron()
    from rcm_megatron.parallel.groups import initialize_parallel
    from rcm_megatron.training.trainer import Trainer

    run = load_config(config_path, overrides)
    trainer = Trainer(run, initialize_parallel(run.parallel))
    trainer.train()
    trainer.close()
    return tiny_run.whole_weights(trainer), type(trainer.state.trained["student"].chunks[0]).__name__


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_run.write_tiny_run(tmp_path_factory.mktemp("tiny"))


def changes_of(runs):
    """Of each run: all parameters' change since the start, of each network."""
    start = tiny_run.initial_weights()
    return {role: tiny_run.flat_change(weights, start) for role, weights in runs.items()}


def test_a_run_in_pieces_is_the_same_and_goes_on_elsewhere(tiny, tmp_path):
    """20 steps, resident and in pieces, stopped in the middle; from there in pieces on another layout, and resident; 10 resident, and
    from there in pieces."""
    found = {}

    def run(name, folder, ranks, overrides):
        weights, kind = run_ranks(train, ranks, str(tiny), [*overrides, f"output_dir={tmp_path / folder}"])[0]
        assert kind == ("ShardedDataParallel" if IN_PIECES[0] in overrides else "DistributedDataParallel")
        found[name] = changes_of(weights)

    run("resident", "resident", 2, [])
    run("half in pieces", "half", 2, [*IN_PIECES, "trainer.stop_after=10"])
    run("half resident", "to", 2, ["trainer.stop_after=10"])
    for name in ("tp", "back"):
        shutil.copytree(tmp_path / "half", tmp_path / name)
    run("in pieces", "half", 2, IN_PIECES)
    run("in pieces to tp 2, dp 2", "tp", 4, [*IN_PIECES, "parallel.tp=2", "memory.recompute=selective"])
    run("in pieces to resident", "back", 2, [])
    run("resident to in pieces", "to", 2, IN_PIECES)
    for name in found.keys() - {"resident", "half in pieces", "half resident"}:
        for role, change in found["resident"].items():
            assert_close(f"{name}: {role}", change, found[name][role], rel=1e-3)
