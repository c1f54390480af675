"""`attention` and its two halves. Valid keys, empty blocks and layout are dealt with here, so that a backend need not."""

from typing import Any

import torch
from torch import Tensor

from rcm_kernels.flash_attention.backends import backend_for


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, *, valid_keys: int | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v over the first `valid_keys` keys. Returns o [s, b, n, d] in q's dtype and lse [b, n, s].

    Without a valid key o = 0 and lse = -inf.
    """
    num_keys = _count_keys(k, valid_keys)
    if num_keys == 0:
        lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        return torch.zeros_like(q), q.new_full((*q.shape[1:3], q.shape[0]), -torch.inf, dtype=lse_dtype)
    q, k, v = (_last_dim_dense(x) for x in (q, k[:num_keys], v[:num_keys]))
    return backend_for(q).forward(q, k, v, _scale(q, scale))


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    *,
    valid_keys: int | None = None,
    scale: float | None = None,
    dq: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) in q's dtype for this block of keys; `o` and `lse` may be those of a larger set of keys.

    With `dq`, a contiguous sum over blocks in lse's dtype, dq is added to it in place, and dk and dv have that dtype too.

    With P = exp(scale q k^T - lse) and dS = P * (do v^T - sum(do * o)): dv = P^T do, dq = scale dS k, dk = scale dS^T q.
    Gradients of keys past `valid_keys` are 0.
    """
    num_keys = _count_keys(k, valid_keys)
    if num_keys == 0:
        dtype = q.dtype if dq is None else dq.dtype
        return torch.zeros_like(q) if dq is None else dq, *(torch.zeros_like(x, dtype=dtype) for x in (k, v))
    do, q, o, k_valid, v_valid = (_last_dim_dense(x) for x in (do, q, o, k[:num_keys], v[:num_keys]))
    backend, arguments = backend_for(q), (do, q, k_valid, v_valid, o, lse, _scale(q, scale))
    if dq is None:
        dq, dk, dv = backend.backward(*arguments)
    elif backend.accumulates:
        dq, dk, dv = backend.backward(*arguments, dq=dq)
    else:
        block_dq, dk, dv = backend.backward(*arguments)
        dq, dk, dv = dq.add_(block_dq), dk.to(dq.dtype), dv.to(dq.dtype)
    return dq, _pad_keys(dk, k.shape[0]), _pad_keys(dv, v.shape[0])


def attention(q: Tensor, k: Tensor, v: Tensor, *, valid_keys: int | None = None, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v with autograd. q: [s, b, n, d]; k, v: [l, b, n, d], of which the first `valid_keys` exist."""
    return _Attention.apply(q, k, v, valid_keys, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, valid_keys: int | None, scale: float | None) -> Tensor:
        o, lse = attention_forward(q, k, v, valid_keys=valid_keys, scale=scale)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.valid_keys, ctx.scale = valid_keys, scale
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        return *attention_backward(do, q, k, v, o, lse, valid_keys=ctx.valid_keys, scale=ctx.scale), None, None


def _count_keys(k: Tensor, valid_keys: int | None) -> int:
    if valid_keys is None:
        return k.shape[0]
    if not 0 <= valid_keys <= k.shape[0]:
        raise ValueError(
            f"got valid_keys={valid_keys}; need 0..{k.shape[0]}, the keys given; fix: count the keys of this block only"
        )
    return valid_keys


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _last_dim_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _pad_keys(grad: Tensor, length: int) -> Tensor:
    if grad.shape[0] == length:
        return grad
    padded = grad.new_zeros(length, *grad.shape[1:])
    padded[: grad.shape[0]] = grad
    return padded
