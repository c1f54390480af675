"""Wan2.1 and 2.2 DiTs (arXiv 2503.20314) on Megatron-Core: one class for plain and dual (primal + tangent) passes.

Text-to-video, and what image conditions add to it (WanModelConfig): channels beside the latent's, CLIP tokens of the image, given frames.

Shapes: x_SBP patch tokens of this rank (rcm_megatron.models.tokens), h_SBD hidden states, text_LBD and image_LBD embeddings, e_FBD time
embedding, e_GBD its projection to the six adaLN vectors (G = 6F, vector by vector), F = 1, or latent frames where each has its own
time; B is 2B inside a Dual. A second time (``model.second_time``) is embedded as the interval down to it, by layers of its own, whose
outputs are added to e_FBD and e_GBD (as NVlabs/FastGen does).
"""

from functools import partial

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from rcm_megatron.dual import BATCH_DIM, Dual, map_linear, recomputed, with_graphs_added
from rcm_megatron.families.wan.settings import WanModelConfig
from rcm_megatron.inputs import Condition
from rcm_megatron.models.conditional_frames import of_tokens
from rcm_megatron.models.dit import DiffusionTransformer, TokenGeometry, sinusoid, with_channels
from rcm_megatron.models.dual_ops import add, gated_residual, gelu, gelu_tanh, layer_norm_modulate, silu
from rcm_megatron.models.layer_specs import LayerSpec
from rcm_megatron.models.layers import (
    MLP,
    AffineLayerNorm,
    AttentionStyle,
    CrossAttention,
    GatheredLinear,
    ReplicatedLinear,
    RMSNormAcrossHeads,
    SelfAttention,
    wide_dtype,
)
from rcm_megatron.models.rope import rope_frequencies
from rcm_megatron.models.tokens import TokenLayout
from rcm_megatron.parallel.context import ContextParallel
from rcm_megatron.parallel.pipeline_stages import PipelineStage


def wan_style(model: WanModelConfig) -> AttentionStyle:
    """What Wan's attention and MLP are among those of all families."""
    return AttentionStyle(
        head_norm=RMSNormAcrossHeads,
        norm_eps=model.eps,
        bias=True,
        text_features=model.hidden_size,
        activation=gelu_tanh,
    )


class TimestepEmbedding(nn.Module):
    """Sinusoid and two-layer MLP of the timestep in fp32."""

    def __init__(self, model: WanModelConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.freq_dim, self.dtype = model.freq_dim, dtype
        self.linear_1 = ReplicatedLinear(model.freq_dim, model.hidden_size, dtype=dtype, on_token_shards=True)
        self.linear_2 = ReplicatedLinear(model.hidden_size, model.hidden_size, dtype=dtype, on_token_shards=True)

    def forward(self, timestep_FB: Tensor | Dual) -> Tensor | Dual:
        frequencies = sinusoid(timestep_FB, width=self.freq_dim, dtype=self.dtype)
        return self.linear_2(silu(self.linear_1(frequencies)))


class TextEmbedding(nn.Module):
    """Two-layer MLP from the text encoder's features to the hidden size. Replicated over tp, where it sees whole text."""

    def __init__(self, model: WanModelConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear_1 = ReplicatedLinear(model.text_dim, model.hidden_size, dtype=dtype, on_token_shards=False)
        self.linear_2 = ReplicatedLinear(model.hidden_size, model.hidden_size, dtype=dtype, on_token_shards=False)

    def forward(self, text_LBD: Tensor) -> Tensor:
        return self.linear_2(gelu_tanh(self.linear_1(text_LBD)))


class ImageEmbedding(nn.Module):
    """Norm, two-layer MLP and norm from CLIP's features to the hidden size, after learned positions where the network has them.

    Replicated over tp as the text embedding is.
    """

    eps = 1e-5

    def __init__(self, model: WanModelConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        width, hidden, positions = model.image_dim, model.hidden_size, model.image_positions
        self.dtype, wide = dtype, wide_dtype(dtype)
        self.positions = None if positions is None else nn.Parameter(torch.zeros(1, positions, width, dtype=wide))
        norm = {"eps": self.eps, "dtype": wide, "on_token_shards": False}
        linear = {"dtype": dtype, "on_token_shards": False}
        self.norm_1 = AffineLayerNorm(width, **norm)
        self.linear_1 = ReplicatedLinear(width, width, **linear)
        self.linear_2 = ReplicatedLinear(width, hidden, **linear)
        self.norm_2 = AffineLayerNorm(hidden, **norm)

    def forward(self, image_LBD: Tensor) -> Tensor:
        if self.positions is not None:
            image_LBD = image_LBD.to(self.positions.dtype) + self.positions.transpose(0, 1)
        x = self.linear_2(gelu(self.linear_1(self.norm_1(image_LBD, dtype=self.dtype))))
        return self.norm_2(x, dtype=self.dtype)


class WanBlock(nn.Module):
    """Self-attention, cross-attention and MLP with adaLN modulation by the time embedding."""

    def __init__(self, model: WanModelConfig, *, config: TransformerConfig, spec: LayerSpec, context, tp_group) -> None:
        super().__init__()
        self.eps, self.dtype = model.eps, config.params_dtype
        wide = wide_dtype(config.params_dtype)
        self.modulation = nn.Parameter(torch.randn(1, 6, model.hidden_size, dtype=wide) / model.hidden_size**0.5)
        self.modulation.sequence_parallel = True
        options = {"config": config, "spec": spec, "tp_group": tp_group, "style": wan_style(model)}
        self.self_attn = SelfAttention(model, context=context, **options)
        self.norm3 = AffineLayerNorm(model.hidden_size, eps=model.eps, dtype=wide) if model.cross_attn_norm else None
        with_image = model.image_dim is not None
        self.cross_attn = CrossAttention(model, with_image=with_image, **options)
        self.mlp = MLP(model, **options)

    def forward(
        self,
        h_SBD: Tensor | Dual,
        e_GBD: Tensor | Dual,
        text_LBD: Tensor,
        image_LBD: Tensor | None = None,
        *,
        geometry: TokenGeometry,
    ) -> Tensor | Dual:
        vectors = split_modulation(e_GBD, self.modulation, geometry.frame_S)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = vectors
        x = layer_norm_modulate(h_SBD, shift_1, scale_1, eps=self.eps, dtype=self.dtype)
        x = self.self_attn(x, geometry.rotation_SK, valid_tokens=geometry.valid_tokens)
        h_SBD = gated_residual(h_SBD, x, gate_1)
        x = h_SBD if self.norm3 is None else self.norm3(h_SBD, dtype=self.dtype)
        h_SBD = add(h_SBD, self.cross_attn(x, text_LBD, image_LBD))
        x = layer_norm_modulate(h_SBD, shift_2, scale_2, eps=self.eps, dtype=self.dtype)
        return gated_residual(h_SBD, self.mlp(x), gate_2)


class WanHead(nn.Module):
    """Final modulated norm and projection to patches, whose rows the Wan release orders (pt, ph, pw, C)."""

    def __init__(self, model: WanModelConfig, layout: TokenLayout, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps, self.patch, self.dtype = model.eps, model.patch_size, dtype
        wide = wide_dtype(dtype)
        features = model.out_channels * model.patch_volume
        self.modulation = nn.Parameter(torch.randn(1, 2, model.hidden_size, dtype=wide) / model.hidden_size**0.5)
        self.modulation.sequence_parallel = True
        self.linear = ReplicatedLinear(model.hidden_size, features, dtype=dtype, on_token_shards=True)
        self.register_buffer("frame_S", layout.grid_indices()[0], persistent=False)

    def forward(self, h_SBD: Tensor | Dual, e_FBD: Tensor | Dual) -> Tensor | Dual:
        both = map_linear(lambda value: value.repeat(2, 1, 1), e_FBD)
        shift, scale = split_modulation(both, self.modulation, self.frame_S)
        x = self.linear(layer_norm_modulate(h_SBD, shift, scale, eps=self.eps, dtype=self.dtype))
        return map_linear(self._channels_first, x)

    def _channels_first(self, x_SBP: Tensor) -> Tensor:
        return x_SBP.unflatten(-1, (*self.patch, -1)).movedim(-1, -4).flatten(-4)


class WanModel(DiffusionTransformer):
    """Wan, or one pipeline stage's piece of it.

    Its time counts as 1000 s, given frames are at 0 (Wan2.2 TI2V).

    Args:
        context: context-parallel attention of this run.
        rest: as DiffusionTransformer.
    """

    def __init__(
        self,
        model: WanModelConfig,
        config: TransformerConfig,
        *,
        layout: TokenLayout,
        context: ContextParallel,
        stage: PipelineStage | None = None,
        spec: LayerSpec | None = None,
        recompute: str = "full",
    ) -> None:
        super().__init__(model, config, layout=layout, stage=stage, spec=spec, recompute=recompute)
        dtype, wide = config.params_dtype, wide_dtype(config.params_dtype)
        hidden = model.hidden_size
        if self.stage.is_first:
            features = model.embedded_channels * model.patch_volume
            self.patch_embedding = ReplicatedLinear(features, hidden, dtype=dtype, on_token_shards=True)
        self.text_embedding = TextEmbedding(model, dtype=dtype)
        self.image_embedding = None if model.image_dim is None else ImageEmbedding(model, dtype=dtype)
        self.time_embedding = TimestepEmbedding(model, dtype=wide)
        self.time_projection = GatheredLinear(hidden, 6 * hidden, dtype=wide, tp_group=layout.groups.tp)
        self.interval_embedding = self.interval_projection = None
        if model.second_time:
            self.interval_embedding = TimestepEmbedding(model, dtype=wide)
            self.interval_projection = GatheredLinear(hidden, 6 * hidden, dtype=wide, tp_group=layout.groups.tp)
        self.blocks = self._build_blocks(WanBlock, context=context)
        if self.stage.is_last:
            self.head = WanHead(model, layout, dtype=dtype)
        self._mark_replicated(self.text_embedding, self.image_embedding, self.time_embedding, self.time_projection)
        self._mark_replicated(self.interval_embedding, self.interval_projection)

    def _embed(
        self,
        timestep_1B: Tensor | Dual,
        text_LBD: Tensor,
        condition: Condition | None,
        interval_1B: Tensor | Dual | None,
    ) -> tuple[tuple, tuple]:
        e_FBD = recomputed(self.time_embedding, self._frame_timesteps(timestep_1B, condition))
        e_GBD = recomputed(partial(_projected, self.time_projection), e_FBD)
        if interval_1B is not None:
            own_FBD = recomputed(self.interval_embedding, self._frame_intervals(interval_1B, condition))
            e_GBD = with_graphs_added(e_GBD, recomputed(partial(_projected, self.interval_projection), own_FBD))
            e_FBD = with_graphs_added(e_FBD, own_FBD)
        for_blocks = (e_GBD, self.text_embedding(text_LBD.to(self.config.params_dtype)))
        image_LBD = None if condition is None else condition.image_LBD
        _check_given("image_LBD", image_LBD, "image_dim", self.model.image_dim)
        if image_LBD is not None:
            for_blocks += (self.image_embedding(image_LBD),)
        return for_blocks, (e_FBD,)

    def _patches(self, x_SBP: Tensor | Dual, condition: Condition | None) -> Tensor | Dual:
        x_SBP = super()._patches(x_SBP, condition)
        channels_SBE = None if condition is None else condition.channels_SBE
        _check_given("channels_SBE", channels_SBE, "condition_channels", self.model.condition_channels)
        return x_SBP if channels_SBE is None else with_channels(x_SBP, channels_SBE)

    def _rotation(self) -> Tensor:
        return rope_frequencies(
            self.layout.grid,
            self.model.head_dim,
            start=self.layout.context_start,
            length=self.layout.context_tokens,
            max_position=self.model.rope_max_seq_len,
        )


def _projected(projection: nn.Module, e_FBD: Tensor | Dual) -> Tensor | Dual:
    """The six adaLN vectors e_GBD of a time's embedding."""
    projected = projection(silu(e_FBD))
    return map_linear(lambda value: value.unflatten(-1, (6, -1)).movedim(2, 0).flatten(0, 1), projected)


def _check_given(name: str, value: Tensor | None, field: str, setting: int | None) -> None:
    """A condition has exactly what the network takes."""
    if (value is None) != (not setting):
        got = "is missing" if value is None else "was given"
        raise ValueError(
            f"the condition's {name} {got}, but the network has model.{field}={setting}; give both or none"
        )


def split_modulation(e_GBD: Tensor | Dual, table_1MD: Tensor, frame_S: Tensor) -> tuple[Tensor | Dual, ...]:
    """The M adaLN vectors: a block's learned table plus the projected time embedding (M vectors of each of F frames).

    ``[1, B, D]``, or ``[S, B, D]`` of every token where frames differ in time.
    """
    count = table_1MD.shape[1]
    table_M11D = table_1MD.transpose(0, 1)[:, None]
    if not isinstance(e_GBD, Dual):
        vectors_MFBD = e_GBD.unflatten(0, (count, -1)) + table_M11D
        return tuple(of_tokens(vector, frame_S) for vector in vectors_MFBD)
    stacked_MFBD = e_GBD.stacked.unflatten(0, (count, -1)).clone()
    stacked_MFBD.narrow(BATCH_DIM + 1, 0, e_GBD.batch).add_(table_M11D)
    return tuple(Dual(of_tokens(vector, frame_S)) for vector in stacked_MFBD)
