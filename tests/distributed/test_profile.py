"""`trainer.profile`: traces with the phases of a step, of the ranks that differ, and the same run."""

import gzip
import json
from pathlib import Path

import pytest

from tests.distributed.harness import run_ranks
from tests.distributed.run_checks import assert_same_curves
from tests.distributed.tiny_run import command, records, write_tiny_run

ITERATIONS = 2


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_tiny_run(tmp_path_factory.mktemp("profiled"))


def train(config, name, ranks, *overrides):
    """The folder of a run of 6 iterations."""
    out = config.parent / name
    argv = ["train", str(config), f"output_dir={out}", "trainer.stop_after=6", *overrides]
    assert [status for status, _ in run_ranks(command, ranks, argv)] == [0] * ranks
    return out


def events(path: Path):
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def names(events):
    return {event["name"] for event in events if "name" in event}


def test_each_stage_has_a_trace_with_its_phases(config):
    out = train(config, "stages", 2, "parallel.pp=2", f"trainer.profile={ITERATIONS}")
    assert sorted(path.name for path in (out / "profile").iterdir()) == ["rank_0.json.gz", "rank_1.json.gz"]
    for path in (out / "profile").iterdir():
        found = events(path)
        steps = {name for name in names(found) if name.startswith("ProfilerStep")}
        assert steps == {f"ProfilerStep#{3 + n}" for n in range(ITERATIONS)}, "the first three are not in it"
        phases = {"phase teacher", "phase dual", "phase backward", "phase optimizer", "phase stages"}
        assert phases <= names(found) and "aten::mm" in names(found), names(found)
    assert_same_curves(records(train(config, "plain", 2, "parallel.pp=2")), records(out), rel=0.0)


def test_replicas_have_one_and_a_run_that_ends_early_leaves_what_it_has(config):
    out = train(config, "replicas", 2, "trainer.profile=50")
    (path,) = (out / "profile").iterdir()
    assert path.name == "rank_0.json.gz"
    steps = {name for name in names(events(path)) if name.startswith("ProfilerStep")}
    assert {f"ProfilerStep#{n}" for n in (3, 4, 5)} <= steps, "the last is what comes after the last iteration"
