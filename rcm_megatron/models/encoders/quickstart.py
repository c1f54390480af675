"""The quick start's encoders, which need no files: one-channel latents that are the pixels, captions of a handful of words.

Shapes: B batch, C channels, T frames, H, W, L text positions (always the full text_len), D text width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUICKSTART_VOCABULARY = (*_DIGITS, "moving", "left", "right", "up", "down")
"""The words of `tools.quickstart.digits`'s captions. Their order is part of a trained checkpoint."""

EMPTY_WORD = "<empty>"
"""Stands for the caption "", so that "no caption" is a vector of its own and not a row of zeros."""


class PixelVideoEncoder:
    """Latents that are the pixels; `decode` clamps, because a sampler may overshoot."""

    def __init__(self, *, channels: int = 1) -> None:
        self.latent_channels = channels

    def encode(self, video_BCTHW: Tensor) -> Tensor:
        """The same values as float32; [B, C, T, H, W] both ways."""
        self._check(video_BCTHW)
        return video_BCTHW.float()

    def decode(self, latent_BCTHW: Tensor) -> Tensor:
        """The same values as float32, clamped to [-1, 1]; [B, C, T, H, W] both ways."""
        self._check(latent_BCTHW)
        return latent_BCTHW.float().clamp(-1.0, 1.0)

    def close(self) -> None:
        """Nothing to free."""

    def _check(self, x_BCTHW: Tensor) -> None:
        if x_BCTHW.ndim != 5 or x_BCTHW.shape[1] != self.latent_channels:
            raise ValueError(
                f"got shape {tuple(x_BCTHW.shape)}, need [B, {self.latent_channels}, T, H, W]; "
                "add the missing dimensions or build PixelVideoEncoder with the right `channels`"
            )


class WordTextEncoder:
    """One fixed random vector for each word of a small vocabulary, plus one for its place in the caption.

    The vectors come from `seed` alone, so a checkpoint trained with them needs no file beside it. Changing `vocabulary`
    (its order too), `seed`, `text_dim` or `text_len` makes a different encoder.
    """

    def __init__(
        self,
        *,
        vocabulary: Sequence[str] = QUICKSTART_VOCABULARY,
        text_dim: int = 32,
        text_len: int = 6,
        seed: int = 0,
        negative_prompt: str = "",
    ) -> None:
        self.negative_prompt = negative_prompt
        self.text_dim = text_dim
        self.text_len = text_len
        words = (EMPTY_WORD, *vocabulary)
        self._row_of_word = {word: row for row, word in enumerate(words)}
        generator = torch.Generator().manual_seed(seed)
        self._word_VD = torch.randn(len(words), text_dim, generator=generator)
        # Half the words' size: order stays readable without drowning the word.
        self._place_LD = 0.5 * torch.randn(text_len, text_dim, generator=generator)

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Embeddings [B, L, D], float32 on the CPU; ValueError names an unknown word or a caption that is too long."""
        embed_BLD = torch.zeros(len(captions), self.text_len, self.text_dim)
        for row, caption in enumerate(captions):
            words = caption.split() or [EMPTY_WORD]
            embed_BLD[row, : len(words)] = self._word_VD[self._rows(words, caption)] + self._place_LD[: len(words)]
        return embed_BLD

    def close(self) -> None:
        """Nothing to free."""

    def _rows(self, words: list[str], caption: str) -> list[int]:
        if len(words) > self.text_len:
            raise ValueError(f"caption {caption!r} has {len(words)} words, text_len={self.text_len} is the most")
        unknown = [word for word in words if word not in self._row_of_word]
        if unknown:
            known = ", ".join(list(self._row_of_word)[1:])
            raise ValueError(f"unknown word {unknown[0]!r} in caption {caption!r}; the vocabulary is: {known}")
        return [self._row_of_word[word] for word in words]
