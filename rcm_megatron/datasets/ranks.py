"""What all ways of building a dataset share: the plan, captions encoded before anything else, units made and joined, the end.

Shapes: B batch, C channels, T latent frames, H, W, L text positions, D text width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from rcm_megatron.config import RunConfig
from rcm_megatron.data.manifest import MANIFEST_NAME, DatasetError
from rcm_megatron.data.samples import load_caption_embedding
from rcm_megatron.data.shards import file_sha256
from rcm_megatron.datasets.build import BuildPlan, BuiltSample, DatasetBuild, Unit, stored, wait_for
from rcm_megatron.dtypes import DTYPES
from rcm_megatron.errors import InputError
from rcm_megatron.finite import require_finite
from rcm_megatron.models.encoders import build_text_encoder
from rcm_megatron.parallel.broadcast import computed_once
from rcm_megatron.platform.device import this_device
from rcm_megatron.progress import bar_interval
from rcm_megatron.requests import BuildRequest

_POLL_SECONDS = 1.0

Made = tuple[list[BuiltSample], dict[int, str]]
"""The samples of a unit, and why others are missing, by index."""


def built_sample(
    request: BuildRequest,
    index: int,
    latent_CTHW: Tensor,
    embed_LD: Tensor,
    prompt: str,
    *,
    text_len: int,
    **image: Tensor,
) -> BuiltSample:
    """A sample as it is stored. `image`: further members, as `ShardWriter.add` takes them. NonFiniteError names sample and tensor."""
    dtype = DTYPES[request.dtype]
    for name, tensor in {"embed": embed_LD, "latent": latent_CTHW, **image}.items():
        require_finite(tensor.to(dtype), what=f"sample {index} ({prompt!r:.80}): {name}")
    return BuiltSample(
        index=index,
        latent_CTHW=latent_CTHW.cpu().to(dtype),
        embed_LD=stored(embed_LD, dtype, length=text_len if request.full_text else None),
        prompt=prompt,
        image={name: tensor.cpu().to(dtype) for name, tensor in image.items()},
    )


def open_build(
    run: RunConfig,
    request: BuildRequest,
    *,
    num_samples: int,
    unit_size: int,
    recipe: Callable[[], Mapping[str, object]],
) -> tuple[DatasetBuild, list[Unit]]:
    """The build and the units that no former start has done, the same on all ranks. InputError if the folder is another build's.

    `recipe`, which reads all weights, is called on the first rank alone.
    """
    whole = {}
    if dist.get_rank() == 0:
        whole = {
            **recipe(),
            "dtype": request.dtype,
            "full_text": request.full_text,
            "model": dataclasses.asdict(run.model),
            "latent": dataclasses.asdict(run.latent),
            "encoders": dataclasses.asdict(run.encoders) | {"sha256": _encoder_checksums(run)},
            "versions": {name: version(name) for name in ("torch", "megatron-core", "diffusers", "transformers")},
        }
    plan = BuildPlan(
        num_samples=num_samples,
        samples_per_shard=request.samples_per_shard,
        unit_size=min(unit_size, request.samples_per_shard),
        member_format=request.member_format,
        recipe=whole,
    )
    build = DatasetBuild(request.output, plan)

    def prepare() -> Tensor:
        try:
            return torch.tensor([unit.number for unit in build.prepare()], dtype=torch.int64)
        except DatasetError as error:
            raise InputError(str(error)) from error

    units = plan.units()
    return build, [units[number] for number in computed_once(prepare, device=this_device()).tolist()]


def encode_texts(
    run: RunConfig, build: DatasetBuild, left: Sequence[Unit], captions: Callable[[Unit], list[str]]
) -> None:
    """Embeddings of all captions, by all ranks, before anything else takes memory; the first one adds the negative prompt's.

    Raises InputError, on all ranks, for what an encoder refuses.
    """
    rank = dist.get_rank()
    mine = [unit for unit in left[rank :: dist.get_world_size()] if not build.has_text(unit)]
    negative_wanted = rank == 0 and bool(left) and not build.negative.exists()
    shape = {"text_len": run.model.text_len, "text_dim": run.model.text_dim}
    if negative_wanted and run.data.negative_embedding is not None:
        build.put_negative(load_caption_embedding(run.data.negative_embedding, **shape))
        negative_wanted = False
    if not mine and not negative_wanted:
        return
    with closing(build_text_encoder(run.encoders, **shape, device=this_device())) as encoder:
        if negative_wanted:
            negative_LD = encoder.encode([encoder.negative_prompt])[0]
            require_finite(negative_LD, what="the negative prompt: embed")
            build.put_negative(negative_LD)
        for unit in tqdm(mine, "captions", unit="batch", disable=rank > 0, mininterval=bar_interval()):
            texts = captions(unit)
            try:
                embed_BLD = encoder.encode(texts)
            except ValueError as error:
                raise InputError(str(error)) from error
            for index, embed_LD, text in zip(unit.indices, embed_BLD, texts, strict=True):
                require_finite(embed_LD, what=f"sample {index} ({text!r:.80}): embed")
            build.put_text(unit, embed_BLD)


def make_units(build: DatasetBuild, mine: Sequence[Unit], make: Callable[[Unit], Made], *, writes: bool) -> None:
    """Make this rank's units; the first rank also joins shards, shows what all have done, and finishes when they have.

    `writes`: whether this rank is the one of its model replica that writes.
    """
    first = dist.get_rank() == 0
    total, done = build.plan.num_samples, build.join_shards() if first else 0
    bar = {"desc": build.folder.name, "unit": "sample", "disable": not first, "mininterval": bar_interval()}
    with tqdm(total=total, initial=done, **bar) as shown:
        for unit in mine:
            samples, skipped = make(unit)
            if writes:
                build.write(unit, samples, skipped)
            if first:
                done = build.join_shards()
                shown.update(done - shown.n)
        while first and done < total:
            time.sleep(_POLL_SECONDS)
            done = build.join_shards()
            shown.update(done - shown.n)
    if first:
        build.finish()


def report(build: DatasetBuild) -> None:
    """Say where the dataset is, on the first rank."""
    if dist.get_rank() == 0:
        wait_for(build.folder / MANIFEST_NAME)
        print(f"{build.folder} is complete; verify it with: rcm inspect-dataset {build.folder}")


def text_facts(captions: Sequence[str]) -> dict[str, object]:
    """What the manifest says of captions: their number, duplicates, a checksum."""
    digest = hashlib.sha256("\n".join(captions).encode()).hexdigest()
    return {"count": len(captions), "distinct": len(set(captions)), "sha256": digest}


def checksums(path: Path) -> dict[str, str]:
    """SHA-256 of a file, or of the files of a folder and its subfolders, by name."""
    if path.is_file():
        return {path.name: file_sha256(path)}
    return {str(file.relative_to(path)): file_sha256(file) for file in sorted(path.rglob("*")) if file.is_file()}


def _encoder_checksums(run: RunConfig) -> dict[str, dict[str, str]]:
    """Of the parts of `encoders.folder` that the run uses."""
    parts = ["vae"] if run.encoders.video == "wan_vae" else []
    parts += ["text_encoder", "tokenizer"] if run.encoders.text in ("umt5", "t5") else []
    parts += ["image_encoder", "image_processor"] if run.encoders.image == "clip" else []
    return {part: checksums(Path(run.encoders.folder) / part) for part in parts}
