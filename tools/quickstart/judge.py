"""Judging generated moving-digit videos: a small classifier trained on the spot, and three numbers computed with it.

The classifier has one head for each direction, which reads the class of the digit moving that way, or "none". Its last
hidden layer gives the features of a Fréchet distance (as FID has it, arXiv 1706.08500, with this network for Inception).

Shapes: B batch, C channels, T frames, H, W, N videos, F features, R directions, S statistics, K classes (ten digits and "none").
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from rcm_megatron.errors import InputError
from rcm_megatron.files import save_safetensors
from tools.quickstart.digits import (
    DIGIT_WORDS,
    DIRECTION_STEPS,
    DIRECTIONS,
    SPEED,
    Sample,
    make_samples,
    parse_caption,
)

NONE_CLASS = len(DIGIT_WORDS)
NUM_FEATURES = 64
_SPOILED_ORDERS = ((0, 0, 0, 0), (1, 0, 3, 2), (2, 0, 3, 1), (0, 2, 1, 3), (1, 3, 0, 2))
CLASSIFIER_SEED = 9_000_001
"""Of the classifier's videos and weights; no training or evaluation set should use it."""


class VideoClassifier(nn.Module):
    """Undo each possible motion, then read a digit from what stands still; one small trunk for all directions.

    A digit that moves as supposed is the same in all aligned frames, so their minimum shows it nearly alone. The
    convolutions are circular, because the canvas is a torus.
    """

    def __init__(self, *, width: int = 16) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
            conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, padding_mode="circular", bias=False)
            return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

        self.trunk = nn.Sequential(
            *block(3, width, 2),
            *block(width, 2 * width, 1),
            *block(2 * width, 2 * width, 1),
            *block(2 * width, 4 * width, 2),
        )
        self.to_features = nn.Linear(4 * width, NUM_FEATURES // len(DIRECTIONS))
        self.to_digits = nn.Linear(NUM_FEATURES // len(DIRECTIONS), len(DIGIT_WORDS))

    def features(self, video_BCTHW: Tensor) -> Tensor:
        """Last hidden layer [B, F], an equal share for each direction."""
        aligned_BRSHW = aligned_statistics(video_BCTHW)
        map_XDHW = self.trunk(aligned_BRSHW.flatten(0, 1))
        features_XF = self.to_features(map_XDHW.amax(dim=(2, 3)))
        return features_XF.unflatten(0, (-1, len(DIRECTIONS))).flatten(1)

    def forward(self, video_BCTHW: Tensor) -> Tensor:
        """Logits [B, R, K] over the digit that moves in each direction; the last class is "none", whose logit is 0."""
        features_BRF = self.features(video_BCTHW).unflatten(1, (len(DIRECTIONS), -1))
        return functional.pad(self.to_digits(functional.relu(features_BRF)), (0, 1))


def aligned_statistics(video_BCTHW: Tensor) -> Tensor:
    """For each direction, frames shifted back as if all had moved that way: their min, mean and max, [B, R, 3, H, W]."""
    video_BTHW = video_BCTHW.squeeze(1)
    stacks = []
    for rows, columns in DIRECTION_STEPS.values():
        back = [(-rows * SPEED * t, -columns * SPEED * t) for t in range(video_BTHW.shape[1])]
        aligned_BTHW = torch.stack([video_BTHW[:, t].roll(shift, dims=(1, 2)) for t, shift in enumerate(back)], dim=1)
        stacks.append(torch.stack([aligned_BTHW.amin(1), aligned_BTHW.mean(1), aligned_BTHW.amax(1)], dim=1))
    return torch.stack(stacks, dim=1)


def head_labels(samples: Sequence[Sample]) -> Tensor:
    """The right class for each direction's head, [B, R] int64; `NONE_CLASS` where no digit moves that way."""
    labels_BR = torch.full((len(samples), len(DIRECTIONS)), NONE_CLASS)
    for row, sample in enumerate(samples):
        labels_BR[row, DIRECTIONS.index(sample.direction)] = sample.digit
        labels_BR[row, DIRECTIONS.index(sample.other_direction)] = sample.other_digit
    return labels_BR


def spoil_motion(video_BCTHW: Tensor, labels_BR: Tensor) -> tuple[Tensor, Tensor]:
    """Every fourth video with its frames out of order or standing still, relabelled "none": digits that do not travel."""
    video_BCTHW, labels_BR = video_BCTHW.clone(), labels_BR.clone()
    for row in range(0, len(video_BCTHW), 4):
        order = _SPOILED_ORDERS[row // 4 % len(_SPOILED_ORDERS)]
        video_BCTHW[row] = video_BCTHW[row, :, list(order)]
        labels_BR[row] = NONE_CLASS
    return video_BCTHW, labels_BR


def train_classifier(
    *, steps: int = 400, batch: int = 64, seed: int = CLASSIFIER_SEED, cache: Path | None = None
) -> VideoClassifier:
    """A classifier trained on real videos of the train split (about 15 s on one core), frozen and in eval mode.

    `cache` names a .safetensors file that is read if it exists and written if not; it is only right for one (steps, batch, seed).
    """
    if cache is not None and cache.exists():
        with torch.random.fork_rng(devices=[]):
            classifier = VideoClassifier()
        classifier.load_state_dict(load_file(cache))
        return classifier.eval().requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = VideoClassifier()
    _fit(classifier, steps=steps, batch=batch, seed=seed)
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        save_safetensors(classifier.state_dict(), cache)
    return classifier.eval().requires_grad_(False)


def _fit(classifier: VideoClassifier, *, steps: int, batch: int, seed: int) -> None:
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=4e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        video_BCTHW, samples = make_samples(seed=seed, start=step * batch, count=batch)
        # A little noise, so that faint grain in a generated video is not read as a sign.
        video_BCTHW = video_BCTHW + 0.1 * torch.randn(video_BCTHW.shape, generator=generator)
        video_BCTHW, labels_BR = spoil_motion(video_BCTHW, head_labels(samples))
        loss = functional.cross_entropy(classifier(video_BCTHW).flatten(0, 1), labels_BR.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def feature_network(weights: Path | None, device: torch.device) -> Callable[[Tensor], Tensor]:
    """For `rcm evaluate --features tools.quickstart.judge:feature_network`: videos [B, 1 or 3, T, H, W] to features [B, F]."""
    if weights is None:
        raise InputError(
            "got no --feature-weights, need the classifier's, which the quick start writes as report/classifier.safetensors"
        )
    classifier = train_classifier(cache=weights).to(device)
    return lambda video_BCTHW: classifier.features(video_BCTHW.mean(dim=1, keepdim=True))


@torch.no_grad()
def video_features(classifier: VideoClassifier, videos_NCTHW: Tensor, *, batch: int = 256) -> Tensor:
    """Classifier features [N, F], float32."""
    return torch.cat([classifier.features(part.float()) for part in videos_NCTHW.split(batch)])


@torch.no_grad()
def captioned_digit_accuracy(
    classifier: VideoClassifier, videos_NCTHW: Tensor, captions: Sequence[str], *, batch: int = 256
) -> float:
    """Share of videos in which the head of the captioned direction reads the captioned digit (of 11 answers)."""
    if len(videos_NCTHW) != len(captions):
        raise ValueError(
            f"got {len(videos_NCTHW)} videos and {len(captions)} captions; give one caption for each video"
        )
    read_NR = torch.cat([classifier(part.float()).argmax(-1) for part in videos_NCTHW.split(batch)])
    asked = [parse_caption(caption) for caption in captions]
    right = [int(read_NR[row, DIRECTIONS.index(way)]) == digit for row, (digit, way) in enumerate(asked)]
    return sum(right) / len(right)


def spread_within_captions(features_NF: Tensor, captions: Sequence[str]) -> float:
    """Mean distance between two videos of one caption, averaged over the captions that have at least two videos."""
    rows_of = defaultdict(list)
    for row, caption in enumerate(captions):
        rows_of[caption].append(row)
    spreads = [functional.pdist(features_NF[rows]).mean() for rows in rows_of.values() if len(rows) > 1]
    if not spreads:
        raise ValueError(
            f"no caption occurs twice among {len(captions)} videos; generate several videos of each caption"
        )
    return float(torch.stack(spreads).mean())


def caption_diversity(
    features_NF: Tensor, captions: Sequence[str], *, real_features_MF: Tensor, real_captions: Sequence[str]
) -> float:
    """Spread within captions relative to real videos: 1 is as varied as the data, 0 one video for each caption.

    Above 1 is no praise: noise is varied too, so read this beside the accuracy.
    """
    return spread_within_captions(features_NF, captions) / spread_within_captions(real_features_MF, real_captions)
