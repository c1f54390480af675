"""Plain attention in Triton, whose backward takes o and lse of all keys from outside and adds dq to an fp32 sum: a ring's step.

The backward is one kernel, run twice, without atomics, so that gradients are the same in every run: seven matmuls where atomics
would need five. Per tile, with delta = sum(do * o) over the head dim and dS = P * (do v^T - delta):

    queries stay, keys pass:   dq += dS k               keys stay, queries pass:   dk += dS^T q,  dv += P^T do

Letters: M rows that stay, N rows of a tile that passes, D head dim, E the head dims of the result that this program makes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rcm_kernels.configs import Config, config_for
from rcm_kernels.launch import check_tensors, last_dim_dense, launch, strides, tile_sizes, tile_types
from rcm_kernels.tiles import LN2, LOG2E, load_rows, round_factor


@triton.jit
def _product(
    left_MD, left, right, left_s, right_s, rows_left, rows_right,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """left right^T. `left_MD` is held where the head dim fits, and else read again by pieces."""
    MASK_D: tl.constexpr = HEAD_DIM % BLOCK_D != 0
    rows_M, rows_N = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    if HEAD_DIM <= BLOCK_D:
        right_ND = load_rows(right, right_s, rows_N, rows_right, HEAD_DIM, BLOCK_D, MASK_D).to(DOT_TYPE)
        return tl.dot(left_MD, tl.trans(right_ND), input_precision=PRECISION)
    else:
        S_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for d in tl.range(0, HEAD_DIM, BLOCK_D):
            piece_MD = load_rows(left + d, left_s, rows_M, rows_left, HEAD_DIM - d, BLOCK_D, MASK_D).to(DOT_TYPE)
            right_ND = load_rows(right + d, right_s, rows_N, rows_right, HEAD_DIM - d, BLOCK_D, MASK_D).to(DOT_TYPE)
            S_MN = tl.dot(piece_MD, tl.trans(right_ND), acc=S_MN, input_precision=PRECISION)
        return S_MN


@triton.jit(do_not_specialize=["num_queries", "num_keys", "batch", "heads"])
def forward_kernel(
    q, k, v, o, lse, q_s, q_b, q_n, k_s, k_b, k_n, v_s, v_b, v_n, scale, num_queries, num_keys, batch, heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    P_TYPE: tl.constexpr, DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o contiguous [s, b, n, d], lse [b, n, s]. Grid: (tiles of queries, fastest, times batch * heads; pieces of the head dim)."""
    num_tiles = tl.cdiv(num_queries, BLOCK_M)
    head = (tl.program_id(0) // num_tiles).to(tl.int64)
    first, b, n = tl.program_id(0) % num_tiles * BLOCK_M, head // heads, head % heads
    first_value = tl.program_id(1) * BLOCK_E
    MASK_E: tl.constexpr = HEAD_DIM % BLOCK_E != 0
    rows_M, rows_N, rows_left = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), num_queries - first
    q_base = q + b * q_b + n * q_n + first.to(tl.int64) * q_s
    k_base, v_base = k + b * k_b + n * k_n, v + b * v_b + n * v_n + first_value
    q_MD = 0
    if HEAD_DIM <= BLOCK_D:
        q_MD = load_rows(q_base, q_s, rows_M, rows_left, HEAD_DIM, BLOCK_D, HEAD_DIM != BLOCK_D).to(DOT_TYPE)
    acc_ME = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    peak_M = tl.zeros([BLOCK_M], tl.float32) - float("inf")
    total_M = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(0, num_keys, BLOCK_N):
        offset, left = tl.cast(start, tl.int64), num_keys - start
        S_MN = _product(
            q_MD, q_base, k_base + offset * k_s, q_s, k_s, rows_left, left,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, DOT_TYPE, PRECISION,
        )  # fmt: skip
        S_MN = tl.where((rows_N < left)[None, :], S_MN, -float("inf"))
        new_peak_M = tl.maximum(peak_M, tl.max(S_MN, 1) * (scale * LOG2E))
        P_MN = tl.exp2(S_MN * (scale * LOG2E) - new_peak_M[:, None])
        decay_M = tl.exp2(peak_M - new_peak_M)
        total_M = total_M * decay_M + tl.sum(P_MN, 1)
        v_NE = load_rows(v_base + offset * v_s, v_s, rows_N, left, HEAD_DIM - first_value, BLOCK_E, MASK_E).to(DOT_TYPE)
        P_dot_MN = round_factor(P_MN, P_TYPE, DOT_TYPE)
        acc_ME = tl.dot(P_dot_MN, v_NE, acc=acc_ME * decay_M[:, None], input_precision=PRECISION)
        peak_M = new_peak_M
    mask_M, cols_E = rows_M < rows_left, first_value + tl.arange(0, BLOCK_E)
    offsets_ME = head * HEAD_DIM + (first + rows_M)[:, None] * (batch.to(tl.int64) * heads * HEAD_DIM) + cols_E[None, :]
    o_ME = (acc_ME / total_M[:, None]).to(o.dtype.element_ty)
    tl.store(o + offsets_ME, o_ME, mask=mask_M[:, None] & (cols_E < HEAD_DIM)[None, :])
    tl.store(lse + head * num_queries + first + rows_M, (peak_M + tl.log2(total_M)) * LN2, mask=mask_M)


@triton.jit(do_not_specialize=["num_queries", "heads"])
def delta_kernel(
    do, o, delta, do_s, do_b, do_n, o_s, o_b, o_n, num_queries, heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta [b, n, s] = sum of do * o over the head dim."""
    num_tiles = tl.cdiv(num_queries, BLOCK_M)
    head = (tl.program_id(0) // num_tiles).to(tl.int64)
    first, b, n = tl.program_id(0) % num_tiles * BLOCK_M, head // heads, head % heads
    rows_M, left = tl.arange(0, BLOCK_M), num_queries - first
    do_base = do + b * do_b + n * do_n + first.to(tl.int64) * do_s
    o_base = o + b * o_b + n * o_n + first.to(tl.int64) * o_s
    do_MD = load_rows(do_base, do_s, rows_M, left, HEAD_DIM, BLOCK_D, HEAD_DIM != BLOCK_D).to(tl.float32)
    o_MD = load_rows(o_base, o_s, rows_M, left, HEAD_DIM, BLOCK_D, HEAD_DIM != BLOCK_D).to(tl.float32)
    tl.store(delta + head * num_queries + first + rows_M, tl.sum(do_MD * o_MD, 1), mask=rows_M < left)


@triton.jit
def _rows_of_statistics(base, rows, left):
    """Rows of lse in units of log2. A row without keys has lse = -inf and no weights: +inf makes them 0, as for rows outside."""
    lse = tl.load(base + rows, mask=rows < left, other=float("inf")) * LOG2E
    return tl.where(lse == -float("inf"), float("inf"), lse)


@triton.jit(do_not_specialize=["num_stay", "num_pass", "num_queries", "batch", "heads"])
def backward_kernel(
    stay1, stay2, pass1, pass2, lse, delta, grad1, grad2,
    stay1_s, stay1_b, stay1_n, stay2_s, stay2_b, stay2_n, pass1_s, pass1_b, pass1_n, pass2_s, pass2_b, pass2_n,
    scale, num_stay, num_pass, num_queries, batch, heads,
    KEYS_STAY: tl.constexpr, ACCUMULATE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    P_TYPE: tl.constexpr, DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(stay1, stay2, pass1, pass2) is (q, do, k, v) and grad1 is dq, or (k, v, q, do) with KEYS_STAY and the grads are dk, dv.

    Grads are contiguous [rows, b, n, d]. ACCUMULATE adds to grad1. Grid: as in `forward_kernel`.
    """
    num_tiles = tl.cdiv(num_stay, BLOCK_M)
    head = (tl.program_id(0) // num_tiles).to(tl.int64)
    first, b, n = tl.program_id(0) % num_tiles * BLOCK_M, head // heads, head % heads
    first_e = tl.program_id(1) * BLOCK_E
    MASK_E: tl.constexpr = HEAD_DIM % BLOCK_E != 0
    rows_M, rows_N, rows_left = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), num_stay - first
    stay1_base = stay1 + b * stay1_b + n * stay1_n + first.to(tl.int64) * stay1_s
    stay2_base = stay2 + b * stay2_b + n * stay2_n + first.to(tl.int64) * stay2_s
    pass1_base, pass2_base = pass1 + b * pass1_b + n * pass1_n, pass2 + b * pass2_b + n * pass2_n
    lse_base, delta_base = lse + head * num_queries, delta + head * num_queries
    stay1_MD, stay2_MD, lse_M, delta_M = 0, 0, 0.0, 0.0
    if HEAD_DIM <= BLOCK_D:
        stay1_MD = load_rows(stay1_base, stay1_s, rows_M, rows_left, HEAD_DIM, BLOCK_D, HEAD_DIM != BLOCK_D).to(
            DOT_TYPE
        )
        stay2_MD = load_rows(stay2_base, stay2_s, rows_M, rows_left, HEAD_DIM, BLOCK_D, HEAD_DIM != BLOCK_D).to(
            DOT_TYPE
        )
    if not KEYS_STAY:
        lse_M = _rows_of_statistics(lse_base + first, rows_M, rows_left)
        delta_M = tl.load(delta_base + first + rows_M, mask=rows_M < rows_left, other=0.0)
    acc1_ME = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    acc2_ME = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for start in tl.range(0, num_pass, BLOCK_N):
        offset, left = tl.cast(start, tl.int64), num_pass - start
        pass1_tile, pass2_tile = pass1_base + offset * pass1_s, pass2_base + offset * pass2_s
        S_MN = _product(
            stay1_MD, stay1_base, pass1_tile, stay1_s, pass1_s, rows_left, left,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, DOT_TYPE, PRECISION,
        )  # fmt: skip
        dP_MN = _product(
            stay2_MD, stay2_base, pass2_tile, stay2_s, pass2_s, rows_left, left,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, DOT_TYPE, PRECISION,
        )  # fmt: skip
        if KEYS_STAY:
            lse_N = _rows_of_statistics(lse_base + start, rows_N, left)
            delta_N = tl.load(delta_base + start + rows_N, mask=rows_N < left, other=0.0)
            P_MN = tl.exp2(S_MN * (scale * LOG2E) - lse_N[None, :])
            dS_MN = P_MN * (dP_MN - delta_N[None, :])
            pass2_NE = load_rows(pass2_tile + first_e, pass2_s, rows_N, left, HEAD_DIM - first_e, BLOCK_E, MASK_E)
            acc2_ME = tl.dot(
                round_factor(P_MN, P_TYPE, DOT_TYPE), pass2_NE.to(DOT_TYPE), acc=acc2_ME, input_precision=PRECISION
            )
        else:
            P_MN = tl.exp2(S_MN * (scale * LOG2E) - lse_M[:, None])
            dS_MN = tl.where((rows_N < left)[None, :], P_MN * (dP_MN - delta_M[:, None]), 0.0)
        pass1_NE = load_rows(pass1_tile + first_e, pass1_s, rows_N, left, HEAD_DIM - first_e, BLOCK_E, MASK_E)
        acc1_ME = tl.dot(
            round_factor(dS_MN, P_TYPE, DOT_TYPE), pass1_NE.to(DOT_TYPE), acc=acc1_ME, input_precision=PRECISION
        )
    cols_E = first_e + tl.arange(0, BLOCK_E)
    offsets_ME = head * HEAD_DIM + (first + rows_M)[:, None] * (batch.to(tl.int64) * heads * HEAD_DIM) + cols_E[None, :]
    mask_ME = (rows_M < rows_left)[:, None] & (cols_E < HEAD_DIM)[None, :]
    acc1_ME *= scale
    if ACCUMULATE:
        acc1_ME += tl.load(grad1 + offsets_ME, mask=mask_ME, other=0.0)
    tl.store(grad1 + offsets_ME, acc1_ME.to(grad1.dtype.element_ty), mask=mask_ME)
    if KEYS_STAY:
        tl.store(grad2 + offsets_ME, acc2_ME.to(grad2.dtype.element_ty), mask=mask_ME)


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, *, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """o [s, b, n, d] in q's dtype and lse [b, n, s] in fp32. At least one key."""
    check_tensors(q, k, v)
    s, b, n, d = q.shape
    o, lse = torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty((b, n, s), dtype=torch.float32)
    config = config or config_for("forward", q)
    grid = (triton.cdiv(s, config.block_m) * b * n, triton.cdiv(d, config.block_e))
    arguments = q, k, v, o, lse, *strides(q, k, v), scale, s, k.shape[0], b, n
    launch(forward_kernel, grid, *arguments, **tile_sizes(config, d), **tile_types(q.dtype))
    return o, lse


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    *,
    dq: Tensor | None = None,
    configs: tuple[Config | None, Config | None] = (None, None),
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv for this block of keys, in q's dtype. With `dq`, an fp32 sum, dq is added to it, and dk and dv are fp32.

    `configs`: of the kernel for dq and of the one for dk and dv, to override the table.
    """
    check_tensors(q, k, v, do, o)
    (s, b, n, d), keys = q.shape, k.shape[0]
    do, lse = last_dim_dense(do), lse.contiguous()
    grad_dtype = q.dtype if dq is None else torch.float32
    dq_sum = torch.empty(q.shape, dtype=q.dtype, device=q.device) if dq is None else _checked_sum(dq, q)
    dk, dv = (torch.empty(k.shape, dtype=grad_dtype, device=q.device) for _ in range(2))
    delta = _delta(do, last_dim_dense(o), lse)
    dq_config, dk_config = configs[0] or config_for("dq", q), configs[1] or config_for("dkdv", q)
    dq_grid = (triton.cdiv(s, dq_config.block_m) * b * n, triton.cdiv(d, dq_config.block_e))
    dk_grid = (triton.cdiv(keys, dk_config.block_m) * b * n, triton.cdiv(d, dk_config.block_e))
    types = tile_types(q.dtype)
    launch(
        backward_kernel, dq_grid, q, do, k, v, lse, delta, dq_sum, None, *strides(q, do, k, v), scale, s, keys, s, b, n,
        KEYS_STAY=False, ACCUMULATE=dq is not None, **tile_sizes(dq_config, d), **types,
    )  # fmt: skip
    launch(
        backward_kernel, dk_grid, k, v, q, do, lse, delta, dk, dv, *strides(k, v, q, do), scale, keys, s, s, b, n,
        KEYS_STAY=True, ACCUMULATE=False, **tile_sizes(dk_config, d), **types,
    )  # fmt: skip
    return dq_sum, dk, dv


def _checked_sum(dq: Tensor, q: Tensor) -> Tensor:
    if dq.dtype != torch.float32 or dq.shape != q.shape or not dq.is_contiguous():
        raise ValueError(
            f"got dq {tuple(dq.shape)} in {dq.dtype}; need a contiguous fp32 tensor of q's shape {tuple(q.shape)}; "
            "fix: start with torch.zeros"
        )
    return dq


def _delta(do: Tensor, o: Tensor, lse: Tensor) -> Tensor:
    """sum(do * o) over the head dim, [b, n, s] like `lse`."""
    (s, b, n, d), delta, tile = do.shape, torch.empty_like(lse), 64
    launch(
        delta_kernel, (triton.cdiv(s, tile) * b * n,), do, o, delta, *strides(do, o), s, n,
        HEAD_DIM=d, BLOCK_D=triton.next_power_of_2(d), BLOCK_M=tile,
    )  # fmt: skip
    return delta
