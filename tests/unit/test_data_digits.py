"""tools/quickstart/build_dataset.py: the quick start's shards, ready for the loader."""

import importlib.util
from pathlib import Path

import pytest
import torch

from rcm_megatron.data.dali import LatentLoader
from rcm_megatron.data.manifest import DatasetError, load_manifest
from rcm_megatron.data.samples import SampleSource, load_caption_embedding
from rcm_megatron.models.encoders import WordTextEncoder
from tools.quickstart.digits import LATENT_SHAPE_CTHW, make_sample

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def write_digits_dataset():
    spec = importlib.util.spec_from_file_location("build_digits_dataset", ROOT / "tools/quickstart/build_dataset.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.write_digits_dataset


def test_digits_go_through_the_loader_unchanged(tmp_path, write_digits_dataset):
    write_digits_dataset(tmp_path, num_samples=10, seed=5, samples_per_shard=4)
    encoder = WordTextEncoder()
    source = SampleSource(
        load_manifest(tmp_path, on_error="raise"),
        seed=0,
        latent_shape=LATENT_SHAPE_CTHW,
        text_len=encoder.text_len,
        text_dim=encoder.text_dim,
        on_error="raise",
    )
    with LatentLoader(source, micro_batch_size=5, dp_rank=0, dp_size=1, global_batch_size=10) as batches:
        for _ in range(2):
            batch = next(batches)
            for b, row in enumerate(batch.dataset_rows.tolist()):
                sample = make_sample(seed=5, index=row, split="train")
                assert batch.prompts[b] == sample.caption
                assert torch.equal(batch.latent_BCTHW[b], sample.latent_CTHW)
                assert torch.equal(batch.text_LBD[:, b], encoder.encode([sample.caption])[0])
    negative_LD = load_caption_embedding(
        tmp_path / "negative_embed.pt", text_len=encoder.text_len, text_dim=encoder.text_dim
    )
    assert torch.equal(negative_LD, encoder.encode([encoder.negative_prompt])[0])


def test_building_again_keeps_the_dataset_and_refuses_another(tmp_path, write_digits_dataset):
    first = write_digits_dataset(tmp_path / "a", num_samples=5, seed=5, samples_per_shard=4)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    again = write_digits_dataset(tmp_path / "a", num_samples=5, seed=5, samples_per_shard=4)
    assert again.fingerprint == first.fingerprint
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    with pytest.raises(DatasetError, match="'seed': 5.*'seed': 6"):
        write_digits_dataset(tmp_path / "a", num_samples=5, seed=6, samples_per_shard=4)
    other = write_digits_dataset(tmp_path / "b", num_samples=5, seed=5, samples_per_shard=4)
    assert [shard.sha256 for shard in other.shards] == [shard.sha256 for shard in first.shards]


def test_an_interrupted_build_starts_over_and_foreign_files_are_left_alone(tmp_path, write_digits_dataset):
    (tmp_path / "a.partial").mkdir()
    (tmp_path / "a.partial" / "shard_000000.tar").write_bytes(b"half")
    assert len(write_digits_dataset(tmp_path / "a", num_samples=3, seed=5)) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "shard_000000.tar").write_bytes(b"somebody's")
    with pytest.raises(DatasetError, match="holds files"):
        write_digits_dataset(tmp_path / "b", num_samples=3, seed=5)
    assert (tmp_path / "b" / "shard_000000.tar").read_bytes() == b"somebody's"
