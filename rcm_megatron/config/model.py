"""The network, the latents it sees, and how it is cut over ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Literal

from rcm_megatron.config.advice import multiples_near
from rcm_megatron.config.declare import AttributeOf, Change, Positive, PositiveFloat, Problem, Variants, until_refused
from rcm_megatron.registries import FAMILIES


@dataclass(frozen=True, kw_only=True)
class ImageInputs:
    """What a network is given of an image beside text; by default nothing."""

    channels: int = 0
    """Concatenated to the latent's before the patch embedding."""
    tokens: int = 0
    """CLIP tokens that blocks attend to, ..."""
    dim: int | None = None
    """... and their width."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What all families of diffusion transformers have. A family's settings (`Family.settings`) are a subclass that adds its own."""

    family: str
    """A key of `rcm_megatron.registries.FAMILIES`; it says which other settings there are."""
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
    """Text positions; shorter captions are padded with zeros, which the network attends to."""
    eps: PositiveFloat = 1e-6
    rope_max_seq_len: Positive = 1024
    """Most tokens along one of the three axes."""
    conditional_frames: bool = False
    """The network takes clean latent frames (`Condition.x0_SBP` and `frames_B`), and each token has its frame's timestep."""

    second_time: bool = False
    """The network is told a second, earlier time, as the interval down to it, and returns the average velocity in between: a flow map
    (objectives emd, lmd, mean_flow). Training starts its layers so that they change nothing yet."""

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
        """Channels that the patch embedding sees: the latent's, and what the family adds to them."""
        return self.in_channels

    @property
    def image(self) -> ImageInputs:
        """What the network is given of an image."""
        return ImageInputs()

    @property
    def inputs(self) -> dict[str, object]:
        """What the network is given, by field: equal in all networks of a run, for they see the same latents, texts and images."""
        shared = ("in_channels", "out_channels", "patch_size", "text_dim", "text_len", "conditional_frames")
        image = {
            "condition_channels": self.image.channels,
            "image_dim": self.image.dim,
            "image_tokens": self.image.tokens,
        }
        return {name: getattr(self, name) for name in shared} | image

    def check(self, path: str) -> Iterator[str | Problem]:
        """Sizes that must fit each other."""
        yield from until_refused(self._heads(path))
        if self.in_channels != self.out_channels:
            yield (
                f"{path}.out_channels={self.out_channels} must equal {path}.in_channels={self.in_channels}: "
                "the network predicts a velocity of its input's shape"
            )
        yield from until_refused(self._frames(path))

    def _heads(self, path: str) -> Iterator[Problem]:
        sizes = f"{path}.hidden_size={self.hidden_size}", f"{path}.num_heads={self.num_heads}"
        if self.hidden_size % self.num_heads:
            yield Problem(f"{sizes[0]} must divide by {sizes[1]}", self._other_heads(path))
        elif self.head_dim % 2 or self.head_dim < 6:
            yield Problem(
                f"{sizes[0]} / {sizes[1]} = {self.head_dim} must be even and at least 6 "
                "(rotary embedding turns pairs of channels on three axes)",
                self._other_heads(path),
            )

    def _other_heads(self, path: str) -> tuple[Change, ...]:
        heads = sorted(range(1, self.hidden_size), key=lambda heads: abs(heads - self.num_heads))
        sizes = multiples_near(self.hidden_size, self.num_heads)
        return Change(f"{path}.hidden_size", sizes), Change(f"{path}.num_heads", heads)

    def _frames(self, path: str) -> Iterator[str]:
        if self.conditional_frames and self.patch_size[0] != 1:
            yield f"{path}.patch_size={list(self.patch_size)} must begin with 1 with conditional_frames: each frame has its timestep"


BY_FAMILY = Variants("family", lambda: AttributeOf(FAMILIES, "settings"))
"""Of a section that is the settings of a network."""
AXES = ("frames", "height", "width")
"""Of a latent, after its channels."""


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
        return _ranges(self.chunk_layers or _even_split(num_layers, self.num_chunks))

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


@lru_cache
def _ranges(counts: tuple[int, ...]) -> tuple[range, ...]:
    stops = list(accumulate(counts))
    return tuple(range(stop - count, stop) for count, stop in zip(counts, stops, strict=True))


@lru_cache
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
