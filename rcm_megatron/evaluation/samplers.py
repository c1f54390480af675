"""`rcm evaluate samplers` and `vbench-sample`: what a run's networks make of prompts, written, measured, compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from rcm_megatron.config import RunConfig
from rcm_megatron.data.video_statistics import video_statistics
from rcm_megatron.errors import InputError
from rcm_megatron.evaluation.compare import Sheet, publish, read_set
from rcm_megatron.evaluation.features import FeatureNetwork, VideoSet, feature_network
from rcm_megatron.evaluation.folders import ShapesSeen
from rcm_megatron.evaluation.prompts import Clip, read_clips
from rcm_megatron.evaluation.sampling import Measure, Sampling, Setting, check_sampling, recipe_of, settings_of
from rcm_megatron.evaluation.sets import neighbour_radius
from rcm_megatron.evaluation.store import VideoStore, close_root, open_root
from rcm_megatron.files import write_atomically
from rcm_megatron.inference.networks import init_parallel, is_trained, resolve_checkpoint
from rcm_megatron.parallel.broadcast import computed_once
from rcm_megatron.platform.device import this_device
from rcm_megatron.requests import EvaluateSamplersRequest, VBenchSampleRequest

MANIFEST = "manifest.json"


def evaluate_samplers(run: RunConfig, request: EvaluateSamplersRequest) -> None:
    """Sample, measure and compare; call on all ranks of any layout. Raises UserError, before anything is sampled where that is possible."""
    clips = read_clips(request.prompts, samples=request.samples)
    settings = settings_of(run, request.weights or _both(run), request.steps or run.sampling.student_steps)
    check_sampling(run)
    _check_numbers(request, clips)
    sampling = _start(run, request, clips, [setting.weights for setting in settings], extra=_feature_facts(request))
    network = feature_network(request.features, weights=request.feature_weights, device=this_device())
    reference = None if request.reference is None else _reference(request.reference, network, k=request.k)
    stores = [
        VideoStore(root=request.output, sampler=each.folder, measured=True, fps=run.sampling.fps) for each in settings
    ]
    sampling.sample(settings, stores, [_measured_by(network, store) for store in stores])
    if _last_alone():
        sets = [_set(setting, store, clips) for setting, store in zip(settings, stores, strict=True)]
        shown = [(setting.name, store) for setting, store in zip(settings, stores, strict=True)]
        facts = {"run": run.name, "checkpoint": str(sampling.checkpoint or ""), "seed": run.sampling.seed}
        facts |= {"prompts": str(request.prompts)}
        sheets = _sheets(shown, clips)
        publish(
            request.output,
            sets,
            reference=reference,
            k=request.k,
            features=request.features,
            facts=facts,
            sheets=sheets,
        )
        close_root(request.output)


def sample_for_vbench(run: RunConfig, request: VBenchSampleRequest) -> None:
    """Write OUTPUT/videos, where nothing but videos is, and OUTPUT/manifest.json; call on all ranks of any layout."""
    clips = read_clips(
        request.prompts,
        long_prompts=request.long_prompts,
        samples=request.samples,
        more=request.flickering,
        more_samples=request.flickering_samples,
    )
    setting = _one_setting(run, request)
    check_sampling(run)
    sampling = _start(run, request, clips, [setting.weights], extra={"setting": setting.name})
    store = VideoStore(root=request.output, fps=run.sampling.fps)
    sampling.sample([setting], [store], [None])
    if _last_alone():
        write_atomically(request.output / MANIFEST, _manifest(run, setting, sampling, clips))
        close_root(request.output)
        prompts = len({clip.short for clip in clips})
        print(
            f"{len(clips)} videos of {prompts} prompts by {setting.name} in {request.output / 'videos'}; {MANIFEST} is beside it"
        )


def _both(run: RunConfig) -> list[str]:
    """The teacher, and the student as it is judged."""
    averaged = "student" in run.networks and run.networks["student"].ema is not None
    return [*(["teacher"] if "teacher" in run.networks else []), "student.ema" if averaged else "student"]


def _one_setting(run: RunConfig, request: VBenchSampleRequest) -> Setting:
    if not is_trained(run, request.weights):
        steps = run.sampling.teacher_steps if request.steps is None else request.steps
        if steps < 1:
            raise InputError(f"got --steps {steps}, need at least 1; fix: --steps {run.sampling.teacher_steps}")
        return Setting(weights=request.weights, steps=steps, guidance=run.sampling.guidance)
    (setting,) = settings_of(
        run, [request.weights], [max(run.sampling.student_steps) if request.steps is None else request.steps]
    )
    return setting


def _check_numbers(request: EvaluateSamplersRequest, clips: Sequence[Clip]) -> None:
    if request.k < 1 or len(clips) <= request.k:
        raise InputError(
            f"got {len(clips)} videos of each sampler and --k {request.k}, need k >= 1 and k + 1 videos; fix: --samples or --k"
        )
    if request.reference is not None and not request.reference.exists():
        raise InputError(
            f"got --reference {request.reference}, which is not there; need a folder of videos or a file of features"
        )


def _start(
    run: RunConfig, request, clips: Sequence[Clip], weights: Sequence[str], *, extra: dict[str, object]
) -> Sampling:
    """Ranks meet, the folder is opened."""
    batch = run.trainer.micro_batch_size if request.batch_size is None else request.batch_size
    if batch < 1:
        raise InputError(f"got --batch-size {batch}, need at least 1")
    groups = init_parallel(run)
    checkpoint = resolve_checkpoint(run, request.checkpoint) if any(is_trained(run, each) for each in weights) else None
    recipe = recipe_of(run, clips, checkpoint=checkpoint, batch_size=batch) | extra

    def prepare() -> torch.Tensor:
        open_root(request.output, recipe)
        return torch.zeros(1)

    computed_once(prepare, device=this_device())
    return Sampling(run=run, groups=groups, clips=clips, batch_size=batch, checkpoint=checkpoint, root=request.output)


def _reference(path: Path, network: FeatureNetwork, *, k: int) -> VideoSet:
    """Read before anything is sampled, by rank 0, so that what is wrong with it comes first."""
    seen = ShapesSeen(fix="give videos of one size and length, or their features as a .safetensors file")

    def features() -> torch.Tensor:
        if path.is_dir():
            seen.note_sizes(path)
        features_NF = read_set(path, network, seen=seen).features_NF
        neighbour_radius(features_NF[: k + 1], k=k, name=str(path))
        return features_NF

    features_NF = computed_once(features, device=this_device())
    return VideoSet(name=path.stem, features_NF=features_NF, prompts=("",) * len(features_NF))


def _last_alone() -> bool:
    """All have finished: rank 0 goes on alone."""
    dist.barrier()
    first = dist.get_rank() == 0
    dist.destroy_process_group()
    return first


def _feature_facts(request: EvaluateSamplersRequest) -> dict[str, object]:
    weights = request.feature_weights
    if weights is not None and not weights.is_file():
        raise InputError(f"got --feature-weights {weights}, which is no file; need the weights that --features takes")
    digest = None if weights is None else hashlib.sha256(weights.read_bytes()).hexdigest()
    return {"features": request.features, "feature_weights_sha256": digest}


def _measured_by(network: FeatureNetwork, store: VideoStore) -> Measure:
    def measure(clip: Clip, video_CTHW: torch.Tensor) -> None:
        features_F = network(video_CTHW, what=f"{store.sampler}, {clip.stem!r:.80}")
        store.put_measures(clip, features_F, video_statistics(video_CTHW))

    return measure


def _set(setting: Setting, store: VideoStore, clips: Sequence[Clip]) -> VideoSet:
    measured = [store.get_measures(clip) for clip in clips]
    return VideoSet(
        name=setting.name,
        features_NF=torch.stack([features for features, _ in measured]),
        prompts=tuple(clip.short for clip in clips),
        statistics=tuple(statistics for _, statistics in measured),
        facts={"evaluations": setting.evaluations},
    )


def _sheets(shown: Sequence[tuple[str, VideoStore]], clips: Sequence[Clip]) -> list[Sheet]:
    """The first video of some prompts, and some videos of the first prompt."""
    prompts = [clip for clip in clips if clip.index == 0]
    seeds = [clip for clip in clips if clip.short == clips[0].short]
    return [
        Sheet(
            name="sheet.png",
            title="one prompt and one noise a column",
            captions=[clip.short for clip in _spaced(prompts)],
            rows=[(name, [store.video(clip) for clip in _spaced(prompts)]) for name, store in shown],
        ),
        Sheet(
            name="seeds.png",
            title=f"{clips[0].short}: one noise a column",
            captions=[f"seed {clip.index}" for clip in seeds[:5]],
            rows=[(name, [store.video(clip) for clip in seeds[:5]]) for name, store in shown],
        ),
    ]


def _spaced(clips: Sequence[Clip], most: int = 5) -> list[Clip]:
    """At most so many, evenly spread."""
    count = min(most, len(clips))
    return [clips[round(i * (len(clips) - 1) / max(1, count - 1))] for i in range(count)]


def _manifest(run: RunConfig, setting: Setting, sampling: Sampling, clips: Sequence[Clip]) -> bytes:
    videos = {f"{clip.stem}.mp4": {"prompt": clip.short, "given": clip.prompt, "noise": clip.noise} for clip in clips}
    facts = {"run": run.name, "sampler": setting.name, "evaluations": setting.evaluations, "seed": run.sampling.seed}
    facts |= {"checkpoint": None if sampling.checkpoint is None else str(sampling.checkpoint)}
    return (json.dumps(facts | {"videos": videos}, indent=1, ensure_ascii=False) + "\n").encode()
