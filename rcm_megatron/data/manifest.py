"""The manifest of a dataset folder: where every sample's members lie, and the one order in which all layouts read them.

`manifest.json` names the shards, what was wrong with them, and the index file beside it: a NumPy structured array with one row
per sample, memory-mapped when read, so that ten million samples cost neither parsing nor memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
import torch

from rcm_megatron.data.shards import PROMPT_SUFFIX, TENSOR_FORMATS, file_sha256

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
LATENT, EMBED, PROMPT, IMAGE_LATENT, IMAGE_EMBED = range(5)
KINDS = ("latent", "embed", "prompt", "image_latent", "image_embed")
_NEEDED = (LATENT, EMBED, PROMPT)
"""What every sample has. Only networks that are given an image ask for the other two."""
_VERSIONS = {len(_NEEDED): 1, len(KINDS): 2}
"""Of the manifest, by the kinds of members in its index: datasets without images have manifests as they always had."""
_FORMATS = (*TENSOR_FORMATS, "txt")
_TENSORS = (LATENT, EMBED, IMAGE_LATENT, IMAGE_EMBED)
_SUFFIXES = {f"{KINDS[kind]}.{name}": (kind, name) for kind in _TENSORS for name in TENSOR_FORMATS}
_SUFFIXES[PROMPT_SUFFIX] = (PROMPT, "txt")
_TAR_BLOCK = 512
_SCAN_THREADS = 8  # a scan waits for the file system, not for the processor


class DatasetError(RuntimeError):
    """A dataset folder that cannot be used; the message names the shard and what is wrong with it."""


class Member(NamedTuple):
    """One file inside a shard."""

    name: str
    format: str
    offset: int
    size: int


_ABSENT = Member("", TENSOR_FORMATS[0], 0, -1)


class Record(NamedTuple):
    """Where one sample lies."""

    shard: str
    shard_size: int
    key: str
    members: tuple[Member | None, ...]
    """Indexed by LATENT, EMBED, PROMPT, IMAGE_LATENT, IMAGE_EMBED; None for an image member that the shard lacks."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar file as it was when it was scanned."""

    name: str
    size: int
    num_samples: int
    sha256: str | None = None
    """Only if the scan was asked for it: it reads the whole shard."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Manifest:
    """The samples of a dataset folder."""

    folder: Path
    shards: tuple[Shard, ...]
    index: np.ndarray
    """[N] rows of (key, shard, offset[K], size[K], format[K]); K is 5 if any sample has image members, else 3. Size -1: no such member."""
    problems: tuple[str, ...] = ()
    """What the scan left out, one line each, naming shard and key."""
    description: Mapping[str, object] = field(default_factory=dict)
    """What the builder of the dataset wrote down about it."""

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def fingerprint(self) -> str:
        """Changes whenever a shard or a sample does; part of the data position of a checkpoint."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps([(shard.name, shard.size) for shard in self.shards]).encode())
        digest.update(np.ascontiguousarray(self.index).view(np.uint8))
        return digest.hexdigest()

    def record(self, row: int) -> Record:
        """Sample number `row` of the folder (not of the reading order)."""
        entry = self.index[row]
        shard = self.shards[int(entry["shard"])]
        key = entry["key"].decode("utf-8")
        members: list[Member | None] = [None] * len(KINDS)
        for kind in np.flatnonzero(entry["size"] >= 0):
            member_format = _FORMATS[int(entry["format"][kind])]
            name = f"{key}.{KINDS[kind]}.{member_format}"
            members[kind] = Member(name, member_format, int(entry["offset"][kind]), int(entry["size"][kind]))
        return Record(shard.name, shard.size, key, tuple(members))

    def check_has(self, kind: int) -> None:
        """DatasetError if no sample has members of that kind, as in a dataset that was built for another network."""
        if kind >= self.index["size"].shape[1] or (self.index["size"][:, kind] < 0).all():
            raise DatasetError(
                f"{self.folder} holds no {KINDS[kind]} members, which this network is given; build it with them, from the first frame of "
                "each video"
            )

    def order(self, *, epoch: int, seed: int) -> np.ndarray:
        """The permutation of the rows, int64 [N], in which epoch `epoch` reads them; depends on (seed, epoch, N) alone."""
        digest = hashlib.blake2b(f"data order/{seed}/{epoch}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        return torch.randperm(len(self), generator=generator, dtype=torch.int64).numpy()

    def save(self) -> Path:
        """Write `manifest.json` and its index into the folder, each atomically; returns the path of the former."""
        index_file = f"manifest-{self.fingerprint[:12]}.npy"
        header = {
            "version": _VERSIONS[self.index["size"].shape[1]],
            "num_samples": len(self),
            "index_file": index_file,
            "fingerprint": self.fingerprint,
            "description": dict(self.description),
            "problems": list(self.problems),
            "shards": [asdict(shard) for shard in self.shards],
        }
        _write_atomically(self.folder / index_file, lambda file: np.save(file, self.index, allow_pickle=False))
        text = (json.dumps(header, indent=1, ensure_ascii=False) + "\n").encode("utf-8")
        _write_atomically(self.folder / MANIFEST_NAME, lambda file: file.write(text))
        return self.folder / MANIFEST_NAME


def _write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    file_descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(file_descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load_manifest(folder: str | os.PathLike[str], *, on_error: Literal["skip", "raise"] = "skip") -> Manifest:
    """Read the manifest of `folder`.

    With on_error="raise", a manifest that lists problems is an error, and so are shards that came or went since the scan; with
    "skip" both are logged (samples of a vanished shard are then skipped when their turn comes).
    """
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; build it with build_manifest({str(folder)!r}).save()")
    header = json.loads(path.read_text(encoding="utf-8"))
    if header.get("version") not in _VERSIONS.values():
        raise DatasetError(
            f"{path} has version {header.get('version')}, need {max(_VERSIONS.values())}; build it again"
        )
    index = np.load(folder / header["index_file"], mmap_mode="r", allow_pickle=False)
    if len(index) != header["num_samples"]:
        raise DatasetError(f"{path} says {header['num_samples']} samples, its index has {len(index)}; build it again")
    manifest = Manifest(
        folder=folder,
        shards=tuple(Shard(**shard) for shard in header["shards"]),
        index=index,
        problems=tuple(header["problems"]),
        description=header["description"],
    )
    manifest.__dict__["fingerprint"] = header["fingerprint"]  # so that no rank has to hash the index again
    _report([*manifest.problems, *_changes_since_scan(manifest)], on_error=on_error)
    return manifest


def _changes_since_scan(manifest: Manifest) -> Iterator[str]:
    known = {shard.name for shard in manifest.shards}
    present = {path.name for path in manifest.folder.glob("*.tar")}
    for name in sorted(known - present):
        yield f"shard {name}: listed in the manifest, but gone from {manifest.folder}"
    for name in sorted(present - known):
        yield f"shard {name}: not in the manifest of {manifest.folder}; delete {MANIFEST_NAME} to have it built again"


def build_manifest(
    folder: str | os.PathLike[str],
    *,
    on_error: Literal["skip", "raise"] = "skip",
    checksums: bool = False,
    description: Mapping[str, object] | None = None,
) -> Manifest:
    """Scan the tar headers of every `*.tar` in `folder`, in the order of their names. Members' contents are not read.

    Truncated or unreadable shards and samples that lack a member are named: an error with on_error="raise", otherwise left out,
    logged and listed in `problems` (a truncated shard keeps the samples that are whole). Raises DatasetError if nothing is left.
    """
    folder = Path(folder)
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise DatasetError(f"{folder} holds no *.tar shard; check the path, or build a dataset there")
    with ThreadPoolExecutor(_SCAN_THREADS) as threads:
        scans = list(threads.map(scan_shard, paths))
        hashes = list(threads.map(file_sha256, paths)) if checksums else [None] * len(paths)
    problems = tuple(problem for _, found in scans for problem in found)
    _report(problems, on_error=on_error)
    shards = tuple(
        Shard(name=path.name, size=path.stat().st_size, num_samples=len(samples), sha256=sha256)
        for path, (samples, _), sha256 in zip(paths, scans, hashes, strict=True)
    )
    index = _index_of([samples for samples, _ in scans])
    if not len(index):
        raise DatasetError(f"{folder} holds no whole sample in {len(paths)} shards; first problem: {problems[:1]}")
    return Manifest(folder=folder, shards=shards, index=index, problems=problems, description=description or {})


def load_or_build_manifest(folder: str | os.PathLike[str], *, on_error: Literal["skip", "raise"] = "skip") -> Manifest:
    """The saved manifest, or else a new one, saved if the folder allows. Several processes may call this at once."""
    folder = Path(folder)
    if (folder / MANIFEST_NAME).is_file():
        return load_manifest(folder, on_error=on_error)
    manifest = build_manifest(folder, on_error=on_error)
    try:
        manifest.save()
    except OSError as error:
        logger.warning("manifest of %s not saved (%s); it will be built at every start", folder, error)
    return manifest


def _report(problems: list[str] | tuple[str, ...], *, on_error: Literal["skip", "raise"]) -> None:
    if on_error not in ("skip", "raise"):
        raise ValueError(f"on_error={on_error!r} is unknown; use 'skip' or 'raise'")
    if problems and on_error == "raise":
        raise DatasetError("; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else ""))
    for problem in problems:
        logger.warning("left out: %s", problem)


def _index_of(scans: list[dict[str, dict[int, Member]]]) -> np.ndarray:
    key_bytes = max((len(key.encode("utf-8")) for samples in scans for key in samples), default=1)
    has_images = any(len(members) > len(_NEEDED) for samples in scans for members in samples.values())
    kinds = len(KINDS) if has_images else len(_NEEDED)
    fields = [("key", f"S{key_bytes}"), ("shard", "<i4")]
    fields += [("offset", "<i8", kinds), ("size", "<i8", kinds), ("format", "u1", kinds)]
    index = np.zeros(sum(map(len, scans)), dtype=fields)
    row = 0
    for shard, samples in enumerate(scans):
        for key, members in samples.items():
            ordered = [members.get(kind, _ABSENT) for kind in range(kinds)]
            formats = [_FORMATS.index(member.format) for member in ordered]
            offsets, sizes = [member.offset for member in ordered], [member.size for member in ordered]
            index[row] = (key.encode("utf-8"), shard, offsets, sizes, formats)
            row += 1
    return index


def scan_shard(path: Path) -> tuple[dict[str, dict[int, Member]], list[str]]:
    """The whole samples of one shard, {key: {kind: Member}} in their order, and what is wrong with it, naming it."""
    samples: dict[str, dict[int, Member]] = {}
    problems: list[str] = []
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for name, offset, size in _members(tar, os.fstat(file.fileno()).st_size):
                folder, _, base = name.rpartition("/")
                key, _, suffix = base.partition(".")
                if key and suffix in _SUFFIXES:
                    kind, member_format = _SUFFIXES[suffix]
                    key = f"{folder}/{key}" if folder else key
                    samples.setdefault(key, {})[kind] = Member(name, member_format, offset, size)
    except (tarfile.TarError, OSError, EOFError) as error:
        problems.append(f"shard {path.name}: {error}")
    whole = {key: members for key, members in samples.items() if members.keys() >= set(_NEEDED)}
    for key, members in samples.items():
        for kind in sorted(set(_NEEDED) - members.keys()):
            problems.append(f"shard {path.name}, key {key}: no member {key}.{KINDS[kind]}.* in the shard")
    return whole, problems


def _members(tar: tarfile.TarFile, file_size: int) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of the regular files of a tar; ReadError where it is cut off or damaged.

    tarfile itself takes a bad or missing header after the first for the end of the archive, hence the check of the end mark.
    """
    while (header := tar.next()) is not None:
        end = header.offset_data + header.size
        if end > file_size:
            raise tarfile.ReadError(f"truncated: {header.name} would end at byte {end}, the shard at {file_size}")
        if header.isfile():
            yield header.name.removeprefix("./"), header.offset_data, header.size
        tar.members.clear()  # or it keeps every header
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(_TAR_BLOCK)
    if len(block) < _TAR_BLOCK:
        raise tarfile.ReadError(f"truncated: no end-of-archive mark at byte {tar.offset}")
    if any(block):
        raise tarfile.ReadError(f"damaged: the header at byte {tar.offset} is not one of tar")
