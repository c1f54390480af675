"""Wan2.1 text-to-video DiT (arXiv 2503.20314) on Megatron-Core: one class for plain and dual (primal + tangent) passes.

Shapes: x_SBP patch tokens of this rank (rcm_megatron.models.tokens), h_SBD hidden states, text_LBD text embeddings, e_1BD time
embedding, e_6BD its projection to the six adaLN vectors; B is 2B inside a Dual.
"""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from rcm_megatron.config import ModelConfig
from rcm_megatron.dual import BATCH_DIM, Dual, map_linear, recomputed
from rcm_megatron.models.dit import DiffusionTransformer, TokenGeometry, sinusoid
from rcm_megatron.models.dual_ops import add, gated_residual, gelu_tanh, layer_norm_modulate, silu
from rcm_megatron.models.layer_specs import LayerSpec
from rcm_megatron.models.layers import MLP, AffineLayerNorm, CrossAttention, ReplicatedLinear, SelfAttention, wide_dtype
from rcm_megatron.models.rope import rope_frequencies
from rcm_megatron.models.tokens import TokenLayout
from rcm_megatron.parallel.context import ContextParallel
from rcm_megatron.parallel.stages import Stage


class TimestepEmbedding(nn.Module):
    """Sinusoid and two-layer MLP of the timestep in fp32."""

    def __init__(self, model: ModelConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.freq_dim, self.dtype = model.freq_dim, dtype
        self.linear_1 = ReplicatedLinear(model.freq_dim, model.hidden_size, dtype=dtype, on_token_shards=True)
        self.linear_2 = ReplicatedLinear(model.hidden_size, model.hidden_size, dtype=dtype, on_token_shards=True)

    def forward(self, timestep_1B: Tensor | Dual) -> Tensor | Dual:
        frequencies = sinusoid(timestep_1B, width=self.freq_dim, dtype=self.dtype)
        return self.linear_2(silu(self.linear_1(frequencies)))


class TextEmbedding(nn.Module):
    """Two-layer MLP from the text encoder's features to the hidden size. Replicated over tp, where it sees whole text."""

    def __init__(self, model: ModelConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear_1 = ReplicatedLinear(model.text_dim, model.hidden_size, dtype=dtype, on_token_shards=False)
        self.linear_2 = ReplicatedLinear(model.hidden_size, model.hidden_size, dtype=dtype, on_token_shards=False)

    def forward(self, text_LBD: Tensor) -> Tensor:
        return self.linear_2(gelu_tanh(self.linear_1(text_LBD)))


class WanBlock(nn.Module):
    """Self-attention, cross-attention and MLP with adaLN modulation by the time embedding."""

    def __init__(self, model: ModelConfig, *, config: TransformerConfig, spec: LayerSpec, context, tp_group) -> None:
        super().__init__()
        self.eps, self.dtype = model.eps, config.params_dtype
        wide = wide_dtype(config.params_dtype)
        self.modulation = nn.Parameter(torch.randn(1, 6, model.hidden_size, dtype=wide) / model.hidden_size**0.5)
        self.modulation.sequence_parallel = True
        self.self_attn = SelfAttention(model, config=config, spec=spec, context=context, tp_group=tp_group)
        self.norm3 = AffineLayerNorm(model.hidden_size, eps=model.eps, dtype=wide) if model.cross_attn_norm else None
        self.cross_attn = CrossAttention(model, config=config, spec=spec, tp_group=tp_group)
        self.mlp = MLP(model, config=config, spec=spec, tp_group=tp_group)

    def forward(
        self, h_SBD: Tensor | Dual, e_6BD: Tensor | Dual, text_LBD: Tensor, *, geometry: TokenGeometry
    ) -> Tensor | Dual:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = split_modulation(e_6BD, self.modulation)
        x = layer_norm_modulate(h_SBD, shift_1, scale_1, eps=self.eps, dtype=self.dtype)
        x = self.self_attn(x, geometry.rotation_SK, valid_tokens=geometry.valid_tokens)
        h_SBD = gated_residual(h_SBD, x, gate_1)
        x = h_SBD if self.norm3 is None else self.norm3(h_SBD, dtype=self.dtype)
        h_SBD = add(h_SBD, self.cross_attn(x, text_LBD))
        x = layer_norm_modulate(h_SBD, shift_2, scale_2, eps=self.eps, dtype=self.dtype)
        return gated_residual(h_SBD, self.mlp(x), gate_2)


class WanHead(nn.Module):
    """Final modulated norm and projection to patches, whose rows the Wan release orders (pt, ph, pw, C)."""

    def __init__(self, model: ModelConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps, self.patch, self.dtype = model.eps, model.patch_size, dtype
        wide = wide_dtype(dtype)
        features = model.out_channels * model.patch_size[0] * model.patch_size[1] * model.patch_size[2]
        self.modulation = nn.Parameter(torch.randn(1, 2, model.hidden_size, dtype=wide) / model.hidden_size**0.5)
        self.modulation.sequence_parallel = True
        self.linear = ReplicatedLinear(model.hidden_size, features, dtype=dtype, on_token_shards=True)

    def forward(self, h_SBD: Tensor | Dual, e_1BD: Tensor | Dual) -> Tensor | Dual:
        both = map_linear(lambda value: value.expand(2, -1, -1), e_1BD)
        shift, scale = split_modulation(both, self.modulation)
        x = self.linear(layer_norm_modulate(h_SBD, shift, scale, eps=self.eps, dtype=self.dtype))
        return map_linear(self._channels_first, x)

    def _channels_first(self, x_SBP: Tensor) -> Tensor:
        return x_SBP.unflatten(-1, (*self.patch, -1)).movedim(-1, -4).flatten(-4)


class WanModel(DiffusionTransformer):
    """Wan2.1, or one pipeline stage's piece of it.

    Args:
        context: context-parallel attention of this run.
        rest: as DiffusionTransformer.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: TransformerConfig,
        *,
        layout: TokenLayout,
        context: ContextParallel,
        stage: Stage | None = None,
        spec: LayerSpec | None = None,
        recompute: str = "full",
    ) -> None:
        super().__init__(model, config, layout=layout, stage=stage, spec=spec, recompute=recompute)
        dtype, wide = config.params_dtype, wide_dtype(config.params_dtype)
        hidden = model.hidden_size
        if self.stage.is_first:
            self.patch_embedding = ReplicatedLinear(layout.patch_features, hidden, dtype=dtype, on_token_shards=True)
        self.text_embedding = TextEmbedding(model, dtype=dtype)
        self.time_embedding = TimestepEmbedding(model, dtype=wide)
        self.time_projection = ReplicatedLinear(hidden, 6 * hidden, dtype=wide, on_token_shards=True)
        self.blocks = self._build_blocks(WanBlock, context=context)
        if self.stage.is_last:
            self.head = WanHead(model, dtype=dtype)
        self._mark_replicated(self.text_embedding, self.time_embedding, self.time_projection)

    def _embed(self, timestep_1B: Tensor | Dual, text_LBD: Tensor, condition: None) -> tuple[tuple, tuple]:
        assert condition is None, "a Wan text-to-video network takes no condition"
        e_1BD = recomputed(self.time_embedding, timestep_1B)
        e_6BD = recomputed(self._project_time, e_1BD)
        return (e_6BD, self.text_embedding(text_LBD.to(self.config.params_dtype))), (e_1BD,)

    def _project_time(self, e_1BD: Tensor | Dual) -> Tensor | Dual:
        projected = self.time_projection(silu(e_1BD))
        return map_linear(lambda value: value.unflatten(-1, (6, -1))[0].transpose(0, 1), projected)

    def _rotation(self) -> Tensor:
        return rope_frequencies(
            self.layout.grid,
            self.model.head_dim,
            start=self.layout.context_start,
            length=self.layout.context_tokens,
            max_position=self.model.rope_max_seq_len,
        )


def split_modulation(e_MBD: Tensor | Dual, table_1MD: Tensor) -> tuple[Tensor | Dual, ...]:
    """The M adaLN vectors ``[1, B, D]``: a block's learned table plus the projected time embedding."""
    count = table_1MD.shape[1]
    table = table_1MD.transpose(0, 1)
    if not isinstance(e_MBD, Dual):
        return (e_MBD + table).split(1, dim=0)
    stacked = e_MBD.stacked.clone()
    stacked.narrow(BATCH_DIM, 0, e_MBD.batch).add_(table)
    return tuple(Dual(stacked[i : i + 1]) for i in range(count))
