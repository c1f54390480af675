"""Statistics of a dataset's samples that can be merged: the same numbers however the samples were divided over ranks.

Shapes: C channels, T latent frames, H, W, L text positions, D text width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Self

import numpy as np
from torch import Tensor

_DIGITS = 6


@dataclass
class Statistics:
    """Sums over samples, in fp64."""

    num_samples: int = 0
    num_values: int = 0
    """Of one channel."""
    channel_sum: list[float] = field(default_factory=list)
    channel_squares: list[float] = field(default_factory=list)
    text_lengths: dict[str, int] = field(default_factory=dict)
    """How many embeddings have each number of positions (a string, as JSON's keys are)."""

    def add(self, latent_CTHW: Tensor | np.ndarray, embed_LD: Tensor | np.ndarray) -> None:
        """Count one sample, as it is stored. NumPy sums: PyTorch's order depends on the number of threads."""
        latent = latent_CTHW.float().numpy() if isinstance(latent_CTHW, Tensor) else latent_CTHW
        values_CX = latent.reshape(len(latent), -1).astype(np.float64)
        part = Statistics(
            num_samples=1,
            num_values=values_CX.shape[1],
            channel_sum=values_CX.sum(axis=1).tolist(),
            channel_squares=np.square(values_CX).sum(axis=1).tolist(),
            text_lengths={str(len(embed_LD)): 1},
        )
        self.__dict__.update(self.merged(part).__dict__)

    def merged(self, other: Self) -> Self:
        """Of both sets of samples; sums of floats are the same only for the same order of merging."""
        return Statistics(
            num_samples=self.num_samples + other.num_samples,
            num_values=self.num_values + other.num_values,
            channel_sum=_added(self.channel_sum, other.channel_sum),
            channel_squares=_added(self.channel_squares, other.channel_squares),
            text_lengths=dict(Counter(self.text_lengths) + Counter(other.text_lengths)),
        )

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Self:
        """The inverse of `as_dict`."""
        return cls(**{each.name: values[each.name] for each in fields(cls)})

    def summary(self) -> dict[str, object]:
        """What the manifest says of a dataset; ValueError without samples."""
        if not self.num_samples:
            raise ValueError("got no sample, need at least one")
        mean = np.array(self.channel_sum) / self.num_values
        std = np.sqrt(np.maximum(np.array(self.channel_squares) / self.num_values - mean**2, 0))
        lengths = np.repeat([int(key) for key in self.text_lengths], list(self.text_lengths.values()))
        return {
            "num_samples": self.num_samples,
            "latent_mean": [_rounded(value) for value in mean],
            "latent_std": [_rounded(value) for value in std],
            "text_length": {"min": int(lengths.min()), "mean": _rounded(lengths.mean()), "max": int(lengths.max())},
        }


def _added(left: Sequence[float], right: Sequence[float]) -> list[float]:
    if not left or not right:
        return list(left or right)
    return [a + b for a, b in zip(left, right, strict=True)]


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
