"""The benchmark of a whole student step, on a CPU and a tiny network."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TOOL = [sys.executable, "tools/benchmark_student_step.py"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_step_on_a_cpu(tmp_path):
    path = tmp_path / "new" / "step.json"
    overrides = ["latent.frames=1", "model.num_layers=1", "--config", "model_configs/quickstart.yaml"]
    options = ["--step", "student", "--settings", "none", "--repeats", "2", "--output", str(path)]
    done = subprocess.run([*TOOL, *overrides, *options], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(path.read_text())
    (row,) = result["settings"]
    assert result["tokens"] == 16
    assert result["kernels"] == {"attention": "aten_cpu", "attention_with_tangent": "reference"}
    assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0
    assert row["tflops"] == pytest.approx(result["useful_tflop"] / row["median_seconds"])
    assert {name for name, seconds in row["phases"].items() if seconds > 0} >= {
        "teacher",
        "dual",
        "fake_score",
        "backward",
    }
    assert row["mfu"] is None and row["peak_gib"] is None
    assert f"| none | {row['median_seconds']:.3f} |" in done.stdout


def test_settings_are_all_none_and_all_but_one():
    from rcm_kernels import fused
    from tools import benchmark_student_step as tool

    assert ("none", "all", *(f"all-{op}" for op in fused.OPS)) == tool.SETTINGS
    pytest.importorskip("triton")
    x = torch.zeros(1)
    try:
        for setting in tool.SETTINGS:
            tool.select(setting)
            chosen = {op for op in fused.OPS if fused.kernel_for(op, x) is not None}
            left_out = set(fused.OPS) if setting == "none" else {setting.removeprefix("all-")}
            assert chosen == set(fused.OPS) - left_out, setting
    finally:
        fused.select_ops("auto")
