"""Random draws that depend on (seed, iteration, global sample index, purpose) alone, never on ranks or batching.

Purposes in use: "time" "noise" (sCM) | "rollout_init" "rollout_time/{j}" "rollout_noise/{j}" "score_time"
"score_noise" (DMD and fake score) | "noise" "dcm_u" (dCM) | "flow_time" "flow_noise" "flow_caption" (flow matching) |
"conditional_frames" (how many frames are given).
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor


class Draws(Protocol):
    """Where an objective gets its randomness from. All tensors fp32, batch first."""

    @property
    def batch_size(self) -> int:
        """Number of samples b."""

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal noise `[b, *shape]`."""

    def uniform(self, purpose: str) -> Tensor:
        """One draw from U[0, 1) a sample, `[b]`."""

    def normal_scalar(self, purpose: str) -> Tensor:
        """One standard normal draw a sample, `[b]`."""


class SeededDraws:
    """Draws of the samples with the given global indices; asking twice for a purpose gives the same numbers.

    Each sample and purpose has its own CPU generator, so that any split of the batch over ranks and micro-batches,
    and any device, sees the same values. PyTorch's CPU generator takes 32 of the 64 hashed bits: among 10^8 draws
    some pairs of noise tensors are equal, far apart and harmless.
    """

    def __init__(self, seed: int, iteration: int, sample_indices: Sequence[int]):
        self.seed, self.iteration = seed, iteration
        self.sample_indices = tuple(int(index) for index in sample_indices)

    @property
    def batch_size(self) -> int:
        return len(self.sample_indices)

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        return self._stack(purpose, lambda generator: torch.randn(tuple(shape), generator=generator))

    def uniform(self, purpose: str) -> Tensor:
        return self._stack(purpose, lambda generator: torch.rand((), generator=generator))

    def normal_scalar(self, purpose: str) -> Tensor:
        return self._stack(purpose, lambda generator: torch.randn((), generator=generator))

    def _stack(self, purpose: str, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        return torch.stack([draw(self._generator(purpose, index)) for index in self.sample_indices])

    def _generator(self, purpose: str, sample_index: int) -> torch.Generator:
        key = f"{self.seed}/{self.iteration}/{sample_index}/{purpose}".encode()
        digest = hashlib.blake2b(key, digest_size=8).digest()
        return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "little"))
