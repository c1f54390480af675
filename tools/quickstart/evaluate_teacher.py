"""Print how good a quick-start teacher is at each number of sampling steps and guidance scale.

    OMP_NUM_THREADS=1 python tools/quickstart/evaluate_teacher.py model_configs/quickstart_teacher --videos 200

One line per setting: network evaluations for one video, Fréchet distance to held-out real videos, captioned-digit
accuracy, caption diversity (see `tools.quickstart.judge`). The last lines judge real videos and noise the same way.

Shapes: B batch, C channels, T frames, H, W, N videos, L text positions, D text width.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rcm_megatron.evaluation.sets import frechet_distance
from rcm_megatron.models.encoders import WordTextEncoder
from tools.quickstart.digits import LATENT_SHAPE_CTHW, all_captions, make_samples
from tools.quickstart.judge import (
    VideoClassifier,
    caption_diversity,
    captioned_digit_accuracy,
    train_classifier,
    video_features,
)

REAL_SEED = 4_000_001
"""Of the held-out videos that generated ones are compared with."""


def load_teacher(folder: Path) -> WanTransformer3DModel:
    """The fp32 transformer of a diffusers folder; `from_pretrained` would need accelerate for this class."""
    model = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(folder))
    model.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    return model.float().eval().requires_grad_(False)


def sampling_times(steps: int, *, shift: float) -> list[float]:
    """Rectified-flow times from 1 to 0, `steps` + 1 of them, denser near noise: s = shift u / (1 + (shift - 1) u)."""
    uniform = [1.0 - i / steps for i in range(steps + 1)]
    return [shift * u / (1.0 + (shift - 1.0) * u) for u in uniform]


def guided_velocity(
    model: WanTransformer3DModel, x_BCTHW: Tensor, s: float, text_BLD: Tensor, null_BLD: Tensor, *, guidance: float
) -> Tensor:
    """v_null + guidance (v_text - v_null), [B, C, T, H, W]; one network evaluation if guidance is 1, else two."""
    time_B = torch.full((len(x_BCTHW),), 1000.0 * s)
    (text_BCTHW,) = model(x_BCTHW, timestep=time_B, encoder_hidden_states=text_BLD, return_dict=False)
    if guidance == 1.0:
        return text_BCTHW
    (null_BCTHW,) = model(x_BCTHW, timestep=time_B, encoder_hidden_states=null_BLD, return_dict=False)
    return torch.lerp(null_BCTHW, text_BCTHW, guidance)


@torch.no_grad()
def sample_videos(
    model: WanTransformer3DModel,
    captions: list[str],
    *,
    steps: int,
    guidance: float,
    shift: float,
    seed: int,
    batch: int = 50,
) -> Tensor:
    """Videos [N, C, T, H, W] in [-1, 1] by Euler's method from s = 1 to 0, one for each caption."""
    encoder, generator = WordTextEncoder(), torch.Generator().manual_seed(seed)
    times, parts = sampling_times(steps, shift=shift), []
    for start in range(0, len(captions), batch):
        text_BLD = encoder.encode(captions[start : start + batch])
        null_BLD = encoder.encode([encoder.negative_prompt] * len(text_BLD))
        x_BCTHW = torch.randn(len(text_BLD), *LATENT_SHAPE_CTHW, generator=generator)
        for s, s_next in itertools.pairwise(times):
            velocity = guided_velocity(model, x_BCTHW, s, text_BLD, null_BLD, guidance=guidance)
            x_BCTHW = x_BCTHW + (s_next - s) * velocity
        parts.append(x_BCTHW)
    return torch.cat(parts).clamp(-1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Judge:
    """The classifier, and real held-out videos to compare with."""

    classifier: VideoClassifier
    real_features: Tensor
    real_captions: list[str]

    @classmethod
    def make(cls, *, videos: int, cache: Path | None) -> Judge:
        """Train (or read) the classifier and take the features of `videos` held-out videos."""
        classifier = train_classifier(cache=cache)
        real, samples = make_samples(seed=REAL_SEED, start=0, count=videos, split="heldout")
        captions = [sample.caption for sample in samples]
        return cls(classifier=classifier, real_features=video_features(classifier, real), real_captions=captions)

    def line(self, name: str, videos_NCTHW: Tensor, captions: list[str]) -> str:
        """One line of the table."""
        features = video_features(self.classifier, videos_NCTHW)
        distance = frechet_distance(features, self.real_features)
        accuracy = captioned_digit_accuracy(self.classifier, videos_NCTHW, captions)
        diversity = caption_diversity(
            features, captions, real_features_MF=self.real_features, real_captions=self.real_captions
        )
        return f"| {name} | {distance:8.2f} | {accuracy:.2f} | {diversity:.2f} |"


def write_pictures(path: Path, videos_NCTHW: Tensor, captions: list[str]) -> None:
    """A PNG of the first 16 videos: one row each, frames side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(8, 2, figsize=(9, 16))
    for axis, video_CTHW, caption in zip(axes.flat, videos_NCTHW, captions, strict=False):
        axis.imshow(torch.cat(list(video_CTHW[0]), dim=1), cmap="gray", vmin=-1, vmax=1)
        axis.set_title(caption, fontsize=9)
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=60)
    plt.close(figure)


def evaluate(arguments: argparse.Namespace) -> None:
    """Print the table for every pair of steps and guidance asked for."""
    judge = Judge.make(videos=arguments.real_videos, cache=arguments.classifier_cache)
    model = load_teacher(arguments.teacher)
    captions = [all_captions()[i % len(all_captions())] for i in range(arguments.videos)]
    print("| steps, guidance | evaluations | Fréchet | accuracy | diversity |\n| --- | --- | --- | --- | --- |")
    for guidance in arguments.guidance:
        for steps in arguments.steps:
            start = time.monotonic()
            videos = sample_videos(
                model, captions, steps=steps, guidance=guidance, shift=arguments.shift, seed=arguments.seed
            )
            evaluations = steps * (1 if guidance == 1.0 else 2)
            line = judge.line(f"{steps}, w={guidance:g} | {evaluations}", videos, captions)
            print(line, f"{time.monotonic() - start:.0f} s", flush=True)
            if arguments.pictures:
                write_pictures(arguments.pictures / f"steps{steps}_w{guidance:g}.png", videos, captions)
    real, samples = make_samples(seed=REAL_SEED + 1, start=0, count=arguments.videos, split="heldout")
    print(judge.line("real videos | -", real, [sample.caption for sample in samples]))
    noise = torch.randn(arguments.videos, *LATENT_SHAPE_CTHW, generator=torch.Generator().manual_seed(0))
    print(judge.line("noise | -", noise.clamp(-1.0, 1.0), captions))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path, help="diffusers folder")
    parser.add_argument("--videos", type=int, default=200)
    parser.add_argument("--real-videos", type=int, default=1000)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 16, 50])
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0])
    parser.add_argument("--shift", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--classifier-cache", type=Path)
    parser.add_argument("--pictures", type=Path, help="folder for PNGs of some videos of each setting")
    arguments = parser.parse_args()
    if arguments.pictures:
        arguments.pictures.mkdir(parents=True, exist_ok=True)
    evaluate(arguments)


if __name__ == "__main__":
    main()
