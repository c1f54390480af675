"""What a network is given: noisy tokens, a time, text, and what is known of the video itself.

Shapes: x_SBP patch tokens of this rank, text_LBD text embeddings; B is 2B inside a Dual.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from rcm_megatron.dual import BATCH_DIM, Dual


@dataclass(frozen=True, eq=False)
class Condition:
    """What a network is told of the video itself; which fields are there is the network's matter. Nothing in it carries a tangent."""

    x0_SBP: Tensor | None = None
    """Clean tokens of this rank; those of frames that are not given are not used."""
    frames_B: Tensor | None = None
    """How many latent frames of each sample are given, 0 or more; goes with ``x0_SBP``."""
    channels_SBE: Tensor | None = None
    """Tokens of this rank of the channels that are concatenated to the latent's, patchified as the latent is (Wan's image-to-video: a mask
    and the image's latent); E = condition_channels * patch_volume."""
    image_LBD: Tensor | None = None
    """CLIP features of the image, equal on all ranks of the sample: [257, B, 1280], or 2 * 257 of first and last frame."""

    def repeated(self, times: int) -> Condition:
        """For a batch that holds every sample ``times`` times, one after the other."""
        return Condition(**{name: torch.cat([value] * times, dim) for name, value, dim in self._present()})

    def chunk(self, parts: int) -> list[Condition]:
        """For a batch in ``parts`` equal parts."""
        chunks = {name: value.chunk(parts, dim) for name, value, dim in self._present()}
        return [Condition(**{name: values[part] for name, values in chunks.items()}) for part in range(parts)]

    def _present(self) -> Iterator[tuple[str, Tensor, int]]:
        """Name, value and batch dimension of the fields that are there."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                yield field.name, value, 0 if field.name == "frames_B" else BATCH_DIM


@dataclass(frozen=True, eq=False)
class NetworkInput:
    """What a network sees of one micro-batch: tokens [S, B, P], timestep [1, B], text [L, B, D]; Duals for a JVP."""

    x_SBP: Tensor | Dual
    timestep_1B: Tensor | Dual
    text_LBD: Tensor
    condition: Condition | None = None
