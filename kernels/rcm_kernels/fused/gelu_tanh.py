"""GELU (tanh) of `x + bias` in one pass, with its tangent or its gradients; the bias, `[f]` or None, is a linear layer's.

With u = sqrt(2/π) (x + 0.044715 x³), (1 + tanh u) / 2 is sigmoid(2u), so gelu = x σ(2u) and gelu' = σ + 2 u' x σ (1 - σ).

Letters: S tokens of a tile (ROWS), F features of a tile (BLOCK_F), B batch, P programs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rcm_kernels.fused.launcher import empty_like, gradient_of, halves, prepared, row_programs
from rcm_kernels.launch import launch

ROWS, BLOCK_F, WARPS = 4, 512, 4
"""16 elements a thread."""

TWO_ROOT_2_OVER_PI = tl.constexpr(1.5957691216057308)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def _gelu_and_slope(x):
    square = x * x
    gate = 1.0 / (1.0 + tl.exp(-(x * (square * CUBIC + 1.0)) * TWO_ROOT_2_OVER_PI))
    slope = gate + x * (square * (3.0 * CUBIC) + 1.0) * TWO_ROOT_2_OVER_PI * gate * (1.0 - gate)
    return x * gate, slope


@triton.jit
def _load(base, s_S, stride, cols_F, mask_SF):
    return tl.load(base + s_S[:, None] * stride + cols_F[None, :], mask=mask_SF, other=0.0).to(tl.float32)


@triton.jit
def forward_kernel(
    x, bias, y, x_s, x_b, y_s, y_b, tokens, batch,
    HAS_BIAS: tl.constexpr, DUAL: tl.constexpr, FEATURES: tl.constexpr, ROWS: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of features (fastest), tiles of tokens, batch."""
    b = tl.program_id(2).to(tl.int64)
    s_S = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols_F = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask_SF = (s_S < tokens)[:, None] & (cols_F < FEATURES)[None, :]
    x_SF = _load(x + b * x_b, s_S, x_s, cols_F, mask_SF)
    if HAS_BIAS:
        x_SF += tl.load(bias + cols_F, mask=cols_F < FEATURES, other=0.0).to(tl.float32)[None, :]
    gelu_SF, slope_SF = _gelu_and_slope(x_SF)
    out_SF = y + b * y_b + s_S[:, None] * y_s + cols_F[None, :]
    tl.store(out_SF, gelu_SF.to(y.dtype.element_ty), mask=mask_SF)
    if DUAL:
        t_x_SF = _load(x + (b + batch) * x_b, s_S, x_s, cols_F, mask_SF)
        tl.store(out_SF + batch * y_b, (t_x_SF * slope_SF).to(y.dtype.element_ty), mask=mask_SF)


@triton.jit
def backward_kernel(
    dy, x, bias, dx, d_bias, dy_s, dy_b, x_s, x_b, dx_s, dx_b, tokens, batch,
    HAS_BIAS: tl.constexpr, FEATURES: tl.constexpr, ROWS: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of features (fastest), programs P, batch; the sum of a program's tokens goes to row [p, b] of d_bias."""
    p, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    cols_F = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    bias_F = tl.zeros([BLOCK_F], tl.float32)
    if HAS_BIAS:
        bias_F = tl.load(bias + cols_F, mask=cols_F < FEATURES, other=0.0).to(tl.float32)
    sum_SF = tl.zeros([ROWS, BLOCK_F], tl.float32)
    for first in tl.range(p * ROWS, tokens, tl.num_programs(1) * ROWS):
        s_S = first + tl.arange(0, ROWS)
        mask_SF = (s_S < tokens)[:, None] & (cols_F < FEATURES)[None, :]
        dy_SF = _load(dy + b * dy_b, s_S, dy_s, cols_F, mask_SF)
        x_SF = _load(x + b * x_b, s_S, x_s, cols_F, mask_SF) + bias_F[None, :]
        _, slope_SF = _gelu_and_slope(x_SF)
        dx_SF = dy_SF * slope_SF
        out_SF = dx + b * dx_b + s_S[:, None] * dx_s + cols_F[None, :]
        tl.store(out_SF, dx_SF.to(dx.dtype.element_ty), mask=mask_SF)
        sum_SF += dx_SF
    if HAS_BIAS:
        out_F = (p * batch + b) * FEATURES + cols_F
        tl.store(d_bias + out_F, tl.sum(sum_SF, 0), mask=cols_F < FEATURES)


def plain(x_SBF: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """`gelu(x + bias)` in the dtype of x, `[s, b, f]`."""
    return _Plain.apply(x_SBF, bias_F)


def dual(x_SBF: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """The same on a stack `[s, 2b, f]`; the bias belongs to the primal alone."""
    return _forward(x_SBF, bias_F, is_dual=True)


def _forward(x: Tensor, bias: Tensor | None, *, is_dual: bool = False) -> Tensor:
    x, bias = prepared(x, bias)
    y = empty_like(x)
    batch, (tokens, _, features) = halves(x) if is_dual else x.shape[1], x.shape
    grid = triton.cdiv(features, BLOCK_F), triton.cdiv(tokens, ROWS), batch
    launch(
        forward_kernel, grid, x, x if bias is None else bias, y, *x.stride()[:2], *y.stride()[:2], tokens, batch,
        HAS_BIAS=bias is not None, DUAL=is_dual, FEATURES=features, ROWS=ROWS, BLOCK_F=BLOCK_F, num_warps=WARPS,
    )  # fmt: skip
    return y


def _backward(dy: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(dx, d_bias `[f]` in fp32 or None)."""
    dy, x, bias = prepared(dy, x, bias)
    tokens, batch, features = x.shape
    programs = row_programs(triton.cdiv(tokens, ROWS))
    dx = empty_like(x)
    sums = None if bias is None else torch.empty(programs * batch, features, dtype=torch.float32, device=x.device)
    launch(
        backward_kernel, (triton.cdiv(features, BLOCK_F), programs, batch), dy, x, x if bias is None else bias, dx,
        dx if sums is None else sums, *dy.stride()[:2], *x.stride()[:2], *dx.stride()[:2], tokens, batch,
        HAS_BIAS=bias is not None, FEATURES=features, ROWS=ROWS, BLOCK_F=BLOCK_F, num_warps=WARPS,
    )  # fmt: skip
    return dx, None if sums is None else sums.sum(0)


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, bias)
        return _forward(x, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        x, bias = ctx.saved_tensors
        dx, d_bias = _backward(dy, x, bias)
        return dx, None if bias is None else gradient_of(bias, d_bias)
