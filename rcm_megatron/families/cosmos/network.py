"""Cosmos-Predict2 Text2Image and Video2World DiTs (arXiv 2501.03575, 2511.00062) on Megatron-Core, for plain and dual passes.

The network is rectified flow like Wan: with s = sigma / (1 + sigma) it sees x / (1 + sigma) at time s and predicts noise − x0; it counts
time in [0, 1] where this program's networks are given 1000 s (rcm_megatron.diffusion.trigflow.precondition).

Shapes: x_SBP patch tokens of this rank (rcm_megatron.models.tokens), h_SBD hidden states, text_LBD text embeddings, e_FBD normed time
embedding and shared_FB3 its three shared adaLN vectors, F = 1, or latent frames where each has its own time; B is 2B inside a Dual.

A second time (``model.second_time``) is embedded as the interval down to it, by layers of its own, whose outputs are added to both.
"""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from rcm_megatron.dual import Dual, map_linear, primal_of, recomputed, with_graphs_added
from rcm_megatron.families.cosmos import ROPE_FPS
from rcm_megatron.families.cosmos.settings import CosmosModelConfig
from rcm_megatron.inputs import Condition
from rcm_megatron.models.conditional_frames import TIME_UNIT, of_tokens
from rcm_megatron.models.dit import DiffusionTransformer, TokenGeometry, sinusoid, with_channels
from rcm_megatron.models.dual_ops import (
    add,
    add_constant,
    gated_residual,
    gelu,
    layer_norm_modulate,
    rms_norm,
    silu,
)
from rcm_megatron.models.layer_specs import LayerSpec
from rcm_megatron.models.layers import (
    MLP,
    AttentionStyle,
    CrossAttention,
    GatheredLinear,
    ReplicatedLinear,
    RMSNormPerHead,
    SelfAttention,
    wide_dtype,
)
from rcm_megatron.models.rope import rope_frequencies, stretched_thetas
from rcm_megatron.models.tokens import TokenLayout
from rcm_megatron.parallel.context import ContextParallel
from rcm_megatron.parallel.pipeline_stages import PipelineStage


def cosmos_style(model: CosmosModelConfig) -> AttentionStyle:
    """What Cosmos' attention and MLP are among those of all families."""
    return AttentionStyle(
        head_norm=RMSNormPerHead,
        norm_eps=model.qk_norm_eps,
        bias=False,
        text_features=model.text_dim,
        activation=gelu,
    )


class TimeEmbedding(nn.Module):
    """What blocks take of the time: the sinusoid, normed, and its projection to a shift, scale and gate that all sublayers share."""

    def __init__(self, model: CosmosModelConfig, *, dtype: torch.dtype, tp_group: ProcessGroup) -> None:
        super().__init__()
        self.width, self.dtype, self.eps = model.hidden_size, dtype, model.eps
        options = {"dtype": dtype, "bias": False}
        self.linear_1 = ReplicatedLinear(self.width, self.width, on_token_shards=True, **options)
        self.linear_2 = GatheredLinear(self.width, 3 * self.width, tp_group=tp_group, **options)
        self.norm_weight = nn.Parameter(torch.ones(self.width, dtype=dtype))
        self.norm_weight.sequence_parallel = True

    def normed(self, timestep_FB: Tensor | Dual) -> Tensor | Dual:
        """e_FBD."""
        return rms_norm(self._sinusoid(timestep_FB), self.norm_weight, eps=self.eps)

    def shared(self, timestep_FB: Tensor | Dual) -> Tensor | Dual:
        """shared_FB3."""
        return self.linear_2(silu(self.linear_1(self._sinusoid(timestep_FB))))

    def _sinusoid(self, timestep_FB: Tensor | Dual) -> Tensor | Dual:
        s_FB = map_linear(lambda value: value.double() / TIME_UNIT, timestep_FB)  # Cosmos was trained on s
        return sinusoid(s_FB, width=self.width, dtype=self.dtype)


class Modulation(nn.Module):
    """adaLN-LoRA: ``vectors`` (shift, scale and perhaps gate) of low rank in the time embedding, plus the shared ones."""

    def __init__(self, model: CosmosModelConfig, *, vectors: int, dtype: torch.dtype, tp_group: ProcessGroup) -> None:
        super().__init__()
        self.vectors, hidden, rank = vectors, model.hidden_size, model.adaln_lora_dim
        options = {"dtype": dtype, "bias": False}
        self.linear_1 = ReplicatedLinear(hidden, rank, on_token_shards=True, **options)
        self.linear_2 = GatheredLinear(rank, vectors * hidden, tp_group=tp_group, **options)

    def forward(self, e_FBD: Tensor | Dual, shared_FB3: Tensor | Dual, frame_S: Tensor) -> tuple[Tensor | Dual, ...]:
        """Vectors ``[1, B, D]``, or ``[S, B, D]`` of every token where frames differ in time."""
        own = self.linear_2(self.linear_1(silu(e_FBD)))
        both = add(own, map_linear(lambda value: value[..., : primal_of(own).shape[-1]], shared_FB3))
        if isinstance(both, Dual):
            return tuple(Dual(of_tokens(part, frame_S)) for part in both.stacked.chunk(self.vectors, dim=-1))
        return tuple(of_tokens(part, frame_S) for part in both.chunk(self.vectors, dim=-1))


class LearnedPositions(nn.Module):
    """Sum of a learned vector for each axis, scaled to a root mean square of one (Cosmos 1.0)."""

    def __init__(self, model: CosmosModelConfig, layout: TokenLayout, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = 1e-6
        for index, (axis, size, patch) in enumerate(zip("thw", model.max_size, model.patch_size, strict=True)):
            table = nn.Parameter(torch.zeros(size // patch, model.hidden_size, dtype=dtype))
            table.sequence_parallel = True
            self.register_parameter(f"pos_emb_{axis}", table)
            self.register_buffer(f"index_{axis}", layout.grid_indices()[index], persistent=False)

    def forward(self) -> Tensor:
        """``[S, 1, D]`` of this rank's tokens."""
        tables = ((self.pos_emb_t, self.index_t), (self.pos_emb_h, self.index_h), (self.pos_emb_w, self.index_w))
        total_SD = sum(table.index_select(0, index) for table, index in tables)
        norm_S1 = torch.linalg.vector_norm(total_SD, dim=-1, keepdim=True)
        return (total_SD / (norm_S1 / total_SD.shape[-1] ** 0.5 + self.eps))[:, None]


class CosmosBlock(nn.Module):
    """Self-attention, cross-attention and MLP, each modulated and gated by the time embedding."""

    def __init__(
        self, model: CosmosModelConfig, *, config: TransformerConfig, spec: LayerSpec, context, tp_group
    ) -> None:
        super().__init__()
        self.eps, self.dtype = model.eps, config.params_dtype
        options = {"config": config, "spec": spec, "tp_group": tp_group, "style": cosmos_style(model)}
        vectors = {"vectors": 3, "dtype": wide_dtype(config.params_dtype), "tp_group": tp_group}
        self.self_attn_modulation = Modulation(model, **vectors)
        self.self_attn = SelfAttention(model, context=context, **options)
        self.cross_attn_modulation = Modulation(model, **vectors)
        self.cross_attn = CrossAttention(model, **options)
        self.mlp_modulation = Modulation(model, **vectors)
        self.mlp = MLP(model, **options)

    def forward(
        self,
        h_SBD: Tensor | Dual,
        e_FBD: Tensor | Dual,
        shared_FB3: Tensor | Dual,
        text_LBD: Tensor,
        positions_S1D: Tensor | None = None,
        *,
        geometry: TokenGeometry,
    ) -> Tensor | Dual:
        if positions_S1D is not None:
            h_SBD = add_constant(h_SBD, positions_S1D)
        time = (e_FBD, shared_FB3, geometry.frame_S)
        shift, scale, gate = self.self_attn_modulation(*time)
        x = layer_norm_modulate(h_SBD, shift, scale, eps=self.eps, dtype=self.dtype)
        x = self.self_attn(x, geometry.rotation_SK, valid_tokens=geometry.valid_tokens)
        h_SBD = gated_residual(h_SBD, x, gate)
        shift, scale, gate = self.cross_attn_modulation(*time)
        x = layer_norm_modulate(h_SBD, shift, scale, eps=self.eps, dtype=self.dtype)
        h_SBD = gated_residual(h_SBD, self.cross_attn(x, text_LBD), gate)
        shift, scale, gate = self.mlp_modulation(*time)
        x = layer_norm_modulate(h_SBD, shift, scale, eps=self.eps, dtype=self.dtype)
        return gated_residual(h_SBD, self.mlp(x), gate)


class CosmosHead(nn.Module):
    """Final modulated norm and projection to patches, whose rows the release orders (ph, pw, pt, C)."""

    def __init__(self, model: CosmosModelConfig, layout: TokenLayout, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps, self.patch, self.dtype = model.eps, model.patch_size, dtype
        self.modulation = Modulation(model, vectors=2, dtype=wide_dtype(dtype), tp_group=layout.groups.tp)
        features = model.out_channels * model.patch_volume
        self.linear = ReplicatedLinear(model.hidden_size, features, dtype=dtype, on_token_shards=True, bias=False)
        self.register_buffer("frame_S", layout.grid_indices()[0], persistent=False)

    def forward(self, h_SBD: Tensor | Dual, e_FBD: Tensor | Dual, shared_FB3: Tensor | Dual) -> Tensor | Dual:
        shift, scale = self.modulation(e_FBD, shared_FB3, self.frame_S)
        x = self.linear(layer_norm_modulate(h_SBD, shift, scale, eps=self.eps, dtype=self.dtype))
        return map_linear(self._channels_first, x)

    def _channels_first(self, x_SBP: Tensor) -> Tensor:
        pt, ph, pw = self.patch
        return x_SBP.unflatten(-1, (ph, pw, pt, -1)).permute(0, 1, 5, 4, 2, 3).flatten(-4)


class CosmosModel(DiffusionTransformer):
    """Cosmos-Predict2, or one pipeline stage's piece of it.

    A Video2World network sees its given latent frames at a time of nearly zero and with their mask set.

    Args:
        context: context-parallel attention of this run.
        rest: as DiffusionTransformer.
    """

    def __init__(
        self,
        model: CosmosModelConfig,
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
        if self.stage.is_first:
            features = model.embedded_channels * model.patch_volume
            self.patch_embedding = ReplicatedLinear(
                features, model.hidden_size, dtype=dtype, on_token_shards=True, bias=False
            )
        self.time_embedding = TimeEmbedding(model, dtype=wide, tp_group=layout.groups.tp)
        self.interval_embedding = None
        if model.second_time:
            self.interval_embedding = TimeEmbedding(model, dtype=wide, tp_group=layout.groups.tp)
        self.positions = LearnedPositions(model, layout, dtype=wide) if model.learnable_positions else None
        self.blocks = self._build_blocks(CosmosBlock, context=context)
        if self.stage.is_last:
            self.head = CosmosHead(model, layout, dtype=dtype)
        self._mark_replicated(self.time_embedding, self.interval_embedding, self.positions)

    @property
    def given_timestep(self) -> float:
        sigma = self.model.condition_sigma
        return TIME_UNIT * sigma / (sigma + 1)

    def _embed(
        self,
        timestep_1B: Tensor | Dual,
        text_LBD: Tensor,
        condition: Condition | None,
        interval_1B: Tensor | Dual | None,
    ) -> tuple[tuple, tuple]:
        timestep_FB = self._frame_timesteps(timestep_1B, condition)
        e_FBD = recomputed(self.time_embedding.normed, timestep_FB)
        shared_FB3 = recomputed(self.time_embedding.shared, timestep_FB)
        if interval_1B is not None:
            interval_FB = self._frame_intervals(interval_1B, condition)
            e_FBD = with_graphs_added(e_FBD, recomputed(self.interval_embedding.normed, interval_FB))
            shared_FB3 = with_graphs_added(shared_FB3, recomputed(self.interval_embedding.shared, interval_FB))
        for_blocks = (e_FBD, shared_FB3, text_LBD.to(self.config.params_dtype))
        if self.positions is not None:
            for_blocks += (self.positions(),)
        return for_blocks, (e_FBD, shared_FB3)

    def _patches(self, x_SBP: Tensor | Dual, condition: Condition | None) -> Tensor | Dual:
        """Latent tokens, given ones in their place, and the channels of masks: given frames', then padding's, which is zero."""
        x_SBP = super()._patches(x_SBP, condition)
        tokens, batch, volume = self.layout.local_tokens, primal_of(x_SBP).shape[1], self.model.patch_volume
        masks = primal_of(x_SBP).new_zeros(tokens, batch, volume * self.model.extra_channels)
        if self._gives_frames(condition):
            masks[..., :volume] = self._known(condition)
        return with_channels(x_SBP, masks)

    def _rotation(self) -> Tensor:
        return rope_frequencies(
            self.layout.grid,
            self.model.head_dim,
            start=self.layout.context_start,
            length=self.layout.context_tokens,
            max_position=self.model.rope_max_seq_len,
            thetas=stretched_thetas(self.model.head_dim, self.model.rope_scale),
            frame_step=1.0 if self.model.rope_fps is None else ROPE_FPS / self.model.rope_fps,
        )
