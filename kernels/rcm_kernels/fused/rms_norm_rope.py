"""RMSNorm over all heads and, after it, RoPE: with its tangent or its gradients, and heads split over tensor-parallel ranks.

With r = rsqrt(mean(x²) + eps): y = R (w x r), R the rotation of interleaved pairs of the head dimension, and
ty = R w (r tx - x r³ mean(x tx)). The backward has g = w Rᵀ dy, dx = r g - x r³ mean(x g), dw = Σ (Rᵀ dy) x r.

The means span the heads of all ranks. So a rank that holds some of them works in two launches, with the caller's sum of the
per-token statistics `[s, b, 1 or 2]` in between; one that holds all (`sum_over_tp=None`) in one. The backward of the sum is the
caller's own, by autograd.

Letters: S tokens, B batch, N heads, K head dim (padded to BLOCK_N, BLOCK_K), J = K / 2 pairs, P programs.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rcm_kernels.fused.launcher import (
    MAX_REGISTERS,
    block_of,
    empty_like,
    gradient_of,
    halves,
    prepared,
    row_programs,
    warps_of,
)
from rcm_kernels.launch import launch


@triton.jit
def _load(base, n_N, stride, k_K, mask_NK):
    return tl.load(base + n_N[:, None] * stride + k_K[None, :], mask=mask_NK, other=0.0).to(tl.float32)


@triton.jit
def _total(x_NK):
    return tl.sum(tl.sum(x_NK, 1), 0)


@triton.jit
def _rotation(rotation, s, HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr):
    """(cos, sin) of token s, `[1, J]`."""
    j_J = tl.arange(0, BLOCK_K // 2)
    pairs_J = rotation + s * HEAD_DIM + 2 * j_J
    mask_J = j_J < HEAD_DIM // 2
    cos_J = tl.load(pairs_J, mask=mask_J, other=0.0)
    return cos_J[None, :], tl.load(pairs_J + 1, mask=mask_J, other=0.0)[None, :]


@triton.jit
def _rotate(x_NK, cos_J, sin_J, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    even_NJ, odd_NJ = tl.split(tl.reshape(x_NK, [BLOCK_N, BLOCK_K // 2, 2]))
    rotated = tl.join(even_NJ * cos_J - odd_NJ * sin_J, even_NJ * sin_J + odd_NJ * cos_J)
    return tl.reshape(rotated, [BLOCK_N, BLOCK_K])


@triton.jit
def stats_kernel(
    x, stats, x_s, x_b, x_n, batch,
    DUAL: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums of x² and x tx over the heads here. Grid: one program per token and sample."""
    row = tl.program_id(0).to(tl.int64)
    s, b = row // batch, row % batch
    n_N, k_K = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    mask_NK = (n_N < HEADS)[:, None] & (k_K < HEAD_DIM)[None, :]
    x_NK = _load(x + s * x_s + b * x_b, n_N, x_n, k_K, mask_NK)
    if DUAL:
        t_x_NK = _load(x + s * x_s + (b + batch) * x_b, n_N, x_n, k_K, mask_NK)
        tl.store(stats + 2 * row, _total(x_NK * x_NK))
        tl.store(stats + 2 * row + 1, _total(x_NK * t_x_NK))
    else:
        tl.store(stats + row, _total(x_NK * x_NK))


@triton.jit
def forward_kernel(
    x, weight, rotation, stats, y, x_s, x_b, x_n, y_s, y_b, y_n, batch, eps,
    DUAL: tl.constexpr, ROPE: tl.constexpr, HAS_STATS: tl.constexpr, FEATURES: tl.constexpr,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: one program per token and sample. HAS_STATS: sums over all ranks, else they are computed here."""
    row = tl.program_id(0).to(tl.int64)
    s, b = row // batch, row % batch
    n_N, k_K = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    mask_NK = (n_N < HEADS)[:, None] & (k_K < HEAD_DIM)[None, :]
    x_NK = _load(x + s * x_s + b * x_b, n_N, x_n, k_K, mask_NK)
    w_NK = _load(weight, n_N, HEAD_DIM, k_K, mask_NK)
    if ROPE:
        cos_J, sin_J = _rotation(rotation, s, HEAD_DIM, BLOCK_K)
    t_x_NK = x_NK
    if DUAL:  # in flight together with x
        t_x_NK = _load(x + s * x_s + (b + batch) * x_b, n_N, x_n, k_K, mask_NK)
    total = tl.load(stats + row * (2 if DUAL else 1)) if HAS_STATS else _total(x_NK * x_NK)
    r = tl.rsqrt(total / FEATURES + eps)
    y_NK = x_NK * r * w_NK
    if ROPE:
        y_NK = _rotate(y_NK, cos_J, sin_J, BLOCK_N, BLOCK_K)
    out_NK = y + s * y_s + b * y_b + n_N[:, None] * y_n + k_K[None, :]
    tl.store(out_NK, y_NK.to(y.dtype.element_ty), mask=mask_NK)
    if DUAL:
        t_total = tl.load(stats + 2 * row + 1) if HAS_STATS else _total(x_NK * t_x_NK)
        t_y_NK = (t_x_NK * r - x_NK * (r * r * r * (t_total / FEATURES))) * w_NK
        if ROPE:
            t_y_NK = _rotate(t_y_NK, cos_J, sin_J, BLOCK_N, BLOCK_K)
        tl.store(out_NK + batch * y_b, t_y_NK.to(y.dtype.element_ty), mask=mask_NK)


@triton.jit
def backward_stats_kernel(
    dy, x, weight, rotation, stats, d_stats, dy_s, dy_b, dy_n, x_s, x_b, x_n, batch, eps,
    ROPE: tl.constexpr, FEATURES: tl.constexpr,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradient of the total of x², from the heads here: -r³ Σ g x / 2 F. Grid: one program per token and sample."""
    row = tl.program_id(0).to(tl.int64)
    s, b = row // batch, row % batch
    n_N, k_K = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    mask_NK = (n_N < HEADS)[:, None] & (k_K < HEAD_DIM)[None, :]
    x_NK = _load(x + s * x_s + b * x_b, n_N, x_n, k_K, mask_NK)
    dy_NK = _load(dy + s * dy_s + b * dy_b, n_N, dy_n, k_K, mask_NK)
    if ROPE:
        cos_J, sin_J = _rotation(rotation, s, HEAD_DIM, BLOCK_K)
        dy_NK = _rotate(dy_NK, cos_J, -sin_J, BLOCK_N, BLOCK_K)
    r = tl.rsqrt(tl.load(stats + row) / FEATURES + eps)
    total = _total(dy_NK * _load(weight, n_N, HEAD_DIM, k_K, mask_NK) * x_NK)
    tl.store(d_stats + row, -0.5 * r * r * r * total / FEATURES)


@triton.jit
def backward_kernel(
    dy, x, weight, rotation, stats, d_stats, dx, d_weight, dy_s, dy_b, dy_n, x_s, x_b, x_n, dx_s, dx_b, dx_n, rows, batch, eps,
    ROPE: tl.constexpr, HAS_STATS: tl.constexpr, FEATURES: tl.constexpr,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: programs P. Each walks over every P-th (token, sample) and stores its sum in row p of d_weight."""
    p = tl.program_id(0).to(tl.int64)
    n_N, k_K = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    mask_NK = (n_N < HEADS)[:, None] & (k_K < HEAD_DIM)[None, :]
    w_NK = _load(weight, n_N, HEAD_DIM, k_K, mask_NK)
    sum_NK = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for row in tl.range(p, rows, tl.num_programs(0)):
        s, b = row // batch, row % batch
        x_NK = _load(x + s * x_s + b * x_b, n_N, x_n, k_K, mask_NK)
        dy_NK = _load(dy + s * dy_s + b * dy_b, n_N, dy_n, k_K, mask_NK)
        if ROPE:
            cos_J, sin_J = _rotation(rotation, s, HEAD_DIM, BLOCK_K)
            dy_NK = _rotate(dy_NK, cos_J, -sin_J, BLOCK_N, BLOCK_K)
        if HAS_STATS:
            r = tl.rsqrt(tl.load(stats + row) / FEATURES + eps)
            d_total = tl.load(d_stats + row)
        else:
            r = tl.rsqrt(_total(x_NK * x_NK) / FEATURES + eps)
            d_total = -0.5 * r * r * r * _total(dy_NK * w_NK * x_NK) / FEATURES
        dx_NK = dy_NK * w_NK * r + x_NK * (2.0 * d_total)
        out_NK = dx + s * dx_s + b * dx_b + n_N[:, None] * dx_n + k_K[None, :]
        tl.store(out_NK, dx_NK.to(dx.dtype.element_ty), mask=mask_NK)
        sum_NK += dy_NK * x_NK * r
    out_NK = d_weight + (p * HEADS + n_N[:, None]) * HEAD_DIM + k_K[None, :]
    tl.store(out_NK, sum_NK, mask=mask_NK)


def plain(
    x_SBNK: Tensor,
    weight_NK: Tensor,
    rotation_SJ: Tensor | None = None,
    *,
    eps: float,
    num_features: int,
    sum_over_tp: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """RMSNorm over `num_features`, the features of all ranks, then RoPE by `rotation_SJ` (complex64) unless it is None."""
    return _Plain.apply(x_SBNK, weight_NK, rotation_SJ, eps, num_features, sum_over_tp)


def dual(
    x_SBNK: Tensor,
    weight_NK: Tensor,
    rotation_SJ: Tensor | None = None,
    *,
    eps: float,
    num_features: int,
    sum_over_tp: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The same on a stack `[s, 2b, n, k]`."""
    x, weight, rotation = _inputs(x_SBNK, weight_NK, rotation_SJ)
    stats = None if sum_over_tp is None else sum_over_tp(_statistics(x, is_dual=True))
    return _forward(x, weight, rotation, stats, eps, num_features, is_dual=True)


def _inputs(x: Tensor, weight: Tensor, rotation: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """x and weight dense in the last dimension; the rotation as real pairs `[s, k]` in fp32."""
    x, weight = prepared(x, weight)
    if x.shape[-1] % 2:
        raise ValueError(
            f"got head dim {x.shape[-1]}; need an even one: features are rotated in pairs; fix: choose 'none'"
        )
    if rotation is not None:
        rotation = torch.view_as_real(rotation.to(torch.complex64).contiguous()).flatten(1)
    return x, weight.contiguous(), rotation


def _tile(x: Tensor, features: int | None = None, *, warps: int = 8) -> dict[str, int]:
    """What the kernels must know of the heads, and the warps for it, at most `warps`."""
    heads, head_dim = x.shape[-2:]
    sizes = {"HEADS": heads, "HEAD_DIM": head_dim, "BLOCK_N": block_of(heads), "BLOCK_K": block_of(head_dim)}
    if features is not None:
        sizes["FEATURES"] = features
    return sizes | {"num_warps": warps_of(block_of(sizes["BLOCK_N"] * sizes["BLOCK_K"]), most=warps)}


def _statistics(x: Tensor, *, is_dual: bool) -> Tensor:
    """`[s, b, stats]` in fp32."""
    batch = halves(x) if is_dual else x.shape[1]
    stats = torch.empty(x.shape[0], batch, 2 if is_dual else 1, dtype=torch.float32, device=x.device)
    launch(stats_kernel, (x.shape[0] * batch,), x, stats, *x.stride()[:3], batch, DUAL=is_dual, **_tile(x))
    return stats


def _forward(
    x: Tensor,
    weight: Tensor,
    rotation: Tensor | None,
    stats: Tensor | None,
    eps: float,
    features: int,
    *,
    is_dual: bool,
) -> Tensor:
    y = empty_like(x)
    batch = halves(x) if is_dual else x.shape[1]
    launch(
        forward_kernel, (x.shape[0] * batch,), x, weight, _or(rotation, x), _or(stats, x), y,
        *x.stride()[:3], *y.stride()[:3], batch, eps,
        DUAL=is_dual, ROPE=rotation is not None, HAS_STATS=stats is not None, **_tile(x, features),
        maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    return y


def _backward_statistics(
    dy: Tensor, x: Tensor, weight: Tensor, rotation: Tensor | None, stats: Tensor, eps: float, features: int
) -> Tensor:
    d_stats = torch.empty_like(stats)
    launch(
        backward_stats_kernel, (x.shape[0] * x.shape[1],), dy, x, weight, _or(rotation, x), stats, d_stats,
        *dy.stride()[:3], *x.stride()[:3], x.shape[1], eps, ROPE=rotation is not None, **_tile(x, features),
    )  # fmt: skip
    return d_stats


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rotation: Tensor | None,
    stats: Tensor | None,
    d_stats: Tensor | None,
    eps: float,
    features: int,
) -> tuple[Tensor, Tensor]:
    """(dx, d_weight `[n, k]` in fp32)."""
    rows = x.shape[0] * x.shape[1]
    dx, programs = empty_like(x), row_programs(rows)
    sums = torch.empty(programs, *weight.shape, dtype=torch.float32, device=x.device)
    launch(
        backward_kernel, (programs,), dy, x, weight, _or(rotation, x), _or(stats, x), _or(d_stats, x), dx, sums,
        *dy.stride()[:3], *x.stride()[:3], *dx.stride()[:3], rows, x.shape[1], eps,
        ROPE=rotation is not None, HAS_STATS=stats is not None, **_tile(x, features, warps=16),
    )  # fmt: skip
    return dx, sums.sum(0)


def _or(optional: Tensor | None, stand_in: Tensor) -> Tensor:
    """A pointer for an argument that the kernel does not read."""
    return stand_in if optional is None else optional


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        rotation: Tensor | None,
        eps: float,
        features: int,
        sum_over_tp: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        ctx.eps, ctx.features, ctx.sum = eps, features, None
        dense, w, pairs = _inputs(x, weight, rotation)
        stats = None
        if sum_over_tp is not None:
            with torch.enable_grad():  # the graph of the sum alone, for the backward
                local = _statistics(dense.detach(), is_dual=False).requires_grad_()
                total = sum_over_tp(local)
            stats, ctx.sum = total.detach(), (local, total)
        ctx.save_for_backward(x, weight, rotation, stats)
        return _forward(dense, w, pairs, stats, eps, features, is_dual=False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rotation, stats = ctx.saved_tensors
        dense, w, pairs = _inputs(x, weight, rotation)
        (dy,) = prepared(dy)
        d_stats = None
        if stats is not None:
            d_total = _backward_statistics(dy, dense, w, pairs, stats, ctx.eps, ctx.features)
            local, total = ctx.sum
            (d_stats,) = torch.autograd.grad(total, local, d_total)
            d_stats = d_stats.contiguous()
        dx, d_weight = _backward(dy, dense, w, pairs, stats, d_stats, ctx.eps, ctx.features)
        return dx, gradient_of(weight, d_weight), None, None, None, None
