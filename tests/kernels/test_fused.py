"""The fused ops: in the interpreter, and each choice of kernels (`test_triton_compile.py` compiles them).

TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted_fused.py tests/kernels/interpreted_fused_network.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rcm_kernels import fused

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]


def run(*command, **environment):
    """Triton reads TRITON_INTERPRET when it is imported, so this takes a process."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    inherited |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.timeout(900)  # half a minute of CPU time, on a machine that others load too
def test_in_the_interpreter():
    files = [f"tests/kernels/interpreted_{name}.py" for name in ("fused", "fused_network")]
    assert " skipped" not in run("pytest", "-q", *files, "-p", "no:cacheprovider", TRITON_INTERPRET="1")


def test_selection(caplog):
    """By default, kernels for CUDA tensors and rules elsewhere; by order, kernels for all but fp64; each choice logged once."""
    x = torch.zeros(1)
    try:
        assert fused.kernel_for("gelu_tanh", x) is None
        fused.select_ops("gelu_tanh, gated_residual")
        with caplog.at_level("INFO"):
            assert [fused.kernel_for("gelu_tanh", x) for _ in range(2)] == [fused.gelu_tanh] * 2
            assert fused.kernel_for("rms_norm_rope", x) is None
            assert fused.kernel_for("gelu_tanh", x.double()) is None
        assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == [
            "triton",
            "pytorch",
            "pytorch",
        ]
        with pytest.raises(
            ValueError, match="got fused ops 'gelu' with the unknown gelu; need auto, none, all or some of layer"
        ):
            fused.select_ops("gelu")
        assert fused.kernel_for("gelu_tanh", x) is fused.gelu_tanh, "a refused setting changes nothing"
    finally:
        fused.select_ops("auto")


@pytest.mark.skipif(bool(os.environ.get("TRITON_INTERPRET")), reason="the interpreter takes CPU tensors")
def test_a_kernel_that_was_ordered_refuses_cpu_tensors():
    fused.select_ops("gelu_tanh")
    try:
        with pytest.raises(ValueError, match="got a tensor on cpu for a fused kernel; need CUDA"):
            fused.kernel_for("gelu_tanh", torch.zeros(1)).plain(torch.zeros(1, 1, 4))
    finally:
        fused.select_ops("auto")
