"""Builds the quick start's dataset: captioned videos of moving digits as latent shards, their manifest, the negative embedding.

    python tools/quickstart/build_dataset.py --output data/digits --num-samples 4096

The folder then holds shard_*.tar, manifest.json with its index, and negative_embed.pt (the embedding of the unconditional branch,
a [L, D] tensor as in NVlabs' `umT5_wan_negative_emb.pt`). Same arguments, same bytes.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rcm_megatron.data.manifest import MANIFEST_NAME, DatasetError, Manifest, build_manifest, load_manifest
from rcm_megatron.data.shards import ShardWriter, TensorFormat, encode_tensor
from rcm_megatron.models.encoders import PixelVideoEncoder, TextEncoder, VideoEncoder, WordTextEncoder
from tools.quickstart.digits import LATENT_SHAPE_CTHW, Sample, Split, make_sample

logger = logging.getLogger(__name__)

NEGATIVE_EMBED_NAME = "negative_embed.pt"


def write_digits_dataset(
    folder: str | os.PathLike[str],
    *,
    num_samples: int,
    seed: int,
    samples_per_shard: int = 1024,
    split: Split = "train",
    member_format: TensorFormat = "pt",
    text_encoder: TextEncoder | None = None,
    video_encoder: VideoEncoder | None = None,
) -> Manifest:
    """Write the dataset into `folder` and return its manifest; if the same dataset is already there, only the latter.

    `folder` appears under its name when it is complete; until then it is `<folder>.partial`, which a later call writes anew.
    DatasetError if `folder` holds anything else.
    """
    folder = Path(folder)
    text_encoder = text_encoder or WordTextEncoder()
    video_encoder = video_encoder or PixelVideoEncoder()
    description = {
        "dataset": "moving digits",
        "num_samples": num_samples,
        "seed": seed,
        "split": split,
        "samples_per_shard": samples_per_shard,
        "member_format": member_format,
        "latent_shape_CTHW": list(LATENT_SHAPE_CTHW),
        "text_len": text_encoder.text_len,
        "text_dim": text_encoder.text_dim,
    }
    if (folder / MANIFEST_NAME).exists():
        return _existing(folder, description)
    if folder.exists() and any(folder.iterdir()):
        raise DatasetError(f"{folder} holds files, but no {MANIFEST_NAME}; choose another folder, or empty it")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with ShardWriter(partial, samples_per_shard=samples_per_shard, member_format=member_format) as writer:
        samples = (make_sample(seed=seed, index=index, split=split) for index in range(num_samples))
        _write_samples(writer, samples, text_encoder, video_encoder)
    return _published(partial, folder, text_encoder, description)


def _write_samples(
    writer: ShardWriter, samples: Iterable[Sample], text_encoder: TextEncoder, video_encoder: VideoEncoder
) -> None:
    for index, sample in enumerate(samples):
        latent_CTHW = video_encoder.encode(sample.latent_CTHW.unsqueeze(0))[0]
        embed_LD = text_encoder.encode([sample.caption])[0]
        writer.add(f"{index:09d}", latent_CTHW=latent_CTHW, embed_LD=embed_LD, prompt=sample.caption)


def _published(partial: Path, folder: Path, text_encoder: TextEncoder, description: dict[str, object]) -> Manifest:
    negative_LD = text_encoder.encode([text_encoder.negative_prompt])[0]
    (partial / NEGATIVE_EMBED_NAME).write_bytes(encode_tensor(negative_LD, "pt"))
    build_manifest(partial, on_error="raise", checksums=True, description=description).save()
    partial.rename(folder)
    return load_manifest(folder, on_error="raise")


def _existing(folder: Path, description: dict[str, object]) -> Manifest:
    manifest = load_manifest(folder, on_error="raise")
    differing = [key for key in description if manifest.description.get(key) != description[key]]
    if differing:
        got = {key: manifest.description.get(key) for key in differing}
        need = {key: description[key] for key in differing}
        raise DatasetError(
            f"{folder} holds another dataset: got {got}, need {need}; choose another folder, or delete it"
        )
    logger.info("%s is there already, %d samples", folder, len(manifest))
    return manifest


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--num-samples", type=int, default=4096)
    parser.add_argument("--samples-per-shard", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=("train", "heldout"), default="train")
    parser.add_argument("--member-format", choices=("pt", "npy", "safetensors"), default="pt")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    manifest = write_digits_dataset(
        arguments.output,
        num_samples=arguments.num_samples,
        seed=arguments.seed,
        samples_per_shard=arguments.samples_per_shard,
        split=arguments.split,
        member_format=arguments.member_format,
    )
    print(
        f"{arguments.output}: {len(manifest)} samples in {len(manifest.shards)} shards, fingerprint {manifest.fingerprint}"
    )


if __name__ == "__main__":
    main()
