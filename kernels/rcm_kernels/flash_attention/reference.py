"""Plain attention and its backward in PyTorch, tiled over queries: for devices and dtypes that the fast backends refuse."""

import torch
from torch import Tensor

TILE_ELEMENTS = 2**24  # of scores held at once


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """o [s, b, n, d] in q's dtype, lse [b, n, s] in the compute type (fp64 for fp64, else fp32). At least one key."""
    dtype = _compute_dtype(q)
    k_BNKL, v_BNLK = k.to(dtype).permute(1, 2, 3, 0), v.to(dtype).permute(1, 2, 0, 3)
    o, lse = torch.empty_like(q), q.new_empty((*q.shape[1:3], q.shape[0]), dtype=dtype)
    for rows in _query_tiles(q, k):
        scores = q[rows].to(dtype).permute(1, 2, 0, 3) @ k_BNKL * scale
        lse[..., rows] = scores.logsumexp(-1)
        o[rows] = (scores.softmax(-1) @ v_BNLK).permute(2, 0, 1, 3).to(q.dtype)
    return o, lse


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in q's dtype, with o and lse from outside; dk and dv are summed over queries in the compute type."""
    dtype = _compute_dtype(q)
    k_BNLK, v_BNLK = (x.to(dtype).permute(1, 2, 0, 3) for x in (k, v))
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k_BNLK), torch.zeros_like(v_BNLK)
    for rows in _query_tiles(q, k):
        q_BNSK, do_BNSK, o_BNSK = (x[rows].to(dtype).permute(1, 2, 0, 3) for x in (q, do, o))
        weights = torch.exp(q_BNSK @ k_BNLK.mT * scale - lse[..., rows].to(dtype).unsqueeze(-1))
        delta = (do_BNSK * o_BNSK).sum(-1, keepdim=True)
        d_scores = weights * (do_BNSK @ v_BNLK.mT - delta) * scale
        dv += weights.mT @ do_BNSK
        dk += d_scores.mT @ q_BNSK
        dq[rows] = (d_scores @ k_BNLK).permute(2, 0, 1, 3).to(q.dtype)
    return dq, dk.permute(2, 0, 1, 3).to(q.dtype), dv.permute(2, 0, 1, 3).to(q.dtype)


def _compute_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _query_tiles(q: Tensor, k: Tensor) -> list[slice]:
    step = max(1, TILE_ELEMENTS // (q.shape[1] * q.shape[2] * k.shape[0]))
    return [slice(i, min(i + step, q.shape[0])) for i in range(0, q.shape[0], step)]
