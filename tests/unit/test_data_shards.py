"""Writing shards, scanning them into a manifest, reading members by offset, and the order of samples."""

import io
import os
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from rcm_megatron.data import manifest as manifest_module
from rcm_megatron.data import shards as shards_module
from rcm_megatron.data.manifest import (
    MANIFEST_NAME,
    DatasetError,
    StaleManifestError,
    build_manifest,
    load_manifest,
    load_or_build_manifest,
)
from rcm_megatron.data.samples import decode_tensor
from rcm_megatron.data.scan import LATENT, scan_shard
from rcm_megatron.data.shards import ShardReader, ShardWriter


def latent(index):
    return torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(index))


def write(folder, *, num_samples=7, samples_per_shard=3, member_format="pt"):
    with ShardWriter(folder, samples_per_shard=samples_per_shard, member_format=member_format) as writer:
        for index in range(num_samples):
            embed = torch.full((4, 6), float(index))
            writer.add(f"{index:09d}", latent_CTHW=latent(index), embed_LD=embed, prompt=f"prompt {index} é")
    return folder


def keys(manifest):
    return [manifest.record(row).key for row in range(len(manifest))]


@pytest.mark.parametrize("member_format", ["pt", "npy", "safetensors"])
def test_shards_are_the_same_bytes_every_time(tmp_path, member_format):
    first = write(tmp_path / "a", member_format=member_format)
    second = write(tmp_path / "b", member_format=member_format)
    names = [path.name for path in sorted(first.iterdir())]
    assert names == ["shard_000000.tar", "shard_000001.tar", "shard_000002.tar"]
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_shards_have_the_published_format(tmp_path):
    with tarfile.open(write(tmp_path) / "shard_000001.tar") as tar:
        members = [f"{index:09d}.{kind}" for index in (3, 4, 5) for kind in ("latent.pt", "embed.pt", "prompt.txt")]
        assert tar.getnames() == members
        stored = torch.load(io.BytesIO(tar.extractfile("000000004.latent.pt").read()), weights_only=True)
        assert torch.equal(stored, latent(4))
        assert tar.extractfile("000000004.prompt.txt").read().decode() == "prompt 4 é"


def test_a_view_is_stored_without_its_base(tmp_path):
    base = torch.zeros(1000, 2, 3, 4, 5)
    with ShardWriter(tmp_path) as writer:
        writer.add("a", latent_CTHW=base[3], embed_LD=torch.zeros(1, 1), prompt="")
    assert (tmp_path / "shard_000000.tar").stat().st_size < 20_000


def test_an_exception_publishes_no_partial_shard(tmp_path):
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, samples_per_shard=2) as writer:
        for index in range(3):
            writer.add(str(index), latent_CTHW=latent(index), embed_LD=torch.zeros(1, 1), prompt="")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["shard_000000.tar"]


def test_writer_refuses_bad_input(tmp_path):
    with ShardWriter(tmp_path / "a", member_format="npy") as writer:
        for key in ("", "a.b", "a/b", "x" * 81):
            with pytest.raises(ValueError, match="key"):
                writer.add(key, latent_CTHW=latent(0), embed_LD=torch.zeros(1, 1), prompt="")
        with pytest.raises(ValueError, match="bfloat16"):
            writer.add("a", latent_CTHW=latent(0).bfloat16(), embed_LD=torch.zeros(1, 1), prompt="")
    assert list((tmp_path / "a").iterdir()) == []
    with pytest.raises(FileExistsError, match="shard_000000.tar"):
        write(write(tmp_path / "b"))
    with pytest.raises(ValueError, match="member_format"):
        ShardWriter(tmp_path, member_format="pickle")


@pytest.mark.parametrize("member_format", ["pt", "npy", "safetensors"])
def test_offsets_give_the_members_contents(tmp_path, member_format):
    manifest = build_manifest(write(tmp_path, member_format=member_format), on_error="raise")
    reader = ShardReader(tmp_path)
    assert keys(manifest) == [f"{index:09d}" for index in range(7)]
    for row in range(len(manifest)):
        record = manifest.record(row)
        member = record.members[LATENT]
        assert member.name == f"{row:09d}.latent.{member_format}"
        data = reader.read(record.shard, offset=member.offset, size=member.size, shard_size=record.shard_size)
        np.testing.assert_array_equal(decode_tensor(data, member.format), latent(row).numpy())


def test_scan_reads_tars_of_other_writers(tmp_path):
    """PAX headers, folders, members of other kinds, files added in two goes."""
    names = ["./s/a.latent.pt", "s/a.embed.npy", "s/a.mp4", "s/a.prompt.txt", "._x", "s/" + "b" * 120 + ".latent.pt"]
    for mode, some in (
        ("w", names),
        ("a", ["s/" + "b" * 120 + ".embed.pt", "s/" + "b" * 120 + ".prompt.txt"]),
    ):
        with tarfile.open(tmp_path / "x.tar", mode, format=tarfile.PAX_FORMAT) as tar:
            for name in some:
                header = tarfile.TarInfo(name)
                header.size = 700
                tar.addfile(header, io.BytesIO(b"z" * 700))
    manifest = build_manifest(tmp_path, on_error="raise")
    assert keys(manifest) == ["s/a", "s/" + "b" * 120]
    latent_member, embed_member, prompt_member = manifest.record(0).members[:3]
    assert (latent_member.format, embed_member.format, prompt_member.format) == ("pt", "npy", "txt")
    assert prompt_member.offset < manifest.record(1).members[2].offset


def offset_of(path, name):
    with tarfile.open(path) as tar:
        return tar.getmember(name).offset


@pytest.mark.parametrize(
    ("cut_after", "named"),
    [(0, "no end-of-archive mark"), (100, "truncated"), (512, "000000004.latent.pt"), (700, "000000004.latent.pt")],
)
def test_truncated_shard_is_named_and_keeps_its_whole_samples(tmp_path, caplog, cut_after, named):
    shard = write(tmp_path) / "shard_000001.tar"
    shard.write_bytes(shard.read_bytes()[: offset_of(shard, "000000004.latent.pt") + cut_after])
    manifest = build_manifest(tmp_path)
    assert keys(manifest) == [f"{index:09d}" for index in (0, 1, 2, 3, 6)]
    assert "shard_000001.tar" in manifest.problems[0]
    assert named in manifest.problems[0]
    assert manifest.problems[0] in caplog.text
    with pytest.raises(DatasetError, match="shard_000001.tar"):
        build_manifest(tmp_path, on_error="raise")


@pytest.mark.parametrize("content", [b"", b"not a tar" * 200, None])
def test_unreadable_shard_is_named_and_left_out(tmp_path, content):
    shard = write(tmp_path) / "shard_000001.tar"
    if content is None:  # one header in the middle overwritten
        data = bytearray(shard.read_bytes())
        start = offset_of(shard, "000000003.latent.pt")
        data[start : start + 512] = b"\xff" * 512
        content = bytes(data)
    shard.write_bytes(content)
    manifest = build_manifest(tmp_path)
    assert keys(manifest) == [f"{index:09d}" for index in (0, 1, 2, 6)]
    assert len(manifest.problems) == 1
    assert "shard_000001.tar" in manifest.problems[0]


def test_damaged_header_in_the_middle_is_not_taken_for_the_end(tmp_path):
    shard = write(tmp_path) / "shard_000000.tar"
    data = bytearray(shard.read_bytes())
    start = offset_of(shard, "000000001.latent.pt")
    data[start : start + 512] = b"\xff" * 512
    shard.write_bytes(data)
    manifest = build_manifest(tmp_path)
    assert len(manifest) == 5
    assert f"shard_000000.tar: damaged: the header at byte {start}" in manifest.problems[0]


def test_missing_member_is_named(tmp_path):
    write(tmp_path)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("k.latent.pt"))
        tar.addfile(tarfile.TarInfo("k.prompt.txt"))
    manifest = build_manifest(tmp_path)
    assert len(manifest) == 7
    assert manifest.problems == ("shard x.tar, key k: no member k.embed.* in the shard",)


def test_folder_without_a_usable_sample_is_an_error(tmp_path):
    with pytest.raises(DatasetError, match=r"no \*\.tar"):
        build_manifest(tmp_path)
    (tmp_path / "x.tar").write_bytes(b"junk" * 1000)
    with pytest.raises(DatasetError, match=r"x\.tar"):
        build_manifest(tmp_path)


def test_saved_manifest_is_the_same(tmp_path, caplog):
    built = load_or_build_manifest(write(tmp_path))
    loaded = load_or_build_manifest(tmp_path, on_error="raise")
    assert loaded.fingerprint == built.fingerprint
    assert loaded.shards == built.shards
    assert [loaded.record(row) for row in range(7)] == [built.record(row) for row in range(7)]
    assert len(list(tmp_path.iterdir())) == 3 + 2  # no temporary file stays behind
    assert build_manifest(tmp_path, checksums=True).shards[0].sha256 == shards_module.file_sha256(
        tmp_path / "shard_000000.tar"
    )


def rewritten(folder, *, offset):
    """The shards again under their names, with the same keys, sizes and captions, and other numbers."""
    for path in folder.glob("shard_*.tar"):
        path.unlink()
    with ShardWriter(folder, samples_per_shard=3, member_format="npy") as writer:
        for index in range(7):
            embed = torch.full((4, 6), float(index))
            writer.add(f"{index:09d}", latent_CTHW=latent(index + offset), embed_LD=embed, prompt=f"prompt {index} é")
    return folder


def first_latent(manifest):
    record = manifest.record(0)
    member = record.members[LATENT]
    reader = ShardReader(manifest.folder)
    data = reader.read(record.shard, offset=member.offset, size=member.size, shard_size=record.shard_size)
    return decode_tensor(data, member.format)


@pytest.mark.parametrize("times", ["newer", "preserved"])
def test_a_manifest_older_than_its_shards_is_built_again(tmp_path, caplog, times):
    """`preserved`: as rsync -t and cp -p set them, older than the manifest."""
    before = load_or_build_manifest(rewritten(tmp_path, offset=0)).fingerprint
    stamps = {path: path.stat() for path in tmp_path.glob("*.tar")}
    rewritten(tmp_path, offset=50)
    for path, stamp in stamps.items() if times == "preserved" else ():
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        assert path.stat().st_size == stamp.st_size
    with pytest.raises(StaleManifestError, match=r"older than 3 of its shards: shard shard_000000.tar: other content"):
        load_manifest(tmp_path)
    manifest = load_or_build_manifest(tmp_path, on_error="raise")
    assert "it is built again" in caplog.text
    np.testing.assert_array_equal(first_latent(manifest), latent(50).numpy())
    assert manifest.fingerprint != before
    assert load_manifest(tmp_path, on_error="raise").fingerprint == manifest.fingerprint


def test_other_captions_of_the_same_length_change_the_fingerprint(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, word in zip(folders, ("left", "down"), strict=True):
        with ShardWriter(folder) as writer:
            writer.add("a", latent_CTHW=latent(0), embed_LD=torch.zeros(1, 1), prompt=word)
    assert len({build_manifest(folder).fingerprint for folder in folders}) == 2


def test_a_builders_manifest_is_not_replaced(tmp_path):
    build_manifest(rewritten(tmp_path, offset=0), checksums=True, description={"build": {}}).save()
    rewritten(tmp_path, offset=1)
    with pytest.raises(StaleManifestError, match=r"restore them, or delete manifest.json"):
        load_or_build_manifest(tmp_path, on_error="skip")
    (tmp_path / MANIFEST_NAME).unlink()
    np.testing.assert_array_equal(first_latent(load_or_build_manifest(tmp_path)), latent(1).numpy())


def test_a_copied_dataset_is_looked_at_once(tmp_path, monkeypatch):
    """Its shards are newer than the manifest that came with them, and the same."""
    built = load_or_build_manifest(write(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    os.utime(tmp_path / "b" / MANIFEST_NAME, ns=(1, 1))
    scanned = []
    monkeypatch.setattr(manifest_module, "scan_shard", lambda path: scanned.append(path) or scan_shard(path))
    for _ in range(3):
        assert load_manifest(tmp_path / "b", on_error="raise").fingerprint == built.fingerprint
        assert len(scanned) == 3
    (tmp_path / "b" / MANIFEST_NAME).unlink()
    assert build_manifest(tmp_path / "b").fingerprint == built.fingerprint


def test_a_broken_manifest_is_a_message(tmp_path):
    built = build_manifest(write(tmp_path))
    path = built.save()
    (tmp_path / f"manifest-{built.fingerprint[:12]}.npy").unlink()
    with pytest.raises(DatasetError, match="manifest.json cannot be read .*delete it"):
        load_manifest(tmp_path)
    for text in ("{", "[]", "{}", '{"version": 2}'):
        path.write_text(text)
        with pytest.raises(DatasetError, match="delete it to have it built again"):
            load_or_build_manifest(tmp_path)


def test_shards_that_came_or_went_since_the_scan_are_named(tmp_path, caplog):
    build_manifest(write(tmp_path)).save()
    (tmp_path / "shard_000001.tar").rename(tmp_path / "shard_000009.tar")
    load_manifest(tmp_path, on_error="skip")
    assert "shard_000001.tar" in caplog.text
    assert "shard_000009.tar" in caplog.text
    with pytest.raises(DatasetError, match=r"shard_000001\.tar"):
        load_manifest(tmp_path, on_error="raise")
    with pytest.raises(DatasetError, match=MANIFEST_NAME):
        load_manifest(tmp_path / "elsewhere")


def test_reader_names_a_shard_that_changed_and_survives_eviction(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "_MAX_OPEN_SHARDS", 1)
    manifest = build_manifest(write(tmp_path))
    reader = ShardReader(tmp_path)

    def read(row):
        record = manifest.record(row % 7)
        member = record.members[LATENT]
        return reader.read(record.shard, offset=member.offset, size=member.size, shard_size=record.shard_size)

    with ThreadPoolExecutor(4) as threads:
        data = list(threads.map(read, range(70)))
    for row in range(70):
        np.testing.assert_array_equal(decode_tensor(data[row], "pt"), latent(row % 7).numpy())
    with pytest.raises(OSError, match="manifest says 5"):
        ShardReader(tmp_path).read("shard_000000.tar", offset=0, size=1, shard_size=5)
    size = (tmp_path / "shard_000000.tar").stat().st_size
    with pytest.raises(OSError, match="truncated"):
        reader.read("shard_000000.tar", offset=size - 1, size=2, shard_size=size)


def test_order_is_a_permutation_of_seed_and_epoch_alone(tmp_path):
    manifest = build_manifest(write(tmp_path, num_samples=10))
    order = manifest.order(epoch=0, seed=0)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(10))
    assert not np.array_equal(order, manifest.order(epoch=1, seed=0))
    assert not np.array_equal(order, manifest.order(epoch=0, seed=1))
    assert order.tolist() == [1, 5, 0, 3, 2, 9, 6, 4, 7, 8], "a run could not be resumed after this change"
