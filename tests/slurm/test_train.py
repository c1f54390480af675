"""The project's sbatch script on a real SLURM of two nodes: it finishes, is requeued, resumes, refuses a bad node, gives up in the end.

What a run computes is compared with the same layout on forked ranks, without SLURM: to the last digit.
"""

import sys
from pathlib import Path

import pytest

from rcm_megatron.platform import MEGATRON_VERSION
from tests.distributed.run_checks import Runs, assert_same_curves
from tests.distributed.tiny_run import records
from tests.slurm.cluster import wait_for

pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).parents[2]
LAYOUTS = {"ring2": (2, ["parallel.ring=2"]), "tp2_ring2": (4, ["parallel.tp=2", "parallel.ring=2"])}
PYTHON = f"""#!/bin/bash
if [ "$3" = train ]; then set -- -m tests.distributed.interrupted "${{@:3}}"; fi
exec {sys.executable} "$@"
"""
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")


class Jobs:
    """Submits to the cluster with this repository's scripts, and a `python` that can interrupt a training."""

    def __init__(self, slurm, folder):
        self.slurm, self.runs = slurm, Runs(folder, LAYOUTS)
        (folder / "venv" / "bin").mkdir(parents=True)
        python = folder / "venv" / "bin" / "python"
        python.write_text(PYTHON)
        python.chmod(0o755)

    @property
    def folder(self):
        return self.runs.folder

    def call(self, *command, **settings):
        """A command at the repository root, e.g. sbatch; its output's lines."""
        common = {"VENV": str(self.folder / "venv"), "GLOO_SOCKET_IFNAME": "lo", "PREFLIGHT": "0", "PYTHONPATH": ""}
        return self.slurm.run(*command, cwd=ROOT, **(common | settings)).splitlines()

    def options(self, *more):
        """Of sbatch, for these small nodes."""
        return ["--gpus-per-node=0", "--cpus-per-task=1", f"--output={self.folder}/%A_%a_%j.out", *more]

    def submit(self, name, *overrides, options=TWO_NODES, layout="ring2", **settings):
        """A run into folder `name`; its job."""
        run = [str(self.runs.config), *LAYOUTS[layout][1], f"output_dir={self.folder / name}", *overrides]
        command = ["sbatch", "--parsable", *self.options(*options), "launch/slurm/train.sbatch", *run]
        return self.call(*command, **settings)[0]

    def output(self, job):
        """What the script of a job has written."""
        return "".join(path.read_text() for path in self.folder.glob(f"*_{job}.out"))

    def ranks(self, name):
        return "".join(path.read_text() for path in sorted((self.folder / name / "logs").rglob("*.log")))

    def wait_for_iteration(self, name, iteration):
        metrics = self.folder / name / "metrics.jsonl"

        def reached():
            return metrics.exists() and len(metrics.read_text().splitlines()) >= iteration

        wait_for(f"{name}: iteration {iteration}", reached, 400, lambda: self.slurm.state() + self.ranks(name))

    def check_finished(self, job, name, *, restarts, layout="ring2"):
        """The job has completed after that many requeues, with the losses of an undisturbed run."""
        fields = self.slurm.finish(job)
        story = self.output(job) + self.ranks(name)
        assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", str(restarts)), f"{fields}\n{story}"
        assert_same_curves(self.runs.undisturbed(layout)[1], records(self.folder / name), rel=0.0)
        return story


@pytest.fixture(scope="module")
def jobs(slurm, tmp_path_factory):
    return Jobs(slurm, tmp_path_factory.mktemp("jobs"))


def test_a_run_on_two_nodes_of_two_tasks_finishes(jobs):
    job = jobs.submit("whole", options=("--nodes=2", "--ntasks-per-node=2"), layout="tp2_ring2", PREFLIGHT="1")
    story = jobs.check_finished(job, "whole", restarts=0, layout="tp2_ring2")
    rows = {line.split()[0]: line for line in story.splitlines() if line.endswith(" ok")}
    assert rows.keys() == {"node0", "node1"} and all("2 of 2" in row for row in rows.values()), story
    logs = sorted(path.name.split("_")[-1] for path in (jobs.folder / "whole" / "logs" / job / "attempt_0").iterdir())
    assert logs == [f"rank{rank}.log" for rank in range(4)]


def test_a_signal_to_the_job_saves_requeues_and_resumes(jobs):
    """Submitted from within another job, an array's task, whose variables sbatch hands on."""
    outer = {"SLURM_ARRAY_JOB_ID": "99", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": "7"}
    job = jobs.submit("signalled", RCM_TEST_FAULT="wait:8", **outer)
    jobs.wait_for_iteration("signalled", 8)
    jobs.slurm.run("scancel", "--batch", "--signal=USR1", job)
    story = jobs.check_finished(job, "signalled", restarts=1)
    assert "status 85, requeueing" in story and "resuming at iteration 9" in story, story


@pytest.fixture(scope="module")
def limited(jobs):
    """A job in its iteration 8 that stops when it is told to, and one that cannot; their limits are brought near.

    SLURM looks at limits every 30 s.
    """
    options = (*TWO_NODES, "--time=60", "--signal=B:USR1@119")
    faults = {"limited": ("wait:8", 2), "over": ("hang:8", 1)}
    started = {
        name: jobs.submit(name, "trainer.checkpoint_every=5", options=options, RCM_TEST_FAULT=fault)
        for name, (fault, _) in faults.items()
    }
    for name, job in started.items():
        jobs.wait_for_iteration(name, 8)
        hours, minutes, _ = jobs.slurm.job(job)["RunTime"].split(":")
        limit = 60 * int(hours) + int(minutes) + faults[name][1]
        jobs.slurm.run("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")
    return started


def finish_with_time(jobs, job, name):
    """Once it is requeued, give the job a limit that it keeps."""
    wait_for("the requeue", lambda: jobs.slurm.job(job)["Restarts"] == "1", 200, jobs.slurm.state)
    wait_for("the old run's end", lambda: jobs.slurm.job(job)["JobState"] == "PENDING", 100, jobs.slurm.state)
    jobs.slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    return jobs.check_finished(job, name, restarts=1)


def test_a_time_limit_saves_requeues_and_resumes(jobs, limited):
    story = finish_with_time(jobs, limited["limited"], "limited")
    assert "status 85, requeueing" in story and "resuming at iteration 9" in story, story


def test_a_job_that_cannot_save_in_time_is_requeued_and_goes_on_from_the_checkpoint_before(jobs, limited):
    story = finish_with_time(jobs, limited["over"], "over")
    assert "over the time limit, requeueing" in story and "resuming at iteration 5" in story, story


def test_a_cancelled_job_saves_and_stays_cancelled(jobs):
    job = jobs.submit("cancelled", options=("--nodes=1", "--ntasks-per-node=2"), RCM_TEST_FAULT="wait:3")
    jobs.wait_for_iteration("cancelled", 3)
    jobs.slurm.run("scancel", job)
    fields = jobs.slurm.finish(job)
    assert (fields["JobState"], fields["Restarts"]) == ("CANCELLED", "0"), jobs.output(job)
    assert "requeueing" not in jobs.output(job)
    assert (jobs.folder / "cancelled" / "checkpoints" / "latest").read_text() == "iter_0000004\n"


def test_a_node_with_another_version_is_refused_by_name(jobs, tmp_path):
    shim = tmp_path / "megatron_core-0.16.0.dist-info"
    shim.mkdir()
    (shim / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.16.0\n")
    job = jobs.submit("refused", PREFLIGHT="1", NODE1_PYTHONPATH=str(tmp_path))
    fields, output = jobs.slurm.finish(job), jobs.output(job)
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "3:0", "0"), output
    assert f"node1: megatron-core 0.16.0, need {MEGATRON_VERSION}" in output
    assert "\nnode0: " not in output and not (jobs.folder / "refused" / "metrics.jsonl").exists()


def test_a_node_on_which_python_does_not_start_is_refused_by_name(jobs, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import time\ntime.sleep(3600)\n")
    settings = {"PREFLIGHT_OPTIONS": "--timeout 8", "PREFLIGHT_WAIT": "3", "NODE1_PYTHONPATH": str(tmp_path)}
    job = jobs.submit("silent", PREFLIGHT="1", **settings)
    fields, output = jobs.slurm.finish(job), jobs.output(job)
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "3:0", "0"), output
    assert "\nnode1: ranks 1: no report within 4 s" in output and "\nnode0: " not in output, output


def test_a_signal_during_the_pre_flight_requeues(jobs, tmp_path):
    """While the first attempt's pre-flight (the job's second step) waits for a node."""
    waits = "if os.environ.get('SLURM_STEP_ID') == '1' and os.environ['SLURM_RESTART_COUNT'] == '0': time.sleep(3600)"
    (tmp_path / "sitecustomize.py").write_text(f"import os, time\n{waits}\n")
    job = jobs.submit("early", "trainer.stop_after=1", PREFLIGHT="1", NODE1_PYTHONPATH=str(tmp_path))
    wait_for("the pre-flight", lambda: jobs.slurm.run("squeue", "-h", "--steps", "-s", f"{job}.1", check=False), 200)
    jobs.slurm.run("scancel", "--batch", "--signal=USR1", job)
    fields, output = jobs.slurm.finish(job), jobs.output(job)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), output
    assert (
        "status 85, requeueing job" in output and "refuses" not in output and len(records(jobs.folder / "early")) == 1
    )


def test_a_job_that_makes_no_progress_is_given_up(jobs):
    job = jobs.submit("broken", f"data.folder={jobs.folder}", MAX_IDLE_STARTS="2")
    fields, output = jobs.slurm.finish(job), jobs.output(job)
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "87:0", "1"), output
    assert "2 starts from checkpoint none gave no newer one" in output


def test_a_sweep_is_an_array_whose_tasks_are_requeued_alone(jobs):
    lines = jobs.folder / "lines.txt"
    folders = [jobs.folder / f"sweep_{i}" for i in (1, 2)]
    texts = [f"seed={i} output_dir={folder}\n" for i, folder in enumerate(folders)]
    lines.write_text("# two seeds\n" + "\n".join(texts))
    options = jobs.options("--nodes=1", "--ntasks-per-node=1")
    command = [
        "bash",
        "launch/slurm/sweep.sh",
        str(lines),
        *options,
        "--",
        str(jobs.runs.config),
        "trainer.stop_after=5",
    ]
    (array,) = jobs.call(*command, RCM_TEST_FAULT="wait:2")
    for task, folder in ((2, folders[1]), (1, folders[0])):  # the last has the array's own number
        jobs.wait_for_iteration(folder.name, 2)
        jobs.slurm.run("scancel", "--batch", "--signal=USR1", f"{array}_{task}")
    for task in (1, 2):
        fields = jobs.slurm.finish(f"{array}_{task}")
        assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), jobs.slurm.state()
    losses = [[line["scm/loss"] for line in records(folder)] for folder in folders]
    assert len(losses[0]) == len(losses[1]) == 5 and losses[0] != losses[1]


def test_a_sweep_needs_a_folder_for_each_line(jobs):
    lines = jobs.folder / "same.txt"
    lines.write_text("seed=1 output_dir=a\nseed=2 output_dir=a\n")
    with pytest.raises(RuntimeError, match="output_dir a is also that of line 1"):
        jobs.call("bash", "launch/slurm/sweep.sh", str(lines), "--", str(jobs.runs.config))


def test_a_chain_waits_for_each_run_and_ends_with_one_that_fails(jobs):
    options, run = (
        jobs.options("--nodes=1", "--ntasks-per-node=1"),
        [str(jobs.runs.config), f"output_dir={jobs.folder}/chain"],
    )
    stages = [["trainer.stop_after=3"], ["trainer.stop_after=5"], ["parallel.tp=3"], ["trainer.stop_after=6"]]
    command = [part for stage in stages for part in ("--", *run, *stage)]
    chain = jobs.call("bash", "launch/slurm/chain.sh", *options, *command, RCM_TEST_FAULT="wait:1")
    jobs.wait_for_iteration("chain", 1)
    jobs.slurm.run("scancel", "--batch", "--signal=USR1", chain[0])
    states = [jobs.slurm.finish(job)["JobState"] for job in chain]
    assert states == ["COMPLETED", "COMPLETED", "FAILED", "CANCELLED"], "".join(map(jobs.output, chain))
    assert [jobs.slurm.job(job)["Restarts"] for job in chain] == ["1", "0", "0", "0"], "a requeue breaks no chain"
    assert "resuming at iteration 3" in jobs.ranks("chain")
    assert len(records(jobs.folder / "chain")) == 5
    assert "parallel.tp=3" in jobs.output(chain[2])


def test_a_dead_node_requeues_the_job_which_finishes_when_it_is_back(jobs):
    """Last: for a while the cluster has one node."""
    job = jobs.submit("node_lost", "trainer.checkpoint_every=5", RCM_TEST_FAULT="wait:8")
    jobs.wait_for_iteration("node_lost", 8)
    jobs.slurm.kill_node("node1")
    wait_for("the requeue", lambda: jobs.slurm.job(job)["Restarts"] == "1", 200, jobs.slurm.state)
    jobs.slurm.start_node("node1")
    story = jobs.check_finished(job, "node_lost", restarts=1)
    assert "resuming at iteration 5" in story, story
