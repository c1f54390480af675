"""The Triton kernels on the CPU. TRITON_INTERPRET has to be set before Triton is imported, so each file runs in its own process:

TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted_jvp.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["interpreted_jvp", "interpreted_attention", "interpreted_benchmark"])
def test_in_the_interpreter(name):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", f"tests/kernels/{name}.py", "-p", "no:cacheprovider"]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-3000:]
    assert " skipped" not in result.stdout, result.stdout[-3000:]
