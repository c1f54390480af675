"""The benchmark of the single dual pass: both ways give the same gradient, at a size that takes a second."""

import json

from tests.distributed.harness import run_ranks


def run_benchmark(path: str) -> dict:
    from tools import benchmark_scm_step

    sizes = ["--hidden", "64", "--layers", "2", "--tokens", "256", "--repeats", "1"]
    return benchmark_scm_step.main([*sizes, "--output", path])


def test_single_and_separate_pass_give_the_same_gradient(tmp_path):
    result = run_ranks(run_benchmark, 1, str(tmp_path / "result.json"))[0]
    assert result["gradient_difference"] < 1e-5
    assert result["peak_mib"]["single"] > 0
    assert result["peak_mib"]["separate"] > 0
    assert json.loads((tmp_path / "result.json").read_text())["shape"]["tokens"] == 256
