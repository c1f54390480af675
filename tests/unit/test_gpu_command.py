"""`bash tests/gpu/run.sh` as far as it goes without a GPU: every command it gives exists, takes its arguments, and selects tests."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
STUBS = {
    # notes its arguments; fails where FAIL occurs in them
    "python3": '#!/bin/bash\n(IFS=$\'\\t\'; echo "$*") >>"$LOG"\n[[ -z "$FAIL" || "$*" != *"$FAIL"* ]]\n',
    "nvidia-smi": "#!/bin/bash\necho name, driver_version\n",
    "compute-sanitizer": '#!/bin/bash\nwhile [[ "$1" != python3 ]]; do shift; done\nexec "$@"\n',
}


def run(folder, *parts, fail="", missing=()):
    """(exit status, what it printed, arguments of each python3) with stubs in the place of python3 and a GPU's tools."""
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    for name, text in STUBS.items():
        if name not in missing:
            (bin_folder / name).write_text(text)
            (bin_folder / name).chmod(0o755)
    log = folder / "log"
    log.touch()
    env = {"PATH": f"{bin_folder}:/usr/bin:/bin", "LOG": str(log), "FAIL": fail, "OUT": str(folder / "out")}
    command = ["bash", "tests/gpu/run.sh", *parts]
    done = subprocess.run(
        command, cwd=ROOT, env=env | {"NVLABS_RCM": "/rcm"}, capture_output=True, text=True, check=False
    )
    commands = [line.split("\t") for line in log.read_text().splitlines()]
    return done.returncode, done.stdout + done.stderr, [c for c in commands if c[0] != "-c"]


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    status, printed, found = run(folder)
    assert status == 0, printed
    assert (folder / "out" / "gpu.txt").read_text() == "name, driver_version\n"
    return found


def of(commands, *words):
    (found,) = [c for c in commands if all(word in c for word in words)]
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_every_benchmark_takes_its_arguments_and_wants_a_gpu(commands, monkeypatch, tmp_path):
    benchmarks = [c for c in commands if "pytest" not in c and "tools/plot_kernel_benchmark.py" not in c]
    assert len(benchmarks) == 6
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for command in benchmarks:
        module = command[0] == "-m"
        monkeypatch.setattr(sys, "argv", command[module:])
        with pytest.raises(SystemExit, match="no CUDA device"):
            if module:
                monkeypatch.delitem(sys.modules, command[1], raising=False)
                runpy.run_module(command[1], run_name="__main__")
            else:
                runpy.run_path(command[0], run_name="__main__")


def test_the_tests_that_it_names_exist(commands):
    for command in (c for c in commands if "pytest" in c):
        paths = [word for word in command if word.startswith("tests/")]
        assert paths and all((ROOT / path).exists() for path in paths), command
    sanitized = of(commands, "-k")
    collect = [sys.executable, *sanitized, "--collect-only", "-p", "no:cacheprovider"]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(collect, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    tests = [line for line in done.stdout.splitlines() if "::" in line]
    assert [t.rpartition("::")[2] for t in tests] == [
        "test_odd_shapes[128-77-dtype0]",
        "test_padded_keys_are_never_read[64]",
    ]


def test_every_test_that_needs_a_gpu_is_run_by_one_part(commands):
    marked = {str(path.relative_to(ROOT)) for path in ROOT.glob("tests/**/test_*.py") if "mark.gpu" in path.read_text()}
    run = []
    for command in (c for c in commands if "pytest" in c and "-k" not in c):
        ignored = [command[i + 1] for i, word in enumerate(command) if word == "--ignore"]
        paths = [w for i, w in enumerate(command) if w.startswith("tests/") and command[i - 1] != "--ignore"]
        run += [test for test in marked if test not in ignored and any(test.startswith(path) for path in paths)]
    assert sorted(run) == sorted(marked - {"tests/unit/test_gpu_command.py"})


def test_parts_can_be_named(tmp_path):
    status, _, found = run(tmp_path, "trace")
    assert status == 0
    assert [c[0] for c in found] == ["tools/trace_ring_overlap.py"]


def test_a_part_that_fails_does_not_stop_the_others(tmp_path):
    status, printed, found = run(tmp_path, "kernels", "trace", fail="rcm_kernels.benchmark")
    assert status == 1
    assert "== attention failed" in printed
    assert found[-1][0] == "tools/trace_ring_overlap.py"


def test_it_says_what_it_needs(tmp_path):
    status, printed, found = run(tmp_path, "trace", "kernel")
    assert (status, found) == (2, [])
    assert "got part 'kernel'; need one of tests, sanitizer, kernels" in printed


def test_without_a_gpu_or_the_sanitizer(tmp_path):
    for name in ("gpu", "sanitizer"):
        (tmp_path / name).mkdir()
    status, printed, found = run(tmp_path / "gpu", "trace", missing=["nvidia-smi"])
    assert (status, found) == (2, [])
    assert "got no GPU; need one" in printed
    status, printed, found = run(tmp_path / "sanitizer", "sanitizer", missing=["compute-sanitizer"])
    assert (status, found) == (0, [])
    assert "compute-sanitizer is not installed: not run" in printed
