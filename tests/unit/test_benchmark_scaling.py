"""The scaling benchmark on its tiny preset: layouts and their errors, measuring here, one SLURM job per point."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rcm_megatron.config import ConfigError, RunConfig, build
from rcm_megatron.reports.colours import COLOURS, phase_colours
from tools.scaling_points import PRESETS, make_points, parse_layout, point_from_dict, ranks_of
from tools.scaling_report import summarise

ROOT = Path(__file__).parents[2]


def points(series, preset="tiny", steps=("student", "fake_score")):
    return make_points(build(RunConfig, PRESETS[preset]), series, steps=steps, rollout_steps=2)


def run_tool(*arguments, **environment):
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "tools/benchmark_scaling.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


def test_a_layout_is_its_degrees_and_ranks_their_product():
    degrees = parse_layout("tp=2,pp=2,vpp=2,dp=3")
    assert degrees == {"dp": 3, "tp": 2, "ring": 1, "ulysses": 1, "pp": 2, "vpp": 2}
    assert ranks_of(degrees) == 12


@pytest.mark.parametrize(
    ("series", "text"),
    [
        ({"strong": ["tpp=2"]}, "did you mean tp?"),
        ({"strong": ["tp=0"]}, "write e.g. tp=2"),
        ({"strong": ["tp=3"]}, "it divides by 1, 2, 4, each of which"),
        ({"strong": ["pp=4"]}, "set parallel.pp to 2"),
        ({"strong": ["dp=1", "dp=4"]}, "set trainer.global_batch_size to 4"),
        ({"weak_tokens": ["ring=2", "ring=3"]}, "need a multiple of 2"),
    ],
)
def test_what_does_not_fit_is_named_with_its_fix(series, text):
    with pytest.raises(ConfigError) as error:
        points(series)
    (layouts,) = series.values()
    assert text in str(error.value) and layouts[-1] in str(error.value)


def test_weak_series_grow_what_they_say():
    strong, tokens, batch = (
        points({name: ["dp=1", "ring=2", "dp=2"]})[:2] for name in ("strong", "weak_tokens", "weak_batch")
    )
    sizes = [[(p.run.latent.frames, p.run.trainer.global_batch_size) for p in s] for s in (strong, tokens, batch)]
    assert sizes == [[(2, 2), (2, 2)], [(2, 2), (4, 2)], [(2, 2), (2, 4)]]


def test_a_point_survives_its_file():
    for point in points({"strong": ["dp=1", "pp=2"]}, steps=("student", "fake_score", "dcm", "flow")):
        assert point_from_dict(json.loads(json.dumps(point.as_dict()))) == point


def test_rows_compare_with_the_first_layout():
    def point(layout, ranks, seconds):
        repeats = [{"seconds": s, "phases": {"dual": s}, "phases_max": {"dual": s}} for s in seconds]
        memory = [{"peak_bytes": 3, "held_bytes": 2, "resident_bytes": 9}]
        size = {"tokens": 100, "token_shards": 1, "global_batch_size": 2, "micro_batches": 2}
        return {
            "series": "strong",
            "layout": layout,
            "ranks": ranks,
            "memory": memory,
            "repeats": {"scm": repeats},
        } | size

    one, four = summarise({"points": [point("dp=1", 1, [3.0, 2.0, 9.0]), point("dp=4", 4, [1.0, 1.0, 2.0])]})
    assert (one["seconds"], one["tokens_per_second"], one["efficiency"]) == (3.0, 200 / 3, 1.0)
    assert four["speedup"] == pytest.approx(3.0) and four["efficiency"] == pytest.approx(0.75)


def test_every_phase_of_the_timers_has_a_colour():
    """Those of every step, and forward passes of any objective, after the data."""
    from rcm_megatron.runtime.timers import PHASES, Timers

    assert COLOURS.keys() == PHASES.keys() - {"preview"}
    colours = phase_colours(Timers(["probe", "teacher"]).phases)
    assert list(colours)[:3] == ["data", "probe", "teacher"] and colours.keys() == COLOURS.keys() | {"probe", "teacher"}
    assert len(set(colours.values())) == len(colours)


def test_illegal_layouts_end_it_before_anything_starts():
    done = run_tool("--preset", "tiny", "--strong", "dp=1", "tp=3", "vpp=2")
    assert done.returncode == 1 and done.stdout == ""
    assert "strong tp=3: model.num_heads=4" in done.stderr and "strong vpp=2:" in done.stderr
    assert "Traceback" not in done.stderr


def check_result(prefix, layouts):
    result = json.loads(prefix.with_suffix(".json").read_text())
    assert [(p["series"], p["layout"], p["ranks"]) for p in result["points"]] == layouts
    assert {"cpu", "torch", "megatron_core", "commit", "command", "load_average_before"} <= result["provenance"].keys()
    for point in result["points"]:
        assert len(point["memory"]) == point["ranks"]
        assert all(0 < m["held_bytes"] < m["peak_bytes"] < m["resident_bytes"] for m in point["memory"])
        for repeat in (repeat for repeats in point["repeats"].values() for repeat in repeats):
            mean, slowest = (sum(repeat[key].values()) for key in ("phases", "phases_max"))
            assert mean <= repeat["seconds"] * 1.001 and repeat["seconds"] <= slowest * 1.001
    with prefix.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["layout"], row["step"]) for row in rows] == [
        (n, s) for _, n, _ in layouts for s in ("student", "fake_score")
    ]
    assert prefix.with_suffix(".png").stat().st_size > 10_000
    page = prefix.with_suffix(".md").read_text()
    assert f"]({prefix.name}.png)" in page and result["provenance"]["command"] in page


def test_two_points_on_this_machine(tmp_path):
    prefix = tmp_path / "scaling"
    done = run_tool("--preset", "tiny", "--strong", "dp=1", "pp=2", "--repeats", "2", "--output", prefix)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "repeat 2/2 strong pp=2" in done.stdout
    check_result(prefix, [("strong", "dp=1", 1), ("strong", "pp=2", 2)])


def test_a_failing_rank_ends_it_with_its_traceback():
    missing = ["--set", "networks.teacher.weights=offloaded"]  # refused by the networks, on a machine without CUDA
    done = run_tool("--preset", "tiny", "--strong", "dp=1", "--repeats", "1", *missing, CUDA_VISIBLE_DEVICES="")
    assert done.returncode != 0
    assert "strong dp=1: rank" in done.stderr and "networks.teacher.weights=offloaded" in done.stderr


SBATCH = """#!/usr/bin/env bash
# sbatch that runs the job at once, on this machine
while [[ "$1" == --* ]]; do
    case "$1" in --nodes=*) nodes="${1#*=}" ;; --ntasks-per-node=*) tasks="${1#*=}" ;; esac
    shift
done
export SLURM_NTASKS=$((nodes * tasks)) SLURM_JOB_ID=$RANDOM SLURM_SUBMIT_DIR="$PWD" SLURM_JOB_NODELIST=here
bash "$@" >&2 && echo "Submitted batch job $SLURM_JOB_ID"
"""
SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
for ((i = 0; i < SLURM_NTASKS; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$i "$@" &
    pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || exit 1; done
"""


def test_one_slurm_job_per_point_and_the_collected_result(tmp_path):
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "scontrol": "#!/bin/sh\necho 127.0.0.1\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    point = ["--preset", "tiny", "--weak-batch", "dp=1", "dp=2", "--repeats", "1"]
    submitted = run_tool(*point, "--slurm", tmp_path / "jobs", PATH=path)
    assert submitted.returncode == 0, submitted.stderr[-3000:]
    assert submitted.stdout.count("Submitted batch job") == 2
    collected = run_tool("--collect", tmp_path / "jobs", "--output", tmp_path / "all")
    assert collected.returncode == 0, collected.stderr[-3000:]
    check_result(tmp_path / "all", [("weak_batch", "dp=1", 1), ("weak_batch", "dp=2", 2)])


def test_collecting_before_any_job_is_done_says_so(tmp_path):
    done = run_tool("--collect", tmp_path)
    assert done.returncode == 1 and "no result" in done.stderr
