"""The whole runs of the attention benchmark and the tuning tool in Triton's interpreter, on tiny shapes, with a clock for CUDA's events.

The figures mean nothing; that every case, implementation, candidate and column is there does. See test_triton_interpreter.py.
"""

import csv
import os
import subprocess
import sys
import time

import pytest
import torch

from rcm_kernels import benchmark, configs, tune
from rcm_kernels.flash_attention import backends
from tests.kernels.test_kernel_tools import ROOT, checkout

assert os.environ.get("TRITON_INTERPRET") == "1", "run me with TRITON_INTERPRET=1"
__all__ = ["checkout"]


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.time = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, later):
        return 1e3 * (later.time - self.time)


@pytest.fixture
def no_gpu_needed(monkeypatch):
    """A CPU in the place of the GPU: the same calls on tensors of the other device."""
    cuda = {"is_available": lambda: True, "Event": Event, "get_device_name": lambda: "no GPU"}
    cuda |= {"synchronize": lambda: None, "reset_peak_memory_stats": lambda: None}
    cuda |= {"memory_allocated": lambda: 2**20, "max_memory_allocated": lambda: 3 * 2**20}
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *sizes, device, **options: randn(*sizes, **options))
    load = backends.load
    monkeypatch.setattr(backends, "load", lambda name: load("aten_cpu" if name in ("aten_cuda", "cudnn") else name))
    peak = benchmark.matmul_peak
    monkeypatch.setattr(benchmark, "matmul_peak", lambda dtype, repeats: peak(dtype, repeats, size=32))


def test_all_cases_are_measured_and_drawn(no_gpu_needed, monkeypatch, tmp_path, checkout, capsys):
    shrunk = {
        name: benchmark.Case(
            case.queries // 1000, max(case.keys // 1000, 2), 2, 1, case.head_dim // 4, case.key_tangents, case.carry
        )
        for name, case in benchmark.CASES.items()
    }
    monkeypatch.setattr(benchmark, "CASES", shrunk)
    command = ["benchmark", "--repeats", "1", "--output", str(tmp_path), "--against", str(checkout())]
    monkeypatch.setattr(sys, "argv", command)
    benchmark.main()
    assert "flash_attn_3 is not timed: No module named" in capsys.readouterr().out
    with (tmp_path / "attention.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(dict.fromkeys(row["case"] for row in rows)) == list(shrunk)
    for name, case in shrunk.items():
        of_case = [row for row in rows if row["case"] == name]
        expected = {"aten flash, forward", "triton, with tangent", "NVlabs/rcm, with tangent"}
        plain = {"triton, forward", "aten flash, backward", "triton, backward", "cudnn, forward", "cudnn, backward"}
        assert {row["implementation"] for row in of_case} == expected | (plain if case.key_tangents else set())
        for row in of_case:
            assert float(row["ms"]) > 0 and float(row["ratio_to_aten_forward"]) > 0 and row["peak_mib"] == "2"
            assert row["commit"] and row["triton"] and row["gpu"] == "no GPU"
        assert of_case[0]["ratio_to_aten_forward"] == "1.0"
    plot = [sys.executable, "tools/plot_kernel_benchmark.py", str(tmp_path / "attention.csv")]
    subprocess.run(plot, cwd=ROOT, check=True, env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"})
    assert (tmp_path / "attention.png").stat().st_size > 1000


def test_every_kernel_is_tuned(no_gpu_needed, monkeypatch, capsys):
    """The table's entry is timed though the compilers have something against it; other candidates only if they have not."""
    base = configs.TABLE["dq", 90, 32, "half"]
    good = base.__class__(32, 16, 32, 32, 4, 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(configs, "generation", lambda index: 90)
    monkeypatch.setattr(tune, "candidates", lambda base: [base, good, base.__class__(64, 16, 32, 32, 4, 1)])
    monkeypatch.setattr(tune, "problems_of_all", lambda key, found: [["spills 8 bytes"], [], ["spills 64 bytes"]])
    monkeypatch.setattr(sys, "argv", ["tune", "--head-dim", "16", "--tokens", "33", "--heads", "1", "--repeats", "1"])
    tune.main()
    printed = capsys.readouterr().out
    for kernel in tune.KERNELS:
        lines = [line for line in printed.splitlines() if line.startswith(f"('{kernel}', 90, 32, 'half')")]
        assert len(lines) == 2, printed
        assert "spills 8 bytes" in lines[0] and f"{good}" in lines[1]
        assert f"best for ('{kernel}', 90, 32, 'half'): Config(" in printed
