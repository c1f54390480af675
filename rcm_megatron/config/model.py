"""The network, the latents it sees, and how it is cut over ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from rcm_megatron.config.advice import multiples_near
from rcm_megatron.config.declare import Change, NotNegative, Positive, PositiveFloat, Problem, until_refused


@dataclass(frozen=True, kw_only=True)
class CosmosConfig:
    """What a Cosmos-Predict2 transformer has beside ModelConfig's fields (names as in diffusers' CosmosTransformer3DModel)."""

    adaln_lora_dim: Positive = 256
    """Rank of each sublayer's modulation by the time embedding."""
    rope_scale: tuple[PositiveFloat, PositiveFloat, PositiveFloat]
    """(frames, rows, columns) by which RoPE is stretched: base 10000 * scale ** (d / (d - 2)) for d channels of an axis."""
    rope_fps: PositiveFloat | None = None
    """Frames a second of the latents' videos: time runs in steps of 24 / rope_fps. null: one a frame, as NVIDIA's release has it for images
    and videos; diffusers' Video2World pipeline does the same when it is called with fps=24."""
    max_size: tuple[Positive, Positive, Positive] = (128, 240, 240)
    """Largest latent (frames, height, width); with learnable_positions the size of their tables."""
    conditional_frames: bool = False
    """Video2World: a channel says which latent frames are given, and each frame has a timestep of its own."""
    condition_sigma: PositiveFloat = 1e-4
    """Noise level that the given frames are announced to have (diffusers' sigma_conditioning)."""
    padding_mask: bool = True
    """A channel that marks borders of the picture without content. Here it is always zero: latents are whole pictures."""
    learnable_positions: bool = False
    """Normalised learned positions added before every block (Cosmos 1.0; not in Predict2)."""
    qk_norm_eps: PositiveFloat = 1e-5
    """diffusers' value; NVIDIA's release computes with 1e-6."""

    @property
    def extra_channels(self) -> int:
        """Input channels beside the latent's: masks."""
        return self.conditional_frames + self.padding_mask


WAN_MASK_CHANNELS = 4
"""Of a Wan network's condition_channels, the first: one for each frame of pixels in a latent frame."""
CLIP_TOKENS = 257
"""Of one image: ViT-H/14 at 224 x 224, 16 * 16 patches and the class token."""


@dataclass(frozen=True, kw_only=True)
class WanConfig:
    """How a Wan transformer is given images (its other fields are ModelConfig's). null, like all defaults, is plain text-to-video."""

    condition_channels: NotNegative = 0
    """Channels concatenated to the latent's before the patch embedding. Image-to-video: 20, a mask of 4 and the image's latent of 16."""
    image_dim: Positive | None = None
    """Width of the CLIP features of an image, which blocks attend to beside the text (Wan2.1 image-to-video: 1280). null: none."""
    image_positions: Positive | None = None
    """CLIP tokens that have a learned position (diffusers' pos_embed_seq_len; first and last frame: 2 * 257). null: no positions."""
    conditional_frames: bool = False
    """Wan2.2 TI2V: given latent frames are in their place, clean and at time 0; each token has its frame's timestep."""

    @property
    def image_tokens(self) -> int:
        """CLIP tokens that blocks attend to: 257 of one image (ViT-H/14 at 224 x 224), or as many as have a position."""
        return 0 if self.image_dim is None else self.image_positions or CLIP_TOKENS

    def check(self, path: str) -> Iterator[str]:
        """Positions are of CLIP tokens."""
        if self.image_positions is not None and self.image_dim is None:
            yield (
                f"{path}.image_positions={self.image_positions} places CLIP tokens, but {path}.image_dim=null has none; set it (1280), or "
                "image_positions to null"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A diffusion transformer. `hidden_size` is `dim` in the Wan release, `ffn_hidden_size` its `ffn_dim`."""

    family: Literal["wan", "cosmos"] = "wan"
    """wan: Wan2.1 and 2.2, described further by `wan`. cosmos: Cosmos-Predict2, described further by `cosmos`."""
    cosmos: CosmosConfig | None = None
    """Required by the family cosmos, null for any other."""
    wan: WanConfig | None = None
    """Image conditions of the family wan; null for text-to-video and for any other family."""
    num_layers: Positive
    hidden_size: Positive
    num_heads: Positive
    ffn_hidden_size: Positive
    in_channels: Positive
    out_channels: Positive
    patch_size: tuple[Positive, Positive, Positive]
    """(frames, rows, columns) of latent that make one token."""
    text_dim: Positive
    """Width of the text encoder's output (UMT5-XXL: 4096)."""
    text_len: Positive
    """Text positions; shorter captions are padded with zeros, which the network attends to as Wan's does."""
    freq_dim: Positive = 256
    """Width of the sinusoid that embeds the timestep. Cosmos: hidden_size."""
    eps: PositiveFloat = 1e-6
    cross_attn_norm: bool = True
    """Affine LayerNorm before cross-attention (Wan's norm3). Cosmos: false."""
    rope_max_seq_len: Positive = 1024
    """Most tokens along one of the three axes."""

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_volume(self) -> int:
        """Latent positions in one token."""
        return math.prod(self.patch_size)

    @property
    def embedded_channels(self) -> int:
        """Channels that the patch embedding sees: the latent's, a condition's, and masks that the network adds."""
        own = self.cosmos.extra_channels if self.cosmos else 0
        return self.in_channels + own + (self.wan.condition_channels if self.wan else 0)

    @property
    def inputs(self) -> dict[str, object]:
        """What the network is given, by field: equal in all networks of a run, for they see the same latents, texts and images."""
        wan = self.wan or WanConfig()
        shared = ("in_channels", "out_channels", "patch_size", "text_dim", "text_len", "conditional_frames")
        own = ("condition_channels", "image_dim", "image_tokens")
        return {name: getattr(self, name) for name in shared} | {f"wan.{name}": getattr(wan, name) for name in own}

    @property
    def conditional_frames(self) -> bool:
        """Whether the network takes clean latent frames (`Condition.x0_SBP` and `frames_B`)."""
        return any(own is not None and own.conditional_frames for own in (self.cosmos, self.wan))

    def check(self, path: str) -> Iterator[str | Problem]:
        """Sizes that must fit each other, and what the family asks of the shared fields."""
        yield from until_refused(self._heads(path))
        if self.freq_dim % 2:
            yield Problem(
                f"{path}.freq_dim={self.freq_dim} must be even (sines and cosines)",
                (Change(f"{path}.freq_dim", (self.freq_dim + 1, self.hidden_size)),),
            )
        if self.in_channels != self.out_channels:
            yield (
                f"{path}.out_channels={self.out_channels} must equal {path}.in_channels={self.in_channels}: "
                "the network predicts a velocity of its input's shape"
            )
        yield from until_refused(self._frames(path))
        yield from until_refused(self._family(path))

    def _heads(self, path: str) -> Iterator[Problem]:
        sizes = f"{path}.hidden_size={self.hidden_size}", f"{path}.num_heads={self.num_heads}"
        changes = (
            Change(f"{path}.hidden_size", multiples_near(self.hidden_size, self.num_heads)),
            Change(
                f"{path}.num_heads", sorted(range(1, self.hidden_size), key=lambda heads: abs(heads - self.num_heads))
            ),
        )
        if self.hidden_size % self.num_heads:
            yield Problem(f"{sizes[0]} must divide by {sizes[1]}", changes)
        elif self.head_dim % 2 or self.head_dim < 6:
            yield Problem(
                f"{sizes[0]} / {sizes[1]} = {self.head_dim} must be even and at least 6 "
                "(rotary embedding turns pairs of channels on three axes)",
                changes,
            )

    def _frames(self, path: str) -> Iterator[str]:
        if self.conditional_frames and self.patch_size[0] != 1:
            yield f"{path}.patch_size={list(self.patch_size)} must begin with 1 with conditional_frames: each frame has its timestep"

    def _family(self, path: str) -> Iterator[str | Problem]:
        if (self.family == "cosmos") != (self.cosmos is not None):
            given, fix = (
                ("null", f"give at least {path}.cosmos.rope_scale")
                if self.cosmos is None
                else ("given", f"remove {path}.cosmos, or set family: cosmos")
            )
            yield f"{path}.family={self.family} with {path}.cosmos={given}; {fix}"
        if self.wan is not None and self.family != "wan":
            yield f"{path}.family={self.family} with {path}.wan given; remove {path}.wan, or set family: wan"
        if self.family != "cosmos" or self.cosmos is None:
            return
        if self.freq_dim != self.hidden_size:
            yield Problem(
                f"{path}.freq_dim={self.freq_dim} must equal {path}.hidden_size={self.hidden_size} for family cosmos",
                (Change(f"{path}.freq_dim", (self.hidden_size,)),),
            )
        if self.cross_attn_norm:
            yield f"{path}.cross_attn_norm=true is Wan's; family cosmos modulates before cross-attention: set it to false"
        if self.head_dim < 12:
            yield f"{path}.hidden_size / num_heads = {self.head_dim} must be at least 12 to stretch RoPE; lower {path}.num_heads"


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Size of one latent video, [channels, frames, height, width], after the VAE (Wan: 4x in time, 8x in space)."""

    channels: Positive
    frames: Positive
    height: Positive
    width: Positive

    @property
    def shape_CTHW(self) -> tuple[int, int, int, int]:
        """(channels, frames, height, width)."""
        return (self.channels, self.frames, self.height, self.width)

    def num_tokens(self, patch_size: tuple[int, int, int]) -> int:
        """Tokens of one video before padding."""
        return math.prod(size // patch for size, patch in zip(self.shape_CTHW[1:], patch_size, strict=True))


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Degrees of model parallelism; data parallelism is what remains of the world size."""

    tp: Positive = 1
    """Tensor parallel; sequence parallelism is on whenever tp > 1."""
    ring: Positive = 1
    """Context parallel by ring attention; cp = ring * ulysses."""
    ulysses: Positive = 1
    """Context parallel by all-to-all over heads; must divide num_heads / tp."""
    pp: Positive = 1
    """Pipeline stages."""
    vpp: Positive = 1
    """Virtual pipeline chunks on each stage (interleaved schedule: a smaller bubble, vpp times the messages); 1 is no
    interleaving. Chunk c of rank p is the network's piece c * pp + p."""
    chunk_layers: tuple[Positive, ...] | None = None
    """Blocks of each of the pp * vpp pieces, in the network's order; null: as even as possible, the larger ones in the middle
    (the first piece also embeds patches, the last one projects and computes the loss)."""

    @property
    def cp(self) -> int:
        """Context parallel degree, ring * ulysses."""
        return self.ring * self.ulysses

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one replica of the networks: tp * cp * pp."""
        return self.tp * self.cp * self.pp

    @property
    def num_chunks(self) -> int:
        """Pieces into which the network's blocks are cut: pp * vpp."""
        return self.pp * self.vpp

    def layer_ranges(self, num_layers: int) -> tuple[range, ...]:
        """The blocks of each piece, in the network's order."""
        counts = self.chunk_layers or _even_split(num_layers, self.num_chunks)
        stops = list(accumulate(counts))
        return tuple(range(stop - count, stop) for count, stop in zip(counts, stops, strict=True))

    def dp(self, world_size: int) -> int:
        """Data parallel degree in a world of `world_size` ranks (which model_parallel_size must divide)."""
        return world_size // self.model_parallel_size

    def check(self, path: str) -> Iterator[Problem]:
        """Chunks need stages between which they are dealt."""
        if self.vpp > 1 and self.pp == 1:
            yield Problem(
                f"{path}.vpp={self.vpp} interleaves the chunks of 2 or more stages, got {path}.pp=1",
                (Change(f"{path}.vpp", (1,)),),
            )


def _even_split(total: int, parts: int) -> tuple[int, ...]:
    """Sizes that differ by one at most, the larger ones in the middle."""
    small, larger = divmod(total, parts)
    before = (parts - larger) // 2
    return tuple(small + (before <= index < before + larger) for index in range(parts))


FP8_ALIGNMENT = 16
"""cuBLAS multiplies FP8 matrices only if the leading dimensions, in bytes, divide by this: features and tokens alike."""


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Parameter dtype. Whatever it is: main parameters, gradients, EMA, norms, RoPE and time path are fp32,
    preconditioning and the tangent's normalisation fp64."""

    params_dtype: Literal["bf16", "fp32"]
    linear_layers: Literal["auto", "local", "transformer_engine"] = "auto"
    """Whose tensor-parallel linears the blocks are built of. auto: Transformer Engine's for bf16 where it is installed and there is
    CUDA, else Megatron-Core's own."""
    fused_ops: Literal["auto", "none"] = "auto"
    """What runs norms, modulation, gates, GELU and RoPE. auto: one Triton kernel each (rcm_kernels.fused) on CUDA, PyTorch's
    operations elsewhere; none: PyTorch's everywhere."""

    def check(self, path: str) -> Iterator[str]:
        """What Transformer Engine can do with a dtype."""
        if self.linear_layers == "transformer_engine" and self.params_dtype == "fp32":
            yield (
                f"{path}.linear_layers=transformer_engine with params_dtype=fp32 would multiply in TF32 (Transformer Engine has no other "
                "way); set linear_layers to auto or local, or params_dtype to bf16"
            )
