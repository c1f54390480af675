"""Every backend of plain attention that a CUDA device has, against fp64: as a ring calls it, and what the run takes of itself."""

import itertools

import pytest
import torch

from rcm_kernels.flash_attention import attention_backward, attention_forward, backend_for, backends, select_backend
from tests.helpers import assert_close, dense_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.timeout(900),
]
REL = {torch.bfloat16: 5e-3, torch.float16: 1e-3}


@pytest.fixture(params=["cudnn", "flash_attn_3", "flash_attn_2", "aten_cuda", "triton"])
def backend(request):
    """Skipped where its package is not installed, or is a cuDNN that is too old; any other refusal is a failure."""
    try:
        select_backend(request.param)
    except ValueError as error:
        if isinstance(error.__cause__, ImportError) or "got cuDNN" in str(error):
            pytest.skip(str(error))
        raise
    yield request.param
    select_backend("auto")


def inputs(queries, keys, d, dtype):
    """q, do and k, v: halves of stacks [s, 2b, n, d], b = 2."""
    generator = torch.Generator().manual_seed(0)
    stacks = (torch.randn(s, 4, 3, d, generator=generator).to("cuda", dtype) for s in (queries, keys))
    (q, do), (k, v) = (x.chunk(2, 1) for x in stacks)
    return q, k, v, do


def dense(q, k, v, do, **options):
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    o = dense_attention(*leaves, **options)
    return o.detach(), *torch.autograd.grad(o, leaves, do.double())


def check(expected, got, rel):
    for name, ref, out in zip(("o", "dq", "dk", "dv"), expected, got, strict=True):
        assert_close(name, ref, out, rel=rel if name == "o" else 2.5 * rel)


@pytest.mark.parametrize("dtype", list(REL), ids=str)
@pytest.mark.parametrize(("queries", "keys", "d"), [(63, 999, 128), (333, 77, 64), (200, 2, 128), (130, 515, 40)])
def test_blocks_of_keys_with_the_global_output(backend, queries, keys, d, dtype):
    """Odd lengths, a block of one key and an empty one; dq is summed in fp32."""
    q, k, v, do = inputs(queries, keys, d, dtype)
    o, lse = attention_forward(q, k, v, scale=0.1)
    scores = torch.einsum("sbnd,lbnd->bnsl", q.double(), k.double()) * 0.1
    assert_close("lse", scores.logsumexp(-1), lse, rel=1e-5)
    dq, parts = torch.zeros(q.shape, device="cuda"), []
    for a, b in itertools.pairwise((0, 1, 1, keys)):
        _, *grads = attention_backward(do, q, k[a:b], v[a:b], o, lse, scale=0.1, dq=dq)
        parts.append(grads)
    dk, dv = (torch.cat(x) for x in zip(*parts, strict=True))
    check(dense(q, k, v, do, scale=0.1), (o, dq, dk, dv), REL[dtype])


def test_one_key(backend):
    q, k, v, do = inputs(100, 1, 64, torch.bfloat16)
    o, lse = attention_forward(q, k, v)
    _, dk, dv = attention_backward(do, q, k, v, o, lse)
    assert_close("o", v.double().expand_as(o), o, rel=4e-3)
    assert_close("dv", do.double().sum(0, keepdim=True), dv, rel=1e-2)
    assert float(dk.abs().max()) < 1


def test_other_strides_of_the_output_and_its_gradient(backend):
    """The same shapes, and q, k, v of the same strides: a library that keeps what it compiled must not take it for these."""
    q, k, v, do = inputs(150, 300, 128, torch.bfloat16)
    o, lse = attention_forward(q, k, v, valid_keys=290)
    expected = dense(q, k, v, do, valid_keys=290)
    heads_first = [x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3) for x in (do, o)]
    for do_here, o_here in ((do.contiguous(), o), heads_first, (do, o)):
        got = attention_backward(do_here, q, k, v, o_here, lse.mT.contiguous().mT, valid_keys=290)
        check(expected, (o_here, *got), REL[torch.bfloat16])


@pytest.mark.parametrize("dtype", list(REL), ids=str)
def test_what_a_run_takes(dtype):
    """Never the reference, on a GPU of 8.0 or later."""
    select_backend("auto")
    for d in (64, 128, 256):
        assert backend_for(torch.empty(1, 1, 1, d, dtype=dtype, device="cuda")).name != "reference"
    assert backends.backend_for(torch.empty(1, 1, 1, 64, dtype=torch.float32, device="cuda")).name == "triton"
