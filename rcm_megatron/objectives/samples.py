"""The samples of a step on this rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rcm_megatron.diffusion.noise import Draws
from rcm_megatron.inputs import Condition


@dataclass(frozen=True, eq=False)
class Samples:
    """All samples of a step on this data-parallel rank, its micro-batches one after the other.

    x0_SBP clean tokens of this rank; text and null text [L, B, D]; their random draws; what of the videos the networks are given
    (Video2World, image-to-video). Networks see ``micro_batch_size`` samples at a time, None: all.
    """

    x0_SBP: Tensor
    text_LBD: Tensor
    null_text_LBD: Tensor
    draws: Draws
    condition: Condition | None = None
    micro_batch_size: int | None = None

    @property
    def count(self) -> int:
        return self.x0_SBP.shape[1]

    @property
    def at_a_time(self) -> int:
        """Samples of a micro-batch."""
        return self.micro_batch_size or self.count

    @property
    def device(self) -> torch.device:
        return self.x0_SBP.device

    def with_conditional_frames(self, choices: Sequence[int]) -> Samples:
        """The networks are given the samples' own first latent frames, of as many as one of ``choices``, all equally likely."""
        choice = (self.draws.uniform("conditional_frames") * len(choices)).long()
        frames_B = torch.tensor(choices)[choice].to(self.device)
        return replace(self, condition=replace(self.condition or Condition(), x0_SBP=self.x0_SBP, frames_B=frames_B))
