"""Told to stop, or hanging, under torchrun: what the processes leave behind, and that the run goes on as if nothing had been."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.run_checks import Runs, assert_same_curves
from tests.distributed.tiny_run import records

ROOT = Path(__file__).parents[2]
LAYOUTS = {"ring2": (2, ["parallel.ring=2"])}
TORCHRUN = f"""#!/bin/bash
exec {sys.executable} -m torch.distributed.run "${{@/#rcm_megatron/tests.distributed.interrupted}}"
"""
WATCHED = """
import sys, time, ctypes
from pathlib import Path
from rcm_megatron.runtime.watchdog import Watchdog
watchdog = Watchdog(Path(sys.argv[1]), rank=4, timeout=float(sys.argv[2]), last_resort=float(sys.argv[3]))
def stuck_here():
    {body}
stuck_here()
"""


_started = []


@pytest.fixture(autouse=True)
def nothing_left_running():
    """A test that fails ends what it has started."""
    yield
    while _started:
        with _started.pop() as process:
            process.kill()


def popen(command, environment):
    """A process that Ctrl-C reaches, although a shell started the tests with `&`."""

    def heed_ctrl_c():
        signal.signal(signal.SIGINT, signal.default_int_handler)

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    _started.append(subprocess.Popen(command, cwd=ROOT, env=environment, preexec_fn=heed_ctrl_c, **pipes))
    return _started[-1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("interrupted"), LAYOUTS)
    torchrun = runs.folder / "torchrun"
    torchrun.write_text(TORCHRUN)
    torchrun.chmod(0o755)
    return runs


def start(runs, name, *overrides, fault, options=()):
    """The run under the project's torchrun script, into folder `name`."""
    command = [
        "bash",
        "launch/torchrun.sh",
        "2",
        str(runs.config),
        "parallel.ring=2",
        f"output_dir={runs.folder / name}",
    ]
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": f"{runs.folder}:{os.environ['PATH']}"}
    settings = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "RCM_TEST_FAULT": fault}
    environment = os.environ | paths | settings | dict(options)
    return popen([*command, *overrides], environment)


def end(process, timeout=900):
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def test_a_signal_to_one_rank_stops_all_with_a_checkpoint_and_a_restart_goes_on(runs):
    _, lines = runs.undisturbed("ring2")
    status, output = end(start(runs, "signal", fault="signal:7", options={"MAX_RESTARTS": "0"}))
    assert status != 0 and output.count("told to stop; saved after 8 of 20") == 2, output[-3000:]
    assert "exitcode  : 85" in output, output[-3000:]
    assert (runs.folder / "signal" / "checkpoints" / "latest").read_text() == "iter_0000008\n"
    status, output = end(start(runs, "signal", fault="none:0"))
    assert status == 0 and "resuming at iteration 8" in output, output[-3000:]
    assert_same_curves(lines, records(runs.folder / "signal"), rel=0.0)


def start_alone(runs, name, fault):
    """The run as one process, as somebody at a terminal starts it."""
    command = [sys.executable, "-m", "tests.distributed.interrupted", "train", str(runs.config)]
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
        "RCM_TEST_FAULT": fault,
    }
    return popen([*command, f"output_dir={runs.folder / name}"], environment)


def wait_for_records(folder, count, patience=600):
    end = time.monotonic() + patience
    while not (folder / "metrics.jsonl").exists() or len(records(folder)) < count:
        assert time.monotonic() < end, f"{folder}: no {count} records"
        time.sleep(0.05)


def test_ctrl_c_saves_and_the_run_goes_on(runs):
    process = start_alone(runs, "ctrl_c", "wait:6")
    wait_for_records(runs.folder / "ctrl_c", 6)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    status, output = end(process)
    assert status == 85 and "told to stop; saved after 7 of 20" in output and "Traceback" not in output, output[-3000:]
    assert "Ctrl-C again ends at once" in output
    status, output = end(start_alone(runs, "ctrl_c", "none:0"))
    assert status == 0 and "resuming at iteration 7" in output, output[-3000:]


@pytest.mark.parametrize("torchrun", [False, True])
def test_a_second_ctrl_c_ends_at_once(runs, torchrun):
    name = f"twice_{torchrun}"
    process = start(runs, name, fault="slow:2") if torchrun else start_alone(runs, name, "slow:2")
    wait_for_records(runs.folder / name, 2)
    for _ in range(2):
        time.sleep(1.0)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    status, output = end(process, timeout=200)
    assert time.monotonic() - begin < 100 and status == (1 if torchrun else 130), (status, output[-3000:])


def test_a_hang_shows_where_each_rank_stood_and_the_restart_finishes(runs):
    """Rank 1 sleeps in iteration 13, rank 0 waits for it in a collective; torchrun starts both again."""
    _, lines = runs.undisturbed("ring2")
    status, output = end(start(runs, "hang", "trainer.hang_timeout=30", fault="hang:13", options={"MAX_RESTARTS": "1"}))
    assert status == 0 and "resuming at iteration 10" in output, output[-3000:]
    stacks = [(runs.folder / "hang" / "stacks" / f"rank_{rank}.txt").read_text() for rank in range(2)]
    assert all(text.count("no step for 30 s") == 1 for text in stacks), stacks
    assert "in hang_in_step" in stacks[1] and "in hang_in_step" not in stacks[0]
    assert "in iterate" in stacks[0] and "in iterate" not in stacks[1]
    assert_same_curves(lines, records(runs.folder / "hang"), rel=0.0)


@pytest.mark.parametrize(
    ("body", "timeout", "last_resort", "status"),
    [
        ("time.sleep(300)", 0.3, 300, 86),
        ("ctypes.PyDLL(None).sleep(300)", 0.3, 0.5, 1),  # holds the interpreter's lock: no other Python thread runs
    ],
)
def test_the_watchdog_ends_a_stuck_process(tmp_path, body, timeout, last_resort, status):
    begin = time.monotonic()
    program = WATCHED.format(body=body)
    arguments = [str(tmp_path / "stacks"), str(timeout), str(last_resort)]
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, timeout=200)
    assert done.returncode == status, done.stderr
    assert time.monotonic() - begin < 100
    assert "in stuck_here" in (tmp_path / "stacks" / "rank_4.txt").read_text()


def test_the_watchdog_lets_a_run_alone_that_makes_steps(tmp_path):
    body = "[(time.sleep(0.05), watchdog.beat()) for _ in range(100)]; watchdog.close(); time.sleep(4.5)"
    arguments = [str(tmp_path), "4", "0"]
    done = subprocess.run([sys.executable, "-c", WATCHED.format(body=body), *arguments], cwd=ROOT, timeout=200)
    assert done.returncode == 0 and (tmp_path / "rank_4.txt").read_text() == ""
