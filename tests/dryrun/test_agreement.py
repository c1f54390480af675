"""A dry run against the same run on Gloo ranks: bytes that live, FLOPs, calls and bytes of every collective, phase by phase."""

import pytest

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
