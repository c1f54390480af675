"""The launch scripts: clean by shellcheck, and what train.sbatch asks SLURM for in a container (no engine and no SLURM here)."""

import contextlib
import os
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    path for pattern in ("launch/**/*.sh", "launch/**/*.sbatch", "tests/**/*.sh") for path in ROOT.glob(pattern)
)
SRUN = f"""#!/bin/bash
printf '%s\\n' "$@" >>"$CALLS"
echo "-- end" >>"$CALLS"
env -0 >"$CALLS.env"
if [[ "$*" == *" check "* ]]; then
    echo "a banner of the image's"
    while [ "$1" != python ]; do shift; done
    exec {sys.executable} "${{@:2}}"
fi
if [[ "$*" == *" train "* ]]; then eval "$TRAINING"; fi
"""
SCONTROL = """#!/bin/bash
if [ -n "$AWAY" ] && [ "$2" != hostnames ] && [ ! -e "$AWAY" ]; then touch "$AWAY" && exit 1; fi # hostnames asks nobody
case "$*" in
"show hostnames gpu[1-2]") printf 'gpu1\\ngpu2\\n' ;;
"--oneliner show node gpu1") echo "NodeName=gpu1 NodeAddr=10.0.0.7 NodeHostName=gpu1 State=ALLOCATED" ;;
"--oneliner show job 31")
    printf 'JobId=32 ArrayJobId=30 ArrayTaskId=9 JobState=PENDING Restarts=5\\n'
    printf 'JobId=31 %s JobName=rcm JobState=%s Reason=%s' "$ARRAY" "${STATE:-RUNNING}" "${REASON:-None}"
    printf ' Restarts=%s RunTime=1\\n' "${RESTARTS:-0}"
    ;;
"requeue 31") echo "SLURM requeues 31" ;;
*) exit 1 ;;
esac
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shellcheck_has_nothing_to_say(script):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@dataclass
class Started:
    """What came of train.sbatch: the arguments of every srun, and the environment of the last."""

    status: int
    output: str
    calls: list[list[str]] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)


def start(tmp_path, **settings):
    """train.sbatch for a job of two nodes, with stand-ins for SLURM's commands. TRAINING: what srun runs in place of `train`."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sleep", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "31", "SLURM_NTASKS": "16", "SLURM_JOB_NODELIST": "gpu[1-2]"}
    calls, environment = tmp_path / "calls", tmp_path / "calls.env"
    inherited = (
        os.environ
        | job
        | {"PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}", "CALLS": str(calls)}
    )
    config = ["model_configs/wan2.1_t2v_1.3b_480p.yaml", f"output_dir={tmp_path / 'out dir'}"]
    done = subprocess.run(
        ["bash", "launch/slurm/train.sbatch", *config],
        cwd=ROOT,
        env=inherited | settings,
        capture_output=True,
        text=True,
    )
    started = Started(done.returncode, done.stdout + done.stderr)
    if calls.exists():
        started.calls = [call.split("\n") for call in calls.read_text().split("\n-- end\n")[:-1]]
        started.environment = dict(line.split("=", 1) for line in environment.read_text().split("\0")[:-1])
    return started


def calls_of(tmp_path, **settings):
    started = start(tmp_path, **settings)
    assert started.status == 0, started.output
    return started.calls


def test_pyxis_gets_the_image_in_every_step(tmp_path):
    started = start(tmp_path, CONTAINER="image.sqsh", CONTAINER_MOUNTS="/lustre:/lustre,/data:/d", PYTHONPATH="/host")
    _, preflight, train = started.calls
    for call in started.calls:
        assert "--container-image=image.sqsh" in call and f"--container-workdir={ROOT}" in call
        assert f"--container-mounts={ROOT}:{ROOT},/lustre:/lustre,/data:/d" in call
    assert preflight[preflight.index("preflight") :][:3] == ["preflight", "--nodes", "gpu1,gpu2"]
    assert (
        f"--output={tmp_path / 'out dir'}/logs/31/attempt_0/%N_rank%t.log" in train and "--kill-on-bad-exit=1" in train
    )
    assert started.environment["PYTHONPATH"] == f"{ROOT}:{ROOT}/kernels"
    assert started.environment["PYTHONNOUSERSITE"] == "1", "Apptainer mounts the home, and with it ~/.local"


@pytest.fixture
def site(tmp_path):
    """What a site's module puts into PYTHONPATH: packages of the run's names that cannot be imported, and one of its own."""
    folder = tmp_path / "site"
    for name in ("torch", "yaml", "rcm_kernels", "rcm_megatron", "only_here"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(
            "" if name == "only_here" else "raise SystemExit(f'the site has {__name__}')"
        )
    return str(folder)


def interpreter(folder, isolated):
    """A `python` in `folder`; without packages of its own when `isolated`."""
    folder.mkdir()
    (folder / "python").write_text(f'#!/bin/bash\nexec {sys.executable} {"-S" if isolated else ""} "$@"\n')
    (folder / "python").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_a_sites_pythonpath_does_not_shadow_the_runs_packages(tmp_path, site):
    started = start(tmp_path, PYTHONPATH=site, PYTHONHOME="/nowhere")
    assert started.status == 0, started.output
    assert started.environment["PYTHONPATH"] == f"{ROOT}:{ROOT}/kernels" and "PYTHONHOME" not in started.environment


def test_nor_under_torchrun(tmp_path, site):
    """torchrun is a stand-in that imports what a run would."""
    imports = "import yaml, rcm_kernels, torch; print(rcm_kernels.__file__)"
    (tmp_path / "torchrun").write_text(f"#!/bin/bash\n{sys.executable} -c '{imports}'\n")
    (tmp_path / "torchrun").chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", f"{ROOT}/launch/torchrun.sh", "1", "model_configs/quickstart.yaml"]
    environment = os.environ | {"PYTHONPATH": site, "PATH": path}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == str(ROOT / "kernels/rcm_kernels/__init__.py"), done.stderr


def test_a_python_without_torch_keeps_the_sites_packages_behind_the_runs(tmp_path, site):
    """A module that is the site's whole Python stack."""
    path = interpreter(tmp_path / "bare", isolated=True)
    script = f". {ROOT}/launch/environment.sh && echo $PYTHONPATH"
    done = subprocess.run(
        ["bash", "-c", script], env={"PATH": path, "PYTHONPATH": site}, capture_output=True, text=True
    )
    assert done.stdout.strip() == f"{ROOT}:{ROOT}/kernels:{site}", done.stderr


def test_apptainer_runs_inside_the_task(tmp_path):
    for call in calls_of(tmp_path, CONTAINER="image.sif", PREFLIGHT="0", CONTAINER_MOUNTS="/lustre:/lustre"):
        start = call.index("apptainer")
        assert call[start : start + 3] == ["apptainer", "exec", "--nv"] and "image.sif" in call[start:]
        assert call[call.index("--bind") + 1] == f"{ROOT}:{ROOT},/lustre:/lustre"
        inner = call[call.index("image.sif") + 1]
        assert inner in ("python", "bash") and not any(option.startswith("--container") for option in call)


def test_without_a_container_there_is_neither(tmp_path):
    for call in calls_of(tmp_path):
        assert "apptainer" not in call and not any(option.startswith("--container") for option in call)


def test_every_step_says_what_srun_would_take_from_the_submitting_shell_or_nowhere(tmp_path):
    """`sbatch --export=NONE` would keep MASTER_ADDR from the ranks; --cpus-per-task reaches no srun since SLURM 22.05."""
    started = start(tmp_path, SLURM_CPUS_PER_TASK="12", SLURM_EXPORT_ENV="NONE", SLURM_DISTRIBUTION="cyclic")
    assert len(started.calls) == 3
    assert all(call[:2] == ["--export=ALL", "--distribution=block"] for call in started.calls)
    assert started.environment["SRUN_CPUS_PER_TASK"] == "12"


def test_a_port_that_is_taken_is_not_the_jobs(tmp_path):
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # somebody else has taken it already
            other.bind(("127.0.0.1", 20031))
            other.listen()
        taken = start(tmp_path).environment
    assert (taken["MASTER_ADDR"], taken["WORLD_SIZE"]) == ("10.0.0.7", "16")
    assert 20031 < int(taken["MASTER_PORT"]) < 20100


def test_a_controller_that_is_away_for_a_moment_costs_no_requeue(tmp_path):
    """scontrol fails once when asked for the node's address, and once for the job's state."""
    started = start(tmp_path, TRAINING='rm -f "$AWAY"; exit 86', AWAY=str(tmp_path / "away"), PREFLIGHT="0")
    assert started.status == 86 and "status 86, requeueing job 31 at checkpoint none" in started.output, started.output


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (2, False), (85, True), (86, True), (137, True)])
def test_what_follows_from_the_ranks_exit_status(tmp_path, status, requeued):
    started = start(tmp_path, TRAINING=f"exit {status}", PREFLIGHT="0")
    assert started.status == status and ("requeueing job 31" in started.output) == requeued, started.output


@pytest.mark.parametrize(
    ("state", "reason", "words", "requeues"),
    [
        ("COMPLETING", "TimeLimit", "over the time limit, requeueing job 31", 1),
        ("COMPLETING", "None", "job 31 is COMPLETING, so it is left alone", 0),
    ],
    ids=["over its limit", "cancelled"],
)
def test_sigterm_requeues_a_job_over_its_limit_once_and_never_a_cancelled_one(tmp_path, state, reason, words, requeues):
    """srun is told, and its status awaited; SLURM kills both a little later."""
    training = (
        "trap 'told=1' USR1; kill -TERM $PPID; for i in 1 2 3 4 5 6 7 8 9; do /bin/sleep 0.2; done; exit $((84 + told))"
    )
    started = start(tmp_path, TRAINING=training, PREFLIGHT="0", STATE=state, REASON=reason)
    assert started.status == 85 and words in started.output, started.output
    assert started.output.count("SLURM requeues 31") == requeues


def test_the_log_of_the_rank_that_failed_is_repeated(tmp_path):
    """In a folder with a space in its name."""
    log = '"$(find "$(dirname "$CALLS")" -name attempt_0)/gpu2_rank9.log"'
    started = start(tmp_path, TRAINING=f"printf 'Traceback\\nOSError: here\\n' >{log}; exit 1", PREFLIGHT="0")
    assert started.status == 1 and "gpu2_rank9.log:\nTraceback\nOSError: here\n" in started.output, started.output


@pytest.mark.parametrize("sweep", [None, "missing", "seed=1 output_dir=a\n"])
def test_an_array_task_without_a_line_of_its_own_does_not_start(tmp_path, sweep):
    settings = {} if sweep is None else {"SWEEP": str(tmp_path / "sweep")}
    if sweep not in (None, "missing"):
        (tmp_path / "sweep").write_text(sweep)
    started = start(tmp_path, ARRAY="ArrayJobId=30 ArrayTaskId=2", **settings)
    assert started.status == 2 and not started.calls and "got no overrides in line 2 of SWEEP=" in started.output


def test_the_last_line_of_a_sweep_needs_no_end(tmp_path):
    (tmp_path / "sweep").write_text("seed=1\nseed=2 name=last")
    for call in calls_of(tmp_path, ARRAY="ArrayJobId=30 ArrayTaskId=2", SWEEP=str(tmp_path / "sweep")):
        assert call[-2:] == ["seed=2", "name=last"]


def test_a_job_submitted_from_within_another_is_not_taken_for_it(tmp_path):
    """sbatch hands the outer job's variables on: its array's task would be requeued, its restarts counted."""
    outer = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": "40"}
    started = start(tmp_path, TRAINING="exit 86", MAX_RESTARTS="2", RESTARTS="1", **outer)
    assert "job 31, restart 1, checkpoint none" in started.output and "requeueing job 31 at" in started.output
    assert started.environment["SLURM_RESTART_COUNT"] == "1"


def test_a_named_environment_that_is_not_there_is_an_error(tmp_path):
    started = start(tmp_path, VENV=str(tmp_path / "nowhere"))
    assert started.status == 2 and f"got VENV={tmp_path}/nowhere, need a folder with bin/python" in started.output
