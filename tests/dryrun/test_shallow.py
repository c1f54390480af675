"""Deep runs concluded from shallow ones equal the same runs executed whole; what is written down of them."""

from dataclasses import replace

import pytest

from rcm_megatron.config import ParallelConfig
from rcm_megatron.dryrun.shallow import combined, parts_of
from tests.distributed.harness import run_ranks
from tests.dryrun.worlds import IN_PIECES, Case, run_of, simulated

PEAK = 0.005
"""Relative. From one micro-batch on, each further one counts a copy of its text that is made once: 0.2 % of these small runs."""
DEEP = {
    "micro_batches": (Case(1, batch=12), 0, PEAK),
    # with more micro-batches the fullest moment of its backward is another one
    "micro_batches_interleaved": (Case(2, {"pp": 2, "vpp": 2}, layers=4, batch=16), 0, 2 * PEAK),
    "blocks_in_pieces": (Case(2, changes=IN_PIECES, layers=8, batch=4), 0, PEAK),
    "blocks_of_the_last_stage": (Case(2, {"pp": 2}, layers=12, batch=4), 1, PEAK),
}


@pytest.mark.parametrize("name", DEEP)
def test_a_deep_run_is_concluded_from_shallow_ones(name):
    case, rank, peak = DEEP[name]
    whole, concluded = (run_ranks(simulated, 1, case, rank, "gpu", flag)[0] for flag in (True, False))
    assert whole["concluded_from"] == 0 and concluded["concluded_from"] == 2
    assert concluded["standing"] == pytest.approx(whole["standing"], rel=1e-3)
    for update, of in whole["updates"].items():
        other = concluded["updates"][update]
        assert summed(other["flops"]) == summed(of["flops"])
        assert {route: of["calls"] for route, of in other["traffic"].items()} == {
            r: x["calls"] for r, x in of["traffic"].items()
        }
        for phase, owners in of["held"].items():
            assert sum(other["held"][phase].values()) == pytest.approx(sum(owners.values()), rel=peak), (update, phase)


def summed(flops):
    """Phase -> FLOPs. PyTorch multiplies the text of a step's one micro-batch by another operation than that of one among several."""
    return {phase: sum(of.values()) for phase, of in flops.items()}


def weights(run, rank=0, world=1):
    return [part.weight for part in parts_of(run, rank=rank, world_size=world)]


def test_what_is_shallow_already_is_executed():
    run = run_of(Case(1, layers=5, batch=10))
    assert weights(run) == [1.0] and parts_of(run, rank=0, world_size=1)[0].run == run


def test_weights_add_up_and_give_affine_numbers_back():
    run = run_of(Case(1, layers=9, batch=40))
    parts = parts_of(run, rank=0, world_size=1)
    assert len(parts) == 4 and sum(part.weight for part in parts) == pytest.approx(1.0)

    def numbers(run):
        blocks, count = run.model_of("student").num_layers, run.trainer.global_batch_size // 2
        return {"bytes": {"a": 7 + 3 * blocks + 2 * count + 5 * blocks * count}}

    assert combined([(part.weight, numbers(part.run)) for part in parts]) == numbers(run)


def test_networks_of_other_depths_have_coefficients_of_their_own():
    run = run_of(Case(1, layers=9))
    teacher = replace(run.networks["teacher"], model=replace(run.model, num_layers=20))
    run = replace(run, networks={**run.networks, "teacher": teacher})

    def numbers(run):
        return {"flops": 3 * run.model_of("teacher").num_layers + 5 * run.model_of("student").num_layers}

    parts = parts_of(run, rank=0, world_size=1)
    assert len(parts) == 3
    assert combined([(part.weight, numbers(part.run)) for part in parts]) == numbers(run)


def test_stages_of_unequal_blocks_are_concluded_each_for_itself():
    run = run_of(Case(2, {"pp": 2}, layers=20))
    run = replace(run, parallel=ParallelConfig(pp=2, chunk_layers=(8, 12)))
    for rank, blocks in ((0, 8), (1, 12)):
        parts = parts_of(run, rank=rank, world_size=2)
        numbers = [(part.weight, {"blocks": part.run.model_of("student").num_layers // 2}) for part in parts]
        assert combined(numbers) == {"blocks": blocks}
