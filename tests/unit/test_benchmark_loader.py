"""The loader's benchmark runs and writes what docs/loader.md is made of; beside a plain WebDataset loader where that is installed."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHORT = ["--workers", "1", "--rounds", "1", "--seconds", "0.1", "--num-samples", "8", "--compute-ms", "5"]


@pytest.mark.parametrize("plain", [False, True])
def test_samples_a_second_and_the_share_of_time_waiting(tmp_path, plain):
    if plain and importlib.util.find_spec("webdataset") is None:
        pytest.skip("webdataset is needed for this comparison alone: pip install webdataset==1.0.2 braceexpand==0.1.7")
    command = [sys.executable, "tools/benchmark_loader.py", *SHORT, "--output", str(tmp_path / "loader")]
    done = subprocess.run([*command, *([] if plain else ["--no-plain"])], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "loader.json").read_text())["rows"]
    assert [row["positions"] for row in rows] == [6, 3], "texts filled up, and of a prompt alone"
    loaders = ["ours", "plain", "plain_bf16"] if plain else ["ours"]
    for row in rows:
        for loader in loaders:
            assert row[f"{loader}_samples_per_s"] > 0 and 0 < row[f"{loader}_waiting_share"] < 1, row
        assert [key for key in row if key.startswith("ratio_")] == [f"ratio_{loader}" for loader in loaders[1:]]
    assert f"| 6 | 1 | {rows[0]['inline_samples_per_s']:.1f} |" in (tmp_path / "loader.md").read_text()
