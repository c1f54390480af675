"""What the fused ops compute, by the book: plain PyTorch, any dtype, differentiable. `jvp_of` gives their tangents."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def jvp_of(function: Callable[..., Tensor], stacked: Tensor, *others: Tensor | None, **options: Any) -> Tensor:
    """`function` on a stack `[s, 2b, ...]`: primal rows, then tangents by forward-mode automatic differentiation.

    Tensors of dimension 3 and up among `others` are stacks too; the rest (weights, biases, rotations) has no tangent.
    """
    values = (stacked, *others)
    has_tangent = [x is not None and x.dim() >= 3 for x in values]
    pairs = [x.chunk(2, dim=1) for x, dual in zip(values, has_tangent, strict=True) if dual]

    def of_duals(*primals: Tensor) -> Tensor:
        given = iter(primals)
        return function(*(next(given) if dual else x for x, dual in zip(values, has_tangent, strict=True)), **options)

    return torch.cat(torch.func.jvp(of_duals, *(tuple(half) for half in zip(*pairs, strict=True))), dim=1)


def layer_norm_modulate(x_SBD: Tensor, shift: Tensor, scale: Tensor, *, eps: float, one: float = 1.0) -> Tensor:
    """`layer_norm(x) * (one + scale) + shift`."""
    centred = x_SBD - x_SBD.mean(-1, keepdim=True)
    normed = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)
    return normed * (one + scale) + shift


def gated_residual(h_SBD: Tensor, x_SBD: Tensor, gate_1BD: Tensor) -> Tensor:
    """`h + gate x`."""
    return h_SBD + gate_1BD * x_SBD


def gelu_tanh(x_SBF: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """`z (1 + tanh(sqrt(2/π) (z + 0.044715 z³))) / 2` of z = x + bias."""
    z = x_SBF if bias_F is None else x_SBF + bias_F
    return 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))


def rms_norm_rope(
    x_SBNK: Tensor,
    weight_NK: Tensor,
    rotation_SJ: Tensor | None = None,
    *,
    eps: float,
    num_features: int | None = None,
    total_SB: Tensor | None = None,
) -> Tensor:
    """RMSNorm over all heads, then the rotation of interleaved pairs; `total_SB`: the sum of x² over all ranks, if there are others."""
    total = x_SBNK.square().sum((-2, -1)) if total_SB is None else total_SB
    features = x_SBNK.shape[-2] * x_SBNK.shape[-1] if num_features is None else num_features
    y = x_SBNK / torch.sqrt(total / features + eps)[..., None, None] * weight_NK
    if rotation_SJ is None:
        return y
    even, odd = y[..., 0::2], y[..., 1::2]
    cos, sin = rotation_SJ.real[:, None, None], rotation_SJ.imag[:, None, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
