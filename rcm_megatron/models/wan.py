"""Wan2.1 text-to-video DiT (arXiv 2503.20314) on Megatron-Core: one class for plain and dual (primal + tangent) passes.

Shapes: x_SBP patch tokens of this rank (rcm_megatron.models.tokens), h_SBD hidden states, text_LBD text embeddings, e_1BD time
embedding, e_6BD its projection to the six adaLN vectors; B is 2B inside a Dual.
"""

from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint
from torch import Tensor, nn

from rcm_megatron.config import ModelConfig
from rcm_megatron.dual import BATCH_DIM, Dual, map_linear, recomputed
from rcm_megatron.models.dual_ops import add, gated_residual, gelu_tanh, layer_norm_modulate, silu
from rcm_megatron.models.layer_specs import LayerSpec, local_layer_spec
from rcm_megatron.models.layers import MLP, AffineLayerNorm, CrossAttention, ReplicatedLinear, SelfAttention, wide_dtype
from rcm_megatron.models.rope import rope_frequencies
from rcm_megatron.models.tokens import TokenLayout
from rcm_megatron.parallel.context import ContextParallel


@dataclass(frozen=True, eq=False)
class TokenGeometry:
    """What a block must know of the tokens: the rotations of its context-parallel rank, and how many tokens are no padding."""

    rotation_SK: Tensor
    valid_tokens: int


class TimestepEmbedding(nn.Module):
    """Sinusoid and two-layer MLP of the timestep in fp32."""

    def __init__(self, model: ModelConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.freq_dim, self.dtype = model.freq_dim, dtype
        self.linear_1 = ReplicatedLinear(model.freq_dim, model.hidden_size, dtype=dtype, on_token_shards=True)
        self.linear_2 = ReplicatedLinear(model.hidden_size, model.hidden_size, dtype=dtype, on_token_shards=True)

    def forward(self, timestep_1B: Tensor | Dual) -> Tensor | Dual:
        return self.linear_2(silu(self.linear_1(self.sinusoid(timestep_1B))))

    def sinusoid(self, timestep_1B: Tensor | Dual) -> Tensor | Dual:
        """``[cos(t w), sin(t w)]`` in fp64, then rounded: fp32 angles near t = 1000 cost 1e-5 of the tangent."""
        half = self.freq_dim // 2
        primal = timestep_1B.primal if isinstance(timestep_1B, Dual) else timestep_1B
        w = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=primal.device) / half)
        angle = primal.double()[..., None] * w
        cos, sin = angle.cos(), angle.sin()
        embedded = torch.cat([cos, sin], dim=-1).to(self.dtype)
        if not isinstance(timestep_1B, Dual):
            return embedded
        t_angle = timestep_1B.tangent.double()[..., None] * w
        return Dual.pack(embedded, torch.cat([-sin * t_angle, cos * t_angle], dim=-1).to(self.dtype))


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


class WanModel(MegatronModule):
    """The network: velocity tokens from noisy tokens, timestep and text.

    Args:
        model: architecture.
        config: Megatron's configuration of the run (parallel sizes, dtypes).
        layout: how the tokens of one latent shape lie on the ranks.
        context: context-parallel attention of this run.
        recompute_blocks: recompute each block in the backward of plain passes (dual passes always do).
    """

    model_type = ModelType.encoder_or_decoder
    share_embeddings_and_output_weights = False

    def __init__(
        self,
        model: ModelConfig,
        config: TransformerConfig,
        *,
        layout: TokenLayout,
        context: ContextParallel,
        recompute_blocks: bool = True,
        spec: LayerSpec | None = None,
    ) -> None:
        super().__init__(config)
        spec, dtype, tp_group = spec or local_layer_spec(), config.params_dtype, layout.groups.tp
        wide = wide_dtype(dtype)
        self.model, self.layout, self.recompute_blocks = model, layout, recompute_blocks
        hidden = model.hidden_size
        self.patch_embedding = ReplicatedLinear(layout.patch_features, hidden, dtype=dtype, on_token_shards=True)
        self.text_embedding = TextEmbedding(model, dtype=dtype)
        self.time_embedding = TimestepEmbedding(model, dtype=wide)
        self.time_projection = ReplicatedLinear(hidden, 6 * hidden, dtype=wide, on_token_shards=True)
        self.blocks = nn.ModuleDict(
            {
                str(i): WanBlock(model, config=config, spec=spec, context=context, tp_group=tp_group)
                for i in range(model.num_layers)
            }
        )
        self.head = WanHead(model, dtype=dtype)
        self._geometry: dict[torch.device, TokenGeometry] = {}

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Megatron's schedules hand a stage its input here; a single stage has none."""
        if any(tensor is not None for tensor in input_tensor):
            raise RuntimeError("a model of one pipeline stage received an input tensor; set parallel.pp to 1")

    def forward(self, x_SBP: Tensor | Dual, timestep_1B: Tensor | Dual, text_LBD: Tensor) -> Tensor | Dual:
        """Velocity ``[S, B, P]`` (RF convention, noise − x0) with padding set to zero; a Dual for Dual inputs.

        Args:
            x_SBP: noisy tokens of this rank, scaled by ``c_in``, in the compute dtype.
            timestep_1B: ``[1, B]`` in [0, 1000], fp32 or wider; a Dual exactly when ``x_SBP`` is one.
            text_LBD: ``[L, B, text_dim]`` text embeddings, equal on all ranks of the sample.
        """
        dtype, device = self.config.params_dtype, text_LBD.device
        geometry = self._token_geometry(device)
        e_1BD = recomputed(self.time_embedding, timestep_1B)
        e_6BD = recomputed(self._project_time, e_1BD)
        h_SBD = recomputed(self.patch_embedding, map_linear(lambda value: value.to(dtype), x_SBP))
        text_LBD = self.text_embedding(text_LBD.to(dtype))
        for block in self.blocks.values():
            h_SBD = self._run(block, h_SBD, e_6BD, text_LBD, geometry)
        v_SBP = recomputed(self.head, h_SBD, e_1BD)
        return masked(v_SBP, self.layout)

    def _run(self, block: WanBlock, h_SBD, e_6BD, text_LBD: Tensor, geometry: TokenGeometry) -> Tensor | Dual:
        def run(h, e, text):
            return block(h, e, text, geometry=geometry)

        if isinstance(h_SBD, Dual) or self.recompute_blocks:
            return recomputed(run, h_SBD, e_6BD, text_LBD)
        return run(h_SBD, e_6BD, text_LBD)

    def _project_time(self, e_1BD: Tensor | Dual) -> Tensor | Dual:
        projected = self.time_projection(silu(e_1BD))
        return map_linear(lambda value: value.unflatten(-1, (6, -1))[0].transpose(0, 1), projected)

    def _token_geometry(self, device: torch.device) -> TokenGeometry:
        if device not in self._geometry:
            rotation = rope_frequencies(
                self.layout.grid,
                self.model.head_dim,
                start=self.layout.context_start,
                length=self.layout.context_tokens,
                max_position=self.model.rope_max_seq_len,
            )
            dtype = torch.complex128 if self.config.params_dtype == torch.float64 else torch.complex64
            self._geometry[device] = TokenGeometry(rotation.to(device, dtype), self.layout.num_tokens)
        return self._geometry[device]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata=None) -> ShardedStateDict:
        """Every parameter as a Megatron ShardedTensor: split over tp where it is, one replica elsewhere."""
        groups = self.layout.groups
        sharded = {}
        for name, parameter in self.named_parameters():
            replicas = {"tp_group": groups.tp, "dp_cp_group": groups.dp_cp, "prepend_offsets": sharded_offsets}
            if getattr(parameter, "tensor_model_parallel", False):
                sharded[prefix + name] = make_tp_sharded_tensor_for_checkpoint(
                    parameter, prefix + name, tp_axis=parameter.partition_dim, **replicas
                )
            else:
                sharded[prefix + name] = make_sharded_tensor_for_checkpoint(parameter, prefix + name, **replicas)
        return sharded


def split_modulation(e_MBD: Tensor | Dual, table_1MD: Tensor) -> tuple[Tensor | Dual, ...]:
    """The M adaLN vectors ``[1, B, D]``: a block's learned table plus the projected time embedding."""
    count = table_1MD.shape[1]
    table = table_1MD.transpose(0, 1)
    if not isinstance(e_MBD, Dual):
        return (e_MBD + table).split(1, dim=0)
    stacked = e_MBD.stacked.clone()
    stacked.narrow(BATCH_DIM, 0, e_MBD.batch).add_(table)
    return tuple(Dual(stacked[i : i + 1]) for i in range(count))


def masked(v_SBP: Tensor | Dual, layout: TokenLayout) -> Tensor | Dual:
    """Padding set to exactly zero in both halves."""
    if isinstance(v_SBP, Dual):
        return Dual(layout.mask(v_SBP.stacked), None if v_SBP.graph is None else layout.mask(v_SBP.graph))
    return layout.mask(v_SBP)
