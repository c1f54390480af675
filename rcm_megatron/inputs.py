"""What a network is given: noisy tokens, a time, text, and what is known of the video itself; and how a batch is cut into micro-batches.

Shapes: x_SBP patch tokens of this rank, text_LBD text embeddings; B is 2B inside a Dual.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from rcm_megatron.dual import BATCH_DIM, Dual

Rows = slice | Tensor
"""Of a batch: a range, or indices."""


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
        """For a batch that holds all samples ``times`` times, one round after the other."""
        return Condition(**{name: torch.cat([value] * times, dim) for name, value, dim in self._present()})

    def rows(self, rows: Rows) -> Condition:
        """For these samples of the batch."""
        return Condition(**{name: take(value, rows, dim=dim) for name, value, dim in self._present()})

    def without(self, dropped_1B1: Tensor) -> Condition:
        """With zeros for the samples that are dropped."""
        return Condition(**{name: zeroed(value, dropped_1B1) for name, value, _ in self._present()})

    @property
    def tensors(self) -> list[Tensor]:
        """The fields that are there."""
        return [value for _, value, _ in self._present()]

    def _present(self) -> Iterator[tuple[str, Tensor, int]]:
        """Name, value and batch dimension of the fields that are there."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                yield field.name, value, 0 if field.name == "frames_B" else BATCH_DIM


@dataclass(frozen=True, eq=False)
class NetworkInput:
    """What a network sees of a batch: tokens [S, B, P], timestep [1, B], text [L, B, D]; Duals for a JVP."""

    x_SBP: Tensor | Dual
    timestep_1B: Tensor | Dual
    text_LBD: Tensor
    condition: Condition | None = None
    dropped_1B1: Tensor | None = None
    """Samples of which a micro-batch holds zeros: a NaN that a network sees is in the gradient of every weight, whatever its loss."""
    interval_1B: Tensor | Dual | None = None
    """For a network of two times: 1000 (s - s') down to the time s' that its average velocity leads to; None: 0, or one time."""

    @property
    def batch(self) -> int:
        """Number of samples."""
        return self.text_LBD.shape[BATCH_DIM]

    def micro_batch(self, number: int, size: int) -> NetworkInput:
        """Samples ``number * size`` and on; the last one again where there are no more."""
        rows: Rows = slice(number * size, (number + 1) * size)
        if rows.stop > self.batch:
            rows = torch.arange(rows.start, rows.stop, device=self.text_LBD.device).clamp(max=self.batch - 1)
        parts = [None if value is None else take(value, rows) for value in self._values]
        condition = None if self.condition is None else self.condition.rows(rows)
        if self.dropped_1B1 is not None:
            dropped_1B1 = take(self.dropped_1B1, rows)
            parts = [None if value is None else zeroed(value, dropped_1B1) for value in parts]
            condition = None if condition is None else condition.without(dropped_1B1)
        x_SBP, timestep_1B, text_LBD, interval_1B = parts
        return NetworkInput(x_SBP, timestep_1B, text_LBD, condition, interval_1B=interval_1B)

    @property
    def tensors(self) -> list[Tensor]:
        """All that it is made of; of a Dual both halves."""
        halves = [
            half
            for value in self._values
            if value is not None
            for half in ((value.primal, value.tangent) if isinstance(value, Dual) else (value,))
        ]
        return [*halves, *(self.condition.tensors if self.condition else ())]

    @property
    def _values(self) -> tuple[Tensor | Dual | None, ...]:
        return self.x_SBP, self.timestep_1B, self.text_LBD, self.interval_1B


def nonfinite_on_rank(tensors: Iterable[Tensor]) -> Tensor:
    """``[1, B, 1]``: 1.0 for each sample that holds a NaN or an infinity in one of ``tensors`` ``[…, B, …]``, of this rank; else 0.0."""
    floats = [value for value in tensors if value.is_floating_point()]
    found = [(~torch.isfinite(value)).transpose(0, BATCH_DIM).flatten(1).any(dim=1) for value in floats]
    return torch.stack(found).any(dim=0).double()[None, :, None]


def zeroed(value: Tensor | Dual, dropped_1B1: Tensor) -> Tensor | Dual:
    """``value`` ``[…, B, …]`` with zeros for the samples that are dropped; whole numbers (counts of frames or elements) as they are."""
    if isinstance(value, Dual):
        return Dual.pack(zeroed(value.primal, dropped_1B1), zeroed(value.tangent, dropped_1B1))
    if not value.is_floating_point():
        return value
    shape = [1] * value.ndim
    shape[BATCH_DIM] = -1
    return torch.where(dropped_1B1.reshape(shape), torch.zeros((), dtype=value.dtype, device=value.device), value)


def take(value: Tensor | Dual, rows: Rows, *, dim: int = BATCH_DIM) -> Tensor | Dual:
    """Those samples of ``value``, whose batch is dimension ``dim``."""
    if isinstance(value, Dual):
        return Dual.pack(take(value.primal, rows, dim=dim), take(value.tangent, rows, dim=dim))
    return value[(slice(None),) * dim + (rows,)]


@dataclass(frozen=True, kw_only=True, eq=False)
class WholeInput:
    """What a network is run on to be compared with another library's: whole, and equal on all ranks."""

    x_BCTHW: Tensor
    timestep_B: Tensor
    """1000 s for the rectified-flow time s."""
    text_BLD: Tensor
    channels_BCTHW: Tensor
    """Of an image, beside the latent's; C may be 0."""
    image_BLD: Tensor | None = None
    """CLIP features, for a network that takes them."""

    def with_channels(self) -> Tensor:
        """Latent and condition, ``[B, C, T, H, W]``."""
        return torch.cat([self.x_BCTHW, self.channels_BCTHW], dim=1)
