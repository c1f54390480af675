"""Plain attention's Triton kernels in the interpreter, through the interface, against fp64. See test_triton_interpreter.py."""

import itertools
import os

import pytest
import torch

from rcm_kernels.configs import Config
from rcm_kernels.flash_attention import attention, attention_backward, attention_forward, select_backend, triton_impl
from tests.helpers import assert_close, dense_attention
from tests.kernels.jvp_cases import rows_far_apart

assert os.environ.get("TRITON_INTERPRET") == "1", "run me with TRITON_INTERPRET=1"
NAMES, FP32 = ("o", "dq", "dk", "dv"), 5e-6


@pytest.fixture(autouse=True)
def triton_backend():
    select_backend("triton")
    yield
    select_backend("auto")


def make_inputs(s, keys, *, b=1, n=2, d=16, dtype=torch.float32):
    """q, k, v, do."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, b, n, d, generator=generator).to(dtype) for length in (s, keys, keys, s)]


def dense_gradients(q, k, v, do, **options):
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    o = dense_attention(q, k, v, **options)
    return o.detach(), *torch.autograd.grad(o, (q, k, v), do.double())


def gradients(q, k, v, do, **options):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    o = attention(q, k, v, **options)
    return o.detach(), *torch.autograd.grad(o, (q, k, v), do)


def check(expected, got, *, rel=FP32, row=None):
    for name, ref, out in zip(NAMES, expected, got, strict=True):
        assert_close(name, ref, out, rel=rel, row=row)


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, FP32), (torch.float16, 1e-3), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize(("keys", "d", "valid_keys"), [(15, 16, None), (77, 40, 70), (129, 128, 128)])
def test_forward_and_backward(dtype, rel, keys, d, valid_keys):
    inputs = make_inputs(63, keys, d=d, dtype=dtype)
    got = gradients(*inputs, valid_keys=valid_keys)
    assert all(x.dtype == dtype for x in got)
    check(dense_gradients(*inputs, valid_keys=valid_keys), got, rel=rel, row=20 * rel)


@pytest.mark.parametrize(("d", "block_d", "block_e"), [(256, 256, 64), (100, 32, 64), (64, 32, 16), (8, 16, 16)])
def test_head_dim_in_pieces(d, block_d, block_e):
    q, k, v, do = make_inputs(31, 45, d=d, n=1)
    config = Config(32, 16, block_d, block_e, 4, 1)
    o, lse = triton_impl.forward(q, k, v, 0.3, config=config)
    grads = triton_impl.backward(do, q, k, v, o, lse, 0.3, configs=(config, config))
    check(dense_gradients(q, k, v, do, scale=0.3), (o, *grads))


def test_one_key_has_no_gradient_of_scores():
    q, k, v, do = make_inputs(63, 1)
    o, dq, dk, dv = gradients(q, k, v, do)
    assert_close("o", v.expand_as(o), o, rel=1e-6)
    assert_close("dv", do.sum(0, keepdim=True), dv, rel=1e-6)
    assert float(dq.abs().max()) < 1e-5
    assert float(dk.abs().max()) < 1e-4


def test_scale_strides_and_expanded_gradient():
    fused = torch.randn(21, 3, 2, 3, 16, generator=torch.Generator().manual_seed(1))
    q, k, v = fused.unbind(3)
    k = k.transpose(1, 3).contiguous().transpose(1, 3)
    do = torch.ones(()).expand_as(q)
    check(dense_gradients(q, k, v, do, scale=0.7), gradients(q, k, v, do, scale=0.7))


def test_padded_keys_are_never_read():
    q, k, v, do = make_inputs(9, 40)
    expected = dense_gradients(q, k, v, do, valid_keys=33)
    k[33:], v[33:] = torch.nan, torch.nan
    check(expected, gradients(q, k, v, do, valid_keys=33))


def test_offsets_beyond_32_bits(tmp_path):
    """Of rows that stay and of rows that pass, in the forward and in both halves of the backward."""
    q, k, v, do = rows_far_apart(tmp_path / "rows", 300, tensors=4)
    config = Config(128, 128, 16, 16, 4, 1)
    o, lse = triton_impl.forward(q, k, v, 0.25, config=config)
    grads = triton_impl.backward(do, q, k, v, o, lse, 0.25, configs=(config, config))
    check(dense_gradients(q, k, v, do), (o, *grads), rel=2e-3)


@pytest.mark.parametrize("backend", ["triton", "aten_cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ring_steps_add_dq_in_fp32(backend, dtype):
    """dk, dv per block of keys and one sum of dq, with o and lse of all keys; one block is empty."""
    select_backend(backend)
    q, k, v, do = make_inputs(31, 50, dtype=dtype)
    expected = dense_gradients(q, k, v, do)
    o, lse = attention_forward(q, k, v)
    dq, parts = torch.zeros(q.shape), []
    for a, b in itertools.pairwise((0, 17, 17, 50)):
        total, *grads = attention_backward(do, q, k[a:b], v[a:b], o, lse, dq=dq)
        assert total is dq
        assert {x.dtype for x in grads} == {torch.float32}
        parts.append(grads)
    dk, dv = (torch.cat(x) for x in zip(*parts, strict=True))
    rel = FP32 if dtype == torch.float32 else 6e-3
    check(expected, (o, dq, dk, dv), rel=rel)


def test_rows_without_any_key_get_no_gradient():
    """lse = -inf from outside: a block-causal ring step may leave such rows."""
    q, k, v, do = make_inputs(9, 12)
    o, lse = attention_forward(q, k, v)
    lse[..., 4], o[4] = -torch.inf, 0
    dq, dk, dv = attention_backward(do, q, k, v, o, lse)
    assert not dq[4].any()
    rows = [i for i in range(9) if i != 4]
    expected = dense_gradients(q[rows], k, v, do[rows])
    check(expected, (o[rows], dq[rows], dk, dv))
