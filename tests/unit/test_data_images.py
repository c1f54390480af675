"""Image members of a dataset: written, indexed and delivered where a network is given them; named where they are missing or wrong."""

import json

import pytest
import torch

from rcm_megatron.data.manifest import (
    MANIFEST_NAME,
    DatasetError,
    build_manifest,
    load_manifest,
)
from rcm_megatron.data.samples import SampleError
from rcm_megatron.data.scan import EMBED, IMAGE_EMBED, IMAGE_LATENT, PROMPT
from rcm_megatron.data.shards import ShardWriter
from tests.unit.test_data_loader import SHAPE, dataset, embed, latent, loader

IMAGE_LD = (3, 2)
IMAGES = {"image_latent_shape": SHAPE, "image_embed_shape": IMAGE_LD}


def image_latent(index):
    return latent(100 + index)


def image_embed(index):
    return torch.randn(IMAGE_LD, generator=torch.Generator().manual_seed(2000 + index))


def images(index):
    return {"image_latent_CTHW": image_latent(index), "image_embed_LD": image_embed(index)}


def write(folder, *, num_samples=6, member_format="pt", members=images):
    with ShardWriter(folder, samples_per_shard=4, member_format=member_format) as writer:
        for index in range(num_samples):
            known = {"latent_CTHW": latent(index), "embed_LD": embed(index), "prompt": "" if index == 1 else f"{index}"}
            writer.add(f"{index:09d}", **known, **members(index))
    return folder


@pytest.mark.parametrize("member_format", ["pt", "npy", "safetensors"])
def test_batches_hold_the_images_of_their_samples(tmp_path, member_format):
    write(tmp_path, member_format=member_format)
    build_manifest(tmp_path, on_error="raise").save()
    manifest = load_manifest(tmp_path, on_error="raise")
    record = manifest.record(1)
    assert [member.name for member in record.members] == [
        f"000000001.{kind}"
        for kind in (
            f"latent.{member_format}",
            f"embed.{member_format}",
            "prompt.txt",
            f"image_latent.{member_format}",
            f"image_embed.{member_format}",
        )
    ]
    assert record.members[PROMPT].size == 0, "an empty caption is a member too"
    with loader(manifest, **IMAGES) as batches:
        batch = next(batches)
    assert batch.image_latent_BCTHW.shape == (2, *SHAPE)
    assert batch.image_LBD.shape == (3, 2, 2) and batch.image_LBD.is_contiguous()
    for b, row in enumerate(batch.dataset_rows.tolist()):
        assert torch.equal(batch.latent_BCTHW[b], latent(row))
        assert torch.equal(batch.image_latent_BCTHW[b], image_latent(row))
        assert torch.equal(batch.image_LBD[:, b], image_embed(row))


def test_a_network_takes_what_it_is_given_and_nothing_else(tmp_path):
    manifest = build_manifest(write(tmp_path), on_error="raise")
    with loader(manifest) as batches:
        batch = next(batches)
    assert batch.image_latent_BCTHW is None and batch.image_LBD is None
    with loader(manifest, image_latent_shape=SHAPE) as batches:  # Wan2.2's experts see no CLIP features
        batch = next(batches)
    assert batch.image_latent_BCTHW is not None and batch.image_LBD is None


def test_a_dataset_without_images_is_indexed_without_them(tmp_path):
    manifest = dataset(tmp_path)
    assert manifest.index["size"].shape == (10, 3)
    manifest.save()
    assert json.loads((tmp_path / MANIFEST_NAME).read_text())["version"] == 3
    assert manifest.record(0).members[IMAGE_LATENT:] == (None, None)
    for kind, shape in IMAGES.items():
        with pytest.raises(DatasetError, match=f"holds no {kind.removesuffix('_shape')} members, which this network"):
            loader(manifest, **{kind: shape})


def test_a_dataset_of_another_network_is_refused(tmp_path):
    manifest = build_manifest(write(tmp_path, members=lambda index: {"image_latent_CTHW": image_latent(index)}))
    assert manifest.record(0).members[IMAGE_LATENT] is not None
    assert manifest.record(0).members[IMAGE_EMBED] is None and manifest.record(0).members[EMBED] is not None
    with pytest.raises(DatasetError, match="holds no image_embed members"):
        loader(manifest, **IMAGES)


WRONG = {
    "missing": (lambda index: {"image_latent_CTHW": image_latent(index)}, r"image_embed\.\*: it is not in the shard"),
    "shape": (
        lambda index: images(index) | {"image_embed_LD": torch.zeros(4, 2)},
        r"image_embed\.pt: got shape \(4, 2\), need \(3, 2\)",
    ),
    "not finite": (
        lambda index: images(index) | {"image_latent_CTHW": image_latent(index) / 0},
        r"image_latent\.pt: .* are NaN or Inf",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_sample_whose_image_is_wrong_is_named_or_replaced(tmp_path, caplog, what):
    wrong, message = WRONG[what]
    write(tmp_path, members=lambda index: wrong(index) if index == 2 else images(index))
    manifest = build_manifest(tmp_path, on_error="raise")
    named = f"shard shard_000000.tar, key 000000002, member 000000002.{message}"
    with loader(manifest, on_error="raise", **IMAGES) as batches, pytest.raises(SampleError, match=named):
        for _ in range(3):
            next(batches)
    with loader(manifest, on_error="skip", **IMAGES) as batches:
        rows = [row for _ in range(3) for row in next(batches).dataset_rows.tolist()]
    assert sorted(set(rows)) == [0, 1, 3, 4, 5]
    assert "skipped a sample: shard shard_000000.tar, key 000000002" in caplog.text
