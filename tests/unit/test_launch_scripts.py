"""The launch scripts: clean by shellcheck, and what train.sbatch asks SLURM for in a container (no engine and no SLURM here)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    path for pattern in ("launch/**/*.sh", "launch/**/*.sbatch", "tests/**/*.sh") for path in ROOT.glob(pattern)
)
SRUN = f"""#!/bin/bash
printf '%s\\n' "$@" >>"$CALLS"
echo "-- end" >>"$CALLS"
if [[ "$*" == *" check "* ]]; then while [ "$1" != python ]; do shift; done; exec {sys.executable} "${{@:2}}"; fi
"""
SCONTROL = """#!/bin/bash
case "$*" in
"show hostnames gpu[1-2]") printf 'gpu1\\ngpu2\\n' ;;
"--oneliner show node gpu1") echo "NodeName=gpu1 NodeAddr=10.0.0.7 NodeHostName=gpu1 State=ALLOCATED" ;;
*) exit 1 ;;
esac
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shellcheck_has_nothing_to_say(script):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def calls_of(tmp_path, **settings):
    """The argument lists of every srun that train.sbatch runs for a job of two nodes, and its environment of the last."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "31", "SLURM_NTASKS": "16", "SLURM_JOB_NODELIST": "gpu[1-2]"}
    environment = os.environ | job | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
    config = ["model_configs/wan2.1_t2v_1.3b_480p.yaml", f"output_dir={tmp_path / 'out dir'}"]
    done = subprocess.run(
        ["bash", "launch/slurm/train.sbatch", *config],
        cwd=ROOT,
        env=environment | settings,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    calls, call = [], []
    for line in (tmp_path / "calls").read_text().splitlines():
        if line == "-- end":
            calls.append(call)
            call = []
        else:
            call.append(line)
    return calls


def test_pyxis_gets_the_image_in_every_step(tmp_path):
    check, preflight, train = calls_of(tmp_path, CONTAINER="image.sqsh")
    for call in (check, preflight, train):
        assert "--container-image=image.sqsh" in call and f"--container-workdir={ROOT}" in call
    assert preflight[preflight.index("preflight") :][:3] == ["preflight", "--nodes", "gpu1,gpu2"]
    assert (
        f"--output={tmp_path / 'out dir'}/logs/31/attempt_0/%N_rank%t.log" in train and "--kill-on-bad-exit=1" in train
    )


def test_apptainer_runs_inside_the_task(tmp_path):
    for call in calls_of(tmp_path, CONTAINER="image.sif", PREFLIGHT="0"):
        start = call.index("apptainer")
        assert call[start : start + 3] == ["apptainer", "exec", "--nv"] and "image.sif" in call[start:]
        inner = call[call.index("image.sif") + 1]
        assert inner in ("python", "bash") and not any(option.startswith("--container") for option in call)


def test_without_a_container_there_is_neither(tmp_path):
    for call in calls_of(tmp_path):
        assert "apptainer" not in call and not any(option.startswith("--container") for option in call)
