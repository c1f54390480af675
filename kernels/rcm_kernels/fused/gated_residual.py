"""`h + gate x` in one pass, with its tangent or its gradients: gate `[1, b, d]`, one vector per sample.

Letters: S tokens of a tile (ROWS), D features of a tile (BLOCK_D), B batch, P programs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rcm_kernels.fused.launcher import batch_stride, empty_like, gradient_of, halves, prepared, row_programs
from rcm_kernels.launch import launch

ROWS, BLOCK_D, WARPS = 4, 512, 4
"""16 elements a thread; the vectors of a tile are loaded once for its rows."""


@triton.jit
def _load(base, s_S, stride, cols_D, mask_SD):
    return tl.load(base + s_S[:, None] * stride + cols_D[None, :], mask=mask_SD, other=0.0).to(tl.float32)


@triton.jit
def forward_kernel(
    h, x, gate, y, h_s, h_b, x_s, x_b, y_s, y_b, gate_b, tokens, batch,
    DUAL: tl.constexpr, FEATURES: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of features (fastest), tiles of tokens, batch."""
    b = tl.program_id(2).to(tl.int64)
    s_S = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols_D = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_SD = (s_S < tokens)[:, None] & (cols_D < FEATURES)[None, :]
    gate_D = tl.load(gate + b * gate_b + cols_D, mask=cols_D < FEATURES, other=0.0).to(tl.float32)
    h_SD = _load(h + b * h_b, s_S, h_s, cols_D, mask_SD)
    x_SD = _load(x + b * x_b, s_S, x_s, cols_D, mask_SD)
    out_SD = y + b * y_b + s_S[:, None] * y_s + cols_D[None, :]
    tl.store(out_SD, (h_SD + gate_D[None, :] * x_SD).to(y.dtype.element_ty), mask=mask_SD)
    if DUAL:
        t = b + batch
        t_gate_D = tl.load(gate + t * gate_b + cols_D, mask=cols_D < FEATURES, other=0.0).to(tl.float32)
        t_h_SD = _load(h + t * h_b, s_S, h_s, cols_D, mask_SD)
        t_x_SD = _load(x + t * x_b, s_S, x_s, cols_D, mask_SD)
        t_y_SD = t_h_SD + gate_D[None, :] * t_x_SD + t_gate_D[None, :] * x_SD
        tl.store(out_SD + batch * y_b, t_y_SD.to(y.dtype.element_ty), mask=mask_SD)


@triton.jit
def backward_kernel(
    dy, x, gate, dx, d_gate, dy_s, dy_b, x_s, x_b, dx_s, dx_b, gate_b, tokens, batch,
    FEATURES: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of features (fastest), programs P, batch; the sum of a program's tokens goes to row [p, b] of d_gate."""
    p, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    cols_D = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    gate_D = tl.load(gate + b * gate_b + cols_D, mask=cols_D < FEATURES, other=0.0).to(tl.float32)
    sum_SD = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for first in tl.range(p * ROWS, tokens, tl.num_programs(1) * ROWS):
        s_S = first + tl.arange(0, ROWS)
        mask_SD = (s_S < tokens)[:, None] & (cols_D < FEATURES)[None, :]
        dy_SD = _load(dy + b * dy_b, s_S, dy_s, cols_D, mask_SD)
        x_SD = _load(x + b * x_b, s_S, x_s, cols_D, mask_SD)
        out_SD = dx + b * dx_b + s_S[:, None] * dx_s + cols_D[None, :]
        tl.store(out_SD, (dy_SD * gate_D[None, :]).to(dx.dtype.element_ty), mask=mask_SD)
        sum_SD += dy_SD * x_SD
    out_D = (p * batch + b) * FEATURES + cols_D
    tl.store(d_gate + out_D, tl.sum(sum_SD, 0), mask=cols_D < FEATURES)


def plain(h_SBD: Tensor, x_SBD: Tensor, gate_1BD: Tensor) -> Tensor:
    """`h + gate x` in the dtype of h."""
    return _Plain.apply(h_SBD, x_SBD, gate_1BD)


def dual(h_SBD: Tensor, x_SBD: Tensor, gate_1BD: Tensor) -> Tensor:
    """The same on stacks `[s, 2b, d]`, `[1, 2b, d]`."""
    return _forward(h_SBD, x_SBD, gate_1BD, is_dual=True)


def _forward(h: Tensor, x: Tensor, gate: Tensor, *, is_dual: bool = False) -> Tensor:
    h, x, gate = prepared(h, x, gate)
    y = empty_like(h)
    batch, (tokens, _, features) = halves(h) if is_dual else h.shape[1], h.shape
    grid = triton.cdiv(features, BLOCK_D), triton.cdiv(tokens, ROWS), batch
    launch(
        forward_kernel, grid, h, x, gate, y, *h.stride()[:2], *x.stride()[:2], *y.stride()[:2], batch_stride(gate),
        tokens, batch, DUAL=is_dual, FEATURES=features, ROWS=ROWS, BLOCK_D=BLOCK_D, num_warps=WARPS,
    )  # fmt: skip
    return y


def _backward(dy: Tensor, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """(dx, d_gate `[b, d]` in fp32)."""
    dy, x, gate = prepared(dy, x, gate)
    tokens, batch, features = x.shape
    tiles = triton.cdiv(features, BLOCK_D)
    programs = row_programs(triton.cdiv(tokens, ROWS))
    dx = empty_like(x)
    sums = torch.empty(programs, batch, features, dtype=torch.float32, device=x.device)
    launch(
        backward_kernel, (tiles, programs, batch), dy, x, gate, dx, sums,
        *dy.stride()[:2], *x.stride()[:2], *dx.stride()[:2], batch_stride(gate), tokens, batch,
        FEATURES=features, ROWS=ROWS, BLOCK_D=BLOCK_D, num_warps=WARPS,
    )  # fmt: skip
    return dx, sums.sum(0)


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate)
        return _forward(h, x, gate)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, gate = ctx.saved_tensors
        dx, d_gate = _backward(dy, x, gate)
        return dy, dx, gradient_of(gate, d_gate)
