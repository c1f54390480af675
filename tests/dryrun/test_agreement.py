"""A dry run against the same run on Gloo ranks: bytes that live, FLOPs, calls and bytes of every collective, phase by phase."""

from collections import Counter

import pytest

from rcm_megatron.dryrun.updates import updates_of
from rcm_megatron.objectives.plan import plan_step
from rcm_megatron.planner.shapes import Shapes, held_of
from rcm_megatron.planner.work import StageWork
from rcm_megatron.training.footprint import standing_bytes
from tests.distributed.harness import run_ranks
from tests.dryrun import worlds
from tests.dryrun.worlds import CASES

PEAK = 0.005
"""Relative, of tracked bytes."""
BOTH_ENDS = {name for name, case in CASES.items() if case.parallel.get("pp", 1) > 1}
"""Cases whose last rank is looked at too."""
PAIRS = [(name, "first") for name in CASES] + [(name, "last") for name in sorted(BOTH_ENDS)]


@pytest.fixture(scope="module")
def compared():
    """(case, which rank) -> (real, dry); all cases of a world in one start of its ranks."""
    found = {}
    for world in sorted({case.world for case in CASES.values()}):
        names = [name for name, case in CASES.items() if case.world == world]
        real = run_ranks(worlds.real, world, names)
        ends = [("first", 0, names), ("last", world - 1, [name for name in names if name in BOTH_ENDS])]
        for end, rank, some in ends:
            dry = run_ranks(worlds.dry, 1, some, rank, world)[0] if some else {}
            found |= {(name, end): (real[rank][name], dry[name]) for name in some}
    return found


@pytest.fixture(params=PAIRS, ids="-".join)
def pair(request, compared):
    return compared[request.param]


def peaks(numbers):
    """(update, phase) -> bytes at the peak."""
    return {
        (name, phase): sum(owners.values())
        for name, update in numbers["updates"].items()
        for phase, owners in update["held"].items()
    }


def test_bytes_between_updates(pair):
    real, dry = pair
    assert dry["standing"] == pytest.approx(real["standing"], rel=PEAK)
    assert sum(dry["standing"].values()) > 100_000


def test_peak_of_each_phase(pair):
    """And of each update."""
    real, dry = (peaks(numbers) for numbers in pair)
    assert len(dry) > 10 and real.keys() == dry.keys()
    for key, size in dry.items():
        assert real[key] == pytest.approx(size, rel=PEAK), key


def test_flops_of_each_phase_and_operation(pair):
    real, dry = pair
    for name, update in real["updates"].items():
        assert update["flops"] and dry["updates"][name]["flops"] == update["flops"], name


def test_messages_of_each_phase_and_group(pair):
    """Calls and bytes, by operation and link."""
    real, dry = pair
    for name, update in real["updates"].items():
        assert dry["updates"][name]["traffic"] == update["traffic"], name


def test_every_group_was_used(compared):
    """Else equal counts would say little."""
    for case, groups in {"tp2_ring2_pp2-first": {"tp", "ring", "pp"}, "ulysses2-first": {"ulysses"}}.items():
        name, _, end = case.partition("-")
        real, _ = compared[name, end]
        used = {route.split(" | ")[1] for update in real["updates"].values() for route in update["traffic"]}
        assert groups <= used, used


def test_links_are_told_apart(compared):
    """Two ranks a node: stages of tp 2 and ring 2 lie on other nodes than their neighbours."""
    _, dry = compared["tp2_ring2_pp2", "first"]
    links = {}
    for update in dry["updates"].values():
        for route in update["traffic"]:
            _, group, _, _, link = route.split(" | ")
            links.setdefault(group, set()).add(link)
    assert links["tp"] == {"inside a node"}
    assert links["pp"] == links["ring"] == {"between nodes"}


# ---- the planner's formulas, against the same dry runs


@pytest.fixture(scope="module")
def inventories():
    """Parameters' dtype -> what the networks of the tiny run are made of."""
    return {dtype: run_ranks(worlds.inventory, 1, dtype)[0] for dtype in ("fp32", "bf16")}


@pytest.fixture
def planned(request, inventories):
    """(Shapes, inventory of each role, pipeline stage) of the case."""
    name, end = request.node.callspec.params["pair"]
    run, world = worlds.run_of(CASES[name]), CASES[name].world
    found = dict.fromkeys(run.roles, inventories[run.precision.params_dtype])
    return Shapes(run, world), found, run.parallel.pp - 1 if end == "last" else 0


def steps_of(run):
    """Name of an update -> its step."""
    rollouts = run.distillation.max_rollout_steps
    return {u.name: plan_step(run.stages[0], u.iteration, max_rollout_steps=rollouts) for u in updates_of(run)}


def test_formulas_of_flops(pair, planned):
    """Of the update without a dual pass, whose attention on the CPU is another than on GPUs (`test_flops.py` has that one)."""
    shapes, inventories, stage = planned
    work = StageWork(shapes, inventories, stage=stage)
    (name,) = (name for name in steps_of(shapes.run) if name.startswith("fake_score"))
    said = sum(sum(done.flops.values()) for done in work.passes(steps_of(shapes.run)[name]).values())
    assert said == pytest.approx(sum(sum(of.values()) for of in pair[1]["updates"][name]["flops"].values()), rel=1e-9)


def test_formulas_of_messages(pair, planned):
    """Bytes that a rank sends over each group; Megatron pads the gradients of small networks by some percent."""
    shapes, inventories, stage = planned
    work = StageWork(shapes, inventories, stage=stage)
    for name, step in steps_of(shapes.run).items():
        said, sent = Counter(), Counter()
        for done in (work.once(step), *work.passes(step).values()):
            said.update(done.sent)
        for route, traffic in pair[1]["updates"][name]["traffic"].items():
            _, group, ranks, operation, _ = route.split(" | ")
            if int(ranks) > 1 and group not in ("world", "tp_cp", "dp") and operation != "broadcast_":
                sent["weights" if operation == "_allgather_base_" and group == "dp_cp" else group] += traffic["sent"]
        groups = {group for group, size in sent.items() if size}
        assert groups == {group for group, size in said.items() if size}, name
        for group in groups:
            assert said[group] == pytest.approx(sent[group], rel=0.04 if group in ("dp_cp", "weights") else 1e-9), (
                name,
                group,
            )


def test_formulas_of_standing_bytes(pair, planned):
    """Megatron pads gradients, to 64 elements a parameter and 128 a bucket, and these networks are small; what is shared is a mean."""
    shapes, inventories, _ = planned
    said = standing_bytes(shapes.run, held_of(shapes, inventories, stage=planned[2]), shards=shapes.shards)
    found = {kind: size for kind, size in pair[1]["standing"].items() if kind != "buffers"}
    assert len(found) == 8
    for kind, size in found.items():
        what, _, role = kind.partition(" ")
        if what != "gradients" or not shapes.run.memory.free_idle_gradients:
            name = role if role == "teacher" else f"{role} {what}"
            assert said[name] == pytest.approx(size, rel=0.08 if what in ("optimizer", "EMA") else 0.04), kind
