"""attention_jvp in Triton: one launch per block of keys, into which the carry of a ring is merged.

A program holds BLOCK_M queries of one head and walks over the keys by BLOCK_N. Letters: M queries, N keys of a tile, D head dim
(padded to a power of two), E the value dims of this program, all of them up to D = 128: two fp32 accumulators of 256 columns do
not fit into the registers, so that two programs then share the work, each with all the scores. Per tile, six matmuls (four without tk, tv):

    S = q k^T    tS = tq k^T + q tk^T    P = exp(S - running max)    o += P v    to += P tv + (P * (tS - c)) v

Both products of `to` go into one accumulator: a third one costs 64 registers a thread, which do not exist (kernels/README.md).
c is a constant per row, the mean of tS over a sample of the keys. It changes nothing but the rounding: (P * tS) v is rounded to bf16
before its matmul, and a tangent that is common to all keys would drown the rest. The sample is spread over all of them, so that a common
tangent may drift. See `_add_tile` for the two sums behind mu.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rcm_kernels.configs import Config, config_for
from rcm_kernels.flash_attention_jvp.reference import Carry, check_call, in_type, without_keys
from rcm_kernels.launch import check_tensors, last_dim_dense, launch, strides, tile_sizes, tile_types
from rcm_kernels.tiles import LN2, LOG2E, load_rows, round_factor


@triton.jit
def _sampled_mean(
    q, tq, k, tk, q_s, tq_s, k_s, tk_s, rows_left, num_keys, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_TK: tl.constexpr,
):  # fmt: skip
    """Mean of tS over at most BLOCK_N keys, evenly spaced, per row. The mean commutes with the product: no matmul is needed."""
    MASK_D: tl.constexpr = HEAD_DIM % BLOCK_D != 0
    rows_M, rows_N = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    step = tl.cdiv(num_keys, BLOCK_N)
    samples = tl.cdiv(num_keys, step)
    sampled_N = rows_N.to(tl.int64) * step
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    for d in tl.range(0, HEAD_DIM, BLOCK_D, num_stages=1):
        k_ND = load_rows(k + d, k_s, sampled_N, samples * step, HEAD_DIM - d, BLOCK_D, MASK_D).to(tl.float32)
        tq_MD = load_rows(tq + d, tq_s, rows_M, rows_left, HEAD_DIM - d, BLOCK_D, MASK_D).to(tl.float32)
        sum_M += tl.sum(tq_MD * tl.sum(k_ND, 0)[None, :], 1)
        if HAS_TK:
            tk_ND = load_rows(tk + d, tk_s, sampled_N, samples * step, HEAD_DIM - d, BLOCK_D, MASK_D).to(tl.float32)
            q_MD = load_rows(q + d, q_s, rows_M, rows_left, HEAD_DIM - d, BLOCK_D, MASK_D).to(tl.float32)
            sum_M += tl.sum(q_MD * tl.sum(tk_ND, 0)[None, :], 1)
    return sum_M * (scale / samples)


@triton.jit
def _add_scores(
    S_MN, tS_MN, q_MD, tq_MD, k, tk, k_s, tk_s, left, num_dims,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASK_D: tl.constexpr, HAS_TK: tl.constexpr,
    DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S and tS, before scaling, plus what these dims contribute."""
    rows_N = tl.arange(0, BLOCK_N)
    k_ND = load_rows(k, k_s, rows_N, left, num_dims, BLOCK_D, MASK_D).to(DOT_TYPE)
    S_MN = tl.dot(q_MD, tl.trans(k_ND), acc=S_MN, input_precision=PRECISION)
    tS_MN = tl.dot(tq_MD, tl.trans(k_ND), acc=tS_MN, input_precision=PRECISION)
    if HAS_TK:
        tk_ND = load_rows(tk, tk_s, rows_N, left, num_dims, BLOCK_D, MASK_D).to(DOT_TYPE)
        tS_MN = tl.dot(q_MD, tl.trans(tk_ND), acc=tS_MN, input_precision=PRECISION)
    return S_MN, tS_MN


@triton.jit
def _add_tile(
    acc_o_ME, acc_to_ME, peak_M, total_M, mu_M, mu_rounded_M, centre_M, limit_M,
    q_MD, tq_MD, q, tq, k, v, tk, tv, q_s, tq_s, k_s, v_s, tk_s, tv_s, start, rows_left, num_keys, scale, value_dims,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_TK: tl.constexpr, CHUNKED: tl.constexpr, P_TYPE: tl.constexpr, DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the tile of keys that begins at `start` to the running sums, which are in units of exp2(peak).

    Masks are applied to every tile: a second loop for the last one makes ptxas serialise the matmuls (Triton 3.7.1, sm_90a).
    """
    MASK_E: tl.constexpr = HEAD_DIM % BLOCK_E != 0
    rows_N, offset, left = tl.arange(0, BLOCK_N), tl.cast(start, tl.int64), num_keys - start
    S_MN, tS_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    k += offset * k_s
    if HAS_TK:
        tk += offset * tk_s
    if HEAD_DIM <= BLOCK_D:
        S_MN, tS_MN = _add_scores(
            S_MN, tS_MN, q_MD, tq_MD, k, tk, k_s, tk_s, left, HEAD_DIM,
            BLOCK_D, BLOCK_N, HEAD_DIM != BLOCK_D, HAS_TK, DOT_TYPE, PRECISION,
        )  # fmt: skip
    else:  # q and tq would not fit: they are read again for every tile of keys, by pieces of the head dim
        MASK_D: tl.constexpr = HEAD_DIM % BLOCK_D != 0
        rows_M = tl.arange(0, BLOCK_M)
        for d in tl.range(0, HEAD_DIM, BLOCK_D):
            piece_MD = load_rows(q + d, q_s, rows_M, rows_left, HEAD_DIM - d, BLOCK_D, MASK_D).to(DOT_TYPE)
            t_piece_MD = load_rows(tq + d, tq_s, rows_M, rows_left, HEAD_DIM - d, BLOCK_D, MASK_D).to(DOT_TYPE)
            S_MN, tS_MN = _add_scores(
                S_MN, tS_MN, piece_MD, t_piece_MD, k + d, tk + d if HAS_TK else tk, k_s, tk_s, left, HEAD_DIM - d,
                BLOCK_D, BLOCK_N, MASK_D, HAS_TK, DOT_TYPE, PRECISION,
            )  # fmt: skip
    S_MN = tl.where((start + rows_N)[None, :] < limit_M[:, None], S_MN, -float("inf"))
    new_peak_M = tl.maximum(peak_M, tl.max(S_MN, 1) * (scale * LOG2E))
    shift_M = new_peak_M
    if CHUNKED:  # a row that has seen no key yet: -inf - -inf would be NaN
        shift_M = tl.where(new_peak_M == -float("inf"), 0.0, new_peak_M)
    P_MN = tl.exp2(S_MN * (scale * LOG2E) - shift_M[:, None])
    decay_M = tl.exp2(peak_M - shift_M)
    PtS_MN = P_MN * (tS_MN * scale - centre_M[:, None])
    P_dot_MN, PtS_dot_MN = round_factor(P_MN, P_TYPE, DOT_TYPE), round_factor(PtS_MN, P_TYPE, DOT_TYPE)
    total_M = total_M * decay_M + tl.sum(P_MN, 1)
    mu_M = mu_M * decay_M + tl.sum(PtS_MN, 1)
    # What the matmul below really adds up. With it, `to` - mu o cancels the rounding of a key that dominates its row: on sharp
    # inputs (logits x16, bf16) the error of `to` falls from 6.5e-3 to 1.8e-3 (tools/emulate_jvp_rounding.py). The exact sum is what
    # the next block needs.
    mu_rounded_M = mu_rounded_M * decay_M + tl.sum(PtS_dot_MN.to(tl.float32), 1)
    acc_o_ME, acc_to_ME = acc_o_ME * decay_M[:, None], acc_to_ME * decay_M[:, None]
    v_NE = load_rows(v + offset * v_s, v_s, rows_N, left, value_dims, BLOCK_E, MASK_E).to(DOT_TYPE)
    acc_o_ME = tl.dot(P_dot_MN, v_NE, acc=acc_o_ME, input_precision=PRECISION)
    acc_to_ME = tl.dot(PtS_dot_MN, v_NE, acc=acc_to_ME, input_precision=PRECISION)
    if HAS_TK:
        tv_NE = load_rows(tv + offset * tv_s, tv_s, rows_N, left, value_dims, BLOCK_E, MASK_E).to(DOT_TYPE)
        acc_to_ME = tl.dot(P_dot_MN, tv_NE, acc=acc_to_ME, input_precision=PRECISION)
    return acc_o_ME, acc_to_ME, new_peak_M, total_M, mu_M, mu_rounded_M


# Lengths and offsets change with the layout and the ring step: one compilation serves all. Strides stay specialised, because
# loads are vectorised only where strides are known to divide by 16.
@triton.jit(do_not_specialize=["num_queries", "num_keys", "batch", "heads", "chunk", "q_offset", "k_offset"])
def forward_kernel(
    q, k, v, tq, tk, tv, o, to, lse, mu, carry_o, carry_to, carry_lse, carry_mu,
    q_s, q_b, q_n, k_s, k_b, k_n, v_s, v_b, v_n, tq_s, tq_b, tq_n, tk_s, tk_b, tk_n, tv_s, tv_b, tv_n,
    scale, num_queries, num_keys, batch, heads, chunk, q_offset, k_offset,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_TK: tl.constexpr, SAME_STRIDES: tl.constexpr, HAS_CARRY: tl.constexpr, CHUNKED: tl.constexpr,
    P_TYPE: tl.constexpr, DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of queries, fastest, so that the programs in flight share the keys of one head in L2; then batch * heads.

    o, to and the carry are contiguous [s, b, n, d], lse and mu [b, n, s]. SAME_STRIDES: tk has the strides of k, tv those of v,
    as in a stacked dual; the offsets of rows are then shared, which saves the registers that decide about spilling.
    """
    num_tiles = tl.cdiv(num_queries, BLOCK_M)
    head = (tl.program_id(0) // num_tiles).to(tl.int64)
    tile = tl.program_id(0) % num_tiles
    if CHUNKED:  # late queries see more keys: they start first
        tile = num_tiles - 1 - tile
    first, b, n = tile * BLOCK_M, head // heads, head % heads
    rows_M, rows_left = tl.arange(0, BLOCK_M), num_queries - first
    q_base = q + b * q_b + n * q_n + first.to(tl.int64) * q_s
    tq_base = tq + b * tq_b + n * tq_n + first.to(tl.int64) * tq_s
    q_MD, tq_MD = 0, 0
    if HEAD_DIM <= BLOCK_D:
        q_MD = load_rows(q_base, q_s, rows_M, rows_left, HEAD_DIM, BLOCK_D, HEAD_DIM != BLOCK_D).to(DOT_TYPE)
        tq_MD = load_rows(tq_base, tq_s, rows_M, rows_left, HEAD_DIM, BLOCK_D, HEAD_DIM != BLOCK_D).to(DOT_TYPE)
    first_value = tl.program_id(1) * BLOCK_E
    value_dims = HEAD_DIM - first_value
    k_base, v_base, tk_base, tv_base = k + b * k_b + n * k_n, v + b * v_b + n * v_n + first_value, tk, tv
    if HAS_TK:
        tk_base, tv_base = tk + b * tk_b + n * tk_n, tv + b * tv_b + n * tv_n + first_value
    if SAME_STRIDES:
        tk_s, tv_s = k_s, v_s

    # Every mask is a number of leading keys per query: the valid ones, or of these the ones up to the end of the query's chunk.
    limit_M, end = tl.zeros([BLOCK_M], tl.int32) + num_keys, num_keys
    if CHUNKED:
        limit_M = tl.minimum(((q_offset + first + rows_M) // chunk + 1) * chunk - k_offset, num_keys)
        end = tl.minimum(((q_offset + first + BLOCK_M - 1) // chunk + 1) * chunk - k_offset, num_keys)

    centre_M = _sampled_mean(
        q_base, tq_base, k_base, tk_base, q_s, tq_s, k_s, tk_s, rows_left, num_keys, scale,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_TK,
    )  # fmt: skip
    row_mask_M, cols_E = rows_M < rows_left, tl.arange(0, BLOCK_E)
    stats_M = head * num_queries + first + rows_M
    row_stride = batch.to(tl.int64) * heads * HEAD_DIM
    offsets_ME = head * HEAD_DIM + first_value + (first + rows_M)[:, None] * row_stride + cols_E[None, :]
    mask_ME = row_mask_M[:, None] & (cols_E < value_dims)[None, :]
    acc_o_ME = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    acc_to_ME = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    peak_M = tl.zeros([BLOCK_M], tl.float32) - float("inf")
    total_M = tl.zeros([BLOCK_M], tl.float32)
    mu_M = tl.zeros([BLOCK_M], tl.float32)
    if HAS_CARRY:  # one more key, of weight exp(lse), re-centred to this block
        peak_M = tl.load(carry_lse + stats_M, mask=row_mask_M, other=-float("inf")) * LOG2E
        total_M = tl.where(peak_M == -float("inf"), 0.0, 1.0)
        mu_M = (tl.load(carry_mu + stats_M, mask=row_mask_M, other=0.0) - centre_M) * total_M
        acc_o_ME = tl.load(carry_o + offsets_ME, mask=mask_ME, other=0.0)
        acc_to_ME = tl.load(carry_to + offsets_ME, mask=mask_ME, other=0.0) + mu_M[:, None] * acc_o_ME
    mu_rounded_M = mu_M

    for start in tl.range(0, end, BLOCK_N):
        acc_o_ME, acc_to_ME, peak_M, total_M, mu_M, mu_rounded_M = _add_tile(
            acc_o_ME, acc_to_ME, peak_M, total_M, mu_M, mu_rounded_M, centre_M, limit_M,
            q_MD, tq_MD, q_base, tq_base, k_base, v_base, tk_base, tv_base, q_s, tq_s, k_s, v_s, tk_s, tv_s,
            start, rows_left, num_keys, scale, value_dims,
            HEAD_DIM, BLOCK_D, BLOCK_E, BLOCK_M, BLOCK_N, HAS_TK, CHUNKED, P_TYPE, DOT_TYPE, PRECISION,
        )  # fmt: skip

    empty_M = total_M == 0.0
    inverse_M = 1.0 / tl.where(empty_M, 1.0, total_M)
    o_ME = acc_o_ME * inverse_M[:, None]
    to_ME = acc_to_ME * inverse_M[:, None] - (mu_rounded_M * inverse_M)[:, None] * o_ME
    mu_M = tl.where(empty_M, 0.0, centre_M + mu_M * inverse_M)
    lse_M = tl.where(empty_M, -float("inf"), (peak_M + tl.log2(tl.where(empty_M, 1.0, total_M))) * LN2)
    tl.store(o + offsets_ME, o_ME.to(o.dtype.element_ty), mask=mask_ME)
    tl.store(to + offsets_ME, to_ME.to(to.dtype.element_ty), mask=mask_ME)
    tl.store(lse + stats_M, lse_M, mask=row_mask_M)
    tl.store(mu + stats_M, mu_M, mask=row_mask_M)


@torch.no_grad()
def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor,
    tk: Tensor | None = None,
    tv: Tensor | None = None,
    *,
    valid_keys: int | None = None,
    scale: float | None = None,
    carry: Carry | None = None,
    chunk: int | None = None,
    q_offset: int = 0,
    k_offset: int = 0,
    out_dtype: torch.dtype | None = None,
    update_carry: bool = False,
    config: Config | None = None,
) -> Carry:
    """`reference.attention_jvp` on a GPU (or, with TRITON_INTERPRET=1, in the interpreter): same arguments, same results.

    `config` overrides the table of configurations; the tuning tool uses it.
    """
    num_keys, scale = check_call(q, k, tk, tv, valid_keys, scale, carry, chunk, out_dtype, update_carry)
    check_tensors(q, k, v, tq, tk, tv)
    if num_keys == 0:
        return without_keys(q, carry, out_dtype)
    q, k, v, tq, tk, tv = (last_dim_dense(x) for x in (q, k, v, tq, tk, tv))
    s, b, n, d = q.shape
    same_strides = tk is None or (tk.stride() == k.stride() and tv.stride() == v.stride())
    config = config or config_for("jvp", q, irregular=not same_strides or chunk is not None)
    grid = (triton.cdiv(s, config.block_m) * b * n, triton.cdiv(d, config.block_e))
    carry, outputs = _carry_and_outputs(q, carry, out_dtype, update_carry=update_carry, pieces=grid[1])
    launch(
        forward_kernel, grid, q, k, v, tq, tk, tv, *outputs, *carry, *strides(q, k, v, tq, tk, tv),
        scale, s, num_keys, b, n, chunk or 1, q_offset, k_offset,
        HAS_TK=tk is not None, SAME_STRIDES=same_strides, HAS_CARRY=carry[0] is not None, CHUNKED=chunk is not None,
        **tile_sizes(config, d), **tile_types(q.dtype),
    )  # fmt: skip
    return in_type(outputs, out_dtype)


def _carry_and_outputs(
    q: Tensor, carry: Carry | None, out_dtype: torch.dtype | None, *, update_carry: bool, pieces: int
) -> tuple[tuple[Tensor | None, ...], Carry]:
    """What the kernel reads of other blocks (four None without a carry), and what it writes; `pieces`: of the head dim, a program each."""
    if carry is None:
        return (None,) * 4, _new_outputs(q, out_dtype)
    carry = tuple(x.contiguous() for x in carry)
    if not update_carry:
        # With a carry the kernel stores fp32: on sm_90a bf16 results would cost 96 bytes of spills at head dim 128.
        return carry, _new_outputs(q, None)
    if pieces > 1:  # a program must not read the lse that another one has updated
        return (*carry[:2], carry[2].clone(), carry[3].clone()), carry
    return carry, carry


def _new_outputs(q: Tensor, out_dtype: torch.dtype | None) -> Carry:
    s, b, n, _ = q.shape
    o, to = (torch.empty(q.shape, dtype=out_dtype or torch.float32, device=q.device) for _ in range(2))
    lse, mu = (torch.empty((b, n, s), dtype=torch.float32, device=q.device) for _ in range(2))
    return o, to, lse, mu
