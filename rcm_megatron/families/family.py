"""What a family of networks is to the rest of the program. No torch is imported until one of the lazy parts is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from rcm_megatron.config import LatentConfig, ModelConfig, RunConfig
    from rcm_megatron.config.declare import Problem
    from rcm_megatron.families.key_map import KeyMap
    from rcm_megatron.inputs import WholeInput
    from rcm_megatron.models.dit import DiffusionTransformer

Shapes = Mapping[str, tuple[int, ...]]
"""Key -> shape of its tensor."""
Fields = dict[str, Any]
"""Keyword arguments of a family's settings."""


@dataclass(frozen=True, kw_only=True)
class Naming:
    """How a family's networks are named, and described, in one format."""

    key_map: KeyMap
    is_used_by: Callable[[Shapes], bool]
    """Whether keys with these shapes are named so. A key or two decide, for damaged files are to be told by name too."""
    is_config: Callable[[Mapping[str, Any]], bool] = lambda config: False
    """Whether a `config.json` is this format's, by its class or its own fields: it may lie beside weights in another naming."""
    read_config: Callable[[Mapping[str, Any], Shapes], Fields] | None = None
    """Settings from the `config.json` beside the weights; None: the format has none for this family."""
    write_config: Callable[[ModelConfig], Mapping[str, Any]] | None = None
    read_shapes: Callable[[Shapes, Mapping[str, Any]], Fields] | None = None
    """Settings from the shapes of weights that come without a `config.json`, and from what the user says of them."""
    no_weights: tuple[str, ...] = ()
    """Ends of keys that files hold and that are no part of the network: counters, constants, weights that nobody uses."""
    second_time: bool = False
    """Whether it has names for what a second time adds."""


@dataclass(frozen=True, kw_only=True)
class PipelineCall:
    """How diffusers samples a network: its pipeline class, a checkpoint with the other components, and the call."""

    pipeline: str
    base: str
    arguments: tuple[str, ...]
    """Python, as in `height=480`, beside prompt, number of steps, guidance and generator."""
    makes_noise: bool
    """The pipeline scales its first noise by the scheduler's `init_noise_sigma` itself."""
    takes_image: bool = False


SHARED_FLOP_ROWS = {
    "patch_embedding": "tokens",
    "self_attn": "tokens",
    "cross_attn.linear_q": "tokens",
    "cross_attn.linear_proj": "tokens",
    "mlp": "tokens",
    "head.linear": "tokens",
    "cross_attn.linear_kv": "text",
    "time_embedding": "times",
}
"""`Family.flop_rows` of what is built of the shared layers (rcm_megatron.models.layers)."""


class Family:
    """One family of networks. A family is an instance of a subclass; `rcm_megatron.registry.Lazy` defers its heavy parts."""

    name: str
    """Its key in `FAMILIES`."""
    title: str
    """What texts call it."""
    settings: type[ModelConfig]
    free_fields: tuple[str, ...] = ()
    """Settings that no tensor shows and no conversion depends on: a run may have others than the file."""
    flop_rows: Mapping[str, str]
    """Linear, by the beginning of its name within the network or a block -> what it works on: `tokens` of the video, all `text` positions,
    features of an `image`, or `times`, of which a sample has one, or one a latent frame."""
    second_time: Mapping[str, str | None] = {}
    """Beginning of the names of each layer that a second time adds (`ModelConfig.second_time`) -> the layer whose values it starts with, or
    None: zero. Together they start as a network that does not depend on it, and can learn to. Empty: the family has none."""
    diffusers_class: str
    scheduler_space: Literal["flow", "edm"]
    """Of RCMScheduler: what diffusers' pipelines of this family scale a network's input by."""

    network: type[DiffusionTransformer]
    namings: Mapping[str, Naming]
    """Format -> this family in it; `internal` is every family's."""

    def problems(self, model: ModelConfig, latent: LatentConfig, *, path: str) -> Iterator[Problem | str]:
        """What is wrong between the settings at `path` and the latents; `ModelConfig.check` has what is wrong within them."""
        raise NotImplementedError

    def image_channels(self, image_latent_BCTHW: Tensor) -> Tensor:
        """Condition channels [B, C, T, H, W] of latents of images, for networks that have them (`ModelConfig.image`)."""
        raise NotImplementedError

    def pipeline(self, run: RunConfig) -> PipelineCall:
        """How diffusers samples a student of `run`."""
        raise NotImplementedError

    def diffusers_inputs(self, model: ModelConfig, given: WholeInput) -> dict[str, Any]:
        """Arguments of a forward of `diffusers_class` that is to give what this program's network gives for `given`."""
        raise NotImplementedError

    def as_diffusers(self, model: ModelConfig) -> ModelConfig:
        """The network as diffusers computes it, where its constants are not the release's."""
        return model

    def vae_factors(self, channels: int) -> tuple[int, int]:
        """(frames, rows and columns) of pixels that the VAE of so many latent channels makes one; the first frame stays one."""
        return 4, 8

    def largest_latent(self, model: ModelConfig) -> tuple[float, float, float]:
        """(frames, height, width) up to which the network has positions, beside `rope_max_seq_len`."""
        return (float("inf"),) * 3
