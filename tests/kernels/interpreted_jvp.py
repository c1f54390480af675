"""attention_jvp's Triton kernel in the interpreter against the reference in fp64. See test_triton_interpreter.py."""

import itertools
import os

import pytest
import torch

from rcm_kernels.configs import Config
from rcm_kernels.flash_attention_jvp import attention_jvp, reference, select_backend, triton_impl
from tests.helpers import assert_close, relative_error
from tests.kernels.jvp_cases import HARD, NAMES, hard_inputs, make_inputs, rows_far_apart, same_precision

assert os.environ.get("TRITON_INTERPRET") == "1", "run me with TRITON_INTERPRET=1"
FP32 = 5e-6


def oracle(*inputs, **options):
    return reference.attention_jvp(*(None if x is None else x.double() for x in inputs), **options)


def kernel(*inputs, block_m=64, block_n=64, block_d=None, block_e=None, **options):
    d = triton_impl.config_for("jvp", inputs[0]).block_d
    config = Config(block_m, block_n, block_d or d, block_e or d, 4, 1)
    return triton_impl.attention_jvp(*inputs, config=config, **options)


def check(expected, got, *, rel=FP32, row=None):
    for name, ref, out in zip(NAMES, expected, got, strict=True):
        if name == "lse":  # rows without a key
            assert torch.equal(ref == -torch.inf, out == -torch.inf), name
            ref, out = (x.masked_fill(x == -torch.inf, 0) for x in (ref, out))
        assert_close(name, ref, out, rel=rel, row=row)


@pytest.mark.parametrize(("keys", "d"), [(1, 16), (15, 128), (77, 40), (999, 32)])
@pytest.mark.parametrize("cross", [False, True])
def test_odd_shapes(keys, d, cross):
    inputs = make_inputs(63, keys, d=d)[: 4 if cross else 6]
    got = kernel(*inputs, block_n=256 if keys == 999 else 32)
    assert [x.shape for x in got] == [(63, 1, 2, d)] * 2 + [(1, 2, 63)] * 2
    assert {x.dtype for x in got} == {torch.float32}
    check(oracle(*inputs), got, row=10 * FP32)


@pytest.mark.parametrize(
    ("d", "block_d", "block_e"), [(256, 256, 64), (100, 32, 64), (64, 32, 16), (24, 32, 16), (8, 16, 16)]
)
def test_head_dim_in_pieces(d, block_d, block_e):
    inputs = make_inputs(31, 45, d=d, n=1)
    carry = kernel(*inputs)
    check(oracle(*inputs), carry)
    got = kernel(*inputs, block_d=block_d, block_e=block_e, carry=carry, update_carry=True)
    check(oracle(*inputs, carry=[x.double() for x in oracle(*inputs)]), got)


def test_fp16():
    inputs = make_inputs(63, 77, d=64, dtype=torch.float16)
    check(oracle(*inputs), kernel(*inputs), rel=5e-4)


def test_default_config_batch_strides_and_scale():
    """Several tiles of queries; q, k, v and tangents sliced out of a fused projection of a stacked dual; a transposed one."""
    s, b, n, d = 45, 2, 2, 16
    fused = torch.randn(s, 2 * b, n, 3, d, generator=torch.Generator().manual_seed(1))
    q, k, v = (fused[:, :b, :, i] for i in range(3))
    tq, tk, tv = (fused[:, b:, :, i] for i in range(3))
    pointers = [x.data_ptr() for x in (q, k, v, tq, tk, tv)]
    seen = [triton_impl.last_dim_dense(x).data_ptr() for x in (q, k, v, tq, tk, tv)]
    assert pointers == seen, "views of a stacked dual were copied"
    expected = oracle(q, k, v, tq, tk, tv, scale=0.7)
    check(expected, triton_impl.attention_jvp(q, k, v, tq, tk, tv, scale=0.7))
    k, tv = (x.transpose(0, 2).contiguous().transpose(0, 2) for x in (k, tv))
    check(expected, triton_impl.attention_jvp(q, k, v, tq, tk, tv, scale=0.7))
    last_dim_strided = v.transpose(0, 3).contiguous().transpose(0, 3)
    check(expected, triton_impl.attention_jvp(q, k, last_dim_strided, tq, tk, tv, scale=0.7))


def test_offsets_beyond_32_bits(tmp_path):
    """Of queries and of keys."""
    inputs = rows_far_apart(tmp_path / "rows", 300, tensors=6)
    check(oracle(*inputs), kernel(*inputs, block_m=128, block_n=128), rel=5e-4)


@pytest.mark.parametrize("valid_keys", [1, 64, 70])
def test_padded_keys_are_never_read(valid_keys):
    q, k, v, tq, tk, tv = make_inputs(31, 77, n=1)
    expected = oracle(q, k, v, tq, tk, tv, valid_keys=valid_keys)
    for x in (k, v, tk, tv):
        x[valid_keys:] = torch.nan
    check(expected, kernel(q, k, v, tq, tk, tv, valid_keys=valid_keys, block_n=32))


def test_carries_chained_over_four_blocks_equal_one_pass():
    q, k, v, tq, tk, tv = make_inputs(63, 100)
    expected, carry = oracle(q, k, v, tq, tk, tv), None
    for begin, end in itertools.pairwise((0, 40, 41, 87, 100)):
        keys = [x[begin:end] for x in (k, v, tk, tv)]
        update = begin == 41
        before = [x.clone() for x in carry or ()]
        old, carry = carry, kernel(q, *keys[:2], tq, *keys[2:], carry=carry, update_carry=update)
        if update:
            assert [x.data_ptr() for x in carry] == [x.data_ptr() for x in old]
        elif old is not None:
            assert all(torch.equal(x, y) for x, y in zip(before, old, strict=True)), "the carry was modified"
    check(expected, carry, row=10 * FP32)


def test_blocks_without_a_valid_key():
    inputs = make_inputs(11, 9)
    empty = kernel(*inputs, valid_keys=0)
    assert bool((empty[2] == -torch.inf).all())
    assert not any(x.any() for x in (empty[0], empty[1], empty[3]))
    full = kernel(*inputs)
    check(full, kernel(*inputs, valid_keys=0, carry=full), rel=0)
    check(full, kernel(*inputs, carry=empty), rel=1e-6)
    hidden = kernel(*inputs, chunk=1, k_offset=100)  # all keys lie in the future of all queries
    check(empty, hidden, rel=0)
    check(empty, kernel(*inputs, chunk=1, k_offset=100, carry=empty), rel=0)
    check(full, kernel(*inputs, chunk=1, k_offset=100, carry=full), rel=1e-6)


@pytest.mark.parametrize(
    ("chunk", "q_offset", "k_offset"), [(1, 0, 0), (10, 0, 0), (1, 5, 40), (16, 64, 48), (7, 20, 45), (100, 0, 0)]
)
def test_causal_and_block_causal(chunk, q_offset, k_offset):
    inputs = make_inputs(45, 77, n=1)
    options = {"chunk": chunk, "q_offset": q_offset, "k_offset": k_offset}
    scores = torch.zeros(45, 77)
    for i in range(45):  # the definition, by hand
        visible = (torch.arange(77) + k_offset) // chunk <= (i + q_offset) // chunk
        scores[i] = torch.where(visible, 0.0, -torch.inf)
    expected = oracle(*inputs, **options)
    S = torch.einsum("sbnd,lbnd->bnsl", inputs[0].double(), inputs[1].double()) / 4 + scores
    lse = S.logsumexp(-1)
    seen = lse != -torch.inf
    assert_close("lse of the reference", lse[seen], expected[2][seen], rel=1e-12)
    check(expected, kernel(*inputs, block_m=16, block_n=16, **options))


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("update", [False, True])
def test_rows_that_see_keys_in_the_carry_alone_in_the_block_alone_in_both_or_in_neither(cross, update):
    """Masks by chunk over two blocks of keys with padding, batch 2: of 24 queries 0..3 see nothing, 4..11 the first block alone.

    In the other order the first block that comes, as a carry, is empty for 0..11.
    """
    q, k, v, tq, tk, tv = make_inputs(24, 20, b=2)
    options = {"chunk": 4, "q_offset": 0}
    # by the position of the first key; of the second 12 of 13 keys are valid
    blocks = {4: slice(0, 7), 12: slice(7, 20)}
    visible = torch.full((24, 20), False)
    for begin, rows in blocks.items():
        positions = begin + torch.arange(rows.stop - rows.start)
        visible[:, rows] = positions[None] // 4 <= torch.arange(24)[:, None] // 4
    visible[:, 19] = False
    assert visible.any(1).tolist() == [False] * 4 + [True] * 20
    for order in ((4, 12), (12, 4)):
        carry = None
        for begin in order:
            keys = [x[blocks[begin]] for x in (k, v, tk, tv)]
            tangents = [] if cross else keys[2:]
            here = options | {"k_offset": begin, "valid_keys": 12 if begin == 12 else 7}
            update_here = update and carry is not None
            carry = kernel(
                q, *keys[:2], tq, *tangents, carry=carry, update_carry=update_here, block_m=16, block_n=16, **here
            )
        for i in range(24):
            keys = [x[visible[i]] for x in (k, v, tk, tv)]
            expected = oracle(q[i : i + 1], *keys[:2], tq[i : i + 1], *([] if cross else keys[2:]))
            check(expected, [x[i : i + 1] for x in carry[:2]] + [x[..., i : i + 1] for x in carry[2:]])


def test_causal_ring_of_two_ranks():
    """The second half of the queries over both blocks of keys, with global offsets."""
    q, k, v, tq, tk, tv = make_inputs(64, 64, n=1)
    expected = oracle(q, k, v, tq, tk, tv, chunk=8)
    carry, rows = None, slice(32, 64)
    for begin in (32, 0):
        keys = [x[begin : begin + 32] for x in (k, v, tk, tv)]
        options = {"carry": carry, "chunk": 8, "q_offset": 32, "k_offset": begin}
        carry = kernel(q[rows], *keys[:2], tq[rows], *keys[2:], block_m=16, block_n=16, **options)
    check([x[rows] for x in expected[:2]] + [x[..., rows] for x in expected[2:]], carry)


def test_output_type_of_the_last_step():
    inputs = make_inputs(15, 33)
    carry = kernel(*inputs)
    o, to, lse, _ = kernel(*inputs, carry=carry, out_dtype=torch.float16)
    assert (o.dtype, to.dtype, lse.dtype) == (torch.float16, torch.float16, torch.float32)
    assert_close("o", carry[0], o, rel=1e-3)
    with pytest.raises(ValueError, match="update_carry with out_dtype"):
        kernel(*inputs, carry=carry, out_dtype=torch.float16, update_carry=True)


def test_linear_in_the_tangents():
    q, k, v, *first = make_inputs(15, 33)
    *_, ta, tb, tc = make_inputs(15, 33, seed=1)
    second = (ta, tb, tc)
    combined = [2 * x - 3 * y for x, y in zip(first, second, strict=True)]
    tangents = [kernel(q, k, v, *t)[1::2] for t in (first, second, combined)]
    for name, a, b, both in zip(("to", "mu"), *tangents, strict=True):
        assert_close(name, 2 * a - 3 * b, both, rel=FP32)


def test_constant_tangent_of_the_scores():
    """tk equal for all keys shifts a row of tS by a constant: to = P tv, mu = the constant."""
    q, k, v, tq, tk, tv = make_inputs(15, 33)
    tk = tk[:1].expand_as(tk)
    _, to, _, mu = kernel(q, k, v, torch.zeros_like(tq), tk, tv, block_n=16)
    assert_close("to", oracle(q, k, tv, tq)[0], to, rel=FP32)
    assert_close("mu", (torch.einsum("sbnd,lbnd->bnsl", q, tk) / 4)[..., 0], mu, rel=FP32)


def test_permutation_of_keys():
    q, k, v, tq, tk, tv = make_inputs(15, 33)
    order = torch.randperm(33, generator=torch.Generator().manual_seed(2))
    permuted = kernel(q, k[order], v[order], tq, tk[order], tv[order], block_n=16)
    check(kernel(q, k, v, tq, tk, tv), permuted)


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hard_inputs(kind, dtype):
    """At most twice the error of a PyTorch reference of the same precision, in one pass and over four blocks.

    bf16 is exact here but for what the kernel rounds itself, see `launch.dot_types`. The floor is the type's own rounding.
    """
    inputs = hard_inputs(kind, dtype=dtype)
    q, k, v, tq, tk, tv = inputs
    carry = None
    for i in range(4):
        keys = [x[i * 64 : (i + 1) * 64] for x in (k, v, tk, tv)]
        carry = kernel(q, *keys[:2], tq, *keys[2:], carry=carry, update_carry=True)
    check_against_torch(inputs, {"one pass": kernel(*inputs), "four blocks": carry})


def check_against_torch(inputs, results, *, mu_floor=5e-7):
    expected, by_torch = oracle(*inputs), same_precision(*inputs)
    floor = {"lse": 5e-7, "mu": mu_floor}
    floor |= dict.fromkeys(("o", "to"), 1e-3 if inputs[0].dtype == torch.bfloat16 else 5e-7)
    for how, got in results.items():
        for name, ref, theirs, ours in zip(NAMES, expected, by_torch, got, strict=True):
            assert_close(f"{name} in {how}", ref, ours, rel=2 * max(relative_error(ref, theirs), floor[name]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_32k_uniform_keys(dtype):
    """Sums of many small weights. mu is the mean of numbers of both signs, 200 times smaller than they are."""
    inputs = hard_inputs("uniform", keys=32768, d=16, dtype=dtype)
    check_against_torch(inputs, {"one pass": kernel(*inputs, block_n=1024)}, mu_floor=FP32)


def test_the_backend_is_chosen_by_name_and_refuses_what_it_cannot_do():
    inputs = make_inputs(3, 5)
    select_backend("triton")
    by_name = attention_jvp(*inputs)
    select_backend("auto")
    assert all(torch.equal(x, y) for x, y in zip(by_name, triton_impl.attention_jvp(*inputs), strict=True))
    check(by_name, attention_jvp(*inputs))
    with pytest.raises(ValueError, match="got torch.float64; need float32"):
        triton_impl.attention_jvp(*make_inputs(3, 5, dtype=torch.float64)[:4])
    with pytest.raises(ValueError, match="head dim 257; need at most 256"):
        triton_impl.attention_jvp(*make_inputs(3, 5, d=257)[:4])
    with pytest.raises(ValueError, match="got torch.float16 on cpu beside torch.float32"):
        triton_impl.attention_jvp(*make_inputs(3, 5)[:3], make_inputs(3, 5, dtype=torch.float16)[3])
    far = torch.empty(2, 2**24)[:, :32].view(2, 1, 2, 16)
    with pytest.raises(ValueError, match="got tokens 16777216 elements apart"):
        triton_impl.attention_jvp(far, far, far, far)
