"""The (primal, tangent) rule of every non-linear operation of a DiT. Linear ones need none (rcm_megatron.dual).

Shapes: h_SBD hidden states, q_SBNK per head, S tokens of this rank, B batch (2B stacked inside a Dual), D features, N heads,
K head dim. Statistics and modulation are fp32; results return in the dtype of the input.

Where rcm_kernels.fused has a kernel for a tensor (on CUDA, unless its ``select_ops`` says otherwise), that one pass over the data
replaces the PyTorch operations below, which are the rule itself and run everywhere else.
"""

from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from rcm_kernels.fused import kernel_for
from rcm_megatron.dual import Dual, add_bias, map_linear, primal_of, shape_of

aten = torch.ops.aten


def gelu_tanh(x: Tensor | Dual, bias: Tensor | None = None) -> Tensor | Dual:
    """GELU of ``x + bias`` with the tanh approximation, as Wan uses it; may add the bias to a Dual in place."""
    if kernel := _kernel("gelu_tanh", x, bias):
        return _run(kernel, x, bias)
    x = add_bias(x, bias)
    if not isinstance(x, Dual):
        return F.gelu(x, approximate="tanh")
    return Dual.pack(
        F.gelu(x.primal, approximate="tanh"), aten.gelu_backward(x.tangent.contiguous(), x.primal, approximate="tanh")
    )


def gelu(x: Tensor | Dual, bias: Tensor | None = None) -> Tensor | Dual:
    """GELU of ``x + bias`` by the error function, as Cosmos uses it; may add the bias to a Dual in place."""
    x = add_bias(x, bias)
    if not isinstance(x, Dual):
        return F.gelu(x)
    return Dual.pack(F.gelu(x.primal), aten.gelu_backward(x.tangent.contiguous(), x.primal, approximate="none"))


def silu(x: Tensor | Dual) -> Tensor | Dual:
    if not isinstance(x, Dual):
        return F.silu(x)
    return Dual.pack(F.silu(x.primal), aten.silu_backward(x.tangent.contiguous(), x.primal))


def layer_norm_modulate(
    x: Tensor | Dual, shift: Tensor | Dual, scale: Tensor | Dual, *, eps: float, dtype: torch.dtype
) -> Tensor | Dual:
    """adaLN: ``layer_norm(x) (1 + scale) + shift`` in ``dtype``; ``shift`` and ``scale`` [1, B, D], or [S, B, D] of each token."""
    if not _of_each_token(shift) and (kernel := _kernel("layer_norm_modulate", x, shift, scale)):
        return _run(kernel, x, shift, scale, eps=eps, dtype=dtype)
    return modulate(layer_norm(x, eps=eps), shift, scale, dtype=dtype)


def layer_norm_affine(
    x: Tensor | Dual, weight: Tensor, bias: Tensor, *, eps: float, dtype: torch.dtype | None = None
) -> Tensor | Dual:
    """``layer_norm(x) weight + bias`` in ``dtype``, by default that of the statistics; ``weight`` and ``bias`` [D]."""
    if dtype and (kernel := _kernel("layer_norm_modulate", x, weight, bias)):
        tangents = {"vector_tangents": False} if isinstance(x, Dual) else {}
        return _run(kernel, x, bias, weight, eps=eps, dtype=dtype, one=0.0, **tangents)
    normed = layer_norm(x, eps=eps, weight=weight, bias=bias)
    return map_linear(lambda value: value.to(dtype), normed) if dtype else normed


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
    sum_over_tp: Callable[[Tensor], Tensor] | None,
    rotation_SK: Tensor | None = None,
) -> Tensor | Dual:
    """RMSNorm whose mean square spans *all* heads, also those of other tensor-parallel ranks (Wan's q/k norm); then RoPE, if any.

    ``sum_over_tp`` sums the per-token statistics ``[S, B, stats]``; q and k themselves are never gathered. None says that all heads
    are here. ``num_features`` is the full number of features. With r = rsqrt(mean(x²) + eps) and x̂ = x r, the tangent is
    t_x̂ = r (tx − x̂ mean(x̂ tx)).
    """
    options = {"eps": eps, "num_features": num_features, "sum_over_tp": sum_over_tp}
    if kernel := _kernel("rms_norm_rope", x_SBNK, weight_NK):
        return _run(kernel, x_SBNK, weight_NK, rotation_SK, **options)
    normed = _rms_norm(x_SBNK, weight_NK, **options)
    return normed if rotation_SK is None else apply_rope(normed, rotation_SK)


def _rms_norm(x_SBNK, weight_NK: Tensor, *, eps: float, num_features: int, sum_over_tp) -> Tensor | Dual:
    sum_over_tp = sum_over_tp or (lambda total: total)
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


def apply_rope(x_SBNK: Tensor | Dual, rotation_SK: Tensor) -> Tensor | Dual:
    """Rotate interleaved pairs of the head dimension in fp32; linear, so a Dual rotates as one tensor."""
    return map_linear(lambda value: _rotate(value, rotation_SK), x_SBNK)


def _rotate(x_SBNK: Tensor, rotation_SK: Tensor) -> Tensor:
    wide = upcast(x_SBNK).contiguous()
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    rotation = rotation_SK.to(pairs.dtype)[:, None, None, :]
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x_SBNK.dtype)


def apply_rope_halves(x_SBNK: Tensor | Dual, rotation_SK: Tensor) -> Tensor | Dual:
    """As :func:`apply_rope`, with pairs (k, k + K/2): the halves of a head are real and imaginary parts (Cosmos)."""
    return map_linear(lambda value: _rotate_halves(value, rotation_SK), x_SBNK)


def _rotate_halves(x_SBNK: Tensor, rotation_SK: Tensor) -> Tensor:
    real, imaginary = upcast(x_SBNK).chunk(2, dim=-1)
    rotation = rotation_SK[:, None, None, :]
    cos, sin = rotation.real.to(real.dtype), rotation.imag.to(real.dtype)
    return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=-1).to(x_SBNK.dtype)


def modulate(x: Tensor | Dual, shift: Tensor | Dual, scale: Tensor | Dual, *, dtype: torch.dtype) -> Tensor | Dual:
    """adaLN modulation ``x (1 + scale) + shift``; ``x`` [S, B, D], ``shift`` and ``scale`` [1, B, D] or [S, B, D]."""
    if not isinstance(x, Dual):
        return torch.addcmul(shift, x, 1 + scale).to(dtype)
    primal = torch.addcmul(shift.primal, x.primal, 1 + scale.primal)
    tangent = torch.addcmul(shift.tangent, x.tangent, 1 + scale.primal).addcmul_(x.primal, scale.tangent)
    return Dual.pack(primal.to(dtype), tangent.to(dtype))


def gated_residual(h: Tensor | Dual, x: Tensor | Dual, gate: Tensor | Dual) -> Tensor | Dual:
    """``h + gate x`` in the precision of ``gate``, returned in the dtype of ``h``; ``gate`` [1, B, D] or [S, B, D]."""
    if not _of_each_token(gate) and (kernel := _kernel("gated_residual", h, x, gate)):
        return _run(kernel, h, x, gate)
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


def _of_each_token(vector: Tensor | Dual) -> bool:
    """Given frames (rcm_megatron.models.conditional_frames) have vectors of their own, for which there are no fused kernels."""
    return shape_of(vector)[0] > 1


def _kernel(op: str, *values: Tensor | Dual | None) -> ModuleType | None:
    """The module of ``op``'s fused kernels for these values, or None where the rules in PyTorch apply.

    They do for a Dual that carries gradient here, outside of :func:`recomputed`: the kernels' duals have none.
    """
    if not isinstance(values[0], Dual):
        return kernel_for(op, values[0])
    if torch.is_grad_enabled() and any(primal_of(v).requires_grad for v in values if v is not None):
        return None
    return kernel_for(op, values[0].stacked)


def _run(kernel: ModuleType, x: Tensor | Dual, *others: Tensor | Dual | None, **options) -> Tensor | Dual:
    if not isinstance(x, Dual):
        return kernel.plain(x, *others, **options)
    return Dual(kernel.dual(*(v.stacked if isinstance(v, Dual) else v for v in (x, *others)), **options))


def upcast(x: Tensor) -> Tensor:
    """fp32 for statistics; fp64 stays fp64 (the oracle tests run in it)."""
    return x if x.dtype == torch.float64 else x.float()
