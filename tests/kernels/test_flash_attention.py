"""Plain attention: each backend that runs here against dense attention in fp64, also with outputs from outside."""

import itertools

import pytest
import torch

from rcm_kernels.flash_attention import attention, attention_backward, attention_forward, select_backend
from tests.helpers import assert_close, dense_attention


@pytest.fixture(params=["aten_cpu", "reference"])
def backend(request):
    select_backend(request.param)
    yield request.param
    select_backend("auto")


def make_inputs(s, keys, *, b=3, n=2, d=16, dtype=torch.float64):
    """q, k, v, do."""
    generator, f64 = torch.Generator().manual_seed(0), torch.float64
    return [torch.randn(length, b, n, d, generator=generator, dtype=f64).to(dtype) for length in (s, keys, keys, s)]


def dense_gradients(q, k, v, do, **kwargs):
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    o = dense_attention(q, k, v, **kwargs)
    return o.detach(), *torch.autograd.grad(o, (q, k, v), do.double())


def gradients(q, k, v, do, **kwargs):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    o = attention(q, k, v, **kwargs)
    return o.detach(), *torch.autograd.grad(o, (q, k, v), do)


def check(expected, got, *, rel, row=None):
    for name, ref, out in zip(("o", "dq", "dk", "dv"), expected, got, strict=True):
        assert_close(name, ref, out, rel=rel, row=row)


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize(("keys", "d", "valid_keys"), [(15, 16, None), (63, 32, 60), (77, 40, 77), (999, 128, 998)])
def test_forward_and_backward(backend, dtype, rel, keys, d, valid_keys):
    inputs = make_inputs(63, keys, d=d, dtype=dtype)
    got = gradients(*inputs, valid_keys=valid_keys)
    assert all(x.dtype == dtype for x in got)
    check(dense_gradients(*inputs, valid_keys=valid_keys), got, rel=rel, row=10 * rel)


def test_scale_strides_and_expanded_gradient(backend):
    """Views of a fused projection; the gradient of a sum has stride 0 everywhere."""
    fused = torch.randn(21, 3, 2, 3, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    q, k, v = fused.unbind(3)
    k = k.transpose(1, 3).contiguous().transpose(1, 3)
    do = torch.ones((), dtype=torch.float64).expand_as(q)
    check(dense_gradients(q, k, v, do, scale=0.7), gradients(q, k, v, do, scale=0.7), rel=1e-13)


def test_one_key_has_no_gradient_of_scores(backend):
    q, k, v, do = make_inputs(63, 1)
    o, dq, dk, dv = gradients(q, k, v, do)
    assert_close("o", v.expand_as(o), o, rel=1e-14)
    assert_close("dv", do.sum(0, keepdim=True), dv, rel=1e-14)
    assert float(dq.abs().max()) < 1e-13
    assert float(dk.abs().max()) < 1e-12


def test_no_valid_key(backend):
    q, k, v, do = make_inputs(5, 4)
    o, lse = attention_forward(q, k, v, valid_keys=0)
    assert not o.any()
    assert torch.equal(lse, torch.full((3, 2, 5), -torch.inf, dtype=torch.float64))
    assert not any(x.any() for x in attention_backward(do, q, k, v, o, lse, valid_keys=0))


@pytest.mark.parametrize("empty_keys", [False, True])
def test_blocks_of_keys_with_the_global_output(backend, empty_keys):
    """dk, dv per block of keys, and the sum of dq, with o and lse of all keys."""
    q, k, v, do = make_inputs(31, 50)
    o, dq, dk, dv = dense_gradients(q, k, v, do)
    _, lse = attention_forward(q, k, v)
    assert_close("lse", (torch.einsum("sbnd,lbnd->bnsl", q, k) / 4).logsumexp(-1), lse, rel=1e-14)
    bounds = (0, 17, 17, 50) if empty_keys else (0, 17, 50)
    blocks = [attention_backward(do, q, k[a:b], v[a:b], o, lse) for a, b in itertools.pairwise(bounds)]
    dq_parts, dk_parts, dv_parts = zip(*blocks, strict=True)
    check((o, dq, dk, dv), (o, sum(dq_parts), torch.cat(dk_parts), torch.cat(dv_parts)), rel=1e-13)


def test_padded_keys_are_never_read(backend):
    q, k, v, do = make_inputs(9, 12)
    expected = dense_gradients(q, k, v, do, valid_keys=7)
    k[7:], v[7:] = torch.nan, torch.nan
    check(expected, gradients(q, k, v, do, valid_keys=7), rel=1e-13)


def test_unknown_or_absent_backend_is_an_error():
    with pytest.raises(ValueError, match="got attention backend 'xformers'; need one of auto, flash_attn_3"):
        select_backend("xformers")
    with pytest.raises(ValueError, match="'flash_attn_3', which cannot run here"):
        select_backend("flash_attn_3")
