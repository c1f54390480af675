"""LayerNorm and `normed * (one + scale) + shift` in one pass, with its tangent or its gradients.

`one` is 1 for adaLN, whose shift and scale `[1, b, d]` belong to a sample, and 0 for a weight and bias `[d]` that all samples
share. With x̂ = (x - mean) rstd: t_x̂ = rstd (tx - mean(tx) - x̂ mean(x̂ tx)), and the backward is the same with g = dy (one + scale)
in place of tx. The backward recomputes the statistics: x is all that it saves.

Letters: S tokens, B batch, D features (padded to BLOCK_D), P programs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rcm_kernels.fused.launcher import (
    MAX_REGISTERS,
    batch_stride,
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
def _normalise(x_D, mask_D, eps, FEATURES: tl.constexpr):
    mean = tl.sum(x_D, 0) / FEATURES
    centred_D = tl.where(mask_D, x_D - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred_D * centred_D, 0) / FEATURES + eps)
    return centred_D * rstd, rstd


@triton.jit
def _jacobian(v_D, normed_D, rstd, FEATURES: tl.constexpr):
    """The Jacobian of the normalisation, which is symmetric, times v (zero where masked). Centred first, as a mean loses digits."""
    centred_D = v_D - tl.sum(v_D, 0) / FEATURES
    return rstd * (centred_D - normed_D * (tl.sum(centred_D * normed_D, 0) / FEATURES))


@triton.jit
def forward_kernel(
    x, y, shift, scale, x_s, x_b, y_s, y_b, shift_b, scale_b, batch, eps, one,
    DUAL: tl.constexpr, VECTOR_TANGENTS: tl.constexpr, FEATURES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid: one program per token and sample; the tangent of sample b lies `batch` samples further on."""
    s, b = tl.program_id(0).to(tl.int64) // batch, tl.program_id(0).to(tl.int64) % batch
    cols_D = tl.arange(0, BLOCK_D)
    mask_D = cols_D < FEATURES
    x_row, y_row = x + s * x_s + b * x_b + cols_D, y + s * y_s + b * y_b + cols_D
    scale_row, shift_row = scale + b * scale_b + cols_D, shift + b * shift_b + cols_D
    x_D = tl.load(x_row, mask=mask_D, other=0.0).to(tl.float32)
    t_x_D = x_D
    if DUAL:  # in flight together with x
        t_x_D = tl.load(x_row + batch * x_b, mask=mask_D, other=0.0).to(tl.float32)
    normed_D, rstd = _normalise(x_D, mask_D, eps, FEATURES)
    if DUAL:
        t_x_D = _jacobian(t_x_D, normed_D, rstd, FEATURES)
    scale_D = one + tl.load(scale_row, mask=mask_D, other=0.0).to(tl.float32)
    shift_D = tl.load(shift_row, mask=mask_D, other=0.0).to(tl.float32)
    tl.store(y_row, (normed_D * scale_D + shift_D).to(y.dtype.element_ty), mask=mask_D)
    if DUAL:
        t_y_D = t_x_D * scale_D
        if VECTOR_TANGENTS:
            t_scale_D = tl.load(scale_row + batch * scale_b, mask=mask_D, other=0.0).to(tl.float32)
            t_shift_D = tl.load(shift_row + batch * shift_b, mask=mask_D, other=0.0).to(tl.float32)
            t_y_D += normed_D * t_scale_D + t_shift_D
        tl.store(y_row + batch * y_b, t_y_D.to(y.dtype.element_ty), mask=mask_D)


@triton.jit
def backward_kernel(
    dy, x, dx, scale, d_shift, d_scale, dy_s, dy_b, x_s, x_b, dx_s, dx_b, scale_b, tokens, batch, eps, one,
    FEATURES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid: programs P, batch. A program walks over every P-th token and stores its sums in row [p, b] of d_shift and d_scale."""
    p, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    cols_D = tl.arange(0, BLOCK_D)
    mask_D = cols_D < FEATURES
    scale_D = one + tl.load(scale + b * scale_b + cols_D, mask=mask_D, other=0.0).to(tl.float32)
    d_shift_D = tl.zeros([BLOCK_D], tl.float32)
    d_scale_D = tl.zeros([BLOCK_D], tl.float32)
    for s in tl.range(p, tokens, tl.num_programs(0)):
        x_D = tl.load(x + s * x_s + b * x_b + cols_D, mask=mask_D, other=0.0).to(tl.float32)
        dy_D = tl.load(dy + s * dy_s + b * dy_b + cols_D, mask=mask_D, other=0.0).to(tl.float32)
        normed_D, rstd = _normalise(x_D, mask_D, eps, FEATURES)
        dx_D = _jacobian(dy_D * scale_D, normed_D, rstd, FEATURES)
        tl.store(dx + s * dx_s + b * dx_b + cols_D, dx_D.to(dx.dtype.element_ty), mask=mask_D)
        d_shift_D += dy_D
        d_scale_D += dy_D * normed_D
    out_D = (p * batch + b) * FEATURES + cols_D
    tl.store(d_shift + out_D, d_shift_D, mask=mask_D)
    tl.store(d_scale + out_D, d_scale_D, mask=mask_D)


def plain(x_SBD: Tensor, shift: Tensor, scale: Tensor, *, eps: float, dtype: torch.dtype, one: float = 1.0) -> Tensor:
    """`layer_norm(x) * (one + scale) + shift` in `dtype`; shift and scale are `[1, b, d]`, or `[d]` for all samples."""
    return _Plain.apply(x_SBD, shift, scale, eps, dtype, one)


def dual(
    x_SBD: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    eps: float,
    dtype: torch.dtype,
    one: float = 1.0,
    vector_tangents: bool = True,
) -> Tensor:
    """The same on a stack `[s, 2b, d]`, shift and scale being stacks `[1, 2b, d]`, or without tangents: `[d]`."""
    return _forward(x_SBD, shift, scale, eps, dtype, one, tangents=(True, vector_tangents))


def _forward(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    dtype: torch.dtype,
    one: float,
    *,
    tangents: tuple[bool, bool] = (False, False),
) -> Tensor:
    x, shift, scale = prepared(x, shift, scale)
    y = empty_like(x, dtype)
    batch = halves(x) if tangents[0] else x.shape[1]
    features, block = x.shape[-1], block_of(x.shape[-1])
    launch(
        forward_kernel, (x.shape[0] * batch,), x, y, shift, scale, *x.stride()[:2], *y.stride()[:2],
        batch_stride(shift), batch_stride(scale), batch, eps, one,
        DUAL=tangents[0], VECTOR_TANGENTS=tangents[1], FEATURES=features, BLOCK_D=block,
        num_warps=warps_of(block), maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    return y


def _backward(dy: Tensor, x: Tensor, scale: Tensor, eps: float, one: float) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, d_shift, d_scale): the sums over tokens as `[b, d]` in fp32."""
    dy, x, scale = prepared(dy, x, scale)
    (tokens, batch, features), block = x.shape, block_of(x.shape[-1])
    programs = row_programs(tokens)
    dx = empty_like(x)
    sums = torch.empty(2, programs, batch, features, dtype=torch.float32, device=x.device)
    launch(
        backward_kernel, (programs, batch), dy, x, dx, scale, sums[0], sums[1],
        *dy.stride()[:2], *x.stride()[:2], *dx.stride()[:2], batch_stride(scale), tokens, batch, eps, one,
        FEATURES=features, BLOCK_D=block, num_warps=warps_of(block, most=16),
    )  # fmt: skip
    return dx, *sums.sum(1)


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype, one: float
    ) -> Tensor:
        ctx.save_for_backward(x, shift, scale)
        ctx.eps, ctx.one = eps, one
        return _forward(x, shift, scale, eps, dtype, one)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, shift, scale = ctx.saved_tensors
        dx, *sums = _backward(dy, x, scale, ctx.eps, ctx.one)
        d_shift, d_scale = (gradient_of(v, s) for v, s in zip((shift, scale), sums, strict=True))
        return dx, d_shift, d_scale, None, None, None
