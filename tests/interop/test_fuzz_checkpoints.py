"""Damaged and hostile checkpoints from seeds: each is a CheckpointError that names a file, or converts; nothing half-written appears.

What no reader can notice is not claimed: changed bytes inside the data of a safetensors or .pt file, which have no checksum, and two
tensors of one shape under each other's names. `--verify` compares with the source, so it does not see them either.
"""

import errno
import json
import os
import pickle
import random
import re
import resource
import shutil
import subprocess
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file

from rcm_megatron.errors import CheckpointError
from tests.interop.conversion import convert
from tests.interop.damaged import copy, digest, outcome

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


def campaign(source, change, tmp_path, *, cases, seed):
    """Messages of `cases` damaged copies; `change(path, random)` damages one."""
    messages = []
    for case in range(cases):
        damaged = tmp_path / source.name
        copy(source, damaged)
        change(damaged, random.Random(f"{seed}/{case}"))
        messages.append(outcome(damaged, tmp_path / "out"))
        shutil.rmtree(damaged) if damaged.is_dir() else damaged.unlink()
    return messages


def truncate(path, rng):
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def flip(path, rng, *, start=0, stop=None, most=3):
    content = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, most)):
        content[rng.randrange(start, stop or len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def header_end(path):
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


# ---- safetensors


def test_truncated_safetensors(sources, tmp_path):
    def in_header(folder, rng):
        path = folder / WEIGHTS
        path.write_bytes(path.read_bytes()[: rng.randrange(header_end(path))])

    messages = campaign(sources / "single", in_header, tmp_path, cases=15, seed="header")
    messages += campaign(
        sources / "single", lambda folder, rng: truncate(folder / WEIGHTS, rng), tmp_path, cases=25, seed="data"
    )
    for message in messages:
        assert f"{WEIGHTS}: truncated or not a safetensors file" in message


def test_a_shard_of_several_truncated(sources, tmp_path):
    def change(folder, rng):
        truncate(rng.choice(sorted(folder.glob("*.safetensors"))), rng)

    for message in campaign(sources / "shards", change, tmp_path, cases=10, seed="shard"):
        assert "-of-" in message and "truncated or not a safetensors file" in message


def test_corrupted_headers(sources, tmp_path):
    """A flipped bit may hit the free text of the metadata; then the file is as good as before."""

    def change(folder, rng):
        flip(folder / WEIGHTS, rng, stop=header_end(folder / WEIGHTS))

    messages = campaign(sources / "single", change, tmp_path, cases=80, seed="bits")
    assert sum(message is not None for message in messages) > 70


def test_integers_are_not_weights(sources, tmp_path):
    def change(folder, rng):
        tensors = load_file(folder / WEIGHTS)
        name = rng.choice(sorted(tensors))
        tensors[name] = tensors[name].view(torch.int32)
        save_file(tensors, folder / WEIGHTS)

    for message in campaign(sources / "single", change, tmp_path, cases=5, seed="integers"):
        assert "holds torch.int32; need floating-point weights" in message


def test_tensors_under_each_others_names(sources, tmp_path):
    """Of different shapes they are noticed; of one shape nobody can tell."""
    shapes = {name: tuple(value.shape) for name, value in load_file(sources / "single" / WEIGHTS).items()}

    def change(folder, rng):
        tensors, first = load_file(folder / WEIGHTS), rng.choice(sorted(shapes))
        second = rng.choice([name for name in sorted(shapes) if shapes[name] != shapes[first]])
        tensors[first], tensors[second] = tensors[second], tensors[first]
        save_file(tensors, folder / WEIGHTS)

    for message in campaign(sources / "single", change, tmp_path, cases=15, seed="swap"):
        assert message.count("got shape") == 2


INDEX_DAMAGE = {
    "file": "which is not in",
    "shard": "does not match its files.*(listed in the index but not in|but not listed for it)",
    "extra": "does not match its files.*listed in the index but not in",
    "lost": "does not match its files.*but not listed for it",
    "escape": "names the file '../shards/.*, which is not in",
    "absolute": "names the file '/.*, which is not in",
    "number": "no 'weight_map' from keys to file names",
    "list": "no 'weight_map' from keys to file names",
    "empty": "no 'weight_map' from keys to file names",
    "text": "not readable as JSON",
    "renamed": "listed in the index but not in.*but not listed for it",
}
"""What is done to the index of a sharded checkpoint -> what the error says."""


@pytest.mark.parametrize("kind", INDEX_DAMAGE)
def test_wrong_indices(sources, tmp_path, kind):
    def change(folder, rng):
        index = json.loads((folder / INDEX).read_text())
        where, files = index["weight_map"], sorted(folder.glob("*.safetensors"))
        key = rng.choice(sorted(where))
        if kind == "file":
            rng.choice(files).unlink()
        elif kind == "shard":
            where[key] = rng.choice([file.name for file in files if file.name != where[key]])
        elif kind == "extra":
            where[f"{key}.more"] = where[key]
        elif kind == "lost":
            del where[key]
        elif kind in ("list", "empty"):
            index["weight_map"] = sorted(where.items()) if kind == "list" else {}
        elif kind == "renamed":
            where[f"{key}s"] = where.pop(key)
        elif kind != "text":
            changed = {
                "escape": f"../shards/{where[key]}",
                "absolute": str(folder / where[key]),
                "number": rng.random(),
            }
            where[key] = changed[kind]
        text = json.dumps(index)
        (folder / INDEX).write_text(text[: rng.randrange(len(text))] if kind == "text" else text)

    for message in campaign(sources / "shards", change, tmp_path, cases=5, seed=kind):
        assert re.search(INDEX_DAMAGE[kind], message, flags=re.DOTALL), message


# ---- .pt, .pth, torch_dist


@pytest.mark.parametrize("name", ["rcm.pt", "legacy.pth"])
def test_damaged_pickles(sources, tmp_path, name):
    messages = campaign(sources / name, truncate, tmp_path, cases=20, seed="cut")
    assert None not in messages
    assert all(name in message for message in messages)
    size = (sources / name).stat().st_size
    table = (size - 4000, size) if name == "rcm.pt" else (0, 4000)  # where the archive's directory, or the pickles, are
    campaign(
        sources / name,
        lambda path, rng: flip(path, rng, start=table[0], stop=table[1]),
        tmp_path,
        cases=30,
        seed="table",
    )
    campaign(sources / name, flip, tmp_path, cases=10, seed="flip")


def test_damaged_torch_dist(sources, tmp_path):
    def cut_data(folder, rng):
        truncate(rng.choice(sorted(folder.glob("*.distcp"))), rng)

    for message in campaign(sources / "dist", cut_data, tmp_path, cases=15, seed="data"):
        assert ".distcp: truncated" in message
    for message in campaign(
        sources / "dist", lambda folder, rng: truncate(folder / ".metadata", rng), tmp_path, cases=15, seed="cut"
    ):
        assert ".metadata: refused, it is damaged" in message

    def flip_data(folder, rng):
        flip(rng.choice(sorted(folder.glob("*.distcp"))), rng)

    campaign(sources / "dist", flip_data, tmp_path, cases=15, seed="bits")
    messages = campaign(
        sources / "dist", lambda folder, rng: flip(folder / ".metadata", rng), tmp_path, cases=60, seed="metadata"
    )
    assert sum(message is not None for message in messages) > 40


def test_a_torch_dist_file_is_looked_for_in_its_folder_only(sources, tmp_path):
    folder = copy(sources / "dist", tmp_path / "dist")
    content = (folder / ".metadata").read_bytes()
    assert b"__0_0.distcp" in content
    (folder / ".metadata").write_bytes(content.replace(b"__0_0.distcp", b"../_0.distcp"))
    (folder / "__0_0.distcp").rename(tmp_path / "_0.distcp")
    assert "is said to be in the file '../_0.distcp', which is not there" in outcome(folder, tmp_path / "out")


def test_chunks_that_leave_a_gap(sources, tmp_path):
    """Memory that no chunk fills must not be taken for weights."""
    folder = copy(sources / "dist", tmp_path / "dist")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    chunk = metadata.state_dict_metadata["network.model.head.linear.bias"].chunks[0]
    chunk.sizes = torch.Size([7])
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "its chunks hold 7 of 12 elements of 'network.model.head.linear.bias'" in outcome(folder, tmp_path / "out")


# ---- targets that cannot be written


@contextmanager
def mounted(folder, options):
    """A tmpfs at `folder`; skips, saying so, where this process may not mount."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"NOT TESTED: a tmpfs with {options} cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


TARGETS = {"internal": "out", "torch_dist": "out", "nvlabs": "out.pt", "safetensors": "out.safetensors"}


def refused(source, target, kind):
    before = digest(source)
    form = "nvlabs" if kind == "safetensors" else kind
    with pytest.raises(CheckpointError, match=rf"{target.name}: cannot be written .*nothing was left there") as caught:
        convert(source, target, to=form, max_shard_size=40_000)
    assert digest(source) == before
    return str(caught.value)


@pytest.mark.parametrize("kind", TARGETS)
def test_a_read_only_target(sources, tmp_path, kind):
    with mounted(tmp_path / "ro", "ro") as folder:
        for target in (folder / TARGETS[kind], folder / "sub" / TARGETS[kind]):
            assert os.strerror(errno.EROFS) in refused(sources / "single", target, kind)


@pytest.mark.parametrize("kind", TARGETS)
def test_a_full_disk(sources, tmp_path, kind):
    with mounted(tmp_path / "full", "size=40k") as folder:
        refused(sources / "single", folder / TARGETS[kind], kind)
        assert not list(folder.iterdir())


@contextmanager
def largest_file(num_bytes):
    """No file of this process may grow past that; Python ignores the signal, so that writing fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("num_bytes", [2000, 30_000])
def test_a_file_that_may_not_grow(sources, tmp_path, kind, num_bytes):
    with largest_file(num_bytes):
        refused(sources / "single", tmp_path / TARGETS[kind], kind)
    assert not list(tmp_path.iterdir())


def test_the_earlier_target_survives_a_full_disk(sources, tmp_path):
    target = tmp_path / "out"
    convert(sources / "single", target, to="internal")
    before = digest(target)
    with largest_file(30_000), pytest.raises(CheckpointError, match="cannot be written"):
        convert(sources / "single", target, to="internal", force=True)
    assert digest(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
