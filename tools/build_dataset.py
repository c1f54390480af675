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
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from rcm_megatron.checkpoint.errors import CheckpointError
from rcm_megatron.config import ConfigError, ParallelConfig, RunConfig, load_config, validate
from rcm_megatron.data.manifest import DatasetError
from rcm_megatron.data.samples import SampleError
from rcm_megatron.data.shards import TENSOR_FORMATS
from rcm_megatron.datasets.from_teacher import TeacherRequest, build_from_teacher
from rcm_megatron.datasets.from_videos import VideosRequest, build_from_videos
from rcm_megatron.errors import InputError
from rcm_megatron.models.encoders import EncoderError


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
    teacher.set_defaults(build=build_from_teacher, request=TeacherRequest)
    videos = commands.add_parser("videos", help="encode a folder of videos with captions beside them")
    _add_common(videos)
    videos.add_argument(
        "--videos", required=True, type=Path, metavar="DIR", help="videos, <name>.txt or .json beside each"
    )
    videos.add_argument("--frames", type=int, metavar="T", help="frames of a clip; default: those of the configuration")
    videos.add_argument("--size", type=_size, metavar="HxW", help="pixels; default: those of the configuration")
    videos.add_argument("--fps", type=float, default=16.0, help="frames a second; default: 16, Wan's")
    videos.add_argument("--on-error", choices=("skip", "raise"), default="skip", help="videos that give no clip")
    videos.set_defaults(build=build_from_videos, request=VideosRequest)
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
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of latents and embeddings")
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
        fields = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(arguments.request)}
        arguments.build(load_run(arguments), arguments.request(**fields))
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
