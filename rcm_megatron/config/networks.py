"""The networks of a run by role, and how each of them trains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from rcm_megatron.config.declare import (
    Bounds,
    FilePath,
    MergedOnto,
    NotNegative,
    NotNegativeFloat,
    Positive,
    PositiveFloat,
)
from rcm_megatron.config.model import BY_FAMILY, ModelConfig

Beta = Annotated[float, Bounds(ge=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW; weight decay acts on every parameter, biases and norms included."""

    lr: NotNegativeFloat
    betas: tuple[Beta, Beta] = (0.0, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NotNegativeFloat = 0.01
    lr_warmup_steps: NotNegative = 100
    """Updates of this network over which lr rises linearly from 0."""
    clip_grad: NotNegativeFloat = 0.0
    """Largest gradient norm; 0 does not clip, which rCM's authors call crucial."""


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """Power-function EMA of a network's weights (EDM2, arXiv 2312.02696)."""

    relative_width: Annotated[float, Bounds(gt=0, lt=0.28, note="0.1 is usual")] = 0.1
    """Width of the averaging window as a fraction of the updates so far."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank changes (arXiv 2106.09685) in the place of a network's weights, which stay as they were."""

    rank: Positive = 64
    """Of each linear; q, k and v have one each."""
    alpha: PositiveFloat | None = None
    """The change is alpha/rank B A. null: rank, a scale of 1."""
    targets: Annotated[tuple[str, ...], Bounds(count=1)] = ("self_attn", "cross_attn", "mlp")
    """Beginnings of the linears' names, within a block or the network: self_attn, cross_attn.linear_q, mlp.linear_fc1, time_embedding,
    text_embedding, time_projection, patch_embedding, head ..."""

    @property
    def scale(self) -> float:
        """Of B A."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def takes(self, name: str) -> bool:
        """Whether the linear of an internal name gets an adapter."""
        own = name.split(".", 2)[2] if name.startswith("blocks.") else name
        return any(own == target or own.startswith(f"{target}.") for target in self.targets)


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """One network of the run. Which roles a run needs, and which of them it trains, its stages' objectives say; one that no stage needs
    is not built."""

    init: FilePath | None = None
    """Where its weights come from: a diffusers folder (config.json + safetensors) or a checkpoint of any format. null: the teacher's, of
    which the architecture must then be; in a run without a teacher (flow matching) random weights from the run's seed."""
    model: Annotated[ModelConfig | None, MergedOnto("model"), BY_FAMILY] = None
    """null: the architecture is `model`. What differs is enough, e.g. {num_layers: 40}; the rest is taken from `model`."""
    chunk_layers: tuple[Positive, ...] | None = None
    """As `parallel.chunk_layers`, of this network's blocks. null: `parallel.chunk_layers` for as many blocks as `model` has, else even."""
    weights: Literal["resident", "sharded", "offloaded"] = "resident"
    """resident: whole on every rank. sharded: 1/(dp*cp) of each block on a rank, gathered block by block in each pass: one all-gather of
    the weights a pass and micro-batch, hidden behind the block before where there is CUDA. Of a network that a stage trains, its fp32
    weights and gradients too are 1/(dp*cp) on a rank (ZeRO stage 3), for a second all-gather in each micro-batch's backward and a
    reduce-scatter of its fp32 gradients after it. offloaded: as sharded, with the parts in pinned host memory: also 1/(dp*cp) of the
    weights over PCIe; a CUDA device only, and a network that no stage trains."""
    fp8: bool = False
    """Plain passes in training, backward too, run the blocks' linears in FP8 (Transformer Engine on Ada, Hopper or newer); never used for
    a tangent, so not for a network that sCM trains. Saves about a third of their time on paper, changes their outputs by FP8's rounding,
    which depends on the layout. Weights stay bf16, main gradients fp32; the tokens of every network are padded to a multiple of 16 on
    each rank."""
    lora: LoraConfig | None = None
    """Of a network that a stage trains: a LoRA is trained, the weights are frozen, and may be sharded. Roles that begin alike and do not
    train their weights hold them once. null: all weights are trained."""
    optimizer: OptimizerConfig | None = None
    """Required of a network that a stage trains."""
    ema: EmaConfig | None = None
    """Of a network that a stage trains. null: none."""
    offload_optimizer: bool = False
    """fp32 main parameters and moments wait in pinned host memory between the updates: 12/(dp*cp) bytes a parameter of device memory less
    (8 with sharded weights, whose main parameters every pass needs; as many of the host's, each tensor rounded up to a power of two), two
    copies over PCIe an update. Those of all networks are on the device while a checkpoint is written or read. A CUDA device only."""

    @property
    def is_in_pieces(self) -> bool:
        """Of a network that a stage trains: whether what trains is sharded. (Of a LoRA it is the base, which does not train.)"""
        return self.weights == "sharded" and self.lora is None

    def check(self, path: str) -> Iterator[str]:
        """What belongs to an optimizer."""
        if self.optimizer is None and self.ema is not None:
            yield f"{path}.ema averages what an optimizer trains, but {path}.optimizer=null; give it at least lr, or set ema to null"
        if self.optimizer is None and self.lora is not None:
            yield f"{path}.lora is what an optimizer trains, but {path}.optimizer=null; give it at least lr, or set lora to null"
        if self.optimizer is None and self.offload_optimizer:
            yield f"{path}.offload_optimizer=true, but {path}.optimizer=null; set it to false"
