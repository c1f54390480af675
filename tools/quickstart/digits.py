"""Captioned videos of two moving digits, made from scikit-learn's 1,797 bundled digit images (nothing is downloaded).

Two 8x8 digits pass each other on a 16x16 canvas, one in the upper and one in the lower half, and come back in where they
go out. The caption names one digit and its direction ("seven moving left") and says nothing of the other. What it leaves
open (which half, places, handwriting, the second digit) makes the conditional distribution many-moded, so a sampler that
takes too few steps shows averages of it.

Shapes: C channels (1), T frames, H and W pixels, B batch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

Split = Literal["train", "heldout"]

NUM_FRAMES = 4
CANVAS = 16
LATENT_SHAPE_CTHW = (1, NUM_FRAMES, CANVAS, CANVAS)
LANE_ROWS = (0, 8)
"""First row of each digit's lane. With both digits anywhere on the canvas and four directions, 67,000 videos (10 minutes
on one core) taught the teacher strokes but no motion and no captions: accuracy 0.05."""
SPEED = 2
"""Pixels a digit moves from one frame to the next; columns are multiples of it."""

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIRECTION_STEPS = MappingProxyType({"left": (0, -1), "right": (0, 1)})
"""(rows, columns) that one pixel of motion adds; row 0 is the top of the picture."""
DIRECTIONS = tuple(DIRECTION_STEPS)

_SPLITS: tuple[Split, ...] = ("train", "heldout")
# One image of six is held out: about 30 of each class to judge with, and 1,500 in all left to learn from.
_HELDOUT_EVERY = 6
_INK_MAX = 16.0  # load_digits counts inked pixels of a 4x4 cell: 0 to 16


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One captioned video. `direction` and `other_direction` are words of `DIRECTIONS`."""

    latent_CTHW: Tensor
    """float32 in [-1, 1]: -1 is background, 1 full ink."""
    caption: str
    digit: int
    direction: str
    other_digit: int
    other_direction: str


@functools.cache
def digit_images(split: Split) -> dict[int, np.ndarray]:
    """Images of each class in `split`: {class: float32 array [n, 8, 8] in [0, 1]}. The two splits share no image."""
    if split not in _SPLITS:
        raise ValueError(f"split={split!r} is unknown; use one of {_SPLITS}")
    pictures = load_digits()
    images = (pictures.images / _INK_MAX).astype(np.float32)
    by_class = {}
    for digit in range(len(DIGIT_WORDS)):
        of_class = images[pictures.target == digit]
        held_out = np.arange(len(of_class)) % _HELDOUT_EVERY == 0
        by_class[digit] = of_class[held_out if split == "heldout" else ~held_out]
    return by_class


def caption_of(digit: int, direction: str) -> str:
    """The caption of a video whose named digit is `digit`: `caption_of(7, "left")` is "seven moving left"."""
    return f"{DIGIT_WORDS[digit]} moving {direction}"


def all_captions() -> tuple[str, ...]:
    """Every caption that can occur: 10 digits times 2 directions."""
    return tuple(caption_of(digit, direction) for digit in range(len(DIGIT_WORDS)) for direction in DIRECTIONS)


def parse_caption(caption: str) -> tuple[int, str]:
    """(digit, direction) of a caption that `caption_of` wrote; ValueError for any other string."""
    words = caption.split()
    if len(words) != 3 or words[0] not in DIGIT_WORDS or words[1] != "moving" or words[2] not in DIRECTIONS:
        raise ValueError(f'caption {caption!r} is not of the form "seven moving left"')
    return DIGIT_WORDS.index(words[0]), words[2]


def _moving_digit(image_HW: np.ndarray, *, row: int, column: int, direction: str) -> np.ndarray:
    """The 8x8 image, from (row, column) on, carried around the torus: ink [T, H, W] in [0, 1]."""
    canvas_HW = np.zeros((CANVAS, CANVAS), dtype=np.float32)
    canvas_HW[: image_HW.shape[0], : image_HW.shape[1]] = image_HW
    rows, columns = DIRECTION_STEPS[direction]
    places = [(row + rows * SPEED * frame, column + columns * SPEED * frame) for frame in range(NUM_FRAMES)]
    return np.stack([np.roll(canvas_HW, place, axis=(0, 1)) for place in places])


def make_sample(*, seed: int, index: int, split: Split = "train") -> Sample:
    """Video number `index`; a pure function of (seed, index, split), on every machine and in any order of calls.

    The two digits differ in class and in direction, so that a caption is true of exactly one of them.
    """
    images = digit_images(split)
    rng = np.random.default_rng([seed, index, _SPLITS.index(split)])
    digits = rng.permutation(len(DIGIT_WORDS))[:2]
    directions = [DIRECTIONS[i] for i in rng.permutation(len(DIRECTIONS))[:2]]
    ink_THW = np.zeros((NUM_FRAMES, CANVAS, CANVAS), dtype=np.float32)
    for digit, direction, row in zip(digits, directions, rng.permutation(LANE_ROWS), strict=True):
        image_HW = images[int(digit)][rng.integers(len(images[int(digit)]))]
        column = SPEED * int(rng.integers(CANVAS // SPEED))
        ink_THW += _moving_digit(image_HW, row=int(row), column=column, direction=direction)
    return Sample(
        latent_CTHW=torch.from_numpy(2.0 * ink_THW - 1.0).unsqueeze(0),
        caption=caption_of(int(digits[0]), directions[0]),
        digit=int(digits[0]),
        direction=directions[0],
        other_digit=int(digits[1]),
        other_direction=directions[1],
    )


def make_samples(*, seed: int, start: int, count: int, split: Split = "train") -> tuple[Tensor, list[Sample]]:
    """Videos `start` to `start + count`: (latents [B, C, T, H, W], the samples themselves)."""
    samples = [make_sample(seed=seed, index=index, split=split) for index in range(start, start + count)]
    return torch.stack([sample.latent_CTHW for sample in samples]), samples
