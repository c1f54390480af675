"""The DALI loader: one order for every layout, exact resumption, contents, and samples that cannot be used."""

import io
import logging
import os
import sys
import tarfile

import numpy as np
import pytest
import safetensors.torch
import torch

from rcm_megatron.data.dali import LatentLoader
from rcm_megatron.data.manifest import build_manifest
from rcm_megatron.data.samples import SampleError, SampleSource, load_caption_embedding
from rcm_megatron.data.shards import ShardWriter, encode_tensor

SHAPE = (1, 2, 3, 4)
TEXT_LEN, TEXT_DIM = 5, 3


def latent(index):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(index))


def embed(index):
    return torch.randn(1 + index % TEXT_LEN, TEXT_DIM, generator=torch.Generator().manual_seed(1000 + index))


def dataset(folder, *, num_samples=10, member_format="pt"):
    with ShardWriter(folder, samples_per_shard=4, member_format=member_format) as writer:
        for index in range(num_samples):
            writer.add(f"{index:09d}", latent_CTHW=latent(index), embed_LD=embed(index), prompt=f"prompt {index}")
    return build_manifest(folder, on_error="raise")


OF_SAMPLES = {"seed": 3, "latent_shape": SHAPE, "text_len": TEXT_LEN, "text_dim": TEXT_DIM, "on_error": "skip"}
OF_SAMPLES |= {"image_latent_shape": None, "image_embed_shape": None}


def loader(manifest, *, micro_batch_size=2, dp_rank=0, dp_size=1, global_batch_size=8, **settings):
    source = SampleSource(manifest, **{name: settings.pop(name, default) for name, default in OF_SAMPLES.items()})
    return LatentLoader(
        source,
        micro_batch_size=micro_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        global_batch_size=global_batch_size,
        **settings,
    )


def read(manifest, *, global_batches=3, **settings):
    """{global sample index: (prompt, latent)} of one rank; checks that each index comes once."""
    seen = {}
    with loader(manifest, **settings) as batches:
        for _ in range(global_batches * batches.num_micro_batches):
            batch = next(batches)
            for b, index in enumerate(batch.sample_indices.tolist()):
                assert index not in seen
                seen[index] = (batch.prompts[b], batch.latent_BCTHW[b])
    return seen


def assert_same_samples(expected, got):
    assert sorted(expected) == sorted(got)
    for index, (prompt, latent_CTHW) in expected.items():
        assert got[index][0] == prompt, f"sample {index}"
        assert torch.equal(got[index][1], latent_CTHW), f"sample {index}"


@pytest.mark.parametrize(("dp_size", "micro_batch_size"), [(1, 8), (2, 1), (2, 4), (4, 2), (8, 1)])
def test_all_layouts_read_the_same_global_batches(tmp_path, dp_size, micro_batch_size):
    manifest = dataset(tmp_path)
    reference = read(manifest)
    assert sorted(reference) == list(range(24))
    got = {}
    for dp_rank in range(dp_size):
        part = read(manifest, dp_rank=dp_rank, dp_size=dp_size, micro_batch_size=micro_batch_size)
        assert not got.keys() & part.keys()
        got |= part
    assert_same_samples(reference, got)


def test_every_epoch_is_a_new_permutation_of_all_samples(tmp_path):
    seen = read(dataset(tmp_path), global_batches=4, micro_batch_size=1)
    epochs = [[seen[index][0] for index in range(start, start + 10)] for start in (0, 10, 20)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(f"prompt {index}" for index in range(10))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.mark.parametrize("member_format", ["pt", "npy", "safetensors"])
def test_batches_hold_what_the_files_hold(tmp_path, member_format):
    manifest = dataset(tmp_path, member_format=member_format)
    order = manifest.order(epoch=0, seed=3)
    with loader(manifest, micro_batch_size=4) as batches:
        held = [next(batches) for _ in range(2)]
        for _ in range(8):  # a batch that somebody holds is not written over
            next(batches)
    for number, batch in enumerate(held):
        assert batch.latent_BCTHW.shape == (4, *SHAPE)
        assert batch.text_LBD.shape == (TEXT_LEN, 4, TEXT_DIM)
        assert batch.text_LBD.is_contiguous()
        assert batch.latent_BCTHW.dtype == batch.text_LBD.dtype == torch.float32
        assert batch.sample_indices.tolist() == list(range(4 * number, 4 * number + 4))
        assert batch.num_skipped == 0
        for b in range(4):
            index = int(order[4 * number + b])
            assert batch.dataset_rows[b] == index
            assert batch.prompts[b] == f"prompt {index}"
            assert torch.equal(batch.latent_BCTHW[b], latent(index))
            length = len(embed(index))
            assert torch.equal(batch.text_LBD[:length, b], embed(index))
            assert not batch.text_LBD[length:, b].any()


def test_resume_from_any_sample(tmp_path):
    manifest = dataset(tmp_path)
    reference = read(manifest, global_batches=6, global_batch_size=4)
    for start in range(0, 13):
        got = read(manifest, global_batches=2, global_batch_size=4, start_sample=start)
        assert_same_samples({index: reference[index] for index in range(start, start + 8)}, got)


def test_state_resumes_on_another_layout(tmp_path):
    manifest = dataset(tmp_path)
    reference = read(manifest, global_batches=4)
    with loader(manifest) as batches:
        for _ in range(2 * batches.num_micro_batches):
            next(batches)
        state = batches.state_dict()
        next(batches)
        with pytest.raises(RuntimeError, match="1 of 4 micro-batches"):
            batches.state_dict()
    assert state["next_sample"] == 16
    got = {}
    for dp_rank in range(2):
        with loader(manifest, dp_rank=dp_rank, dp_size=2, micro_batch_size=4) as batches:
            next(batches)  # restoring also works on a loader that runs already
            batches.load_state_dict(state)
            assert batches.state_dict() == state
            for _ in range(2):
                batch = next(batches)
                for b, index in enumerate(batch.sample_indices.tolist()):
                    got[index] = (batch.prompts[b], batch.latent_BCTHW[b])
    assert_same_samples({index: reference[index] for index in range(16, 32)}, got)


def test_state_of_another_dataset_or_seed_goes_on_after_as_many_samples(tmp_path):
    """In the order that a loader of that seed or dataset has there."""
    with loader(dataset(tmp_path / "a")) as first:
        for _ in range(2 * first.num_micro_batches):
            next(first)
        state = first.state_dict()
    for settings in (
        {"manifest": build_manifest(tmp_path / "a"), "seed": 4},
        {"manifest": dataset(tmp_path / "b", num_samples=9)},
    ):
        manifest = settings.pop("manifest")
        with (
            loader(manifest, **settings) as on,
            loader(manifest, start_sample=state["next_sample"], **settings) as fresh,
        ):
            on.load_state_dict(state)
            assert next(on).dataset_rows.tolist() == next(fresh).dataset_rows.tolist()
            assert on.fingerprint == manifest.fingerprint
    with pytest.raises(ValueError, match="next_sample"):
        loader(dataset(tmp_path / "c")).load_state_dict({"seed": 3})


def test_closing_and_going_on_loses_nothing(tmp_path):
    manifest = dataset(tmp_path)
    reference = read(manifest)
    batches = loader(manifest)
    got = {}
    for _ in range(12):
        batch = next(batches)
        batches.close()
        for b, index in enumerate(batch.sample_indices.tolist()):
            got[index] = (batch.prompts[b], batch.latent_BCTHW[b])
    assert_same_samples(reference, got)


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def pickled_npy(value):
    buffer = io.BytesIO()
    np.save(buffer, np.array([value], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def with_value(tensor, value):
    tensor = tensor.clone()
    tensor.view(-1)[1] = value
    return tensor


BAD_MEMBERS = {
    "malicious_pt": lambda tmp: ("latent.pt", saved(Bomb(tmp / "bomb")), "cannot be read as .pt"),
    "malicious_npy": lambda tmp: ("latent.npy", pickled_npy(Bomb(tmp / "bomb")), "cannot be read as .npy"),
    "malicious_embed": lambda tmp: ("embed.pt", saved({"a": Bomb(tmp / "bomb")}), "cannot be read as .pt"),
    "junk_safetensors": lambda tmp: ("latent.safetensors", b"junk" * 30, "cannot be read as .safetensors"),
    "two_tensors": lambda tmp: (
        "latent.safetensors",
        safetensors.torch.save({"a": latent(0), "b": latent(1)}),
        "2 tensors",
    ),
    "empty": lambda tmp: ("latent.pt", b"", "cannot be read"),
    "not_a_tensor": lambda tmp: ("latent.pt", saved([1.0]), "got list"),
    "integers": lambda tmp: ("latent.pt", saved(latent(0).long()), "got int64"),
    "nan": lambda tmp: ("latent.pt", saved(with_value(latent(0), float("nan"))), "1 of 24 values are NaN or Inf"),
    "inf_bf16": lambda tmp: ("latent.pt", saved(with_value(latent(0), float("inf")).bfloat16()), "NaN or Inf"),
    "nan_embed": lambda tmp: ("embed.pt", saved(with_value(embed(1), float("nan"))), "NaN or Inf"),
    "wrong_shape": lambda tmp: (
        "latent.pt",
        saved(torch.zeros(1, 2, 3, 5)),
        "got shape (1, 2, 3, 5), need (1, 2, 3, 4)",
    ),
    "too_few_frames": lambda tmp: ("latent.pt", saved(torch.zeros(1, 1, 3, 4)), "got shape (1, 1, 3, 4)"),
    "wrong_text_dim": lambda tmp: ("embed.pt", saved(torch.zeros(2, 4)), "text_dim=3"),
    "long_prompt": lambda tmp: ("embed.pt", saved(torch.ones(7, TEXT_DIM)), "fills 7 rows, text_len=5"),
    "not_utf8": lambda tmp: ("prompt.txt", b"\xff\xfe\xfd", "utf-8"),
}


def spoil(folder, key, suffix, data):
    """Put `data` in the place of member `key.suffix` (of whatever format) of its shard."""
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = [(name, tar.extractfile(name).read()) for name in tar.getnames()]
        kind = suffix.split(".")[0]
        with tarfile.open(path, "w") as tar:
            for name, content in members:
                if name.startswith(f"{key}.{kind}."):
                    name, content = f"{key}.{suffix}", data
                header = tarfile.TarInfo(name)
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))


@pytest.mark.parametrize("case", BAD_MEMBERS)
def test_unusable_member_is_named_counted_and_replaced_by_the_next(tmp_path, caplog, case):
    suffix, data, reason = BAD_MEMBERS[case](tmp_path)
    folder = tmp_path / "data"
    reference = read(dataset(folder), global_batches=2)
    order = build_manifest(folder).order(epoch=0, seed=3)
    position = 5
    key = f"{order[position]:09d}"
    spoil(folder, key, suffix, data)
    manifest = build_manifest(folder, on_error="raise")
    with caplog.at_level(logging.WARNING), loader(manifest) as batches:
        skipped = [next(batches).num_skipped for _ in range(5)]
        assert batches.num_skipped == 1
    assert skipped == [0, 0, 1, 0, 0]  # sample 5 lies in the third micro-batch of two
    assert f"shard shard_00000{int(key) // 4}.tar, key {key}, member {key}.{suffix}: " in caplog.text
    assert reason in caplog.text
    assert len(caplog.records) == 1
    assert not (tmp_path / "bomb").exists()
    expected = {**reference, position: reference[position + 1]}
    expected.update({index: sample for index, sample in read(manifest, global_batches=2).items() if index >= 10})
    got = read(manifest, global_batches=2, dp_rank=0, dp_size=2) | read(
        manifest, global_batches=2, dp_rank=1, dp_size=2
    )
    assert_same_samples(expected, got)

    with loader(manifest, on_error="raise") as batches:
        for _ in range(2):  # what lies before it is read in full
            next(batches)
        for _ in range(2):
            with pytest.raises(SampleError, match=f"key {key}, member {key}.{suffix}"):
                next(batches)
    assert not (tmp_path / "bomb").exists()


def test_neighbouring_bad_samples_and_the_last_of_an_epoch_are_replaced_within_the_epoch(tmp_path):
    order = dataset(tmp_path).order(epoch=0, seed=3)
    for position in (8, 9):
        spoil(tmp_path, f"{order[position]:09d}", "latent.pt", b"")
    manifest = build_manifest(tmp_path)
    with loader(manifest, micro_batch_size=1, global_batch_size=1) as batches:
        rows = [int(next(batches).dataset_rows) for _ in range(10)]
        assert batches.num_skipped == 2
    assert rows == [*order[:8], order[0], order[0]]


def test_shard_that_is_cut_or_lost_after_the_scan(tmp_path, caplog):
    manifest = dataset(tmp_path)
    shard = tmp_path / "shard_000001.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    (tmp_path / "shard_000002.tar").unlink()
    with loader(manifest, micro_batch_size=5, global_batch_size=5) as batches:
        rows = [row for _ in range(2) for row in next(batches).dataset_rows.tolist()]
        assert batches.num_skipped == 6
    assert set(rows) == {0, 1, 2, 3}
    assert "shard_000001.tar is 3000 bytes" in caplog.text
    assert "shard_000002.tar" in caplog.text
    (tmp_path / "shard_000000.tar").unlink()
    with loader(manifest) as batches, pytest.raises(SampleError, match="none of the 10 samples"):
        next(batches)


def test_published_shapes_are_accepted(tmp_path):
    """bf16, a leading batch dimension of one, more frames than the model takes, and zero rows behind text_len."""
    stored = torch.randn(1, 1, 4, 3, 4).bfloat16()
    text = torch.zeros(1, 9, TEXT_DIM, dtype=torch.bfloat16)
    text[:, :TEXT_LEN] = 0.3
    with ShardWriter(tmp_path) as writer:
        writer.add("a", latent_CTHW=stored, embed_LD=text, prompt="a")
    with loader(build_manifest(tmp_path), micro_batch_size=1, on_error="raise") as batches:
        batch = next(batches)
    assert torch.equal(batch.latent_BCTHW, stored[:, :, :2].float())
    assert torch.equal(batch.text_LBD[:, 0], text[0, :TEXT_LEN].float())


def test_impossible_settings_are_refused_with_what_to_change(tmp_path):
    manifest = dataset(tmp_path)
    for wrong, message in (
        ({"dp_size": 3}, "global_batch_size=8 must divide by micro_batch_size\\*dp_size=2\\*3"),
        ({"dp_rank": 1}, "dp_rank=1"),
        ({"start_sample": -1}, "start_sample=-1"),
        ({"num_threads": 0}, "num_threads=0"),
        ({"on_error": "ignore"}, "on_error='ignore'"),
        ({"latent_shape": (2, 3, 4)}, "latent_shape"),
    ):
        with pytest.raises(ValueError, match=message):
            loader(manifest, **wrong)


def test_missing_dali_is_an_error_that_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ImportError, match="pip install nvidia-dali"):
        next(loader(dataset(tmp_path)))


@pytest.mark.parametrize("suffix", ["pt", "npy", "safetensors"])
def test_negative_embedding(tmp_path, suffix):
    stored = torch.randn(2, TEXT_DIM)
    path = tmp_path / f"negative.{suffix}"
    path.write_bytes(encode_tensor(stored, suffix))
    embed_LD = load_caption_embedding(path, text_len=TEXT_LEN, text_dim=TEXT_DIM)
    assert embed_LD.shape == (TEXT_LEN, TEXT_DIM)
    assert torch.equal(embed_LD[:2], stored)
    assert not embed_LD[2:].any()
    with pytest.raises(SampleError, match=f"negative.{suffix}.*text_dim=9"):
        load_caption_embedding(path, text_len=TEXT_LEN, text_dim=9)
    with pytest.raises(ValueError, match="must be"):
        load_caption_embedding(tmp_path / "x.bin", text_len=TEXT_LEN, text_dim=TEXT_DIM)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_the_gpu_hold_the_same_samples(tmp_path):
    manifest = dataset(tmp_path)
    with loader(manifest) as on_cpu, loader(manifest, device="cuda") as on_gpu:
        pairs = [(next(on_cpu), next(on_gpu)) for _ in range(12)]
    for cpu, gpu in pairs:
        assert gpu.latent_BCTHW.is_cuda
        assert gpu.text_LBD.is_cuda
        assert torch.equal(cpu.latent_BCTHW, gpu.latent_BCTHW.cpu())
        assert torch.equal(cpu.text_LBD, gpu.text_LBD.cpu())
        assert cpu.prompts == gpu.prompts
