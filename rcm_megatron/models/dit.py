"""What every diffusion transformer here shares: its piece of the pipeline, recomputation, token geometry and sharded state.

A family (rcm_megatron.families) adds its embedders, its blocks and its head. Shapes: x_SBP patch tokens of this rank
(rcm_megatron.models.tokens), h_SBD hidden states, text_LBD text embeddings; B is 2B inside a Dual.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint
from torch import Tensor, nn

from rcm_megatron.config import ModelConfig
from rcm_megatron.dual import Dual, as_message, from_message, map_linear, recomputed
from rcm_megatron.inputs import Condition
from rcm_megatron.models.conditional_frames import frame_timesteps, lead_to, where_known, with_graph
from rcm_megatron.models.layer_specs import LayerSpec, local_layer_spec
from rcm_megatron.models.layers import wide_dtype
from rcm_megatron.models.recompute import run_block
from rcm_megatron.models.tokens import TokenLayout
from rcm_megatron.parallel.context import ContextParallel
from rcm_megatron.parallel.pipeline_stages import PipelineStage


@dataclass(frozen=True, eq=False)
class TokenGeometry:
    """What a block must know of the tokens: the rotations of its context-parallel rank, how many tokens are no padding, and the latent
    frame (in patches) of each token of this rank."""

    rotation_SK: Tensor
    valid_tokens: int
    frame_S: Tensor


class DiffusionTransformer(MegatronModule):
    """A network, or one pipeline stage's piece of it: velocity tokens from noisy tokens, timestep and text.

    The embedders of time and text are on every piece, because every block needs them and a message carries the hidden state alone.
    A family's constructor builds ``patch_embedding`` on the first piece, ``blocks`` (by layer number), ``head`` on the last.

    Where a condition gives frames (``model.conditional_frames``), the network sees them clean and at the time ``given_timestep``, and its
    velocity there is the one that leads exactly to them, (x_in − x0) / s. So every loss and every sampler keeps them without knowing of
    them, and their tokens carry neither loss nor gradient.

    Args:
        model: architecture.
        config: Megatron's configuration of the run (parallel sizes, dtypes).
        layout: how the tokens of one latent shape lie on the ranks.
        stage: which blocks this piece holds; by default all of them.
        spec: the blocks' linears and their precision (``config`` adapted to it); by default Megatron-Core's own.
        recompute: what a block keeps for the backward pass, as in MemoryConfig.
    """

    blocks: nn.ModuleDict
    adapted = False
    """It has a LoRA (`rcm_megatron.models.lora`), which alone is trained and saved."""
    given_timestep: float = 0.0
    """Of the time of given frames, in the unit of ``timestep_1B``."""

    def __init__(
        self,
        model: ModelConfig,
        config: TransformerConfig,
        *,
        layout: TokenLayout,
        stage: PipelineStage | None = None,
        spec: LayerSpec | None = None,
        recompute: str = "full",
    ) -> None:
        super().__init__(config)
        self.model_type, self.share_embeddings_and_output_weights = ModelType.encoder_or_decoder, False
        self.model, self.layout, self.recompute = model, layout, recompute
        self.spec = spec or local_layer_spec()
        self.stage = stage or PipelineStage(range(model.num_layers))
        # finalize_model_grads asks for them
        self.pre_process, self.post_process = (self.stage.is_first, self.stage.is_last)
        self._received: Tensor | None = None
        self._geometry: dict[torch.device, TokenGeometry] = {}

    def _build_blocks(self, block: type[nn.Module], *, context: ContextParallel) -> nn.ModuleDict:
        """The blocks of this piece, by layer number."""
        options = {"config": self.config, "spec": self.spec, "context": context, "tp_group": self.layout.groups.tp}
        blocks = nn.ModuleDict()
        for layer in self.stage.layers:
            # One by one: each may be cut in pieces before the next is allocated (rcm_megatron.parallel.sharded).
            blocks[str(layer)] = block(self.model, **options)
        return blocks

    def _mark_replicated(self, *embedders: nn.Module | None) -> None:
        """Tell Megatron of the embedders that every piece holds, where there are several pieces."""
        for embedder in filter(None, embedders) if self.stage.count > 1 else ():
            mark_replicated_over_stages(embedder)

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Megatron's schedules hand a stage the message of the one before here."""
        (self._received,) = input_tensor

    def forward(
        self,
        x_SBP: Tensor | Dual,
        timestep_1B: Tensor | Dual,
        text_LBD: Tensor,
        condition: Condition | None = None,
        interval_1B: Tensor | Dual | None = None,
    ) -> Tensor | Dual:
        """Velocity ``[S, B, P]`` (RF convention, noise − x0) with padding set to zero; a Dual for Dual inputs.

        Of a network of two times (``model.second_time``) the average velocity over the interval, MeanFlow (arXiv 2505.13447) Eq. 3.

        A piece that is not the last returns the hidden state instead, as the next one's message ``[S, B or 2B, D]``.

        Args:
            x_SBP: noisy tokens of this rank, scaled by ``c_in``, in the compute dtype or wider.
            timestep_1B: ``[1, B]`` in [0, 1000], 1000 s for the rectified-flow time s, fp32 or wider, whatever unit the family's release
                counts in; a Dual exactly when ``x_SBP`` is one.
            text_LBD: ``[L, B, text_dim]`` text embeddings, equal on all ranks of the sample.
            condition: what is known of the video itself, for families that take it.
            interval_1B: as ``timestep_1B``, 1000 (s − s') for the earlier time s' of a network of two times; None: 0, the velocity at s.
        """
        geometry = self._token_geometry(text_LBD.device)
        interval_1B = self._interval(interval_1B, timestep_1B)
        for_blocks, for_head = self._embed(timestep_1B, text_LBD, condition, interval_1B)
        if self.stage.is_first:
            h_SBD = recomputed(self.patch_embedding, self._patches(x_SBP, condition))
        else:
            h_SBD, self._received = from_message(self._received, dual=isinstance(timestep_1B, Dual)), None
        for block in self.blocks.values():
            h_SBD = self._run(block, h_SBD, *for_blocks, geometry=geometry)
        if not self.stage.is_last:
            return as_message(h_SBD)
        v_SBP = self._finish(recomputed(self.head, h_SBD, *for_head), x_SBP, timestep_1B, condition)
        return masked(v_SBP, self.layout)

    def new_output(self, batch: int) -> Tensor:
        """An empty velocity ``[S, batch, P]`` of this rank, to receive the last stage's."""
        features = self.model.out_channels * self.model.patch_volume
        shape = (self.layout.local_tokens, batch, features)
        return torch.empty(shape, dtype=self.output_dtype, device=next(self.parameters()).device)

    @property
    def output_dtype(self) -> torch.dtype:
        """Of the velocity. Wide where given frames come out: rounded to bf16 they would come back changed."""
        dtype = self.config.params_dtype
        return wide_dtype(dtype) if self.model.conditional_frames else dtype

    def _interval(self, interval_1B: Tensor | Dual | None, timestep_1B: Tensor | Dual) -> Tensor | Dual | None:
        """What a network of two times is given of the second: no interval where none is said."""
        if not self.model.second_time:
            assert interval_1B is None, "this network has one time: second_time=false"
            return None
        return map_linear(torch.zeros_like, timestep_1B) if interval_1B is None else interval_1B

    def _embed(
        self,
        timestep_1B: Tensor | Dual,
        text_LBD: Tensor,
        condition: Condition | None,
        interval_1B: Tensor | Dual | None,
    ) -> tuple[tuple, tuple]:
        """What the blocks and what the head take beside the hidden state; ``interval_1B`` exactly for a network of two times."""
        raise NotImplementedError

    def _rotation(self) -> Tensor:
        """Complex rotations ``[S, K / 2]`` of the tokens of this context-parallel rank."""
        raise NotImplementedError

    def _gives_frames(self, condition: Condition | None) -> bool:
        gives = condition is not None and condition.frames_B is not None
        assert not gives or self.model.conditional_frames, (
            "this network takes no given frames: conditional_frames=false"
        )
        return gives

    def _known(self, condition: Condition) -> Tensor:
        """Which tokens of this rank lie in given frames, ``[S, B, 1]``."""
        frame_S = self._token_geometry(condition.frames_B.device).frame_S
        return (frame_S[:, None] < condition.frames_B)[..., None]

    def _frame_timesteps(self, timestep_1B: Tensor | Dual, condition: Condition | None) -> Tensor | Dual:
        """``[1, B]``, or ``[F, B]`` of each latent frame where some are given."""
        return self._of_frames(timestep_1B, condition, given=self.given_timestep)

    def _frame_intervals(self, interval_1B: Tensor | Dual, condition: Condition | None) -> Tensor | Dual:
        """The same of intervals: a given frame goes nowhere."""
        return self._of_frames(interval_1B, condition, given=0.0)

    def _of_frames(self, value_1B: Tensor | Dual, condition: Condition | None, *, given: float) -> Tensor | Dual:
        if not self._gives_frames(condition):
            return value_1B
        return frame_timesteps(value_1B, condition.frames_B, frames=self.layout.grid[0], given=given)

    def _patches(self, x_SBP: Tensor | Dual, condition: Condition | None) -> Tensor | Dual:
        """What the patch embedding takes."""
        x_SBP = map_linear(lambda value: value.to(self.config.params_dtype), x_SBP)
        if not self._gives_frames(condition):
            return x_SBP
        return where_known(self._known(condition), condition.x0_SBP, x_SBP)

    def _finish(
        self, v_SBP: Tensor | Dual, x_SBP: Tensor | Dual, timestep_1B: Tensor | Dual, condition: Condition | None
    ) -> Tensor | Dual:
        """The velocity that leaves the network, from what its head gives."""
        v_SBP = with_graph(lambda v: v.to(self.output_dtype), v_SBP)
        if not self._gives_frames(condition):
            return v_SBP
        return lead_to(condition.x0_SBP, self._known(condition), v_SBP, x_SBP, timestep_1B)

    def _run(self, block: nn.Module, h_SBD, *inputs: Tensor | Dual, geometry: TokenGeometry) -> Tensor | Dual:
        def run(hidden, *values):
            with self.spec.pass_context(hidden):
                return block(hidden, *values, geometry=geometry)

        return run_block(run, h_SBD, *inputs, policy=self.recompute)

    def _token_geometry(self, device: torch.device) -> TokenGeometry:
        if device not in self._geometry:
            dtype = torch.complex128 if self.config.params_dtype == torch.float64 else torch.complex64
            frame_S = self.layout.grid_indices()[0].to(device)
            self._geometry[device] = TokenGeometry(self._rotation().to(device, dtype), self.layout.num_tokens, frame_S)
        return self._geometry[device]

    def stored_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What training changes and checkpoints hold: every parameter, or those of the LoRA."""
        return ((name, value) for name, value in self.named_parameters() if not self.adapted or ".lora." in name)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata=None) -> ShardedStateDict:
        """Every parameter as a Megatron ShardedTensor: split over tp where it is, one main replica elsewhere."""
        groups = self.layout.groups
        sharded = {}
        for name, parameter in self.stored_parameters():
            replicas = {"tp_group": groups.tp, "dp_cp_group": groups.dp_cp, "prepend_offsets": sharded_offsets}
            piece = self.stage.index if getattr(parameter, "pipeline_parallel", False) else 0
            if getattr(parameter, "tensor_model_parallel", False):
                replicas |= {"tp_axis": parameter.partition_dim, "replica_id": (piece, 0, groups.dp_cp.rank())}
                sharded[prefix + name] = make_tp_sharded_tensor_for_checkpoint(parameter, prefix + name, **replicas)
            else:
                sharded[prefix + name] = make_sharded_tensor_for_checkpoint(
                    parameter, prefix + name, replica_id=(piece, groups.tp.rank(), groups.dp_cp.rank()), **replicas
                )
        return sharded


def mark_replicated_over_stages(module: nn.Module) -> None:
    """Tell Megatron that every stage holds ``module``: its gradients are summed over the stages.

    With the distributed optimizer that sum comes after the reduce-scatter over dp*cp, and stages of different sizes would cut their buffers
    at different places. ``shared_embedding`` gives each parameter a bucket of its own, cut alike on all stages.
    """
    for parameter in module.parameters():
        parameter.pipeline_parallel = parameter.shared_embedding = True


def sinusoid(timestep_1B: Tensor | Dual, *, width: int, dtype: torch.dtype) -> Tensor | Dual:
    """``[cos(t w), sin(t w)]`` in fp64, then rounded: fp32 angles near t = 1000 cost 1e-5 of the tangent."""
    half = width // 2
    primal = timestep_1B.primal if isinstance(timestep_1B, Dual) else timestep_1B
    w = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=primal.device) / half)
    angle = primal.double()[..., None] * w
    cos, sin = angle.cos(), angle.sin()
    embedded = torch.cat([cos, sin], dim=-1).to(dtype)
    if not isinstance(timestep_1B, Dual):
        return embedded
    t_angle = timestep_1B.tangent.double()[..., None] * w
    return Dual.pack(embedded, torch.cat([-sin * t_angle, cos * t_angle], dim=-1).to(dtype))


def with_channels(x_SBP: Tensor | Dual, channels_SBE: Tensor) -> Tensor | Dual:
    """``x_SBP`` with further features, which carry no tangent."""
    if not isinstance(x_SBP, Dual):
        return torch.cat([x_SBP, channels_SBE.to(x_SBP.dtype)], dim=-1)
    stacked = nn.functional.pad(x_SBP.stacked, (0, channels_SBE.shape[-1]))
    stacked[:, : x_SBP.batch, x_SBP.stacked.shape[-1] :] = channels_SBE
    return Dual(stacked)


def masked(v_SBP: Tensor | Dual, layout: TokenLayout) -> Tensor | Dual:
    """Padding set to exactly zero in both halves."""
    if isinstance(v_SBP, Dual):
        return Dual(layout.mask(v_SBP.stacked), None if v_SBP.graph is None else layout.mask(v_SBP.graph))
    return layout.mask(v_SBP)
