"""Shards as other programs and people make them: read right, or named; never another sample's numbers."""

import io
import shutil
import subprocess
import tarfile

import numpy as np
import pytest
import torch

from rcm_megatron.data.manifest import DatasetError, build_manifest
from rcm_megatron.data.samples import SampleSource
from rcm_megatron.data.shards import encode_tensor

SHAPE = (2, 3, 8, 8)
GNU_TAR = shutil.which("tar")


def members(key, value, member_format="npy"):
    """[(name, bytes)] of a sample whose numbers are all `value`."""
    return [
        (f"{key}.latent.{member_format}", encode_tensor(torch.full(SHAPE, float(value)), member_format)),
        (f"{key}.embed.{member_format}", encode_tensor(torch.full((2, 5), float(value)), member_format)),
        (f"{key}.prompt.txt", f"caption {value}".encode()),
    ]


def pack(path, files, **kwargs):
    with tarfile.open(path, "w", **kwargs) as tar:
        for name, data in files:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def unpack(folder, files):
    folder.mkdir(parents=True)
    for name, data in files:
        (folder / name).write_bytes(data)
    return folder


def contents(folder, *, on_error="raise"):
    """{key: (mean of the latent, caption)} as the loader reads them."""
    manifest = build_manifest(folder, on_error=on_error)
    source = SampleSource(manifest, seed=0, latent_shape=SHAPE, text_len=4, text_dim=5, on_error="raise")
    samples = [source[index] for index in range(len(manifest))]
    return {manifest.record(s.row).key: (float(s.latent_CTHW.mean()), s.prompt) for s in samples}


def sample(value):
    return (float(value), f"caption {value}")


def problems(folder):
    """What is named with on_error="skip", one line; the same is an error with "raise"."""
    found = build_manifest(folder, on_error="skip").problems
    with pytest.raises(DatasetError) as error:
        build_manifest(folder, on_error="raise")
    assert found[0] in str(error.value)
    return " | ".join(found)


@pytest.mark.skipif(GNU_TAR is None, reason="needs tar")
@pytest.mark.parametrize("version", ["gnu", "0.0", "0.1", "1.0"])
@pytest.mark.parametrize("holes", ["middle", "end", "everywhere"])
def test_a_sparse_member_is_named_and_its_neighbours_are_right(tmp_path, version, holes):
    big = np.ones((1, 64, 64, 64), np.float32)  # 1 MiB
    big[:, {"middle": slice(8, 56), "end": slice(8, None), "everywhere": slice(None)}[holes]] = 0
    folder = unpack(tmp_path / "in", [*members("a", 1), *members("b", 2), *members("c", 3)])
    with open(folder / "b.latent.npy", "wb") as file:
        np.save(file, big)
    subprocess.run(["fallocate", "--dig-holes", folder / "b.latent.npy"], check=True)
    assert (folder / "b.latent.npy").stat().st_blocks * 512 < big.nbytes, "the file has no hole"
    (tmp_path / "data").mkdir()
    kind = ["--format=gnu"] if version == "gnu" else ["--format=posix", f"--sparse-version={version}"]
    command = [GNU_TAR, "-cSf", tmp_path / "data" / "x.tar", *kind, "--sort=name", "-C", folder, "."]
    subprocess.run(command, check=True)
    assert "key b: member ./b.latent.npy is sparse" in problems(tmp_path / "data")
    assert contents(tmp_path / "data", on_error="skip") == {"a": sample(1), "c": sample(3)}


@pytest.mark.parametrize("padding", [0, 512, 10240, 200 * 512])
def test_archives_one_behind_the_other_are_read_to_the_end(tmp_path, padding):
    """`cat a.tar b.tar c.tar`, with more or less between them."""
    parts = [pack(tmp_path / f"{key}.part", members(key, value)) for value, key in enumerate("abc")]
    (tmp_path / "x.tar").write_bytes(b"".join(part.read_bytes() + bytes(padding) for part in parts))
    assert contents(tmp_path) == {"a": sample(0), "b": sample(1), "c": sample(2)}


@pytest.mark.skipif(GNU_TAR is None, reason="needs tar")
def test_archives_that_tar_joined(tmp_path):
    for value, key in enumerate("ab"):
        pack(tmp_path / f"{key}.part", members(key, value), format=tarfile.PAX_FORMAT)
    (tmp_path / "a.part").rename(tmp_path / "x.tar")
    subprocess.run([GNU_TAR, "-Af", tmp_path / "x.tar", tmp_path / "b.part"], check=True)
    assert contents(tmp_path) == {"a": sample(0), "b": sample(1)}


@pytest.mark.parametrize("cut", [False, True])
def test_what_is_behind_the_end_and_no_archive_is_named(tmp_path, cut):
    first, second = (pack(tmp_path / f"{key}.part", members(key, 1)).read_bytes() for key in "ab")
    rest = second[:900] if cut else b"\0" * 700 + b"some text" * 100
    (tmp_path / "x.tar").write_bytes(first + rest)
    assert ("truncated: b.latent.npy would end at byte" if cut else "damaged: the header at byte") in problems(tmp_path)
    assert contents(tmp_path, on_error="skip") == {"a": sample(1)}


TWICE = {
    "a sample": members("a", 7),
    "a latent": members("a", 7)[:1],
    "an embedding in another format": members("a", 7, "pt")[1:2],
    "a caption in a folder that is none": [("./a.prompt.txt", b"caption 7")],
}


@pytest.mark.parametrize("what", TWICE)
@pytest.mark.parametrize("joined", [False, True], ids=["in one archive", "behind its end"])
def test_a_key_that_comes_twice_is_named_and_left_out_whole(tmp_path, what, joined):
    base = [*members("a", 0), *members("b", 1)]
    if joined:
        data = pack(tmp_path / "1", base).read_bytes() + pack(tmp_path / "2", TWICE[what]).read_bytes()
        (tmp_path / "x.tar").write_bytes(data)
    else:
        pack(tmp_path / "x.tar", [*base, *TWICE[what]])
    assert "shard x.tar, key a: member a." in (found := problems(tmp_path)) and "comes twice" in found
    assert contents(tmp_path, on_error="skip") == {"b": sample(1)}


def test_one_key_in_two_shards_or_folders_is_two_samples(tmp_path):
    pack(tmp_path / "x.tar", [*members("a", 0), *members("f/a", 1)])
    pack(tmp_path / "y.tar", members("a", 2))
    manifest = build_manifest(tmp_path, on_error="raise")
    assert [manifest.record(row).key for row in range(3)] == ["a", "f/a", "a"]


ODD_NAMES = {
    "a dot": ("a.v2.{}", lambda kind: kind, "key a.v2: the key of member a.v2.latent.npy holds a dot"),
    "two dots": ("f/a.b.c.{}", lambda kind: kind, "key f/a.b.c: the key of member a.b.c.latent.npy holds a dot"),
    "capitals": ("a.{}", str.upper, "key a: got member a.LATENT.NPY, need the ending .latent.npy"),
    "one capital": ("a.{}", lambda kind: kind.replace("npy", "Npy"), "got member a.latent.Npy, need the ending"),
    "both": ("a.v2.{}", str.title, "key a.v2: the key of member a.v2.Latent.Npy holds a dot"),
}


@pytest.mark.parametrize("what", ODD_NAMES)
def test_members_that_would_vanish_are_named(tmp_path, what):
    name, change, message = ODD_NAMES[what]
    odd = [(name.format(change(old.partition(".")[2])), data) for old, data in members("a", 5)]
    pack(tmp_path / "x.tar", [*members("good", 1), *odd])
    assert message in problems(tmp_path)
    assert contents(tmp_path, on_error="skip") == {"good": sample(1)}


def test_files_that_are_no_part_of_a_sample_are_passed_over(tmp_path):
    """Dot files, as macOS packs them beside each member, and whatever else a dataset holds."""
    extra = [
        (name, b"x")
        for name in ("._a.latent.npy", "f/._a.prompt.txt", ".latent.npy", "a.mp4", "a.latents.npy", "README")
    ]
    pack(tmp_path / "x.tar", [*extra[:3], *members("a", 4), *extra[3:]])
    assert contents(tmp_path) == {"a": sample(4)}


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE], ids=["hard", "symbolic"])
def test_a_link_in_place_of_a_member_is_named(tmp_path, kind):
    with tarfile.open(pack(tmp_path / "x.tar", members("a", 1)), "a") as tar:
        for name, data in members("b", 2):
            header = tarfile.TarInfo(name)
            header.size = len(data)
            if "latent" in name:
                header.type, header.linkname, header.size = kind, "a.latent.npy", 0
            tar.addfile(header, io.BytesIO(data))
    assert "key b: member b.latent.npy is no file but a link" in problems(tmp_path)
    assert contents(tmp_path, on_error="skip") == {"a": sample(1)}


def test_names_that_are_not_utf8_are_messages(tmp_path):
    pack(tmp_path / "good.tar", members("a", 1))
    latin = [(name.replace("a", "\xe4", 1), data) for name, data in members("a", 2)]
    pack(tmp_path / "x.tar", [*members("b", 3), *latin], format=tarfile.GNU_FORMAT, encoding="latin-1")
    shutil.copy(tmp_path / "good.tar", bytes(tmp_path) + b"/caf\xe9.tar")
    found = problems(tmp_path)
    assert r"shard x.tar, key \xe4: the name of member \xe4.latent.npy is not UTF-8" in found
    assert r"shard caf\xe9.tar: its name is not UTF-8" in found
    assert contents(tmp_path, on_error="skip") == {"a": sample(1), "b": sample(3)}
    build_manifest(tmp_path).save()


def test_dot_files_are_no_shards_and_broken_links_are_named(tmp_path):
    pack(tmp_path / "x.tar", members("a", 1))
    for name in ("._x.tar", ".tar", ".DS_Store"):
        (tmp_path / name).write_bytes(bytes.fromhex("0005160700020000") + b"Mac OS X" + bytes(100))
    assert contents(tmp_path) == {"a": sample(1)}
    (tmp_path / "away.tar").symlink_to(tmp_path / "nowhere" / "away.tar")
    (tmp_path / "folder.tar").mkdir()
    (tmp_path / "loop.tar").symlink_to("loop.tar")
    found = problems(tmp_path)
    assert "shard away.tar: No such file" in found and "shard folder.tar: Is a directory" in found
    assert "shard loop.tar: Too many levels" in found
    assert contents(tmp_path, on_error="skip") == {"a": sample(1)}
    assert len(build_manifest(tmp_path, checksums=True).shards) == 1


def test_a_caption_with_a_byte_order_mark(tmp_path):
    pack(tmp_path / "x.tar", [*members("a", 1)[:2], ("a.prompt.txt", "\ufeffa cat".encode())])
    assert contents(tmp_path) == {"a": (1.0, "a cat")}
