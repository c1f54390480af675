"""Power-function EMA of a network's weights (EDM2, arXiv 2312.02696, Sec. 3.1 and Appendix C).

The average lives on the distributed optimizer's fp32 main shards: 4/(dp*cp) bytes for each parameter of the rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from rcm_megatron.parallel.optimizer_shards import owned_shards
from rcm_megatron.training.optimizer import sync_model_parameters


def power_exponent(relative_width: float) -> float:
    """gamma of the profile t^gamma whose width is `relative_width` of the training so far.

    The largest real root of x^3 + 7 x^2 + (16 - s^-2) x + (12 - s^-2); s = 0.1 gives 6.94.
    Raises ValueError for widths that no gamma above 0 has.
    """
    if not 0.0 < relative_width < 12**-0.5:
        raise ValueError(f"got relative_width={relative_width}; need 0 < width < 0.288 (gamma > 0); fix: the usual 0.1")
    inverse_square = relative_width**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse_square, 12.0 - inverse_square])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-9))


def power_decay(update: int, *, gamma: float) -> float:
    """beta = (1 - 1/(i+1))^(gamma+1) of the i-th update, i from 1."""
    return (1.0 - 1.0 / (update + 1)) ** (gamma + 1.0)


class PowerEMA:
    """EMA of the weights that `optimizer` trains.

    `shards` holds the averages of this rank's shards in the order of `owned_shards(optimizer)`: a checkpoint stores them, and
    reshards them, with the optimizer's own state. The number of updates is the caller's: it is the argument of `update`.
    """

    def __init__(self, optimizer: MegatronOptimizer, relative_width: float) -> None:
        self._optimizer = optimizer
        self._mains = [shard.main.detach() for shard in owned_shards(optimizer)]
        self.gamma = power_exponent(relative_width)
        self.shards: list[Tensor] = [main.clone() for main in self._mains]

    @torch.no_grad()
    def restart(self) -> None:
        """The average is the weights of now."""
        for average, main in zip(self.shards, self._mains, strict=True):
            average.copy_(main)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average in the weights that the `step`-th update (from 1) has produced."""
        weight = 1.0 - power_decay(step, gamma=self.gamma)
        if self.shards:
            torch._foreach_lerp_(self.shards, self._mains, weight)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model computes with the averaged weights inside, on all ranks, and with its own bits again afterwards.

        Enter and leave it on every rank of dp*cp; do not train, save or update inside."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for main, average in zip(self._mains, self.shards, strict=True):
            held = main.clone()
            main.copy_(average)
            average.copy_(held)
        sync_model_parameters(self._optimizer)
