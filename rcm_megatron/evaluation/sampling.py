"""Samplers of a run into folders of videos: any layout, data-parallel replicas share the batches, kill and restart at will.

Shapes: B batch, C channels, T frames, H, W pixels, L text positions, D text width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from rcm_megatron.config import RunConfig
from rcm_megatron.diffusion.trigflow import needs_guidance
from rcm_megatron.errors import InputError
from rcm_megatron.evaluation.prompts import Clip, distinct_prompts
from rcm_megatron.evaluation.store import VideoStore
from rcm_megatron.evaluation.texts import TextFolder
from rcm_megatron.finite import require_finite
from rcm_megatron.inference.conditioning import image_shapes
from rcm_megatron.inference.encoding import check_encoders, video_encoder
from rcm_megatron.inference.networks import (
    is_trained,
    load_network,
    low_noise_expert,
    student_sampling,
    teacher_sampling,
)
from rcm_megatron.inference.sampler import Sampler, teacher_evaluations
from rcm_megatron.parallel.broadcast import computed_once
from rcm_megatron.parallel.groups import ParallelGroups
from rcm_megatron.platform.device import this_device
from rcm_megatron.progress import bar_interval


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way of sampling: a network, its steps, and for one that the run does not train its guidance."""

    weights: str
    steps: int
    guidance: float | None = None

    @property
    def name(self) -> str:
        """`teacher, 50 steps, guidance 3`."""
        steps = f"{self.steps} step{'s' * (self.steps > 1)}"
        guidance = "" if self.guidance is None else f", guidance {self.guidance:g}" if self.guided else ", unguided"
        return f"{self.weights}, {steps}{guidance}"

    @property
    def folder(self) -> str:
        """`teacher_50_steps_guidance_3`."""
        return self.name.replace(",", "").replace(" ", "_")

    @property
    def guided(self) -> bool:
        return self.guidance is not None and needs_guidance(self.guidance)

    @property
    def evaluations(self) -> int:
        """Of the network, for one video."""
        return self.steps if self.guidance is None else teacher_evaluations(self.steps, guidance=self.guidance)


def settings_of(run: RunConfig, weights: Sequence[str], steps: Sequence[int]) -> list[Setting]:
    """Side by side: what is not trained at its best, and at each of ``steps`` network evaluations with and without guidance; what is
    trained at each of ``steps``. InputError for a number of steps that a sampler has not.
    """
    most = len(run.sampling.student_times) + 1
    if not steps or min(steps) < 1:
        raise InputError(f"got --steps {list(steps)}, need numbers of at least 1; fix: --steps 1 --steps 2 --steps 4")
    found = []
    for role in weights:
        if not is_trained(run, role):
            found.append(Setting(weights=role, steps=run.sampling.teacher_steps, guidance=run.sampling.guidance))
            found += [few for count in steps for few in _few_evaluations(run, role, count)]
            continue
        if max(steps) > most:
            raise InputError(
                f"got --steps {max(steps)}, need 1 to {most} for {role}; sampling.student_times has one time for every step but the first"
            )
        found += [Setting(weights=role, steps=count) for count in steps]
    return list(dict.fromkeys(found))


def _few_evaluations(run: RunConfig, role: str, count: int) -> Iterator[Setting]:
    yield Setting(weights=role, steps=count, guidance=1.0)
    if needs_guidance(run.sampling.guidance) and count % 2 == 0:
        yield Setting(weights=role, steps=count // 2, guidance=run.sampling.guidance)


def check_sampling(run: RunConfig) -> None:
    """InputError for a run that cannot be sampled of prompts into videos; before ranks meet and weights are read."""
    check_encoders(run)
    for part, fix in {"text": "umt5 or t5", "video": "wan_vae"}.items():
        if getattr(run.encoders, part) == "none":
            raise InputError(f"got encoders.{part}=none, need one to evaluate videos of prompts; set it to {fix}")
    given = run.distillation.conditional_frames
    if (given is not None and 0 not in given) or any(image_shapes(run).values()):
        raise InputError(
            "this network is given an image or frames, and prompts have none; fix: write videos with `rcm sample --image`, and compare "
            "folders with `rcm evaluate folders`"
        )


Measure = Callable[[Clip, Tensor], None]
"""Takes a clip and its pixels [C, T, H, W] in [-1, 1], before the clip counts as finished."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sampling:
    """What all samplers of an evaluation share."""

    run: RunConfig
    groups: ParallelGroups
    clips: Sequence[Clip]
    batch_size: int
    checkpoint: Path | None
    root: Path

    def sample(self, settings: Sequence[Setting], stores: Sequence[VideoStore], measure: list[Measure | None]) -> None:
        """Write every clip of every setting that is not there yet. Call on all ranks."""
        work = [self._left(store) for store in stores]
        texts = TextFolder(run=self.run, folder=self.root / "text")
        wanted: dict[str | None, None] = {}
        for setting, units in zip(settings, work, strict=True):
            prompts = distinct_prompts([clip for unit in units for clip in unit])
            wanted |= dict.fromkeys([*prompts, *([None] if setting.guided and prompts else [])])
        texts.encode(list(wanted))
        loaded, network, second = None, None, None
        for setting, store, units, look in zip(settings, stores, work, measure, strict=True):
            if units and loaded != setting.weights:
                network = second = None
                network = load_network(self.run, self.groups, weights=setting.weights, checkpoint=self.checkpoint)
                second = low_noise_expert(self.run, self.groups, setting.weights, checkpoint=self.checkpoint)
                loaded = setting.weights
            self._sample_one(setting, store, units, look, network, second, texts)
            dist.barrier()

    def _sample_one(self, setting, store, units, measure, network, second, texts) -> None:
        groups = self.groups
        mine, writes = units[groups.dp_rank :: groups.dp_size], groups.token_shard == 0 and groups.pp_rank == 0
        shown = {"desc": setting.name, "unit": "batch", "disable": dist.get_rank() > 0, "mininterval": bar_interval()}
        with video_encoder(self.run, wanted=writes and bool(mine)) as encoder:
            for unit in tqdm(mine, **shown):
                latents_BCTHW = self._latents(setting, unit, network, second, texts)
                for clip, latent_CTHW in zip(unit, latents_BCTHW, strict=True):
                    require_finite(latent_CTHW, what=f"{setting.name}, {clip.stem!r:.80}: latent")
                    if not writes or store.has(clip):
                        continue
                    video_CTHW = encoder.decode(latent_CTHW[None].cpu())[0].clamp(-1, 1)
                    store.put_video(clip, video_CTHW)
                    if measure is not None:
                        measure(clip, video_CTHW)

    @torch.no_grad()
    def _latents(self, setting: Setting, unit: Sequence[Clip], network, second, texts: TextFolder) -> Tensor:
        device = this_device()
        text_LBD = texts.load([clip.prompt for clip in unit]).to(device)
        null_LBD = texts.load([None]).to(device).expand(-1, len(unit), -1) if setting.guided else None
        noise, seed = [clip.noise for clip in unit], self.run.sampling.seed
        sampler = Sampler(network, network[0].layout, text_LBD, null_LBD, seed, noise, None, second)
        if setting.guidance is None:
            return student_sampling(self.run, steps=setting.steps)(sampler)
        return teacher_sampling(self.run, steps=setting.steps, guidance=setting.guidance)(sampler)

    def _left(self, store: VideoStore) -> list[list[Clip]]:
        """The batches of which a clip is missing, the same on all ranks. Batches are always cut alike, so that a restart and any number of
        replicas sample the same numbers."""
        units = [
            list(self.clips[start : start + self.batch_size]) for start in range(0, len(self.clips), self.batch_size)
        ]

        def missing() -> Tensor:
            return torch.tensor([i for i, unit in enumerate(units) if not all(map(store.has, unit))], dtype=torch.int64)

        return [units[i] for i in computed_once(missing, device=this_device()).tolist()]


def recipe_of(run: RunConfig, clips: Sequence[Clip], *, checkpoint: Path | None, batch_size: int) -> dict[str, object]:
    """What makes the videos what they are. The number of samples is no part of it: there may be more later."""
    prompts = dict.fromkeys((clip.short, clip.prompt) for clip in clips)
    inits = {role: network.init for role, network in run.networks.items() if role not in run.trained_roles}
    return {
        "prompts": {"count": len(prompts), "sha256": hashlib.sha256(repr(list(prompts)).encode()).hexdigest()},
        "long_prompts": any(clip.short != clip.prompt for clip in clips),
        "checkpoint": None if checkpoint is None else str(checkpoint.resolve()),
        "init": inits,
        "sampling": asdict(replace(run.sampling, num_samples=1, student_steps=(1,), fps=run.sampling.fps)),
        "noise": "sampling.seed, and 1000 p + i for sample i of prompt p",
        "batch_size": batch_size,
        "model": asdict(run.model),
        "latent": asdict(run.latent),
        "encoders": asdict(run.encoders),
        "params_dtype": run.precision.params_dtype,
    }
