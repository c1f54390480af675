"""The benchmark and the tuning tool, as far as they go without a GPU."""

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from rcm_kernels import benchmark, configs, tune

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("module", ["rcm_kernels.benchmark", "rcm_kernels.tune"])
def test_without_a_gpu_they_say_so(module):
    env = {"PYTHONPATH": str(ROOT / "kernels"), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-m", module]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "got no CUDA device; need" in result.stderr


def test_another_kernel_must_be_where_it_is_said_to_be(tmp_path):
    with pytest.raises(ValueError, match="need a checkout of github.com/NVlabs/rcm"):
        benchmark.load_nvlabs(tmp_path)


def test_the_tuning_tool_rewrites_one_entry(tmp_path):
    path = tmp_path / "configs.py"
    shutil.copy(configs.__file__, path)
    key = ("jvp", 90, 128, "half")
    tune.write(key, configs.Config(64, 16, 128, 128, 4, 3), path)
    scope = {"__name__": "copy"}
    exec(compile(path.read_text(), str(path), "exec"), scope)
    table = scope["TABLE"]
    assert vars(table[key]) == vars(configs.Config(64, 16, 128, 128, 4, 3))
    assert {k: vars(v) for k, v in table.items() if k != key} == {
        k: vars(v) for k, v in configs.TABLE.items() if k != key
    }


def test_candidates_begin_with_the_table():
    base = configs.TABLE["jvp", 90, 128, "half"]
    found = tune.candidates(base)
    assert found[0] == base
    assert len(set(found)) == len(found)


def test_plot(tmp_path):
    case = {"case": "self", "tflops": 1.0, "matmul_tflops": 2.0, "gpu": "none", "dtype": "bf16", "torch": "0"}
    rows = [case | {"implementation": name, "triton": "0", "commit": "0"} for name in ("a", "b")]
    with (tmp_path / "attention.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    command = [sys.executable, "tools/plot_kernel_benchmark.py", str(tmp_path / "attention.csv")]
    subprocess.run(command, cwd=ROOT, check=True)
    assert (tmp_path / "attention.png").stat().st_size > 1000
