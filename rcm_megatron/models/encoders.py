"""What turns videos and captions into the transformer's inputs: the interface, and the two quick-start implementations.

A Wan VAE and a UMT5 encoder fit the same two protocols. The quick start needs neither: its one-channel latents are the
pixels, and its captions are a handful of words.

Shapes: B batch, C channels, T frames, H, W, L text positions (always the full text_len), D text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUICKSTART_VOCABULARY = (*_DIGITS, "moving", "left", "right", "up", "down")
"""The words of `rcm_megatron.data.synthetic`'s captions. Their order is part of a trained checkpoint."""

EMPTY_WORD = "<empty>"
"""Stands for the caption "", so that "no caption" is a vector of its own and not a row of zeros."""


@runtime_checkable
class VideoEncoder(Protocol):
    """Pixels in [-1, 1] to normalised latents and back."""

    latent_channels: int

    def encode(self, video_BCTHW: Tensor) -> Tensor:
        """Latents [B, C', T', H', W'] of pixel videos [B, C, T, H, W]."""
        ...

    def decode(self, latent_BCTHW: Tensor) -> Tensor:
        """Pixel videos [B, C, T, H, W], within [-1, 1], of latents [B, C', T', H', W']."""
        ...


@runtime_checkable
class TextEncoder(Protocol):
    """Captions to embeddings of one length."""

    text_len: int
    text_dim: int
    negative_prompt: str
    """Caption of the unconditional branch of classifier-free guidance."""

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Embeddings [B, L, D], zeros after each caption's last token (the transformer attends to those zeros too)."""
        ...


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

    negative_prompt = ""

    def __init__(
        self,
        *,
        vocabulary: Sequence[str] = QUICKSTART_VOCABULARY,
        text_dim: int = 32,
        text_len: int = 6,
        seed: int = 0,
    ) -> None:
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

    def _rows(self, words: list[str], caption: str) -> list[int]:
        if len(words) > self.text_len:
            raise ValueError(f"caption {caption!r} has {len(words)} words, text_len={self.text_len} is the most")
        unknown = [word for word in words if word not in self._row_of_word]
        if unknown:
            known = ", ".join(list(self._row_of_word)[1:])
            raise ValueError(f"unknown word {unknown[0]!r} in caption {caption!r}; the vocabulary is: {known}")
        return [self._row_of_word[word] for word in words]


def build_video_encoder(kind: str, *, channels: int) -> VideoEncoder:
    """The video encoder that `encoders.video` names; ValueError for one that cannot encode."""
    if kind != "pixels":
        raise ValueError(f"got encoders.video={kind!r}, need a video encoder here; set encoders.video to pixels")
    return PixelVideoEncoder(channels=channels)


def build_text_encoder(kind: str, *, text_len: int, text_dim: int) -> TextEncoder:
    """The text encoder that `encoders.text` names; ValueError for one that cannot encode."""
    if kind != "words":
        raise ValueError(
            f"got encoders.text={kind!r}, need a text encoder here; set encoders.text to words, or give "
            "data.negative_embedding and captions as embeddings"
        )
    return WordTextEncoder(text_len=text_len, text_dim=text_dim)
