"""What only a CUDA device can show. `bash tests/gpu/run.sh` runs these and the benchmarks; elsewhere they are skipped."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rcm_kernels.flash_attention import attention_backward, attention_forward, select_backend
from rcm_kernels.flash_attention_jvp import attention_jvp
from tests.helpers import GOLDEN, assert_close

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.timeout(900),
]


def qkv(
    dtype: torch.dtype, *, queries: int = 333, keys: int = 777, heads: int = 4, dim: int = 128
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = (queries, keys, keys)
    return [torch.randn(size, 2, heads, dim, generator=generator).to("cuda", dtype) for size in sizes]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_plain_attention_and_its_backward_with_an_outside_lse(dtype):
    select_backend("auto")
    q, k, v = qkv(dtype)
    do = torch.randn_like(q)
    o, lse = attention_forward(q, k, v, valid_keys=700)
    gradients = attention_backward(do, q, k, v, o, lse, valid_keys=700)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    scores = torch.einsum("sbnd,lbnd->bnsl", leaves[0], leaves[1][:700]) / q.shape[-1] ** 0.5
    reference = torch.einsum("bnsl,lbnd->sbnd", scores.softmax(-1), leaves[2][:700])
    reference.backward(do.double())
    assert_close("o", reference, o, rel=1e-2)
    for name, leaf, gradient in zip(("dq", "dk", "dv"), leaves, gradients, strict=True):
        assert_close(name, leaf.grad, gradient, rel=2e-2)


def test_attention_with_tangent_in_bf16():
    q, k, v = qkv(torch.bfloat16)
    tq, tk, tv = (torch.randn_like(x) for x in (q, k, v))
    reference = attention_jvp(*(x.double() for x in (q, k, v, tq, tk, tv)), valid_keys=700)
    result = attention_jvp(q, k, v, tq, tk, tv, valid_keys=700)
    for name, expected, got in zip(("o", "to", "lse", "mu"), reference, result, strict=True):
        assert_close(name, expected, got, rel=4e-3)


@pytest.mark.parametrize("name", ["nvlabs_rcm_small", "nvlabs_rcm_deep"])
def test_conformance(name):
    command = [sys.executable, "-m", "rcm_megatron", "conformance", str(GOLDEN / f"{name}.safetensors")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_training_and_resume(dtype, tmp_path):
    from tools.quickstart.build_dataset import write_digits_dataset

    write_digits_dataset(tmp_path / "data", num_samples=64, seed=0)
    scm = {"name": "scm", "steps": 2, "losses": {"scm": 100.0}}
    rcm = {"name": "rcm", "steps": 4, "losses": {"scm": 100.0, "dmd": 1.0}, "student_update_freq": 2}
    stages = json.dumps([scm, rcm])
    overrides = [
        "parallel.ring=1",
        f"precision.params_dtype={dtype}",
        f"output_dir={tmp_path}",
        f"data.folder={tmp_path}/data",
    ]
    overrides += ["logging.wandb_mode=disabled", f"stages={stages}", "trainer.checkpoint_every=3"]
    for stop in (3, 6):
        command = [sys.executable, "-m", "rcm_megatron", "train", "model_configs/quickstart.yaml", *overrides]
        subprocess.run([*command, f"trainer.stop_after={stop}"], cwd=ROOT, check=True)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == list(range(6))
    assert all(record["updated"] for record in records)
