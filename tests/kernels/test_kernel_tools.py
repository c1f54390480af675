"""The benchmark and the tuning tool, as far as they go without a GPU."""

import csv
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from rcm_kernels import benchmark, configs, tune
from rcm_kernels.flash_attention_jvp import reference
from tests.helpers import assert_close

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("module", ["rcm_kernels.benchmark", "rcm_kernels.tune"])
def test_without_a_gpu_they_say_so(module):
    env = {"PYTHONPATH": str(ROOT / "kernels"), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-m", module]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "got no CUDA device; need" in result.stderr


CHECKOUT = """
import torch
from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_varlen_backward

class _attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, tq, tk, tv, sm_scale=None):
        for x, t in ((q, tq), (k, tk), (v, tv)):
            assert x.shape == t.shape and x.stride() == t.stride()
        attend = torch.nn.functional.scaled_dot_product_attention
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return torch.func.jvp(attend, (q, k, v), (tq, tk, tv))

attention = _attention.apply
"""


@pytest.fixture
def checkout(tmp_path):
    """Stands for one of NVlabs/rcm at 5b41aa9: the same path, imports, signature and conditions, in PyTorch. Returns how to change it."""

    def write(text=CHECKOUT):
        path = tmp_path / "rcm" / "utils" / "flash_attention_jvp_triton.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return tmp_path

    return write


@pytest.mark.parametrize("key_tangents", [True, False])
def test_another_kernel_runs_on_the_same_inputs(checkout, key_tangents):
    case = benchmark.Case(21, 21 if key_tangents else 9, 3, batch=2, head_dim=16, key_tangents=key_tangents)
    inputs = benchmark.make_inputs(case, torch.float64, device="cpu")
    o, to = benchmark.nvlabs_call(benchmark.load_nvlabs(checkout()), *inputs)()
    expected = reference.attention_jvp(*inputs)
    assert_close("o", expected[0], o.permute(2, 0, 1, 3), rel=1e-12)
    assert_close("to", expected[1], to.permute(2, 0, 1, 3), rel=1e-12)


def test_flash_attn_is_stood_in_for_only_while_the_other_kernel_is_loaded(checkout):
    benchmark.load_nvlabs(checkout())
    assert ("flash_attn" in sys.modules) == (importlib.util.find_spec("flash_attn") is not None)


def test_another_kernel_must_be_what_it_is_said_to_be(checkout, tmp_path):
    with pytest.raises(ValueError, match="without rcm/utils/flash.*; need a checkout of github.com/NVlabs/rcm"):
        benchmark.load_nvlabs(tmp_path)
    for text in (
        "",
        CHECKOUT.replace("tk, tv, sm_scale", "tangents, sm_scale"),
        CHECKOUT.replace("_attention.apply", "print"),
    ):
        with pytest.raises(ValueError, match=r"has no attention\(q, k, v, tq, tk, tv\) .*check that commit out"):
            benchmark.load_nvlabs(checkout(text))
    with pytest.raises(ValueError, match=r"cannot be imported \(No module named 'rcm_no_such_module'\).*install them"):
        benchmark.load_nvlabs(checkout("import rcm_no_such_module"))


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


def test_what_the_compilers_have_against_a_candidate(monkeypatch):
    """Also what they refuse. In processes of their own, as a tuning run does."""
    key, fits = ("forward", 90, 128, "half"), configs.Config(64, 32, 128, 128, 4, 1)
    too_big = configs.Config(128, 128, 128, 128, 8, 4)
    found = tune.problems_of_all(key, [fits, too_big])
    assert found[0] == [] and any("shared memory" in problem for problem in found[1]), found

    def refuse(*args):
        raise RuntimeError("ptxas failed")

    monkeypatch.setattr("rcm_kernels.compile_report.compile_entry", refuse)
    assert tune.problems(key, fits) == ["does not compile: ptxas failed"]


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
