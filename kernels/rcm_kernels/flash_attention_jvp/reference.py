"""Attention with its tangent in plain PyTorch, tiled over heads, queries and keys. Runs anywhere, in fp64 too.

Shapes: s queries, l keys, b batch, n heads, d head dim. With softmax weights P over keys, tS = scale (tq k^T + q tk^T),

    o = P v        mu = sum_keys P * tS        to = P tv + (P * (tS - mu)) v        lse = logsumexp(scale q k^T)

`mu` is what a block of keys must return, beside o, to and lse, for two blocks to merge exactly (docs/ARCHITECTURE.md, "Attention").
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Carry = tuple[Tensor, Tensor, Tensor, Tensor]
"""(o, to, lse, mu)."""

# Measured on one core of an EPYC for 64..4096 tokens, see kernels/README.md: a tile of scores stays in the L2 cache.
BLOCK_QUERIES = 256
BLOCK_KEYS = 1024
TILE_ELEMENTS = {"cpu": 2**16, "cuda": 2**26}


@torch.no_grad()
def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor,
    tk: Tensor | None = None,
    tv: Tensor | None = None,
    *,
    valid_keys: int | None = None,
    scale: float | None = None,
    carry: Carry | None = None,
    chunk: int | None = None,
    q_offset: int = 0,
    k_offset: int = 0,
    out_dtype: torch.dtype | None = None,
    update_carry: bool = False,
    block_queries: int = BLOCK_QUERIES,
    block_keys: int = BLOCK_KEYS,
) -> Carry:
    """Softmax attention and its Jacobian-vector product over one block of keys.

    q, tq: [s, b, n, d]; k, v, tk, tv: [l, b, n, d]; strided views are fine. `tk = tv = None` means that keys and values
    have no tangent (cross-attention): no zero tensors are made, four matmuls instead of six. `valid_keys` (int) is the
    number of leading keys that exist; `scale` is 1/sqrt(d) by default. `carry` is the result of other blocks of keys,
    merged in; it is not modified unless `update_carry`, which writes the results into its tensors.

    `chunk` hides later chunks (frames) of that many tokens: the query at global position q_offset + i sees the keys at
    k_offset + j of its own chunk and of earlier ones. chunk = 1 is the causal mask.

    Returns o, to [s, b, n, d] and lse, mu [b, n, s], all fp32 (fp64 for fp64 inputs); `out_dtype` is another type for o and
    to. Rows without a valid key have lse = -inf and 0 elsewhere. No gradient flows. ValueError for arguments that do not fit.
    """
    num_keys, scale = check_call(q, k, tk, tv, valid_keys, scale, carry, chunk, out_dtype, update_carry)
    if num_keys == 0:
        return without_keys(q, carry, out_dtype)
    limits = _rows_by_limit(q.shape[0], num_keys, chunk, q_offset, k_offset)
    blocks = [_block(q[r], k, v, tq[r], tk, tv, limit, scale, block_queries, block_keys) for r, limit in limits]
    return in_type(_merged(carry, _below_each_other(blocks), update_carry), out_dtype)


def check_call(
    q: Tensor,
    k: Tensor,
    tk: Tensor | None,
    tv: Tensor | None,
    valid_keys: int | None,
    scale: float | None,
    carry: Carry | None,
    chunk: int | None,
    out_dtype: torch.dtype | None,
    update_carry: bool,
) -> tuple[int, float]:
    """Raise for arguments that do not fit together. Returns the number of keys and the scale."""
    if (tk is None) != (tv is None):
        raise ValueError("got only one of tk and tv; need both or neither; fix: pass zeros for the missing one")
    num_keys = k.shape[0] if valid_keys is None else valid_keys
    if not 0 <= num_keys <= k.shape[0]:
        raise ValueError(
            f"got valid_keys={valid_keys}; need 0..{k.shape[0]}, the keys given; fix: count the keys of this block only"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not scale > 0:
        raise ValueError(f"got scale={scale}; need a positive number; fix: negate q instead")
    if chunk is not None and chunk < 1:
        raise ValueError(f"got chunk={chunk}; need the tokens of a chunk, 1 for causal; fix: None for no mask")
    full = torch.float64 if q.dtype == torch.float64 else torch.float32
    if carry is not None and (carry[0].shape != q.shape or any(x.dtype != full for x in carry)):
        raise ValueError(
            f"got a carry of shape {tuple(carry[0].shape)} and types {sorted({str(x.dtype) for x in carry})}; need "
            f"{tuple(q.shape)} and {full}; fix: set out_dtype in the last call of a chain only"
        )
    if update_carry and (out_dtype is not None or not all(x.is_contiguous() for x in carry or ())):
        raise ValueError(
            "got update_carry with out_dtype or a strided carry; need a contiguous fp32 carry as attention_jvp returns it; "
            "fix: leave out update_carry"
        )
    return num_keys, scale


def without_keys(q: Tensor, carry: Carry | None, out_dtype: torch.dtype | None) -> Carry:
    """The result of a block without a valid key: the carry, or lse = -inf and zeros."""
    full = torch.float64 if q.dtype == torch.float64 else torch.float32
    return in_type(_empty_block(q, full) if carry is None else carry, out_dtype)


def in_type(block: Carry, out_dtype: torch.dtype | None) -> Carry:
    """A result with o and to in another type; None: as it is."""
    o, to, lse, mu = block
    return (o, to, lse, mu) if out_dtype is None else (o.to(out_dtype), to.to(out_dtype), lse, mu)


def _rows_by_limit(
    num_queries: int, num_keys: int, chunk: int | None, q_offset: int, k_offset: int
) -> Iterator[tuple[slice, int]]:
    """(rows, number of leading keys that they see), one entry per chunk of queries; without chunks one of all."""
    if chunk is None:
        yield slice(None), num_keys
        return
    begin = 0
    while begin < num_queries:
        end_of_chunk = ((q_offset + begin) // chunk + 1) * chunk
        end = min(end_of_chunk - q_offset, num_queries)
        yield slice(begin, end), min(max(end_of_chunk - k_offset, 0), num_keys)
        begin = end


def _block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor,
    tk: Tensor | None,
    tv: Tensor | None,
    num_keys: int,
    scale: float,
    block_queries: int,
    block_keys: int,
) -> Carry:
    """(o, to, lse, mu) over the first `num_keys` keys, all of which every query sees."""
    if num_keys == 0:
        return without_keys(q, None, None)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys = [None if x is None else _rows(x[:num_keys], dtype) for x in (k, v, tk, tv)]
    o, to, lse, mu = _attend(_rows(q, dtype), _rows(tq, dtype), *keys, scale, block_queries, block_keys)
    s, b, n, d = q.shape
    return o.view(s, b, n, d), to.view(s, b, n, d), lse.view(b, n, s), mu.view(b, n, s)


def _below_each_other(blocks: Sequence[Carry]) -> Carry:
    """The results of consecutive queries as one."""
    if len(blocks) == 1:
        return blocks[0]
    return tuple(torch.cat(parts, dim) for parts, dim in zip(zip(*blocks, strict=True), (0, 0, 2, 2), strict=True))


def _merged(carry: Carry | None, block: Carry, update: bool) -> Carry:
    if carry is None:
        return block
    return _update(carry, block) if update else merge_blocks(carry, block)


def merge_blocks(first: Carry, second: Carry) -> Carry:
    """The (o, to, lse, mu) of two disjoint sets of keys together, in the centred form; either may hold no valid key.

    With w = sigmoid(lse2 - lse1):  to = to1 + w (to2 - to1) + w (1 - w)(mu2 - mu1)(o2 - o1), the others linear in w.
    """
    (o1, to1, lse1, mu1), (o2, to2, lse2, mu2) = first, second
    lse, w, w_mu = _merge_weights(lse1, lse2, mu2 - mu1)
    o, to = _interpolate(o1, to1, o2, to2, *_per_row(w, w_mu))
    return o, to, lse, torch.lerp(mu1, mu2, w)


def _update(carry: Carry, block: Carry) -> Carry:
    """`merge_blocks`, bit for bit, into the carry's tensors: no third o and to. Uses up the block."""
    (o1, to1, lse1, mu1), (o2, to2, lse2, mu2) = carry, block
    lse, w, w_mu = _merge_weights(lse1, lse2, mu2 - mu1)
    w_SBN1, w_mu_SBN1 = _per_row(w, w_mu)
    step = o2.sub_(o1)
    to1.lerp_(to2, w_SBN1).addcmul_(w_mu_SBN1, step)
    return o1.add_(step.mul_(w_SBN1)), to1, lse1.copy_(lse), mu1.lerp_(mu2, w)


def _merge_weights(lse1: Tensor, lse2: Tensor, mu_step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """lse of both blocks, w, and w (1 - w) mu_step, all [b, n, s]."""
    lse = torch.logaddexp(lse1, lse2)
    w = torch.where(lse == -torch.inf, 0.0, torch.exp(lse2 - lse))
    return lse, w, w * (1 - w) * mu_step


def _per_row(*statistics_BNS: Tensor) -> list[Tensor]:
    """[b, n, s] -> [s, b, n, 1]."""
    return [x.permute(2, 0, 1).unsqueeze(-1) for x in statistics_BNS]


def _interpolate(o1: Tensor, to1: Tensor, o2: Tensor, to2: Tensor, w: Tensor, w_mu: Tensor) -> tuple[Tensor, Tensor]:
    step = o2 - o1
    to = torch.lerp(to1, to2, w).addcmul_(w_mu, step)
    return step.mul_(w).add_(o1), to


def _rows(x_SBNK: Tensor, dtype: torch.dtype) -> Tensor:
    """[s, b, n, d] -> [b*n, s, d] in the compute type; a view unless b and n do not merge or the type changes."""
    return x_SBNK.to(dtype).flatten(1, 2).transpose(0, 1)


def _empty_block(q: Tensor, dtype: torch.dtype) -> Carry:
    s, b, n, _ = q.shape
    o, lse = q.new_zeros(q.shape, dtype=dtype), q.new_full((b, n, s), -torch.inf, dtype=dtype)
    return o, torch.zeros_like(o), lse, torch.zeros_like(lse)


def _attend(
    q: Tensor,
    tq: Tensor,
    k: Tensor,
    v: Tensor,
    tk: Tensor | None,
    tv: Tensor | None,
    scale: float,
    block_queries: int,
    block_keys: int,
) -> Carry:
    """Tiles of [heads, queries, keys]; q.. are [B, s, d]. Returns o, to [s, B, d] and lse, mu [B, s]."""
    (rows, s, d), num_keys = q.shape, k.shape[1]
    qb, kb = min(block_queries, s), min(block_keys, num_keys)
    hb = min(rows, max(1, TILE_ELEMENTS.get(q.device.type, 2**26) // max(1, qb * kb)))
    workspace = q.new_empty(2, hb * qb * kb)
    o, to, lse, mu = q.new_empty(s, rows, d), q.new_empty(s, rows, d), q.new_empty(rows, s), q.new_empty(rows, s)
    for h in range(0, rows, hb):
        heads = slice(h, h + hb)
        for i in range(0, s, qb):
            queries, block = slice(i, i + qb), None
            for j in range(0, num_keys, kb):
                keys = [None if x is None else x[heads, j : j + kb] for x in (k, v, tk, tv)]
                tile = _tile(q[heads, queries], tq[heads, queries], *keys, scale, workspace)
                block = tile if block is None else _merge_rows(block, tile)
            o[queries, heads], to[queries, heads] = block[0].transpose(0, 1), block[1].transpose(0, 1)
            lse[heads, queries], mu[heads, queries] = block[2].squeeze(-1), block[3].squeeze(-1)
    return o, to, lse, mu


def _tile(
    q: Tensor, tq: Tensor, k: Tensor, v: Tensor, tk: Tensor | None, tv: Tensor | None, scale: float, workspace: Tensor
) -> Carry:
    """One tile, whose keys are all valid: o, to [h, s, d] and lse, mu [h, s, 1]. Normalised at the end, by the row's total."""
    shape = (q.shape[0], q.shape[1], k.shape[1])
    scores, tangent = (x[: shape[0] * shape[1] * shape[2]].view(shape) for x in workspace)
    k_T = k.transpose(1, 2)
    torch.baddbmm(scores, q, k_T, beta=0, alpha=scale, out=scores)
    torch.baddbmm(tangent, tq, k_T, beta=0, alpha=scale, out=tangent)
    if tk is not None:
        tangent.baddbmm_(q, tk.transpose(1, 2), alpha=scale)
    peak = scores.amax(-1, keepdim=True)
    weights = scores.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True)
    tangent.mul_(weights)
    mu = tangent.sum(-1, keepdim=True) / total
    tangent.addcmul_(weights, mu, value=-1)  # centred: weights * (tS - mu)
    o = torch.bmm(weights, v)
    to = torch.bmm(tangent, v)
    if tv is not None:
        to.baddbmm_(weights, tv)
    return o.div_(total), to.div_(total), peak + total.log(), mu


def _merge_rows(first: Carry, second: Carry) -> Carry:
    """`merge_blocks` for tiles, where every row has a valid key and lse, mu are [h, s, 1]."""
    (o1, to1, lse1, mu1), (o2, to2, lse2, mu2) = first, second
    w = torch.sigmoid(lse2 - lse1)
    o, to = _interpolate(o1, to1, o2, to2, w, w * (1 - w) * (mu2 - mu1))
    return o, to, torch.logaddexp(lse1, lse2), torch.lerp(mu1, mu2, w)
