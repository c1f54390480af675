"""Layers of a DiT block on Megatron-Core: each takes ``Tensor | Dual`` and returns the same.

Shapes: h_SBD hidden shard (S tokens of this rank under sequence parallelism), q_SBNK local heads of a context-parallel rank,
text_LBD text tokens (replicated), L text length, N local heads, K head dim.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from rcm_kernels.flash_attention import attention
from rcm_kernels.flash_attention_jvp import attention_jvp
from rcm_megatron.dual import Dual, add_bias, map_linear
from rcm_megatron.models.dual_ops import (
    add,
    apply_rope_halves,
    layer_norm_affine,
    rms_norm,
    rms_norm_across_heads,
)
from rcm_megatron.models.layer_specs import LayerSpec
from rcm_megatron.parallel.context import ContextParallel
from rcm_megatron.parallel.mappings import all_reduce_sum


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms, modulation and the time embedding: fp32, or fp64 in an fp64 network."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def column_linear(spec: LayerSpec, in_features: int, out_features: int, **options) -> nn.Module:
    """A Megatron linear whose output features are split over tensor-parallel ranks; a bias is left to :func:`project`."""
    linear = _parallel_linear(spec.column_linear, in_features, out_features, gather_output=False, **options)
    for parameter in linear.parameters():
        mark_tensor_parallel(parameter, dim=0)
    return linear


def row_linear(spec: LayerSpec, in_features: int, out_features: int, **options) -> nn.Module:
    """A Megatron linear whose input features are split over tensor-parallel ranks; a bias is left to :func:`project`."""
    linear = _parallel_linear(spec.row_linear, in_features, out_features, input_is_parallel=True, **options)
    mark_tensor_parallel(linear.weight, dim=1)
    return linear


def _parallel_linear(
    linear: type,
    in_features: int,
    out_features: int,
    *,
    config: TransformerConfig,
    tp_group: ProcessGroup,
    bias: bool = True,
    **layout: bool,
) -> nn.Module:
    return linear(
        in_features,
        out_features,
        config=config,
        init_method=config.init_method,
        bias=bias,
        skip_bias_add=True,
        is_expert=False,
        tp_group=tp_group,
        **layout,
    )


def mark_tensor_parallel(parameter: nn.Parameter, *, dim: int) -> None:
    """Say that ``parameter`` is this rank's slice along ``dim``; Megatron itself marks only weights that it initialises."""
    parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, dim, 1


def project(linear: nn.Module, x: Tensor | Dual) -> Tensor | Dual:
    """Apply a Megatron linear to a tensor, or to both halves of a dual with the bias on the primal alone."""
    return add_bias(map_linear(lambda value: linear(value)[0], x), bias_of(linear))


def bias_of(linear: nn.Module) -> Tensor | None:
    """The bias of a Megatron linear; Transformer Engine's "none" is an empty one."""
    return linear.bias if linear.bias is not None and linear.bias.numel() else None


class ReplicatedLinear(nn.Linear):
    """A linear that every tensor-parallel rank holds whole, for tensors and duals.

    ``on_token_shards``: it works on tokens (or modulation of tokens) that sequence parallelism shards, so its gradients are
    partial and Megatron must sum them over the tensor-parallel group.
    """

    def __init__(
        self, in_features: int, out_features: int, *, dtype: torch.dtype, on_token_shards: bool, bias: bool = True
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, dtype=dtype)
        for parameter in self.parameters():
            parameter.sequence_parallel = on_token_shards

    def forward(self, x: Tensor | Dual) -> Tensor | Dual:
        if isinstance(x, Dual):
            return add_bias(x.linear(lambda value: nn.functional.linear(value, self.weight)), self.bias)
        return nn.functional.linear(x, self.weight, self.bias)


class GatheredLinear(nn.Linear):
    """A linear of what modulates tokens, whose output features are split over tensor-parallel ranks and gathered.

    Its output meets the tokens that sequence parallelism shards: the output's gradient is partial on each rank, and is summed on its way to
    the rank that holds the features. The input's stays partial, over features here: what comes before is ``on_token_shards``, so that
    Megatron sums it.
    """

    def __init__(
        self, in_features: int, out_features: int, *, dtype: torch.dtype, tp_group: ProcessGroup, bias: bool = True
    ) -> None:
        super().__init__(in_features, out_features // tp_group.size(), bias=bias, dtype=dtype)
        self.gather = partial(all_gather_last_dim_from_tensor_parallel_region, group=tp_group)
        self.is_split = tp_group.size() > 1
        for parameter in self.parameters():
            mark_tensor_parallel(parameter, dim=0)

    def forward(self, x: Tensor | Dual) -> Tensor | Dual:
        own = add_bias(map_linear(lambda value: nn.functional.linear(value, self.weight), x), self.bias)
        return map_linear(self.gather, own) if self.is_split else own


class AffineLayerNorm(nn.Module):
    """LayerNorm with weight and bias; ``on_token_shards`` as in ReplicatedLinear."""

    def __init__(self, features: int, *, eps: float, dtype: torch.dtype, on_token_shards: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(features, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(features, dtype=dtype))
        self.weight.sequence_parallel = self.bias.sequence_parallel = on_token_shards

    def forward(self, h_SBD: Tensor | Dual, *, dtype: torch.dtype | None = None) -> Tensor | Dual:
        """The normed state in ``dtype``; by default in that of the statistics."""
        return layer_norm_affine(h_SBD, self.weight, self.bias, eps=self.eps, dtype=dtype)


class RMSNormAcrossHeads(nn.Module):
    """q/k norm over all heads; each tensor-parallel rank holds the weights of its own heads."""

    def __init__(
        self, num_heads: int, head_dim: int, *, eps: float, dtype: torch.dtype, tp_group: ProcessGroup
    ) -> None:
        super().__init__()
        self.eps, self.num_features = eps, num_heads * head_dim
        self.shape = (num_heads // tp_group.size(), head_dim)
        self.sum_over_tp = partial(all_reduce_sum, group=tp_group) if tp_group.size() > 1 else None
        self.weight = nn.Parameter(torch.ones(self.shape[0] * head_dim, dtype=dtype))
        mark_tensor_parallel(self.weight, dim=0)

    def forward(self, x_SBNK: Tensor | Dual, rotation_SK: Tensor | None = None) -> Tensor | Dual:
        """The norm, and after it RoPE by ``rotation_SK`` if there is one."""
        return rms_norm_across_heads(
            x_SBNK,
            self.weight.view(self.shape),
            eps=self.eps,
            num_features=self.num_features,
            sum_over_tp=self.sum_over_tp,
            rotation_SK=rotation_SK,
        )


class RMSNormPerHead(nn.Module):
    """q/k norm of each head by itself, with weights that all heads share.

    Every tensor-parallel rank holds the weights and sees its own heads alone: their gradients are partial, and are summed over tp like
    those of parameters on token shards.
    """

    def __init__(
        self, num_heads: int, head_dim: int, *, eps: float, dtype: torch.dtype, tp_group: ProcessGroup
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(head_dim, dtype=dtype))
        self.weight.sequence_parallel = True

    def forward(self, x_SBNK: Tensor | Dual, rotation_SK: Tensor | None = None) -> Tensor | Dual:
        """The norm, and after it RoPE by ``rotation_SK`` if there is one."""
        normed = rms_norm(x_SBNK, self.weight, eps=self.eps)
        return normed if rotation_SK is None else apply_rope_halves(normed, rotation_SK)


@dataclass(frozen=True, kw_only=True)
class AttentionStyle:
    """In what the attention and MLP of families differ."""

    head_norm: type
    """Norm of q and k, and the family's RoPE after it."""
    norm_eps: float
    bias: bool
    """Of all linears."""
    text_features: int
    """Width of the text that cross-attention sees."""
    activation: Callable[[Tensor | Dual, Tensor | None], Tensor | Dual]
    """Of the MLP; takes its first linear's bias."""


def split_heads(x: Tensor | Dual, parts: int, head_dim: int) -> tuple[Tensor | Dual, ...]:
    """Views ``[S, B, N, K]`` of a fused projection whose rows are interleaved per head, ``[N, parts, K]``."""
    stacked = x.stacked if isinstance(x, Dual) else x
    views = stacked.unflatten(-1, (-1, parts, head_dim)).unbind(-2)
    return tuple(Dual(view) for view in views) if isinstance(x, Dual) else views


class SelfAttention(nn.Module):
    """Self-attention with fused qkv, norm of q and k, RoPE and context parallelism."""

    def __init__(
        self,
        model,
        *,
        config: TransformerConfig,
        spec: LayerSpec,
        context: ContextParallel,
        tp_group,
        style: AttentionStyle,
    ) -> None:
        super().__init__()
        self.head_dim, self.context = model.head_dim, context
        hidden, norm = model.hidden_size, partial(style.head_norm, model.num_heads, model.head_dim)
        options = {"config": config, "tp_group": tp_group, "bias": style.bias}
        self.linear_qkv = column_linear(spec, hidden, 3 * hidden, **options)
        self.q_norm = norm(eps=style.norm_eps, dtype=wide_dtype(config.params_dtype), tp_group=tp_group)
        self.k_norm = norm(eps=style.norm_eps, dtype=wide_dtype(config.params_dtype), tp_group=tp_group)
        self.linear_proj = row_linear(spec, hidden, hidden, **options)

    def forward(self, h_SBD: Tensor | Dual, rotation_SK: Tensor, *, valid_tokens: int) -> Tensor | Dual:
        q, k, v = split_heads(project(self.linear_qkv, h_SBD), 3, self.head_dim)
        q, k = self.q_norm(q, rotation_SK), self.k_norm(k, rotation_SK)
        if isinstance(q, Dual):
            o, to = self.context.attention_jvp(
                q.primal, k.primal, v.primal, q.tangent, k.tangent, v.tangent, valid_tokens=valid_tokens
            )
            o_SBNK = Dual.pack(o, to)
        else:
            o_SBNK = self.context.attention(q, k, v, valid_tokens=valid_tokens)
        return project(self.linear_proj, map_linear(partial(torch.flatten, start_dim=2), o_SBNK))


class CrossAttention(nn.Module):
    """Cross-attention to replicated text tokens: local on every rank, and the text carries no tangent.

    ``with_image``: image tokens have keys and values of their own, and what a query finds among them is added to what it finds in the text.
    """

    def __init__(
        self,
        model,
        *,
        config: TransformerConfig,
        spec: LayerSpec,
        tp_group: ProcessGroup,
        style: AttentionStyle,
        with_image: bool = False,
    ) -> None:
        super().__init__()
        self.head_dim = model.head_dim
        hidden, norm = model.hidden_size, partial(style.head_norm, model.num_heads, model.head_dim)
        norm = partial(norm, eps=style.norm_eps, dtype=wide_dtype(config.params_dtype), tp_group=tp_group)
        # Sequence parallelism would gather the replicated text over tp and attend to every key tp times.
        text_config = copy.copy(config)
        text_config.sequence_parallel = False
        options = {"tp_group": tp_group, "bias": style.bias}
        self.linear_q = column_linear(spec, hidden, hidden, config=config, **options)
        self.linear_kv = column_linear(spec, style.text_features, 2 * hidden, config=text_config, **options)
        self.q_norm, self.k_norm = norm(), norm()
        if with_image:
            self.image_linear_kv = column_linear(spec, hidden, 2 * hidden, config=text_config, **options)
            self.image_k_norm = norm()
        self.linear_proj = row_linear(spec, hidden, hidden, config=config, **options)

    def forward(self, h_SBD: Tensor | Dual, text_LBD: Tensor, image_LBD: Tensor | None = None) -> Tensor | Dual:
        (q,) = split_heads(project(self.linear_q, h_SBD), 1, self.head_dim)
        q = self.q_norm(q)
        o_SBNK = self._attend(q, text_LBD, self.linear_kv, self.k_norm)
        if image_LBD is not None:
            o_SBNK = add(o_SBNK, self._attend(q, image_LBD, self.image_linear_kv, self.image_k_norm))
        return project(self.linear_proj, map_linear(partial(torch.flatten, start_dim=2), o_SBNK))

    def _attend(self, q: Tensor | Dual, context_LBD: Tensor, linear_kv: nn.Module, k_norm: nn.Module) -> Tensor | Dual:
        k, v = split_heads(project(linear_kv, context_LBD), 2, self.head_dim)
        assert k.shape[0] == context_LBD.shape[0], "keys were gathered over the tensor-parallel group"
        k = k_norm(k)
        if not isinstance(q, Dual):
            return attention(q, k, v)
        o, to, _, _ = attention_jvp(q.primal, k, v, q.tangent, out_dtype=k.dtype)
        return Dual.pack(o, to)


class MLP(nn.Module):
    """Feed-forward of two linears around an activation."""

    def __init__(
        self,
        model,
        *,
        config: TransformerConfig,
        spec: LayerSpec,
        tp_group: ProcessGroup,
        style: AttentionStyle,
    ) -> None:
        super().__init__()
        hidden, ffn, self.activation = model.hidden_size, model.ffn_hidden_size, style.activation
        options = {"config": config, "tp_group": tp_group, "bias": style.bias}
        self.linear_fc1 = column_linear(spec, hidden, ffn, **options)
        self.linear_fc2 = row_linear(spec, ffn, hidden, **options)

    def forward(self, h_SBD: Tensor | Dual) -> Tensor | Dual:
        x = map_linear(lambda value: self.linear_fc1(value)[0], h_SBD)
        return project(self.linear_fc2, self.activation(x, bias_of(self.linear_fc1)))
