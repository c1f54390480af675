"""What lies in a tar shard: the members of its samples by offset, and all that is wrong with it, by name.

Archives that were put one behind the other (`cat a.tar b.tar`, `tar -A`) are read to the end. A member that cannot be taken as it is
(sparse, a link, a second one of its kind) leaves its whole sample out, so that no sample is made of parts of two.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from rcm_megatron.data.shards import PROMPT_SUFFIX, TENSOR_FORMATS
from rcm_megatron.text import is_utf8, printable

LATENT, EMBED, PROMPT, IMAGE_LATENT, IMAGE_EMBED = range(5)
KINDS = ("latent", "embed", "prompt", "image_latent", "image_embed")
NEEDED = (LATENT, EMBED, PROMPT)
"""What every sample has. Only networks that are given an image ask for the other two."""
FORMATS = (*TENSOR_FORMATS, "txt")
_TENSORS = (LATENT, EMBED, IMAGE_LATENT, IMAGE_EMBED)
_SUFFIXES = {f"{KINDS[kind]}.{name}": (kind, name) for kind in _TENSORS for name in TENSOR_FORMATS}
_SUFFIXES[PROMPT_SUFFIX] = (PROMPT, "txt")
_TAR_BLOCK = 512
_CHUNK = 128 * _TAR_BLOCK
_DIGESTED = 4096
"""Bytes at either end of a member that count as its content: all of a `.pt` file, whose end holds the checksums of its tensors."""


class Member(NamedTuple):
    """One file inside a shard."""

    name: str
    format: str
    offset: int
    size: int


@dataclass(kw_only=True)
class ShardScan:
    """One shard as it was found."""

    size: int | None = None
    """In bytes; None if it cannot be opened."""
    samples: dict[str, dict[int, Member]] = field(default_factory=dict)
    """{key: {kind: Member}} of the whole samples, in their order."""
    problems: list[str] = field(default_factory=list)
    """What was left out and why, naming the shard."""
    content: str = ""
    """Digest of the members' names, places, and first and last bytes."""


def find_shards(folder: Path) -> list[Path]:
    """The shards of a folder in the order of their names; dot files, as macOS lays them beside others, are none."""
    return sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))


def scan_shard(path: Path) -> ShardScan:
    """Read a shard's headers and the ends of its members. What is wrong with it is among the result's `problems`. It raises nothing."""
    scan, found, digest = ShardScan(), _Found(), hashlib.blake2b(digest_size=16)
    name = printable(path.name)
    try:
        if not is_utf8(path.name):
            raise OSError("its name is not UTF-8; rename it")
        with open(path, "rb") as file:
            scan.size = os.fstat(file.fileno()).st_size
            for header in _headers(file, scan.size):
                if (member := found.add(header)) is not None:
                    digest.update(f"{member}".encode())
                    digest.update(_ends(file, member))
    except (tarfile.TarError, OSError, EOFError) as error:
        scan.problems.append(f"shard {name}: {error.strerror if isinstance(error, OSError) and error.errno else error}")
    scan.samples = {key: members for key, members in found.samples.items() if key not in found.wrong}
    for key, members in list(scan.samples.items()):
        if missing := [KINDS[kind] for kind in NEEDED if kind not in members]:
            found.wrong[key] = "no " + ", ".join(f"member {key}.{kind}.*" for kind in missing) + " in the shard"
            del scan.samples[key]
    scan.problems += [f"shard {name}, key {key}: {reason}" for key, reason in found.wrong.items()]
    scan.content = digest.hexdigest()
    return scan


class _Found:
    """The samples of a shard as they come in."""

    def __init__(self) -> None:
        self.samples: dict[str, dict[int, Member]] = {}
        self.wrong: dict[str, str] = {}
        """Keys that cannot be used: why."""

    def add(self, header: tarfile.TarInfo) -> Member | None:
        """Take in a file of the shard; returns the member if it is one that can be used."""
        place = _place(header.name.removeprefix("./"))
        if place is None or header.isdir():
            return None
        key, suffix, reason = place
        reason = reason or _unreadable(header)
        kind, member_format = _SUFFIXES[suffix]
        members = self.samples.setdefault(key, {})
        if reason is None and kind in members:
            reason = f"member {key}.{KINDS[kind]}.* comes twice, and may be another sample's; keep one"
        if reason is not None:
            self.wrong.setdefault(key, reason)
            return None
        members[kind] = Member(f"{key}.{suffix}", member_format, header.offset_data, header.size)
        return members[kind]


def _place(name: str) -> tuple[str, str, str | None] | None:
    """(key, known ending, what is wrong with the name) of a member; None for a file that is no part of a sample."""
    folder, _, base = name.rpartition("/")
    key, _, suffix = base.partition(".")
    lower = suffix.lower()
    ending = next((known for known in _SUFFIXES if f".{lower}".endswith(f".{known}")), None)
    if not key or ending is None:
        return None
    reason = None
    if not is_utf8(name):
        reason = f"the name of member {printable(name)} is not UTF-8; rename it"
    elif lower != ending:
        key = base[: -len(ending) - 1]
        reason = f"the key of member {base} holds a dot, at which a WebDataset key ends; rename it"
    elif suffix != ending:
        reason = f"got member {base}, need the ending .{ending}; rename it"
    return printable(f"{folder}/{key}" if folder else key), ending, reason


def _unreadable(header: tarfile.TarInfo) -> str | None:
    """Why a member is not the bytes at its offset."""
    if header.issparse():
        return f"member {header.name} is sparse; pack the shard again without tar's --sparse (-S)"
    if not header.isfile():
        return f"member {header.name} is no file but a link; pack the shard again with tar's --dereference --hard-dereference"
    return None


def _headers(file: BinaryIO, size: int) -> Iterator[tarfile.TarInfo]:
    """The headers of all archives that a shard of `size` bytes holds; ReadError where it is cut off or damaged."""
    start: int | None = 0
    while start is not None:
        file.seek(start)
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - the file is the caller's
        yield from _archive(tar, size)
        start = _next_archive(file, tar.offset)


def _archive(tar: tarfile.TarFile, size: int) -> Iterator[tarfile.TarInfo]:
    """The headers up to the end mark. tarfile itself takes a bad or missing header after the first for the end."""
    while (header := tar.next()) is not None:
        end = header.offset_data + (0 if header.issparse() else header.size)
        if end > size:
            raise tarfile.ReadError(f"truncated: {printable(header.name)} would end at byte {end}, the shard at {size}")
        yield header
        tar.members.clear()  # or it keeps every header
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(_TAR_BLOCK)
    if len(block) < _TAR_BLOCK:
        raise tarfile.ReadError(f"truncated: no end-of-archive mark at byte {tar.offset}")
    if any(block):
        raise tarfile.ReadError(f"damaged: the header at byte {tar.offset} is not one of tar")


def _next_archive(file: BinaryIO, end: int) -> int | None:
    """Where the first block behind an end mark lies that is not empty; None if there is none."""
    file.seek(end)
    while chunk := file.read(_CHUNK):
        if any(chunk):
            empty = len(chunk) - len(chunk.lstrip(b"\0"))
            return end + empty // _TAR_BLOCK * _TAR_BLOCK
        end += len(chunk)
    return None


def _ends(file: BinaryIO, member: Member) -> bytes:
    """The first and the last bytes of a member."""
    file.seek(member.offset)
    head = file.read(min(member.size, _DIGESTED))
    file.seek(member.offset + max(len(head), member.size - _DIGESTED))
    return head + file.read(member.size - len(head) if member.size < 2 * _DIGESTED else _DIGESTED)
