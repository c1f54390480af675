"""The Triton kernels on a GPU against fp64: what tests/kernels/interpreted_*.py shows in the interpreter, in bf16.

`bash tests/gpu/run.sh` runs these and the benchmarks.
"""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from rcm_kernels.flash_attention import attention_backward, attention_forward, backends, select_backend
from rcm_kernels.flash_attention_jvp import reference, triton_impl
from tests.helpers import assert_close, dense_attention, relative_error
from tests.kernels.jvp_cases import HARD, NAMES, hard_inputs, make_inputs, same_precision

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.timeout(900),
]
REL = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 1e-5}
kernel = triton_impl.attention_jvp


@pytest.fixture
def inputs_of():
    def make(s, keys, *, dtype=torch.bfloat16, **sizes):
        return make_inputs(s, keys, dtype=dtype, device="cuda", **sizes)

    return make


def oracle(*inputs, **options):
    return reference.attention_jvp(*(None if x is None else x.double() for x in inputs), **options)


def check(expected, got, *, rel=REL[torch.bfloat16]):
    for name, ref, out in zip(NAMES, expected, got, strict=True):
        if name == "lse":
            assert torch.equal(ref == -torch.inf, out == -torch.inf), name
            ref, out = (x.masked_fill(x == -torch.inf, 0) for x in (ref, out))
        assert_close(name, ref, out, rel=rel)


@pytest.mark.parametrize("dtype", list(REL))
@pytest.mark.parametrize("keys", [1, 15, 77, 999])
@pytest.mark.parametrize("d", [16, 40, 64, 96, 128, 256])
def test_odd_shapes(inputs_of, dtype, keys, d):
    inputs = inputs_of(63, keys, d=d, b=3, dtype=dtype)
    expected = oracle(*inputs)
    check(expected, kernel(*inputs), rel=REL[dtype])
    carry = kernel(*inputs)
    check(oracle(*inputs, carry=expected), kernel(*inputs, carry=carry, update_carry=True), rel=REL[dtype])
    check(oracle(*inputs[:4]), kernel(*inputs[:4]), rel=REL[dtype])


def test_many_tiles_heads_and_batches(inputs_of):
    inputs = inputs_of(1000, 1500, d=128, b=2, n=5)
    check(oracle(*inputs), kernel(*inputs))


def test_stacked_dual_and_strides():
    s, b, n, d = 333, 2, 4, 128
    fused = torch.randn(s, 2 * b, n, 3, d, device="cuda").bfloat16()
    q, k, v = (fused[:, :b, :, i] for i in range(3))
    tq, tk, tv = (fused[:, b:, :, i] for i in range(3))
    expected = oracle(q, k, v, tq, tk, tv, scale=0.05)
    check(expected, kernel(q, k, v, tq, tk, tv, scale=0.05))
    k, tv = (x.transpose(0, 2).contiguous().transpose(0, 2) for x in (k, tv))
    check(expected, kernel(q, k, v, tq, tk, tv, scale=0.05))


def test_offsets_beyond_32_bits():
    """Rows 2^23 elements apart: the last of 300 keys begins at element 2.5e9."""
    rows = torch.empty(300, 1, 2**23, device="cuda", dtype=torch.bfloat16)
    k, v, tk, tv = (rows[..., i * 128 : (i + 1) * 128].unsqueeze(2) for i in range(4))
    generator = torch.Generator("cuda").manual_seed(0)
    for x in (k, v, tk, tv):
        x.copy_(torch.randn(x.shape, device="cuda", generator=generator))
    q, tq = (torch.randn(70, 1, 1, 128, device="cuda", generator=generator).bfloat16() for _ in range(2))
    check(oracle(q, k, v, tq, tk, tv), kernel(q, k, v, tq, tk, tv))


@pytest.mark.parametrize("valid_keys", [1, 64, 700])
def test_padded_keys_are_never_read(inputs_of, valid_keys):
    inputs = inputs_of(333, 777, d=128)
    expected = oracle(*inputs, valid_keys=valid_keys)
    for x in (*inputs[1:3], *inputs[4:]):
        x[valid_keys:] = torch.nan
    check(expected, kernel(*inputs, valid_keys=valid_keys))


def test_carries_chained_over_four_blocks_equal_one_pass(inputs_of):
    q, k, v, tq, tk, tv = inputs_of(333, 1000, d=128)
    carry = None
    for begin, end in itertools.pairwise((0, 400, 401, 870, 1000)):
        keys = [x[begin:end] for x in (k, v, tk, tv)]
        carry = kernel(q, *keys[:2], tq, *keys[2:], carry=carry, update_carry=carry is not None)
    check(oracle(q, k, v, tq, tk, tv), carry)


@pytest.mark.parametrize(("chunk", "q_offset", "k_offset"), [(1, 0, 0), (100, 0, 0), (1, 50, 400), (60, 300, 480)])
def test_causal_and_block_causal(inputs_of, chunk, q_offset, k_offset):
    inputs = inputs_of(333, 777, d=128)
    options = {"chunk": chunk, "q_offset": q_offset, "k_offset": k_offset}
    check(oracle(*inputs, **options), kernel(*inputs, **options))


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("keys", [256, 32768])
def test_hard_inputs(kind, keys):
    """At most twice the error of PyTorch with the same precision, or twice the rounding of bf16."""
    inputs = hard_inputs(kind, keys=keys, d=128, dtype=torch.bfloat16, device="cuda")
    expected, by_torch = oracle(*inputs), same_precision(*inputs)
    for name, ref, theirs, ours in zip(NAMES, expected, by_torch, kernel(*inputs), strict=True):
        floor = 1e-3 if name in ("o", "to") else 5e-6
        assert_close(name, ref, ours, rel=2 * max(relative_error(ref, theirs), floor))


def test_one_compilation_for_all_lengths(inputs_of):
    """Lengths, valid keys and offsets are run-time arguments."""
    counts = []
    for keys, valid in ((1, 1), (16, 15), (4095, 4000), (4096, 4096)):
        kernel(*inputs_of(keys, keys, d=128), valid_keys=valid)
        counts.append(len(triton_impl.forward_kernel.device_caches[torch.cuda.current_device()][0]))
    assert counts == counts[:1] * 4, counts


@pytest.mark.parametrize("dtype", list(REL))
@pytest.mark.parametrize(("keys", "d", "valid_keys"), [(1, 16, None), (77, 40, 70), (999, 128, 998), (300, 256, None)])
def test_plain_backward_with_an_outside_lse(dtype, keys, d, valid_keys):
    select_backend("triton")
    try:
        q, k, v, do, *_ = make_inputs(333, keys, d=d, dtype=dtype, device="cuda")
        leaves = [x.double().requires_grad_() for x in (q, k, v)]
        o_ref = dense_attention(*leaves, valid_keys=valid_keys)
        expected = torch.autograd.grad(o_ref, leaves, do.double())
        o, lse = attention_forward(q, k, v, valid_keys=valid_keys)
        rel = 2.5 * REL[dtype]
        assert_close("o", o_ref.detach(), o, rel=rel)
        dq = torch.zeros(q.shape, device="cuda")
        half = (valid_keys or keys) // 2
        parts = [
            attention_backward(do, q, k[a:b], v[a:b], o, lse, dq=dq) for a, b in ((0, half), (half, valid_keys or keys))
        ]
        dk, dv = (torch.cat([part[i] for part in parts]) for i in (1, 2))
        count = valid_keys or keys
        for name, ref, out in zip(("dq", "dk", "dv"), expected, (dq, dk, dv), strict=True):
            ref = ref[:count] if name != "dq" else ref
            if keys == 1 and name in ("dq", "dk"):  # exactly 0: what is left is rounding
                assert float(out.abs().max()) < 0.1
            else:
                assert_close(name, ref, out, rel=rel)
    finally:
        select_backend("auto")


def test_fp32_attention_chooses_triton():
    q = torch.zeros(3, 1, 2, 64, device="cuda")
    assert backends.backend_for(q).name == "triton"
