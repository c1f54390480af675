"""The (primal, tangent) rule of every non-linear operation of a DiT. Linear ones need none (rcm_megatron.dual).

Shapes: h_SBD hidden states, q_SBNK per head, S tokens of this rank, B batch (2B stacked inside a Dual), D features, N heads,
K head dim. Statistics and modulation are fp32; results return in the dtype of the input.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rcm_megatron.dual import Dual, shape_of

aten = torch.ops.aten


def gelu_tanh(x: Tensor | Dual) -> Tensor | Dual:
    """GELU with the tanh approximation, as Wan uses it."""
    if not isinstance(x, Dual):
        return F.gelu(x, approximate="tanh")
    return Dual.pack(
        F.gelu(x.primal, approximate="tanh"), aten.gelu_backward(x.tangent.contiguous(), x.primal, approximate="tanh")
    )


def gelu(x: Tensor | Dual) -> Tensor | Dual:
    """GELU by the error function, as Cosmos uses it."""
    if not isinstance(x, Dual):
        return F.gelu(x)
    return Dual.pack(F.gelu(x.primal), aten.gelu_backward(x.tangent.contiguous(), x.primal, approximate="none"))


def silu(x: Tensor | Dual) -> Tensor | Dual:
    if not isinstance(x, Dual):
        return F.silu(x)
    return Dual.pack(F.silu(x.primal), aten.silu_backward(x.tangent.contiguous(), x.primal))


def layer_norm(
    x: Tensor | Dual, *, eps: float, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor | Dual:
    """LayerNorm over the last dimension in fp32 (fp64 stays fp64).

    The Jacobian of the normalisation is symmetric, so its JVP *is* its backward: one fused kernel gives the tangent.
    """
    shape = list(shape_of(x)[-1:])
    if not isinstance(x, Dual):
        return F.layer_norm(upcast(x), shape, weight, bias, eps)
    primal, tangent = upcast(x.primal).contiguous(), upcast(x.tangent).contiguous()
    normed, mean, rstd = torch.native_layer_norm(primal, shape, None, None, eps)
    t_normed, _, _ = aten.native_layer_norm_backward(
        tangent, primal, shape, mean, rstd, None, None, [True, False, False]
    )
    if weight is not None:
        normed, t_normed = normed * weight, t_normed * weight
    return Dual.pack(normed if bias is None else normed + bias, t_normed)


def rms_norm_across_heads(
    x_SBNK: Tensor | Dual,
    weight_NK: Tensor,
    *,
    eps: float,
    num_features: int,
    sum_over_tp: Callable[[Tensor], Tensor],
) -> Tensor | Dual:
    """RMSNorm whose mean square spans *all* heads, also those of other tensor-parallel ranks (Wan's q/k norm).

    ``sum_over_tp`` sums the per-token statistics ``[S, B, stats]``; q and k themselves are never gathered. ``num_features`` is the
    full number of features. With r = rsqrt(mean(x²) + eps) and x̂ = x r, the tangent is t_x̂ = r (tx − x̂ mean(x̂ tx)).
    """
    if not isinstance(x_SBNK, Dual):
        x = upcast(x_SBNK)
        total = sum_over_tp(x.square().sum(dim=(-2, -1)).unsqueeze(-1))
        r_SB = torch.rsqrt(total[..., 0] / num_features + eps)
        return (x * r_SB[..., None, None] * weight_NK).to(x_SBNK.dtype)
    x, tx = upcast(x_SBNK.primal), upcast(x_SBNK.tangent)
    stats = torch.stack([x.square().sum(dim=(-2, -1)), (x * tx).sum(dim=(-2, -1))], dim=-1)
    total = sum_over_tp(stats) / num_features
    r_SB = torch.rsqrt(total[..., 0] + eps)
    t_r_SB = -total[..., 1] * r_SB.pow(3)
    r, t_r = r_SB[..., None, None], t_r_SB[..., None, None]
    dtype = x_SBNK.stacked.dtype
    return Dual.pack((x * r * weight_NK).to(dtype), ((tx * r + x * t_r) * weight_NK).to(dtype))


def rms_norm(x: Tensor | Dual, weight: Tensor, *, eps: float) -> Tensor | Dual:
    """RMSNorm over the last dimension in fp32 (fp64 stays fp64), returned in the dtype of the input.

    With r = rsqrt(mean(x²) + eps), the tangent is (tx − x r² mean(x tx)) r, times the weight.
    """
    if not isinstance(x, Dual):
        wide = upcast(x)
        r = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
        return (wide * r * weight).to(x.dtype)
    primal, tangent = upcast(x.primal), upcast(x.tangent)
    r = torch.rsqrt(primal.square().mean(dim=-1, keepdim=True) + eps)
    t_normed = (tangent - primal * (r * r * (primal * tangent).mean(dim=-1, keepdim=True))) * r
    dtype = x.stacked.dtype
    return Dual.pack((primal * r * weight).to(dtype), (t_normed * weight).to(dtype))


def modulate(x: Tensor | Dual, shift: Tensor | Dual, scale: Tensor | Dual, *, dtype: torch.dtype) -> Tensor | Dual:
    """adaLN modulation ``x (1 + scale) + shift``; ``x`` [S, B, D], ``shift`` and ``scale`` [1, B, D]."""
    if not isinstance(x, Dual):
        return torch.addcmul(shift, x, 1 + scale).to(dtype)
    primal = torch.addcmul(shift.primal, x.primal, 1 + scale.primal)
    tangent = torch.addcmul(shift.tangent, x.tangent, 1 + scale.primal).addcmul_(x.primal, scale.tangent)
    return Dual.pack(primal.to(dtype), tangent.to(dtype))


def gated_residual(h: Tensor | Dual, x: Tensor | Dual, gate: Tensor | Dual) -> Tensor | Dual:
    """``h + gate x`` in the precision of ``gate``, returned in the dtype of ``h``; ``gate`` [1, B, D]."""
    if not isinstance(h, Dual):
        return torch.addcmul(h.to(gate.dtype), x.to(gate.dtype), gate).to(h.dtype)
    dtype, wide = h.stacked.dtype, gate.stacked.dtype
    primal = torch.addcmul(h.primal.to(wide), x.primal.to(wide), gate.primal)
    tangent = torch.addcmul(h.tangent.to(wide), x.tangent.to(wide), gate.primal).addcmul_(
        x.primal.to(wide), gate.tangent
    )
    return Dual.pack(primal.to(dtype), tangent.to(dtype))


def add(a: Tensor | Dual, b: Tensor | Dual) -> Tensor | Dual:
    return Dual(a.stacked + b.stacked) if isinstance(a, Dual) else a + b


def add_constant(x: Tensor | Dual, constant: Tensor) -> Tensor | Dual:
    """``x`` plus what does not depend on the input (``constant`` may be a parameter): the tangent stays."""
    if not isinstance(x, Dual):
        return (x + constant).to(x.dtype)
    return Dual.pack((x.primal + constant).to(x.stacked.dtype), x.tangent)


def upcast(x: Tensor) -> Tensor:
    """fp32 for statistics; fp64 stays fp64 (the oracle tests run in it)."""
    return x if x.dtype == torch.float64 else x.float()
