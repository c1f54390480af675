"""The manifest of a dataset folder: where every sample's members lie, and the one order in which all layouts read them.

`manifest.json` names the shards, what was wrong with them, and the index file beside it: a NumPy structured array with one row
per sample, memory-mapped when read, so that ten million samples cost neither parsing nor memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from rcm_megatron.data.scan import FORMATS, KINDS, NEEDED, Member, ShardScan, find_shards, scan_shard
from rcm_megatron.data.shards import file_sha256
from rcm_megatron.errors import UserError
from rcm_megatron.files import write_atomically
from rcm_megatron.text import printable

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
_VERSION = 3
_SCAN_THREADS = 8  # a scan waits for the file system, not for the processor


class DatasetError(UserError, RuntimeError):
    """A dataset folder that cannot be used; the message names the shard and what is wrong with it."""


class StaleManifestError(DatasetError):
    """A manifest whose shards are others now."""


_ABSENT = Member("", FORMATS[0], 0, -1)


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
    content: str
    """Digest of its members' names, places, and first and last bytes."""
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
        digest.update(json.dumps([(shard.name, shard.size, shard.content) for shard in self.shards]).encode())
        digest.update(np.ascontiguousarray(self.index).view(np.uint8))
        return digest.hexdigest()

    def record(self, row: int) -> Record:
        """Sample number `row` of the folder (not of the reading order)."""
        entry = self.index[row]
        shard = self.shards[int(entry["shard"])]
        key = entry["key"].decode("utf-8")
        members: list[Member | None] = [None] * len(KINDS)
        for kind in np.flatnonzero(entry["size"] >= 0):
            member_format = FORMATS[int(entry["format"][kind])]
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
            "version": _VERSION,
            "num_samples": len(self),
            "index_file": index_file,
            "fingerprint": self.fingerprint,
            "description": dict(self.description),
            "problems": list(self.problems),
            "shards": [asdict(shard) for shard in self.shards],
        }
        write_atomically(self.folder / index_file, lambda file: np.save(file, self.index, allow_pickle=False))
        text = (json.dumps(header, indent=1, ensure_ascii=False) + "\n").encode("utf-8")
        write_atomically(self.folder / MANIFEST_NAME, text)
        return self.folder / MANIFEST_NAME


def load_manifest(folder: str | os.PathLike[str], *, on_error: Literal["skip", "raise"] = "skip") -> Manifest:
    """The manifest of `folder`. StaleManifestError if a shard is not the one that was scanned.

    With on_error="raise", a manifest that lists problems is an error, and so are shards that came or went since the scan; with
    "skip" both are logged (samples of a vanished shard are then skipped when their turn comes).
    """
    manifest = read_manifest(folder)
    if changed := changed_shards(manifest):
        raise StaleManifestError(
            f"{manifest.folder / MANIFEST_NAME} is older than {len(changed)} of its shards: {'; '.join(changed[:5])}; restore them, "
            f"or delete {MANIFEST_NAME} to have it built again"
        )
    _report([*manifest.problems, *_came_or_went(manifest)], on_error=on_error)
    return manifest


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """What the manifest says, with no look at the shards. Raises DatasetError where there is none that can be read."""
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise DatasetError(
            f"{path} does not exist; check the path, or build it with build_manifest({str(folder)!r}).save()"
        )
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        if header.get("version") != _VERSION:
            raise DatasetError(
                f"{path} has version {header.get('version')}, need {_VERSION}; delete it to have it built again"
            )
        index = np.load(folder / header["index_file"], mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise DatasetError(
            f"{path} cannot be read ({error}); restore it, or delete it to have it built again"
        ) from error
    if len(index) != header["num_samples"]:
        raise DatasetError(
            f"{path} says {header['num_samples']} samples, its index has {len(index)}; delete it to have it built again"
        )
    manifest = Manifest(
        folder=folder,
        shards=tuple(Shard(**shard) for shard in header["shards"]),
        index=index,
        problems=tuple(header["problems"]),
        description=header["description"],
    )
    manifest.__dict__["fingerprint"] = header["fingerprint"]  # so that no rank has to hash the index again
    return manifest


def changed_shards(manifest: Manifest) -> list[str]:
    """Which shards are not those that were scanned, and why; nothing of those that are gone.

    A shard that has not changed its place or content since the manifest was written needs no look. Others (a whole dataset just copied)
    are scanned; if they are the same, the manifest's time says so to the next start.
    """
    path = manifest.folder / MANIFEST_NAME
    written, times = path.stat().st_mtime_ns, {}
    for shard in manifest.shards:
        with contextlib.suppress(OSError):
            times[shard] = os.stat(
                manifest.folder / shard.name
            ).st_ctime_ns  # unlike mtime, no copying program sets it back
    newer = [shard for shard, time in times.items() if time >= written]
    with ThreadPoolExecutor(_SCAN_THREADS) as threads:
        scans = list(threads.map(lambda shard: scan_shard(manifest.folder / shard.name), newer))
    changes = list(filter(None, map(_change, newer, scans)))
    if newer and not changes:
        with contextlib.suppress(OSError):
            os.utime(path, ns=(max(times.values()) + 1,) * 2)
    return changes


def _change(shard: Shard, scan: ShardScan) -> str | None:
    if scan.size != shard.size:
        return f"shard {shard.name}: got {scan.size} bytes, need {shard.size}"
    return None if scan.content == shard.content else f"shard {shard.name}: other content"


def _came_or_went(manifest: Manifest) -> Iterator[str]:
    known = {shard.name for shard in manifest.shards}
    present = {path.name for path in find_shards(manifest.folder) if path.exists()}
    for name in sorted(known - present):
        yield f"shard {name}: listed in the manifest, but gone from {manifest.folder}"
    for name in sorted(present - known):
        yield (
            f"shard {printable(name)}: not in the manifest of {manifest.folder}; delete {MANIFEST_NAME} to have it built again"
        )


def build_manifest(
    folder: str | os.PathLike[str],
    *,
    on_error: Literal["skip", "raise"] = "skip",
    checksums: bool = False,
    description: Mapping[str, object] | None = None,
) -> Manifest:
    """Scan the tar headers of every shard in `folder`, in the order of their names, and the ends of their members.

    Truncated or unreadable shards and samples that lack a member, or have one twice, are named: an error with on_error="raise", otherwise
    left out, logged and listed in `problems` (a truncated shard keeps the samples that are whole). DatasetError if nothing is left.
    """
    folder = Path(folder)
    paths = find_shards(folder)
    if not paths:
        raise DatasetError(f"{folder} holds no *.tar shard; check the path, or build a dataset there")
    with ThreadPoolExecutor(_SCAN_THREADS) as threads:
        scans = list(threads.map(scan_shard, paths))
        problems = tuple(problem for scan in scans for problem in scan.problems)
        _report(problems, on_error=on_error)
        readable = [(path, scan) for path, scan in zip(paths, scans, strict=True) if scan.size is not None]
        hashes = list(threads.map(lambda found: file_sha256(found[0]) if checksums else None, readable))
    shards = tuple(
        Shard(name=path.name, size=scan.size, num_samples=len(scan.samples), content=scan.content, sha256=sha256)
        for (path, scan), sha256 in zip(readable, hashes, strict=True)
    )
    index = _index_of([scan.samples for _, scan in readable])
    if not len(index):
        raise DatasetError(f"{folder} holds no whole sample in {len(paths)} shards; first problem: {problems[:1]}")
    return Manifest(folder=folder, shards=shards, index=index, problems=problems, description=description or {})


def load_or_build_manifest(folder: str | os.PathLike[str], *, on_error: Literal["skip", "raise"] = "skip") -> Manifest:
    """The saved manifest, or else a new one, saved if the folder allows. Several processes may call this at once.

    A manifest that is older than its shards is built again, unless the builder of the dataset wrote it: StaleManifestError.
    """
    folder = Path(folder)
    if (folder / MANIFEST_NAME).is_file():
        try:
            return load_manifest(folder, on_error=on_error)
        except StaleManifestError as error:
            if read_manifest(folder).description:
                raise
            logger.warning("%s: it is built again", error)
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
    has_images = any(len(members) > len(NEEDED) for samples in scans for members in samples.values())
    kinds = len(KINDS) if has_images else len(NEEDED)
    fields = [("key", f"S{key_bytes}"), ("shard", "<i4")]
    fields += [("offset", "<i8", kinds), ("size", "<i8", kinds), ("format", "u1", kinds)]
    index = np.zeros(sum(map(len, scans)), dtype=fields)
    row = 0
    for shard, samples in enumerate(scans):
        for key, members in samples.items():
            ordered = [members.get(kind, _ABSENT) for kind in range(kinds)]
            formats = [FORMATS.index(member.format) for member in ordered]
            offsets, sizes = [member.offset for member in ordered], [member.size for member in ordered]
            index[row] = (key.encode("utf-8"), shard, offsets, sizes, formats)
            row += 1
    return index
