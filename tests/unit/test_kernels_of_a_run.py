"""The kernels of a run are chosen at its start, as configured, and the choice is logged."""

import pytest
import torch

from rcm_kernels import flash_attention_jvp, fused
from rcm_megatron.config import ConfigError, load_config
from rcm_megatron.networks.kernels import choose_kernels
from tests.unit.test_config import ROOT

QUICKSTART = ROOT / "model_configs" / "quickstart.yaml"


@pytest.fixture(autouse=True)
def defaults():
    yield
    fused.select_ops("auto")


def chosen(caplog, *overrides, dtype=torch.float32):
    run = load_config(QUICKSTART, overrides)
    with caplog.at_level("INFO", logger="rcm_megatron"):
        choose_kernels(run, run.roles, dtype=dtype)
    return [r.getMessage() for r in caplog.records if r.name == "rcm_megatron.networks.kernels"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_one_line_says_what_runs(caplog):
    assert chosen(caplog) == [
        "attention of 32 channels a head: aten_cpu; with tangent: reference; fused operations: none"
    ]


def test_fused_operations_as_configured(caplog, monkeypatch):
    """The loader refuses other words; on CUDA, auto is all of them and none is none."""
    settings = []
    monkeypatch.setattr(fused, "select_ops", settings.append)
    monkeypatch.setattr(fused, "kernel_for", lambda op, x: object() if settings[-1] == "auto" else None)
    assert chosen(caplog)[-1].endswith(f"fused operations: {', '.join(fused.OPS)}")
    assert chosen(caplog, "precision.fused_ops=none")[-1].endswith("fused operations: none")
    assert settings == ["auto", "none"]
    with pytest.raises(ConfigError, match="fused_ops"):
        load_config(QUICKSTART, ["precision.fused_ops=gelu"])


def test_a_kernel_that_fails_its_check_is_replaced_before_the_first_step(caplog, monkeypatch):
    """As on a GPU whose Triton makes something else of the kernel."""

    def broken():
        raise RuntimeError("the kernel's to is 1.0e+00 off the reference on this GPU")

    monkeypatch.setitem(flash_attention_jvp.CHOICE.loaders, "triton", broken)
    monkeypatch.setattr(flash_attention_jvp.CHOICE, "_loaded", {})
    with caplog.at_level("WARNING"):
        name, _ = flash_attention_jvp.CHOICE.decide("cuda", torch.bfloat16, 64)
    assert name == "reference"
    assert "attention_jvp: reference is taken because others cannot run: triton" in caplog.text
    assert "off the reference on this GPU" in caplog.text


def test_selective_recomputation_keeps_the_attention_of_torchs_fused_operators():
    """Not the batched matmuls of the reference, quadratic in tokens."""
    from rcm_megatron.models.recompute import is_kept

    for name in ("flash_attention", "flash_attention_for_cpu", "cudnn_attention"):
        assert is_kept(getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default), name
    assert not is_kept(torch.ops.aten.bmm.default)
