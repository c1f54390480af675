"""Builds a dataset of latent shards: samples of a teacher, or raw videos. One process, or torchrun; kill and restart it at will.

    torchrun --nproc-per-node 8 tools/build_dataset.py teacher model_configs/wan2.1_t2v_14b_480p.yaml \\
        --prompts prompts.txt --output data/wan_14b_480p
    torchrun --nproc-per-node 8 tools/build_dataset.py videos model_configs/wan2.1_t2v_1.3b_480p.yaml \\
        --videos clips/ --output data/clips_480p --fps 16

The teacher is sampled as for rCM's published dataset: 100 Euler steps, shift 3, guidance 5, the noise of sample i from (seed, i) alone.
A finished folder holds shard_*.tar, manifest.json (recipe, checksums, statistics), skipped.jsonl and negative_embed.pt; until then it is
`<output>.partial`. docs/data.md describes both.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from rcm_megatron import platform
from rcm_megatron.checkpoint.errors import CheckpointError
from rcm_megatron.config import ConfigError, ParallelConfig, RunConfig, load_config, validate
from rcm_megatron.data.building import BuildPlan, BuiltSample, DatasetBuild, Unit, stored, wait_for
from rcm_megatron.data.captions import CaptionError, read_caption, read_prompts
from rcm_megatron.data.manifest import DatasetError
from rcm_megatron.data.samples import SampleError, load_negative_embedding
from rcm_megatron.data.shards import TENSOR_FORMATS, file_sha256
from rcm_megatron.data.video import ENDINGS, ClipReader, VideoError, check_codec, find_videos, probe
from rcm_megatron.models.encoders import EncoderError, build_text_encoder
from rcm_megatron.models.encoders.wan_vae import latent_size
from rcm_megatron.parallel.broadcast import computed_once
from rcm_megatron.training.encoding import InputError, check_encoders, video_encoder
from rcm_megatron.training.inference import join, load_network
from rcm_megatron.training.sampling import Sampler

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
VIDEOS_PER_UNIT = 4
VIDEOS_NAME = "videos.txt"
"""Line i names the video of key i."""
_POLL_SECONDS = 1.0
_PROBED = 8
"""So many videos are looked at before anything is loaded."""

Made = tuple[list[BuiltSample], dict[int, str]]
"""The samples of a unit, and why others are missing."""


def build_from_teacher(run: RunConfig, arguments: argparse.Namespace) -> None:
    """Sample the teacher for every prompt; any layout, data-parallel replicas share the units."""
    prompts = [prompt for prompt in read_prompts(arguments.prompts) for _ in range(arguments.samples_per_prompt)]
    _check_teacher(run, arguments)
    groups = join(run)
    batch = arguments.batch_size or run.trainer.micro_batch_size
    build = _open(run, arguments, len(prompts), batch, lambda: _teacher_recipe(run, arguments, prompts))
    left = _left(build)
    encode_texts(run, build, left, lambda unit: [prompts[index] for index in unit.indices])
    if not left:
        return _report(build)
    mine = left[groups.dp_rank :: groups.dp_size]
    network = load_network(run, groups, weights="teacher")
    null_L1D = _negative(run, build) if mine else None  # a rank without work may come after the end
    settings = {"steps": arguments.steps, "guidance": arguments.guidance, "shift": arguments.shift, "method": "euler"}

    def make(unit: Unit) -> Made:
        embed_BLD = build.text(unit)
        text_LBD = _padded(embed_BLD, run.model.text_len).transpose(0, 1).to(platform.device())
        null_LBD = null_L1D.to(platform.device()).expand(-1, len(unit.indices), -1)
        sampler = Sampler(network, network[0].layout, text_LBD, null_LBD, arguments.seed, list(unit.indices))
        with torch.no_grad():
            latents_BCTHW = sampler.teacher(**settings)
        rows = zip(unit.indices, latents_BCTHW, embed_BLD, strict=True)
        return [_sample(arguments, index, latent, embed, prompts[index]) for index, latent, embed in rows], {}

    writes = groups.token_shard == 0 and groups.pp_rank == 0
    work(build, mine, make, writes=writes)
    return _report(build)


def _negative(run: RunConfig, build: DatasetBuild) -> Tensor:
    path = wait_for(build.negative)
    return load_negative_embedding(path, text_len=run.model.text_len, text_dim=run.model.text_dim)[:, None]


def _check_teacher(run: RunConfig, arguments: argparse.Namespace) -> None:
    check_encoders(run)
    if run.encoders.text == "none":
        raise InputError("got encoders.text=none, need a text encoder for the prompts; set it to umt5 or t5")
    if run.init.teacher is None:
        raise InputError("got init.teacher=null, need a teacher to sample; set it to a checkpoint")
    if run.distillation.given_frames is not None and 0 not in run.distillation.given_frames:
        raise InputError("this teacher continues given frames, and prompts have none; use the `videos` command")
    if arguments.steps < 1 or arguments.samples_per_prompt < 1 or arguments.shift <= 0:
        raise InputError(
            f"got --steps {arguments.steps}, --samples-per-prompt {arguments.samples_per_prompt}, --shift {arguments.shift}; "
            "need at least 1, at least 1, and more than 0"
        )


def _teacher_recipe(run: RunConfig, arguments: argparse.Namespace, prompts: Sequence[str]) -> dict[str, object]:
    teacher = Path(run.init.teacher)
    inner = teacher / "transformer"
    return {
        "source": "teacher",
        **{name: getattr(arguments, name) for name in ("seed", "steps", "shift", "guidance", "samples_per_prompt")},
        "sampler": "euler",
        "prompts": text_facts(prompts),
        "teacher": str(teacher),
        "teacher_sha256": checksums(inner if inner.is_dir() else teacher),
        "parallel": dataclasses.asdict(run.parallel),
        "precision": dataclasses.asdict(run.precision),
    }


def build_from_videos(run: RunConfig, arguments: argparse.Namespace) -> None:
    """Encode a folder of captioned videos; every rank takes its share of them."""
    size = _video_size(run, arguments)
    check_encoders(run)
    if run.encoders.text == "none":
        raise InputError("got encoders.text=none, need a text encoder for the captions; set it to umt5 or t5")
    videos = _find_videos(arguments.videos)
    join(run)
    build = _open(run, arguments, len(videos), VIDEOS_PER_UNIT, lambda: _video_recipe(arguments, videos, size))
    left = _left(build)
    encode_texts(run, build, left, lambda unit: [_caption_or_empty(videos[index]) for index in unit.indices])
    if not left:
        return _report(build)
    if dist.get_rank() == 0:
        names = "".join(f"{path.relative_to(arguments.videos)}\n" for path in videos)
        build.put_file(VIDEOS_NAME, names.encode())
    reader = ClipReader(**size, fps=arguments.fps, device=platform.device())
    with video_encoder(run) as encoder:

        def make(unit: Unit) -> Made:
            samples, skipped = [], {}
            for index, embed_LD in zip(unit.indices, build.text(unit), strict=True):
                try:
                    caption = read_caption(videos[index])
                    latent_CTHW = encoder.encode(reader.read(videos[index])[None])[0]
                    samples.append(_sample(arguments, index, latent_CTHW, embed_LD, caption))
                except (VideoError, CaptionError) as error:
                    skipped[index] = f"{videos[index].relative_to(arguments.videos)}: {error}"
                    if arguments.on_error == "raise":
                        raise DatasetError(f"{skipped[index]} (--on-error skip leaves it out)") from error
                    tqdm.write(f"left out: {skipped[index]}", file=sys.stderr)
            return samples, skipped

        work(build, left[dist.get_rank() :: dist.get_world_size()], make, writes=True)
    return _report(build)


def _video_size(run: RunConfig, arguments: argparse.Namespace) -> dict[str, int]:
    """Pixels and frames of the clips; InputError where they do not give the latents of the configuration."""
    if run.encoders.video == "none":
        raise InputError("got encoders.video=none, need a video encoder; set it to wan_vae and encoders.folder")
    check_encoders(run)
    time, space, channels = 1, 1, run.latent.channels
    if run.encoders.video == "wan_vae":
        config = json.loads((Path(run.encoders.folder) / "vae" / "config.json").read_text())
        time, space, channels = config["scale_factor_temporal"], config["scale_factor_spatial"], 3
    if channels != 3:
        raise InputError(f"got encoders.video=pixels with latent.channels={channels}, need 3 for videos in colour")
    latent = run.latent
    frames = arguments.frames or (latent.frames - 1) * time + 1
    height, width = arguments.size or (latent.height * space, latent.width * space)
    try:
        got = latent_size(frames, height, width, time=time, space=space)
    except EncoderError as error:
        raise InputError(f"--frames {frames} --size {height}x{width}: {error}") from error
    if got != (need := (latent.frames, latent.height, latent.width)):
        raise InputError(
            f"--frames {frames} --size {height}x{width}: got latents of {got} frames, rows and columns, need {need}; leave both "
            "options out, or change latent.frames, latent.height and latent.width of the configuration"
        )
    if arguments.fps <= 0:
        raise InputError(f"got --fps {arguments.fps}, need more than 0")
    return {"frames": frames, "height": height, "width": width}


def _find_videos(folder: Path) -> list[Path]:
    """The videos; InputError if there are none, or if the first of them show that none can be used."""
    videos = find_videos(folder)
    if not videos:
        raise InputError(f"got --videos {folder} without a video, need files that end in {', '.join(ENDINGS)}")
    reasons = []
    for path in videos[:_PROBED]:
        try:
            check_codec(probe(path).codec, on_gpu=platform.device().type == "cuda")
            read_caption(path)
            return videos
        except (VideoError, CaptionError) as error:
            reasons.append(f"{path.name}: {error}")
    raise InputError(f"none of the first {len(reasons)} videos of {folder} can be used; {reasons[0]}")


def _video_recipe(arguments: argparse.Namespace, videos: Sequence[Path], size: Mapping[str, int]) -> dict[str, object]:
    files = [f"{path.relative_to(arguments.videos)} {path.stat().st_size}" for path in videos]
    captions = [_caption_or_empty(path) for path in videos]
    return {
        "source": "videos",
        **size,
        "fps": arguments.fps,
        "on_error": arguments.on_error,
        "videos": text_facts(files),
        "prompts": text_facts(captions),
        "dali": version("nvidia-dali-cuda130"),
    }


def _caption_or_empty(video: Path) -> str:
    """A video whose caption cannot be read is named when its turn comes."""
    try:
        return read_caption(video)
    except CaptionError:
        return ""


def encode_texts(
    run: RunConfig, build: DatasetBuild, left: Sequence[Unit], captions: Callable[[Unit], list[str]]
) -> None:
    """Embeddings of all captions on all ranks, before anything else takes memory; the first one adds the negative prompt's."""
    rank = dist.get_rank()
    mine = [unit for unit in left[rank :: dist.get_world_size()] if not build.has_text(unit)]
    negative_wanted = rank == 0 and bool(left) and not build.negative.exists()
    shape = {"text_len": run.model.text_len, "text_dim": run.model.text_dim}
    if negative_wanted and run.data.negative_embedding is not None:
        build.put_negative(load_negative_embedding(run.data.negative_embedding, **shape))
        negative_wanted = False
    if not mine and not negative_wanted:
        return
    with closing(build_text_encoder(run.encoders, **shape, device=platform.device())) as encoder:
        if negative_wanted:
            build.put_negative(encoder.encode([encoder.negative_prompt])[0])
        for unit in tqdm(mine, "captions", unit="batch", disable=rank > 0, mininterval=_bar_interval()):
            try:
                build.put_text(unit, encoder.encode(captions(unit)))
            except ValueError as error:
                raise InputError(str(error)) from error


def work(build: DatasetBuild, mine: Sequence[Unit], make: Callable[[Unit], Made], *, writes: bool) -> None:
    """Make this rank's units; the first rank also joins shards, shows what all have done, and finishes when they have."""
    first = dist.get_rank() == 0
    total, done = build.plan.num_samples, build.join_shards() if first else 0
    bar = tqdm(
        total=total, initial=done, desc=build.folder.name, unit="sample", disable=not first, mininterval=_bar_interval()
    )
    with bar:
        for unit in mine:
            samples, skipped = make(unit)
            if writes:
                build.write(unit, samples, skipped)
            if first:
                done = _advance(bar, build)
        while first and done < total:
            time.sleep(_POLL_SECONDS)
            done = _advance(bar, build)
    if first:
        build.finish()


def _advance(bar: tqdm, build: DatasetBuild) -> int:
    done = build.join_shards()
    bar.update(done - bar.n)
    return done


def _open(
    run: RunConfig,
    arguments: argparse.Namespace,
    num_samples: int,
    unit_size: int,
    recipe: Callable[[], Mapping[str, object]],
) -> DatasetBuild:
    """The build; its recipe, which takes reading all weights, on the first rank alone."""
    whole = {}
    if dist.get_rank() == 0:
        whole = {
            **recipe(),
            "dtype": arguments.dtype,
            "full_text": arguments.full_text,
            "model": dataclasses.asdict(run.model),
            "latent": dataclasses.asdict(run.latent),
            "encoders": dataclasses.asdict(run.encoders) | {"sha256": encoder_checksums(run)},
            "versions": {name: version(name) for name in ("torch", "megatron-core", "diffusers", "transformers")},
        }
    plan = BuildPlan(
        num_samples=num_samples,
        samples_per_shard=arguments.samples_per_shard,
        unit_size=min(unit_size, arguments.samples_per_shard),
        member_format=arguments.member_format,
        recipe=whole,
    )
    return DatasetBuild(arguments.output, plan)


def _left(build: DatasetBuild) -> list[Unit]:
    """The units that no former start has done, the same on all ranks; errors of the first rank are everybody's."""

    def prepare() -> Tensor:
        try:
            return torch.tensor([unit.number for unit in build.prepare()], dtype=torch.int64)
        except DatasetError as error:
            raise InputError(str(error)) from error

    units = build.plan.units()
    return [units[number] for number in computed_once(prepare, device=platform.device()).tolist()]


def _report(build: DatasetBuild) -> None:
    if dist.get_rank() == 0:
        manifest = wait_for(build.folder / "manifest.json")
        print(f"{manifest} is complete; verify it with: python tools/inspect_dataset.py {build.folder}")


def _sample(
    arguments: argparse.Namespace, index: int, latent_CTHW: Tensor, embed_LD: Tensor, prompt: str
) -> BuiltSample:
    dtype = DTYPES[arguments.dtype]
    embed_LD = embed_LD.to(dtype) if arguments.full_text else stored(embed_LD, dtype)
    return BuiltSample(index=index, latent_CTHW=stored(latent_CTHW, dtype), embed_LD=embed_LD, prompt=prompt)


def _padded(embed_BLD: Tensor, text_len: int) -> Tensor:
    return torch.nn.functional.pad(embed_BLD.float(), (0, 0, 0, text_len - embed_BLD.shape[1]))


def text_facts(captions: Sequence[str]) -> dict[str, object]:
    """What the manifest says of the captions: their number, duplicates, a checksum."""
    import hashlib

    digest = hashlib.sha256("\n".join(captions).encode()).hexdigest()
    return {"count": len(captions), "distinct": len(set(captions)), "sha256": digest}


def checksums(path: Path) -> dict[str, str]:
    """SHA-256 of a file, or of the files of a folder and its subfolders, by name."""
    if path.is_file():
        return {path.name: file_sha256(path)}
    return {str(file.relative_to(path)): file_sha256(file) for file in sorted(path.rglob("*")) if file.is_file()}


def encoder_checksums(run: RunConfig) -> dict[str, dict[str, str]]:
    """Of the parts of `encoders.folder` that the run uses."""
    parts = ["vae"] if run.encoders.video == "wan_vae" else []
    parts += ["text_encoder", "tokenizer"] if run.encoders.text in ("umt5", "t5") else []
    return {part: checksums(Path(run.encoders.folder) / part) for part in parts}


def _bar_interval() -> float:
    return 1.0 if sys.stderr.isatty() else 30.0


def load_run(arguments: argparse.Namespace) -> RunConfig:
    """The configuration for this number of processes; a batch of training does not have to fit them."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    run = load_config(arguments.config, arguments.overrides)
    if world_size == 1 or arguments.command == "videos":  # every rank encodes whole videos
        run = dataclasses.replace(run, parallel=ParallelConfig())
    replicas = max(1, world_size // run.parallel.model_parallel_size)
    trainer = dataclasses.replace(run.trainer, global_batch_size=run.trainer.micro_batch_size * replicas)
    run = dataclasses.replace(run, trainer=trainer)
    validate(run, world_size)
    return run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    teacher = commands.add_parser("teacher", help="sample a run's teacher for a file of prompts")
    _add_common(teacher)
    teacher.add_argument("--prompts", required=True, type=Path, metavar="FILE", help=".txt, or .jsonl with `prompt`")
    teacher.add_argument("--samples-per-prompt", type=int, default=1)
    teacher.add_argument("--batch-size", type=int, help="samples drawn together; default: trainer.micro_batch_size")
    teacher.add_argument("--steps", type=int, default=100, help="Euler steps; default: 100")
    teacher.add_argument("--shift", type=float, default=3.0, help="of the time grid; default: 3")
    teacher.add_argument("--guidance", type=float, default=5.0, help="classifier-free guidance; default: 5")
    teacher.add_argument("--seed", type=int, default=0)
    teacher.set_defaults(build=build_from_teacher)
    videos = commands.add_parser("videos", help="encode a folder of videos with captions beside them")
    _add_common(videos)
    videos.add_argument(
        "--videos", required=True, type=Path, metavar="DIR", help="videos, <name>.txt or .json beside each"
    )
    videos.add_argument("--frames", type=int, metavar="T", help="frames of a clip; default: those of the configuration")
    videos.add_argument("--size", type=_size, metavar="HxW", help="pixels; default: those of the configuration")
    videos.add_argument("--fps", type=float, default=16.0, help="frames a second; default: 16, Wan's")
    videos.add_argument("--on-error", choices=("skip", "raise"), default="skip", help="videos that give no clip")
    videos.set_defaults(build=build_from_videos)
    return parser


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    try:
        return int(height), int(width)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text}, need HxW, e.g. 480x832") from error


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML run configuration: network, latent size, encoders, layout")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. parallel.tp=2")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument("--samples-per-shard", type=int, default=256)
    parser.add_argument("--member-format", choices=TENSOR_FORMATS, default="pt")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="of latents and embeddings")
    parser.add_argument("--full-text", action="store_true", help="keep the zeros after a prompt's embedding")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; bad input is one message on stderr and status 2 (configuration) or 1."""
    parser = _parser()
    arguments, extra = parser.parse_known_args(argv)
    if late := [item for item in extra if item.startswith("-") or "=" not in item]:
        parser.error(f"unrecognized arguments: {' '.join(late)}")
    arguments.overrides += extra
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rank = os.environ.get("RANK", "0")
    try:
        arguments.build(load_run(arguments), arguments)
    except ConfigError as error:
        print(f"build_dataset: {error}", file=sys.stderr)
        return 2
    except (CheckpointError, DatasetError, EncoderError, InputError, SampleError) as error:
        print(f"build_dataset: rank {rank}: {error}", file=sys.stderr)
        return 1
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
