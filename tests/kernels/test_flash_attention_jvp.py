"""attention_jvp's reference against torch.func.jvp of dense attention in fp64."""

import functools

import pytest
import torch

from rcm_kernels.flash_attention_jvp import attention_jvp, merge_blocks, select_backend
from tests.helpers import assert_close, dense_attention, worst_row_error
from tools.measuring import PeakBytes

NAMES = ("o", "to", "lse", "mu")


def make_inputs(s, keys, *, b=3, n=2, d=16, seed=0, dtype=torch.float64):
    """q, k, v, tq, tk, tv."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (s, keys, keys, s, keys, keys)
    return [torch.randn(length, b, n, d, generator=generator, dtype=torch.float64).to(dtype) for length in lengths]


def oracle(q, k, v, tq, tk=None, tv=None, *, valid_keys=None, scale=None):
    """(o, to, lse, mu) in fp64, o and to by forward-mode automatic differentiation."""
    q, k, v, tq = (x.double() for x in (q, k, v, tq))
    tk, tv = (torch.zeros_like(x) if t is None else t.double() for x, t in ((k, tk), (v, tv)))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    attend = functools.partial(dense_attention, valid_keys=valid_keys, scale=scale)
    o, to = torch.func.jvp(attend, (q, k, v), (tq, tk, tv))

    def scores(q, k):
        return torch.einsum("sbnd,lbnd->bnsl", q, k[:valid_keys]) * scale

    S, tS = torch.func.jvp(scores, (q, k), (tq, tk))
    lse, mu = torch.func.jvp(lambda x: x.logsumexp(-1), (S,), (tS,))
    return o, to, lse, mu


def check(expected, got, *, rel, row=None):
    for name, ref, out in zip(NAMES, expected, got, strict=True):
        assert_close(name, ref, out, rel=rel, row=row)


@pytest.mark.parametrize("keys", [1, 15, 77, 999])
@pytest.mark.parametrize("d", [16, 40, 128])
def test_odd_shapes(keys, d):
    inputs = make_inputs(63, keys, d=d)
    expected = oracle(*inputs)
    got = attention_jvp(*inputs)
    assert [x.shape for x in got] == [(63, 3, 2, d)] * 2 + [(3, 2, 63)] * 2
    if keys == 1:  # one key: to = tv, and o = v whatever q is
        assert_close("to", inputs[5].expand_as(got[1]), got[1], rel=1e-13)
    check(expected, got, rel=1e-13, row=1e-12)


@pytest.mark.parametrize(("block_queries", "block_keys"), [(1, 1), (7, 5), (64, 13), (256, 999)])
def test_tiles_do_not_matter(block_queries, block_keys):
    inputs = make_inputs(13, 41)
    got = attention_jvp(*inputs, block_queries=block_queries, block_keys=block_keys)
    check(oracle(*inputs), got, rel=1e-13, row=1e-12)


def test_several_tiles_of_heads_and_the_default_blocks():
    inputs = make_inputs(300, 1100, b=1, n=3)
    check(oracle(*inputs), attention_jvp(*inputs), rel=1e-13, row=1e-12)


@pytest.mark.parametrize("valid_keys", [1, 5, 76, 77])
def test_padded_keys_are_never_read(valid_keys):
    q, k, v, tq, tk, tv = make_inputs(63, 77)
    expected = oracle(q, k, v, tq, tk, tv, valid_keys=valid_keys)
    for x in (k, v, tk, tv):
        x[valid_keys:] = torch.nan
    check(expected, attention_jvp(q, k, v, tq, tk, tv, valid_keys=valid_keys), rel=1e-13, row=1e-12)


def test_scale_and_strided_views():
    """q, k, v sliced out of a fused projection and out of a stacked Dual, and a transposed one."""
    s, b, n, d = 21, 3, 2, 16
    generator = torch.Generator().manual_seed(1)
    fused = torch.randn(s, 2 * b, n, 3, d, generator=generator, dtype=torch.float64)
    q, k, v = (fused[:, :b, :, i] for i in range(3))
    tq, tk, tv = (fused[:, b:, :, i] for i in range(3))
    k = k.transpose(0, 2).contiguous().transpose(0, 2)
    check(oracle(q, k, v, tq, tk, tv, scale=0.7), attention_jvp(q, k, v, tq, tk, tv, scale=0.7), rel=1e-13, row=1e-12)


def test_without_tangents_of_keys_and_values():
    q, k, v, tq, _, _ = make_inputs(63, 77)
    check(oracle(q, k, v, tq), attention_jvp(q, k, v, tq), rel=1e-13, row=1e-12)
    with pytest.raises(ValueError, match="only one of tk and tv"):
        attention_jvp(q, k, v, tq, k)


def test_chained_carries_equal_one_pass():
    q, k, v, tq, tk, tv = make_inputs(63, 100)
    carry = None
    for begin, end in ((0, 40), (40, 41), (41, 87), (87, 100)):
        block = [x[begin:end] for x in (k, v)], [x[begin:end] for x in (tk, tv)]
        carry = attention_jvp(q, *block[0], tq, *block[1], carry=carry)
    check(attention_jvp(q, k, v, tq, tk, tv), carry, rel=1e-13, row=1e-12)


def test_blocks_without_a_valid_key_merge():
    q, k, v, tq, tk, tv = make_inputs(11, 9)
    empty = attention_jvp(q, k, v, tq, tk, tv, valid_keys=0)
    assert bool((empty[2] == -torch.inf).all())
    assert all(not x.any() for x in (empty[0], empty[1], empty[3]))
    full = attention_jvp(q, k, v, tq, tk, tv)
    check(full, attention_jvp(q, k, v, tq, tk, tv, valid_keys=0, carry=full), rel=0)
    check(full, attention_jvp(q, k, v, tq, tk, tv, carry=empty), rel=1e-15)
    check(full, merge_blocks(full, empty), rel=1e-15)
    for name, ref, out in zip(NAMES, empty, merge_blocks(empty, empty), strict=True):
        assert torch.equal(ref, out), name


def test_carry_is_not_modified():
    inputs = make_inputs(11, 9)
    carry = attention_jvp(*inputs)
    before = [x.clone() for x in carry]
    attention_jvp(*inputs, carry=carry)
    assert all(torch.equal(x, y) for x, y in zip(before, carry, strict=True))


@pytest.mark.parametrize(("chunk", "q_offset", "k_offset"), [(1, 0, 0), (4, 3, 0), (5, 20, 12), (3, 0, 100)])
def test_masks_by_chunk(chunk, q_offset, k_offset):
    """One query at a time, over the keys that the definition leaves; rows that see none are empty."""
    q, k, v, tq, tk, tv = make_inputs(11, 17)
    got = attention_jvp(q, k, v, tq, tk, tv, chunk=chunk, q_offset=q_offset, k_offset=k_offset)
    for i in range(11):
        count = sum((j + k_offset) // chunk <= (i + q_offset) // chunk for j in range(17))
        row = [x[i : i + 1] for x in got[:2]] + [x[..., i : i + 1] for x in got[2:]]
        expected = attention_jvp(q[i : i + 1], k, v, tq[i : i + 1], tk, tv, valid_keys=count)
        if count:
            check(expected, row, rel=1e-12)
        else:
            assert all(torch.equal(x, y) for x, y in zip(expected, row, strict=True))


def test_results_in_the_carry_and_in_another_type():
    inputs = make_inputs(11, 9)
    first = attention_jvp(*inputs)
    expected = attention_jvp(*inputs, carry=first)
    o, to, lse, _ = attention_jvp(*inputs, carry=first, out_dtype=torch.bfloat16)
    assert (o.dtype, to.dtype, lse.dtype) == (torch.bfloat16, torch.bfloat16, torch.float64)
    updated = attention_jvp(*inputs, carry=first, update_carry=True)
    assert {x.dtype for x in updated} == {torch.float64}
    assert all(x.data_ptr() == y.data_ptr() for x, y in zip(updated, first, strict=True))
    check(expected, updated, rel=0)


def test_updating_the_carry_in_place_saves_memory():
    """The peak of a step beside its inputs and carry: o and to of the block, not those of the merged result too."""
    inputs = make_inputs(256, 256, n=8, d=128, dtype=torch.float32)
    carry = attention_jvp(*inputs)
    peaks = {}
    for update in (False, True):
        with PeakBytes() as tracked:
            attention_jvp(*inputs, carry=carry, update_carry=update)
        peaks[update] = tracked.peak
    assert peaks[True] <= peaks[False] - 1.5 * carry[0].nbytes, (peaks, carry[0].nbytes)


def test_linear_in_the_tangents():
    q, k, v, *first = make_inputs(15, 33)
    *_, ta, tb, tc = make_inputs(15, 33, seed=1)
    second = (ta, tb, tc)
    combined = [2 * x - 3 * y for x, y in zip(first, second, strict=True)]
    tangents = [attention_jvp(q, k, v, *t)[1::2] for t in (first, second, combined)]
    for name, a, b, both in zip(("to", "mu"), *tangents, strict=True):
        assert_close(name, 2 * a - 3 * b, both, rel=1e-13)


def test_constant_tangent_of_the_scores():
    """tk equal for all keys shifts a row of tS by a constant: to = P tv, mu = the constant."""
    q, k, v, tq, tk, tv = make_inputs(15, 33)
    tk = tk[:1].expand_as(tk)
    o_of_tv = attention_jvp(q, k, tv, tq)[0]
    _, to, _, mu = attention_jvp(q, k, v, torch.zeros_like(tq), tk, tv)
    assert_close("to", o_of_tv, to, rel=1e-13)
    assert_close("mu", (torch.einsum("sbnd,lbnd->bnsl", q, tk) / 4)[..., 0], mu, rel=1e-13)


def test_permutation_of_keys():
    q, k, v, tq, tk, tv = make_inputs(15, 33)
    order = torch.randperm(33, generator=torch.Generator().manual_seed(2))
    permuted = attention_jvp(q, k[order], v[order], tq, tk[order], tv[order], block_keys=7)
    check(attention_jvp(q, k, v, tq, tk, tv), permuted, rel=1e-13)


def hard_inputs(kind):
    q, k, v, tq, tk, tv = make_inputs(63, 128, d=64)
    if kind == "sharp":  # logits x16
        q = q * 16
    if kind == "common_mode":  # every row of tS is shifted by about 100 * |q| * scale
        tk = tk + 100
    if kind == "one_hot":  # row i sees key i alone
        k[:63] = 30 * torch.nn.functional.normalize(k[:63], dim=-1)
        q = k[:63].clone()
    return q, k, v, tq, tk, tv


@pytest.mark.parametrize(
    ("kind", "fp32", "bf16"),
    [("plain", 1e-6, 4e-3), ("sharp", 2e-5, 4e-3), ("common_mode", 2e-5, 4e-3), ("one_hot", 2e-5, 4e-3)],
)
@pytest.mark.parametrize("blocks", [1, 4])
def test_hard_inputs(kind, fp32, bf16, blocks):
    """fp32 and bf16 inputs against fp64 of the same rounded inputs; results rounded to bf16, whose floor is 2e-3."""
    for dtype, rel in ((torch.float32, fp32), (torch.bfloat16, bf16)):
        q, k, v, tq, tk, tv = (x.to(dtype) for x in hard_inputs(kind))
        carry = None
        for i in range(blocks):
            keys = [x[i * 128 // blocks : (i + 1) * 128 // blocks] for x in (k, v, tk, tv)]
            carry = attention_jvp(q, keys[0], keys[1], tq, keys[2], keys[3], carry=carry)
        assert {x.dtype for x in carry} == {torch.float32}
        check(oracle(q, k, v, tq, tk, tv), [x.to(dtype) for x in carry], rel=rel)


def test_row_error_sees_one_bad_row():
    ref = torch.ones(1000, 4)
    out = ref.clone()
    out[7] = 0
    assert worst_row_error(ref, out) == pytest.approx(1.0)


def test_bad_calls_say_what_they_need():
    inputs = make_inputs(3, 5)
    with pytest.raises(ValueError, match=r"valid_keys=6; need 0\.\.5"):
        attention_jvp(*inputs, valid_keys=6)
    with pytest.raises(ValueError, match="scale=-1; need a positive number"):
        attention_jvp(*inputs, scale=-1)
    with pytest.raises(ValueError, match="got chunk=0"):
        attention_jvp(*inputs, chunk=0)
    with pytest.raises(ValueError, match=r"got a carry of shape \(3, 3, 2, 16\)"):
        attention_jvp(*inputs, carry=[x.float() for x in attention_jvp(*inputs)])
    with pytest.raises(ValueError, match="got attention_jvp backend 'cutlass'; need one of auto, reference"):
        select_backend("cutlass")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_backend_that_cannot_run_is_an_error():
    with pytest.raises(ValueError, match="'triton', which cannot run here"):
        select_backend("triton")
