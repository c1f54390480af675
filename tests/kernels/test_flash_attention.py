"""Plain attention: each backend that runs here against dense attention in fp64, also with outputs from outside."""

import itertools

import pytest
import torch

from rcm_kernels.flash_attention import (
    attention,
    attention_backward,
    attention_forward,
    backends,
    reference,
    select_backend,
)
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


def cudnn_stand_in(lse_tail):
    """torch's two cuDNN operators by the reference, with what they want of their caller; the forward's o is laid out like q."""

    def on_tokens_first(*tensors):
        return [x.permute(2, 0, 1, 3) for x in tensors]

    def forward_op(q, k, v, bias, compute_lse, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale):
        assert bias is None and compute_lse and k.shape[2] > 1 and q.shape[3] % 8 == 0
        o, lse = reference.forward(*on_tokens_first(q, k, v), scale)
        return torch.empty_like(q).copy_(o.permute(1, 2, 0, 3)), lse.view(*lse.shape, *lse_tail)

    def backward_op(do, q, k, v, o, lse, seed, offset, bias, cum_q, cum_k, max_q, max_k, p, causal, *, scale):
        assert k.shape[2] > 1 and q.shape[3] % 8 == 0 and (max_q, max_k) == (q.shape[2], k.shape[2])
        assert (bias, cum_q, cum_k, p, causal) == (None, None, None, 0.0, False)
        assert lse.shape == (*q.shape[:3], *lse_tail) and lse.is_contiguous()
        do, q, k, v, o = on_tokens_first(do, q, k, v, o)
        assert do.is_contiguous() and o.is_contiguous(), "torch would run a graph that was compiled for other strides"
        grads = reference.backward(do, q, k, v, o, lse.flatten(2), scale)
        return [x.permute(1, 2, 0, 3) for x in grads]

    return backends._cudnn_backend(forward_op, backward_op, lse_tail)


@pytest.mark.parametrize("lse_tail", [(), (1,)])
@pytest.mark.parametrize(("keys", "d"), [(1, 16), (2, 16), (41, 20), (41, 128)])
def test_what_cudnn_is_given(lse_tail, keys, d):
    """Strided halves, an expanded gradient, an outside o and lse that are strided, single keys, head dims that 8 does not divide."""
    backend, scale = cudnn_stand_in(lse_tail), 0.3
    (q, do), (k, v) = (torch.randn(s, 4, 2, d).half().chunk(2, 1) for s in (23, keys))
    do = do[:1].expand_as(q)
    o, lse = backend.forward(q, k, v, scale)
    expected = reference.forward(q, k, v, scale)
    assert_close("o", expected[0], o, rel=1e-3)
    assert_close("lse", expected[1], lse, rel=1e-6)
    o, lse = o.transpose(0, 2).contiguous().transpose(0, 2), lse.mT.contiguous().mT
    got = backend.backward(do, q, k, v, o, lse, scale)
    for name, ref, out in zip(("dq", "dk", "dv"), reference.backward(do, q, k, v, o, lse, scale), got, strict=True):
        assert_close(name, ref, out, rel=1e-3)


@pytest.mark.parametrize(("dtype", "d"), [(torch.float32, 64), (torch.bfloat16, 136)])
def test_what_cudnn_would_take_for_something_else_is_refused(dtype, d):
    backend, x = cudnn_stand_in(()), torch.zeros(3, 1, 1, d, dtype=dtype)
    for call in (lambda: backend.forward(x, x, x, 1.0), lambda: backend.backward(x, x, x, x, x, x[..., 0], 1.0)):
        with pytest.raises(
            ValueError, match=f"got {dtype} with head dim {d} .*'cudnn'; need bfloat16 or float16 and at most 128"
        ):
            call()


def test_torch_has_the_cudnn_operators_as_they_are_called():
    """On meta tensors: schema and shapes, without a GPU."""
    op, backward_op = (getattr(torch.ops.aten, f"_scaled_dot_product_cudnn_attention{x}") for x in ("", "_backward"))
    q, do, o = torch.empty(3, 5, 2, 4, 64, dtype=torch.bfloat16, device="meta").unbind(0)
    k, v = torch.empty(2, 7, 2, 4, 64, dtype=torch.bfloat16, device="meta").unbind(0)
    lse_tail = op(*(x.permute(1, 2, 0, 3) for x in (q, k, v)), None, True)[1].shape[3:]
    backend = backends._cudnn_backend(op, backward_op, lse_tail)
    out, lse = backend.forward(q, k, v, 0.1)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, (2, 4, 5), torch.float32)
    assert [x.shape for x in backend.backward(do, q, k, v, o, lse, 0.1)] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize(
    ("capability", "head_dim", "first"),
    [
        ((9, 0), 128, ["flash_attn_3", "cudnn", "flash_attn_2"]),
        ((9, 0), 256, ["flash_attn_3", "flash_attn_2", "aten_cuda"]),
        ((10, 3), 64, ["cudnn", "flash_attn_2", "aten_cuda"]),
        ((8, 0), 128, ["flash_attn_2", "aten_cuda", "triton"]),
        ((12, 0), 128, ["flash_attn_2", "aten_cuda", "triton"]),
    ],
)
def test_order_of_the_backends_on_gpus(capability, head_dim, first, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert backends.candidates("cuda", torch.bfloat16, head_dim)[:3] == first
    assert backends.candidates("cuda", torch.float32, head_dim) == ["triton", "reference"]


def test_a_cudnn_that_is_too_old_or_asked_for_determinism_is_refused(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91500)
    with pytest.raises(ValueError, match="'cudnn', which cannot run here .got cuDNN 91500; need 91501"):
        select_backend("cudnn")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91501)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with pytest.raises(ValueError, match="'cudnn', which cannot run here .*use_deterministic_algorithms"):
        select_backend("cudnn")


@pytest.mark.parametrize("wrong", ["o", "lse", "dq", "dk", "dv", "shape"])
def test_a_library_that_computes_something_else_is_refused(wrong, monkeypatch):
    """The check at load, with a CPU in the place of the GPU."""
    generator, randn = torch.Generator, torch.randn
    monkeypatch.setattr(torch, "Generator", lambda device: generator())
    monkeypatch.setattr(torch, "randn", lambda *sizes, device, **options: randn(*sizes, **options))

    def spoiled(name, x):
        return x.mT if wrong == "shape" and name == "dk" else x * 1.5 if name == wrong else x

    def forward(*args):
        return [spoiled(*x) for x in zip(("o", "lse"), reference.forward(*args), strict=True)]

    def backward(*args):
        return [spoiled(*x) for x in zip(("dq", "dk", "dv"), reference.backward(*args), strict=True)]

    right = backends.Backend("right", reference.forward, reference.backward)
    assert backends._checked(right) is right
    message = f"library is not what is known here: its {'dk' if wrong == 'shape' else wrong} is"
    with pytest.raises(RuntimeError, match=message):
        backends._checked(backends.Backend("library", forward, backward))


def test_the_choice_and_what_cannot_run_are_logged(caplog, monkeypatch):
    """Once per kind of tensor; a loss of speed by a warning."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with caplog.at_level("INFO", logger="rcm_kernels"):
        for _ in range(2):
            assert backends.CHOICE.settle("cpu", torch.float64, 12)[0] == "aten_cpu"
        assert [r.getMessage() for r in caplog.records] == [
            "attention backend on cpu, torch.float64, head dim 12: aten_cpu"
        ]
        if not torch.cuda.is_available():
            assert backends.CHOICE.decide("cuda", torch.bfloat16, 128)[0] == "reference"
            assert caplog.records[-1].levelname == "WARNING"
            for name in ("flash_attn_3: ", "cudnn: got cuDNN", "flash_attn_2: ", "aten_cuda: ", "triton: "):
                assert name in caplog.records[-1].getMessage()
