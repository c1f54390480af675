"""Inspection of a dataset: damage is named with shard and key and is status 1; statistics; the contact sheet."""

import numpy as np
import pytest
import torch

from rcm_megatron.cli.main import main
from rcm_megatron.data.manifest import DatasetError, build_manifest
from rcm_megatron.data.media import contact_sheet
from rcm_megatron.data.shards import ShardWriter
from rcm_megatron.datasets.build import BuildPlan, BuiltSample, DatasetBuild
from rcm_megatron.datasets.inspection import inspect_dataset
from rcm_megatron.datasets.statistics import Statistics
from tests.wan_encoders import write_vae


def latent(index, *, channels=16):
    return torch.randn(channels, 2, 4, 6, generator=torch.Generator().manual_seed(index)) + 0.1 * channels


def write(folder, *, changed=None, channels=16):
    """Ten samples in shards of four, with their manifest; `changed`: {index: fields of ShardWriter.add}."""
    with ShardWriter(folder, samples_per_shard=4) as writer:
        for index in range(10):
            fields = {"latent_CTHW": latent(index, channels=channels), "embed_LD": torch.ones(2 + index % 3, 8)}
            fields |= {"prompt": f"caption {index % 7}"} | (changed or {}).get(index, {})
            writer.add(f"{index:09d}", **fields)
    build_manifest(folder, checksums=True).save()
    return folder


def test_a_whole_dataset_and_its_statistics(tmp_path, capsys):
    found = inspect_dataset(write(tmp_path))
    assert found.problems == () and found.outliers == () and found.num_checksums == 3
    stacked = torch.stack([latent(index) for index in range(10)]).double()
    summary = found.statistics.summary()
    assert summary["latent_mean"] == pytest.approx(stacked.mean((0, 2, 3, 4)).tolist(), rel=1e-5)
    assert summary["latent_std"] == pytest.approx(stacked.std((0, 2, 3, 4), correction=0).tolist(), rel=1e-5)
    assert summary["text_length"] == {"min": 2, "mean": 2.9, "max": 4}
    assert main(["inspect-dataset", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "10 samples" in output and "7 distinct, 0 empty" in output and output.endswith("whole\n")


def flip(folder):
    path = folder / "shard_000001.tar"
    data = bytearray(path.read_bytes())
    at = data.index(latent(5)[3].numpy().tobytes())
    data[at] ^= 1
    path.write_bytes(data)


def remove(folder):
    (folder / "shard_000000.tar").unlink()


def truncate(folder):
    path = folder / "shard_000002.tar"
    path.write_bytes(path.read_bytes()[:-5000])


def add(folder):
    (folder / "shard_000009.tar").write_bytes((folder / "shard_000000.tar").read_bytes())


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (flip, ["shard shard_000001.tar: its SHA-256"]),
        (remove, ["shard shard_000000.tar: [Errno 2]", "shard_000000.tar, key 000000003, member 000000003.latent.pt"]),
        (truncate, ["shard shard_000002.tar: got ", "key 000000009"]),
        (add, ["shard shard_000009.tar: not in manifest.json"]),
    ],
)
def test_damage_to_shards_is_named(tmp_path, capsys, damage, named):
    damage(write(tmp_path))
    assert main(["inspect-dataset", str(tmp_path)]) == 1
    output = capsys.readouterr().out
    assert all(f"DAMAGED: {text}" in output or text in output for text in named), output
    assert output.endswith("damaged\n")


def test_shards_made_again_are_named_without_a_checksum_too(tmp_path):
    for number in range(2):
        folder = write(tmp_path / str(number), changed={5: {"latent_CTHW": latent(5 + number)}})
    build_manifest(folder).save()
    assert inspect_dataset(folder).problems == ()
    (folder / "shard_000001.tar").write_bytes((tmp_path / "0" / "shard_000001.tar").read_bytes())
    (problem,) = inspect_dataset(folder).problems
    assert "shard shard_000001.tar: other content" in problem


BAD = {
    "nan": ({"latent_CTHW": latent(5).index_fill(0, torch.tensor([1]), torch.nan)}, "48 of 768 values are NaN"),
    "shape": ({"latent_CTHW": latent(5)[:, :1]}, "got shapes ((16, 1, 4, 6), (8,)), need ((16, 2, 4, 6), (8,))"),
    "width": ({"embed_LD": torch.ones(3, 7)}, "got shapes ((16, 2, 4, 6), (7,))"),
    "type": ({"embed_LD": torch.ones(3, 8, dtype=torch.int32)}, "need one floating-point tensor"),
}


@pytest.mark.parametrize("kind", BAD)
def test_damaged_samples_are_named(tmp_path, kind):
    fields, message = BAD[kind]
    (problem,) = inspect_dataset(write(tmp_path, changed={5: fields})).problems
    assert "shard shard_000001.tar, key 000000005" in problem and message in problem


def test_outliers_are_reported_and_are_no_damage(tmp_path, capsys):
    folder = write(tmp_path, changed={3: {"latent_CTHW": 5 * latent(3)}, 6: {"prompt": ""}})
    found = inspect_dataset(folder)
    assert found.problems == () and all("key 000000003" in line for line in found.outliers) and found.outliers
    assert main(["inspect-dataset", str(folder)]) == 0
    assert "outlier: shard shard_000000.tar" in capsys.readouterr().out


def test_statistics_that_the_builder_noted_must_hold(tmp_path):
    plan = BuildPlan(num_samples=3, samples_per_shard=2, unit_size=2, member_format="pt", recipe={})
    build = DatasetBuild(tmp_path / "built", plan)
    for unit in build.prepare():
        samples = [
            BuiltSample(index=i, latent_CTHW=latent(i), embed_LD=torch.ones(3, 8), prompt="a") for i in unit.indices
        ]
        build.write(unit, samples)
    build.join_shards()
    assert build.finish().description["statistics"]["num_samples"] == 3
    assert inspect_dataset(tmp_path / "built").problems == ()
    manifest = tmp_path / "built" / "manifest.json"
    noted = Statistics()
    noted.add(latent(7), torch.ones(3, 8))
    changed = {**build_manifest(tmp_path / "built").description, "statistics": noted.summary()}
    manifest.unlink()
    build_manifest(tmp_path / "built", checksums=True, description=changed).save()
    (first, _) = inspect_dataset(tmp_path / "built").problems
    assert "manifest.json: latent_mean says" in first


def test_an_unfinished_or_foreign_folder(tmp_path, capsys):
    with pytest.raises(DatasetError, match="manifest.json does not exist"):
        inspect_dataset(tmp_path)
    assert main(["inspect-dataset", str(tmp_path)]) == 1
    assert "manifest.json does not exist" in capsys.readouterr().err
    (tmp_path / "manifest.json").write_text('{"version": 9}')
    with pytest.raises(DatasetError, match="version 9"):
        inspect_dataset(tmp_path)


@pytest.mark.parametrize("channels", [1, 2, 3, 16])
def test_a_contact_sheet_of_latents(tmp_path, channels):
    from PIL import Image

    folder = write(tmp_path / "data", channels=channels)
    assert (
        main(
            ["inspect-dataset", str(folder), "--output", str(tmp_path / "sheet.png"), "--samples", "3", "--frames", "9"]
        )
        == 0
    )
    picture = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert picture.shape[0] > 3 * 128 and picture.shape[1] >= 640
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20, "nothing is drawn"


def test_a_contact_sheet_of_decoded_latents(tmp_path):
    from PIL import Image

    folder = write(tmp_path / "data")
    write_vae(tmp_path / "wan" / "vae")
    argv = ["inspect-dataset", str(folder), "--output", str(tmp_path / "sheet.png"), "--samples", "2", "--frames", "3"]
    assert main([*argv, "--decode", str(tmp_path / "wan")]) == 0
    assert Image.open(tmp_path / "sheet.png").width >= 3 * 48
    assert main([*argv, "--decode", str(tmp_path / "nowhere")]) == 1


def test_captions_stand_above_their_frames_and_overlap_nothing():
    """Frames keep their pixels; the lines between them hold the captions, black on white, within the picture's width."""
    strips = [np.full((3, 40, 60, 3), 10 * (row + 1), dtype=np.uint8) for row in range(3)]
    captions = ["short", "long " * 400, "$5 & x_1 " + "ÄÖ漢" * 3]
    picture = contact_sheet(strips, captions=captions, title="title", gap=8, least_width=640)
    top = 0
    for row, strip in enumerate(strips):
        lines = 2 if row == 1 else 1
        start = (40 if row == 0 else top) + 20 * lines + 8
        assert np.array_equal(picture[start : start + 40, 8:68], strip[0]), f"row {row}"
        band = picture[start - 20 * lines - 8 : start]
        assert (band < 128).any(), f"caption {row} is missing"
        assert (picture[start : start + 40, 68 + 2 * 64 + 8 :] == 255).all(), f"text beside row {row}"
        assert (picture[:, -4:] == 255).all(), "text runs out of the picture"
        top = start + 40 + 8
    assert picture.shape[0] == top
