"""25 Gaussians of unequal weight in two dimensions: the exact teacher, and how far samples are from the truth.

Shapes: K repetitions (seeds) side by side, B samples, M modes: x_KB2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rcm_megatron.diffusion import trigflow

SIDE, SPACING, STD = 5, 0.7, 0.1
"""Modes along an axis, their distance, and the standard deviation of each: the data's own is about 1."""
LARGEST = 10.0
"""Weight of the heaviest mode, of the lightest; geometric in between."""
INSIDE = 3.0
"""Standard deviations from the nearest mode within which a sample belongs to it."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """Centres ``[M, 2]`` and weights ``[M]`` that sum to 1, fp64."""

    centres_M2: Tensor
    weights_M: Tensor

    @staticmethod
    def unequal() -> "Mixture":
        """The weights lie on the grid in a fixed random order."""
        axis = (torch.arange(SIDE, dtype=torch.float64) - (SIDE - 1) / 2) * SPACING
        centres = torch.cartesian_prod(axis, axis)
        weights = LARGEST ** torch.linspace(0, 1, len(centres), dtype=torch.float64)
        weights = weights[torch.randperm(len(centres), generator=torch.Generator().manual_seed(0))]
        return Mixture(centres, weights / weights.sum())

    def sample(self, *shape: int, generator: torch.Generator) -> Tensor:
        """Data ``[*shape, 2]``."""
        count = torch.Size(shape).numel()
        mode = torch.multinomial(self.weights_M, count, replacement=True, generator=generator)
        noise = torch.randn(count, 2, generator=generator, dtype=torch.float64)
        return (self.centres_M2[mode] + STD * noise).unflatten(0, shape)

    def denoised(self, xt: Tensor, t: Tensor) -> Tensor:
        """The exact E[x0 | xt] at TrigFlow times ``t``, for ``xt`` ``[..., 2]``."""
        cos, sin = torch.cos(t), torch.sin(t)
        variance = cos**2 * STD**2 + sin**2
        gaps = xt[..., None, :] - cos[..., None] * self.centres_M2
        logits = self.weights_M.log() - gaps.square().sum(-1) / (2 * variance)
        share = logits.softmax(-1)[..., None]
        each = self.centres_M2 + (cos * STD**2 / variance)[..., None] * gaps
        return (share * each).sum(-2)

    def velocity(self, xt: Tensor, t: Tensor) -> Tensor:
        """The exact RF velocity E[noise - x0 | xt], as a network returns it."""
        cos, sin = torch.cos(t), torch.sin(t)
        x0 = self.denoised(xt, t)
        # noise = (xt - cos x0) / sin; at t = 0 xt is data, and the noise has mean 0
        noise = torch.where(sin > 1e-9, (xt - cos * x0) / sin.clamp(min=1e-9), torch.zeros_like(xt))
        return noise - x0

    def F(self, xt: Tensor, t: Tensor) -> Tensor:
        """The exact TrigFlow velocity."""
        return trigflow.velocity(xt, self.velocity(xt, t), t)


def distances(mixture: Mixture, x_N2: Tensor) -> dict[str, float]:
    """What is wrong with samples.

    modes: of 25, those with at least a fifth of their share of the samples. kl: of the true weights to the samples' (one sample added to
    each mode). inside: share of the samples within 3 standard deviations of a mode. spread: standard deviation of those around their
    mode's centre, of the true one: 1 is right, less is too narrow.
    """
    gaps_NM = torch.cdist(x_N2.double(), mixture.centres_M2)
    nearest_N, is_in_N = gaps_NM.argmin(1), gaps_NM.amin(1) <= INSIDE * STD
    found_M = torch.bincount(nearest_N[is_in_N], minlength=len(mixture.weights_M)).double()
    share_M = (found_M + 1) / (found_M.sum() + len(found_M))
    inner = (x_N2.double() - mixture.centres_M2[nearest_N])[is_in_N]
    return {
        "modes": float((found_M >= 0.2 * mixture.weights_M * len(x_N2)).sum()),
        "kl": float((mixture.weights_M * (mixture.weights_M / share_M).log()).sum()),
        "inside": float(is_in_N.double().mean()),
        "spread": float(inner.square().mean().sqrt() / STD) if len(inner) else float("nan"),
    }
