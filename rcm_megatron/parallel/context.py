"""Context parallelism: self-attention over a sequence that is split over ranks, by a ring, by Ulysses, or by both.

Rank r of cp holds the r-th contiguous piece of the tokens, with padding at the global end; r = ring_rank * ulysses_size +
ulysses_rank. Ulysses (arXiv 2309.14509) trades heads for tokens with one all-to-all each way; between the two, the ring
(rcm_megatron.parallel.ring) passes blocks of keys and values round, and each rank merges its partial results.

All tensors are [s, b, n, d]: tokens of this rank, batch, heads of this rank (num_heads / tp), head dim.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from rcm_kernels.flash_attention import attention_backward, attention_forward
from rcm_kernels.flash_attention_jvp import attention_jvp
from rcm_megatron.parallel.kept_attention import keep, kept_or
from rcm_megatron.parallel.ring import Ring, ring_attention_jvp, ring_backward, ring_forward


@dataclass(frozen=True)
class ContextParallel:
    """Attention over `ring_group` x `ulysses_group`; None is a group of one rank, and needs no communication."""

    ring_group: dist.ProcessGroup | None = None
    ulysses_group: dist.ProcessGroup | None = None

    @property
    def ring_size(self):
        return 1 if self.ring_group is None else dist.get_world_size(self.ring_group)

    @property
    def ulysses_size(self):
        return 1 if self.ulysses_group is None else dist.get_world_size(self.ulysses_group)

    @property
    def size(self):
        return self.ring_size * self.ulysses_size

    def attention(self, q, k, v, *, valid_tokens=None):
        """softmax(q k^T / sqrt(d)) v with autograd. q, k, v and the result: [s_local, b, n_local, d].

        `valid_tokens` is the number of tokens, of all `s_local * size`, that are not padding; None means all.
        """
        valid_tokens = self._check(q, valid_tokens)
        if self.ulysses_size > 1:
            q, k, v = _ScatterHeads.apply(self.ulysses_group, q, k, v)
        o = SelfAttention.apply(q, k, v, Ring.of(self.ring_group) if self.ring_size > 1 else None, valid_tokens)
        return _GatherHeads.apply(self.ulysses_group, o)[0] if self.ulysses_size > 1 else o

    @torch.no_grad()
    def attention_jvp(self, q, k, v, tq, tk, tv, *, valid_tokens=None):
        """Attention and its tangent (o, to) for tangents tq, tk, tv of q, k, v; no gradient. Shapes as in `attention`."""
        valid_tokens = self._check(q, valid_tokens)
        if self.ulysses_size > 1:
            q, k, v, tq, tk, tv = _scatter_heads(self.ulysses_group, q, k, v, tq, tk, tv)
        if self.ring_size > 1:
            o, to, lse = ring_attention_jvp(Ring.of(self.ring_group), q, k, v, tq, tk, tv, valid_tokens)
        else:
            o, to, lse, _ = attention_jvp(q, k, v, tq, tk, tv, valid_keys=valid_tokens, out_dtype=q.dtype)
        keep(o, lse)
        return _gather_heads(self.ulysses_group, o, to) if self.ulysses_size > 1 else (o, to)

    def _check(self, q, valid_tokens):
        s_local, _, heads, _ = q.shape
        if heads % self.ulysses_size:
            divisors = [str(i) for i in range(1, heads + 1) if heads % i == 0]
            raise ValueError(
                f"got {heads} heads on this rank (num_heads / tp) and ulysses={self.ulysses_size}; need a Ulysses degree that "
                f"divides the heads; fix: set ulysses to one of {', '.join(divisors)} and use ring for the rest"
            )
        total = s_local * self.size
        valid_tokens = total if valid_tokens is None else valid_tokens
        if not 0 < valid_tokens <= total:
            raise ValueError(
                f"got valid_tokens={valid_tokens}; need 1..{total} = {s_local} tokens a rank x cp={self.size}; fix: pass the "
                "global count of tokens without padding"
            )
        return valid_tokens


def _all_to_all(group, buffer):
    received = torch.empty_like(buffer)
    dist.all_to_all_single(received, buffer, group=group)
    return received


def _scatter_heads(group, *tensors):
    """[s, b, n, d] each -> [s*u, b, n/u, d] each, in one all-to-all of u = group size pieces."""
    size, (s, b, n, d) = dist.get_world_size(group), tensors[0].shape
    buffer = tensors[0].new_empty(size, s, b, len(tensors), n // size, d)
    for i, x in enumerate(tensors):
        buffer[:, :, :, i] = x.reshape(s, b, size, n // size, d).permute(2, 0, 1, 3, 4)
    return _all_to_all(group, buffer).flatten(0, 1).unbind(2)


def _gather_heads(group, *tensors):
    """[s*u, b, n/u, d] each -> [s, b, n, d] each, in one all-to-all: the inverse, and the transpose, of `_scatter_heads`."""
    size = dist.get_world_size(group)
    buffer = torch.stack(tensors, dim=2).unflatten(0, (size, -1))
    received = _all_to_all(group, buffer).permute(3, 1, 2, 0, 4, 5)
    return received.flatten(3, 4).unbind(0)


class SelfAttention(torch.autograd.Function):
    """Attention with gradient over all blocks of `ring`, or with None over the keys of this rank alone."""

    @staticmethod
    def forward(ctx, q, k, v, ring, valid_tokens):
        def compute():
            if ring is None:
                return attention_forward(q, k, v, valid_keys=valid_tokens)
            return ring_forward(ring, q, k, v, valid_tokens)

        o, lse = kept_or(compute)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.ring, ctx.valid_tokens = ring, valid_tokens
        return o

    @staticmethod
    def backward(ctx, do):
        saved = do, *ctx.saved_tensors
        if ctx.ring is None:
            return *attention_backward(*saved, valid_keys=ctx.valid_tokens), None, None
        return *ring_backward(ctx.ring, *saved, ctx.valid_tokens), None, None


class _ScatterHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group, *tensors):
        ctx.group = group
        return _scatter_heads(group, *tensors)

    @staticmethod
    def backward(ctx, *grads):
        return None, *_gather_heads(ctx.group, *grads)


class _GatherHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group, *tensors):
        ctx.group = group
        return _gather_heads(group, *tensors)

    @staticmethod
    def backward(ctx, *grads):
        return None, *_scatter_heads(ctx.group, *grads)
