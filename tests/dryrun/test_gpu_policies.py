"""Policies that only a GPU can follow, in a dry run of one: what leaves the device, and is in the host's memory instead."""

from tests.distributed.harness import run_ranks
from tests.dryrun.worlds import BF16, Case, simulated

AWAY = {
    "networks": {
        "teacher": {"weights": "offloaded"},
        "student": {"offload_optimizer": True},
        "fake_score": {"offload_optimizer": True},
    },
    "memory": {"free_idle_gradients": True},
}


def test_offloaded_state_is_on_the_host():
    plain, away = (
        run_ranks(simulated, 1, Case(2, changes=BF16 | changes, batch=4), 0, "gpu", True)[0] for changes in ({}, AWAY)
    )
    there = plain["standing"]
    moved = {kind: size - away["standing"].get(kind, 0) for kind, size in there.items()}
    states = [f"optimizer {role}" for role in ("student", "fake_score")]
    assert all(moved[kind] == there[kind] > 0 for kind in [*states, "weights teacher"])
    assert (
        moved["gradients student"] == there["gradients student"]
        and moved["gradients fake_score"] == there["gradients fake_score"]
    )
    assert moved["weights student"] == moved["EMA student"] == 0
    for name, update in plain["updates"].items():
        other = away["updates"][name]
        assert other["host"]["peak"] - update["host"]["peak"] >= sum(there[kind] for kind in states)
        assert max(map(size_of, other["held"].values())) < max(map(size_of, update["held"].values()))
        assert other["flops"] == update["flops"]


def size_of(owners):
    return sum(owners.values())
