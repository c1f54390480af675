"""The pre-flight: which node it names for which fault, and that a node which is silent, or hangs, does not hang it."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rcm_megatron.cluster import preflight as checks
from rcm_megatron.cluster.bandwidth import neighbours
from rcm_megatron.cluster.report import Report, checkpoint_gib
from rcm_megatron.cluster.verdict import Findings, nodes_of_ranks
from rcm_megatron.config import load_config
from rcm_megatron.platform import MEGATRON_VERSION

ROOT = Path(__file__).parents[2]
VERSIONS = {"torch": "2.13.0", "megatron-core": MEGATRON_VERSION}


def findings(*, nodes=("a", "b", "c"), **changes):
    """Two ranks on each node, all well. `changes`: {node: fields of its reports}."""
    found = Findings([node for node in nodes for _ in range(2)])
    for rank, node in enumerate(found.nodes):
        fields = {"device": "8 x H200", "versions": VERSIONS, "free_memory_gib": 138.0, "free_disk_gib": 900.0}
        found.reports[rank] = Report(rank=rank, node=node, **(fields | changes.get(node, {})))
        found.bandwidths[rank] = {"node": 400.0 + rank, "pair": 90.0, "all": 85.0}
    found.clocks = dict.fromkeys(nodes[1:], (0.003, 0.001))
    return found


def test_equal_nodes_are_fit():
    assert findings().named_problems(slow=0.5) == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"versions": VERSIONS | {"torch": "2.12.1"}}, "torch 2.12.1, but 2.13.0 on a"),
        ({"versions": {"megatron-core": MEGATRON_VERSION}}, "torch unknown, but 2.13.0 on a"),
        ({"device": "7 x H200"}, "device 7 x H200, but 8 x H200 on a"),
        ({"problems": ["uncorrected ECC errors: 0 3"]}, "uncorrected ECC errors: 0 3"),
    ],
)
def test_the_node_that_differs_is_named_once(fields, words):
    assert findings(b=fields).named_problems(slow=0.5) == [("b", words)]


def test_a_megatron_that_is_wrong_everywhere_is_named_everywhere():
    wrong = {"versions": VERSIONS | {"megatron-core": "0.17.0"}}
    found = findings(nodes=("a", "b"), a=wrong, b=wrong).named_problems(slow=0.5)
    assert found == [(node, f"megatron-core 0.17.0, need {MEGATRON_VERSION}") for node in "ab"]


def test_a_megatron_built_from_its_repository_is_the_release_that_it_is_of():
    built = {"versions": VERSIONS | {"megatron-core": f"{MEGATRON_VERSION}+44a65c4"}}
    assert findings(nodes=("a", "b"), a=built, b=built).named_problems(slow=0.5) == []


@pytest.mark.parametrize(("ahead", "uncertainty", "bad"), [(1.2, 0.01, True), (-7.0, 0.5, True), (1.2, 0.4, False)])
def test_a_clock_is_off_by_more_than_the_measurement_leaves_open(ahead, uncertainty, bad):
    found = findings()
    found.clocks["c"] = (ahead, uncertainty)
    problems = found.named_problems(slow=0.5)
    assert [node for node, _ in problems] == (["c"] if bad else [])
    assert not bad or f"{abs(ahead):.1f} s {'ahead' if ahead > 0 else 'behind'}" in problems[0][1]


@pytest.mark.parametrize(
    ("kind", "words"), [("node", "inside the node is slow: 150.00"), ("pair", "neighbours is slow: 150.00")]
)
def test_a_slow_node_is_named_by_its_slowest_rank(kind, words):
    found = findings()
    for rank, values in found.bandwidths.items():
        values[kind] = 150.0 if rank == 3 else 400.0
    problems = found.named_problems(slow=0.5)
    assert [node for node, _ in problems] == ["b"] and words in problems[0][1]
    assert found.named_problems(slow=0.3) == []


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
def test_each_node_meets_both_neighbours_in_rounds_of_disjoint_pairs(count):
    rounds = list(neighbours([str(index) for index in range(count)]))
    for pairs in rounds:
        met = [node for pair in pairs for node in pair]
        assert len(met) == len(set(met)), pairs
    links = {frozenset(pair) for pairs in rounds for pair in pairs}
    assert links == {frozenset((str(i), str((i + 1) % count))) for i in range(count)}
    assert len(rounds) == (1 if count == 2 else 2 + count % 2)


def test_one_node_has_no_neighbours():
    assert list(neighbours(["a"])) == []


def test_the_table_marks_the_bad_node_and_gives_its_reason():
    found = findings(b={"device": "7 x H200"})
    text = found.table(found.named_problems(slow=0.5))
    marks = {line.split()[0]: line.split()[-1] for line in text.splitlines()[1:4]}
    assert marks == {"a": "ok", "b": "BAD", "c": "ok"}
    assert text.splitlines()[-2:] == ["all ranks: 85.00 GB/s", "b: device 7 x H200, but 8 x H200 on a"]


def test_silent_ranks_are_placed_by_the_list_of_nodes():
    reports = {0: findings().reports[0]}
    assert nodes_of_ranks(reports, world_size=4, listed=["a", "b"]) == ["a", "a", "b", "b"]
    assert nodes_of_ranks(reports, world_size=4, listed=[]) == ["a", "rank 1", "rank 2", "rank 3"]


def test_the_estimate_of_a_checkpoint_is_that_of_the_trained_networks():
    run = load_config(ROOT / "model_configs" / "wan2.1_t2v_1.3b_480p.yaml")
    assert 1.3e9 * 36 / 2**30 * 0.9 < checkpoint_gib(run) < 1.5e9 * 36 / 2**30


@pytest.fixture
def config(tmp_path):
    """The quick start's run, with data and teacher that can be read."""
    data, teacher = tmp_path / "data", tmp_path / "teacher"
    data.mkdir(), teacher.mkdir()
    (data / "0.tar").write_bytes(b"shard")
    written = yaml.safe_load((ROOT / "model_configs" / "quickstart.yaml").read_text())
    written["output_dir"], written["data"]["folder"], written["networks"]["teacher"]["init"] = (
        str(tmp_path / "out"),
        str(data),
        str(teacher),
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(written))
    return tmp_path / "run.yaml"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def ranks(config, *overrides, present=(0, 1), timeout=40, **settings):
    """(status, stdout, stderr) of each rank that is present, of two; ranks are nodes a and b."""
    common = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    common |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [
        sys.executable,
        "-m",
        "rcm_megatron",
        "preflight",
        str(config),
        "--nodes",
        "a,b",
        "--timeout",
        str(timeout),
    ]
    started = []
    for rank in present:
        own = {"RANK": str(rank), "SLURMD_NODENAME": "ab"[rank]} | settings.get(f"rank{rank}", {})
        environment = os.environ | common | own
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([*command, *overrides], cwd=ROOT, env=environment, **pipes))
    outputs = [process.communicate(timeout=900) for process in started]
    return [(process.returncode, *output) for process, output in zip(started, outputs, strict=True)]


def test_two_ranks_that_are_fit_are_measured(config):
    (status, table, errors), (other, _, _) = ranks(config)
    assert (status, other) == (0, 0), table + errors
    rows = table.splitlines()
    assert [row.split()[-1] for row in rows[1:3]] == ["ok", "ok"] and "GB/s across" in rows[0], table
    assert "±" in rows[2] and "not measured" not in table
    assert not list((config.parent / "out").iterdir()), "the file that ranks look for stays behind"


def test_a_node_that_does_not_report_is_named_in_time(config):
    begin = time.monotonic()
    ((status, table, _),) = ranks(config, present=(0,), timeout=8)
    assert status == 3 and "b: ranks 1: no report within 4 s" in table and "a: " not in table, table
    assert table.splitlines()[2].split()[-1] == "BAD"
    assert time.monotonic() - begin < 100


def test_a_rank_without_rank_0_names_itself_and_ends(config):
    ((status, _, errors),) = ranks(config, present=(1,), timeout=6)
    assert status == 3 and "preflight: b: rank 1 " in errors


def test_a_node_that_cannot_read_its_data_or_teacher_is_named(config):
    (status, table, _), (_, _, errors) = ranks(config, "networks.teacher.init=/nowhere", "data.folder=/empty")
    assert (
        status == 3
        and "b: networks.teacher.init: cannot read /nowhere" in table
        and "b: data.folder: no *.tar in /empty" in table
    )
    assert "all ranks: not measured" in table and "lost rank 0" not in errors


def test_an_output_folder_that_cannot_be_made_is_named(config):
    (status, table, _), _ = ranks(config, "output_dir=/dev/null/out")
    assert status == 3 and "a: output_dir: cannot write to /dev/null/out" in table


def test_a_layout_that_does_not_fit_is_a_configuration_error(config):
    statuses = [status for status, _, _ in ranks(config, "parallel.tp=3")]
    assert statuses == [2, 2]


def test_gloo_that_does_not_connect_is_found_before_the_first_checkpoint(monkeypatch, capsys):
    """On GPUs too, where NCCL alone would have passed."""

    def no_route(*args, **options):
        assert options["backend"] == "gloo"
        raise RuntimeError("connect to 127.0.1.1 timed out")

    monkeypatch.setenv("TORCH_NCCL_BLOCKING_WAIT", "1")  # what it sets itself is undone with this
    monkeypatch.setattr(checks.dist, "init_process_group", lambda *args, **options: None)
    monkeypatch.setattr(checks.dist, "new_group", no_route)
    assert checks._measure(checks.dist.HashStore(), ["b"], 0, timeout=1.0) == {}
    assert "b: rank 0: all-reduce: Gloo: connect to 127.0.1.1 timed out; fix: set GLOO_SOCKET_IFNAME" in (
        capsys.readouterr().err
    )
