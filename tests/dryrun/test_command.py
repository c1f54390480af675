"""`rcm dryrun` as a command: what is refused at once, which ranks it takes, what it writes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rcm_megatron.cli.main import main
from rcm_megatron.config import ConfigError, load_config
from rcm_megatron.dryrun.command import check_experts, ranks_of
from rcm_megatron.dryrun.report import report_of, to_text
from rcm_megatron.requests import DryRunRequest

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "model_configs"
QUICKSTART = CONFIGS / "quickstart.yaml"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--world-size", "3"], "processes: got 3, need a multiple of"),
        (["--world-size", "0"], "--world-size: got 0, need an integer greater than 0"),
        (["--world-size", "2", "--rank", "2"], "--rank: got 2, need one of 0 to 1"),
        (["--world-size", "2", "model.num_heads=3"], "must divide by model.num_heads=3"),
    ],
)
def test_what_cannot_run_is_refused_with_status_2(words, message, capsys):
    assert main(["dryrun", str(QUICKSTART), *words]) == 2
    assert message in capsys.readouterr().err


def test_two_experts_are_refused_by_name():
    run = load_config(CONFIGS / "wan2.2_t2v_a14b_480p.yaml")
    with pytest.raises(ConfigError, match=r"got networks\.teacher_low_noise beside networks\.teacher; need .*; fix: "):
        check_experts(run)


def test_ranks_are_the_first_of_the_stages_that_may_be_fullest():
    run = load_config(CONFIGS / "wan2.1_t2v_14b_480p.yaml")
    request = DryRunRequest(world_size=64)
    assert ranks_of(run, request) == (0,)
    assert ranks_of(run, replace(request, rank=63)) == (63,)
    four = replace(run, parallel=replace(run.parallel, pp=4))
    assert ranks_of(four, request) == (0, 48)
    uneven = replace(run, parallel=replace(run.parallel, pp=4, chunk_layers=(9, 11, 10, 10)))
    assert ranks_of(uneven, request) == (0, 16, 32, 48)


def test_the_command_writes_report_json_and_picture(tmp_path):
    """In a process of its own, as a user runs it; no checkpoint, no data, and the output folder is not made."""
    paths = {"json": tmp_path / "run.json", "picture": tmp_path / "run.png"}
    words = ["model.num_layers=2", "stages.0.steps=150", f"output_dir={tmp_path / 'out'}", "data.folder=/nowhere"]
    options = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    command = [sys.executable, "-m", "rcm_megatron", "dryrun", str(QUICKSTART), "--world-size", "2", *options, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(paths["json"].read_text())
    (rank,) = report["ranks"]
    assert report["simulated"] and done.stdout.startswith("# simulated") and "rank 0: student: scm" in done.stderr
    for update in rank["updates"].values():
        assert sum(update["at_peak"].values()) == update["peak"] >= sum(rank["standing"].values())
        assert update["sites_at_peak"][0]["site"].split(":")[0].endswith(".py")
    assert paths["picture"].read_bytes().startswith(b"\x89PNG") and not (tmp_path / "out").exists()


def measured(peak):
    """As `simulate` says it."""
    held = {
        "backward": {"weights student | a.py:1 f": peak - 10, "activations | b.py:2 g": 10},
        "data": {"buffers | c": 5},
    }
    route = "backward | tp | 4 | _allgather_base_ | inside a node"
    update = {"held": held, "host": {"peak": 3}, "flops": {"backward": {"mm": 2 * 10**12}}, "launches": {"backward": 7}}
    update |= {"host_reads": {"data": 1}, "traffic": {route: {"calls": 2, "message": 2**30, "sent": 2**29}}}
    updates = {"student: scm": update}
    return {
        "rank": 0,
        "stage": 0,
        "concluded_from": 4,
        "seconds": 9.0,
        "process_gib": 0.5,
        "standing": {"buffers": 5},
    } | {"updates": updates}


def test_the_report_names_peak_owners_and_links():
    run = load_config(QUICKSTART)
    report = report_of(run, DryRunRequest(world_size=2), [measured(3 * 2**30)])
    update = report["ranks"][0]["updates"]["student: scm"]
    assert (update["peak"], update["peak_phase"]) == (3 * 2**30, "backward")
    assert update["at_peak"] == {"weights student": 3 * 2**30 - 10, "activations": 10}
    assert update["sites_at_peak"] == [{"kind": "activations", "site": "b.py:2 g", "bytes": 10}]
    text = to_text(report)
    for words in ("concluded from 4 shallower runs", "peak 3.00 GiB, in backward", "512.00 MiB", "inside a node"):
        assert words in text
