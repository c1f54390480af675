"""Whether a checkpoint's files are what was written: `files.json` holds size and CRC-32 of each, taken from the bytes on their way out.

CRC-32 and not a cryptographic hash: it finds torn and flipped bytes, which is what disks do, at 6 GB/s against 1.8 of SHA-256
(one core of an AMD EPYC, zlib and hashlib of Python 3.11.7).
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from torch.distributed.checkpoint.filesystem import FileSystem

MANIFEST = "files.json"
_CHUNK = 1 << 24

Entry = dict[str, int]
"""{"size": bytes, "crc32": checksum} of one file."""


class ChecksummedWriter(io.BufferedWriter):
    """A new file that knows size and checksum of what was written to it. For writers that never seek."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self.entry: Entry = {"size": 0, "crc32": 0}

    def write(self, data) -> int:
        self.entry = {
            "size": self.entry["size"] + memoryview(data).nbytes,
            "crc32": zlib.crc32(data, self.entry["crc32"]),
        }
        return super().write(data)


class ChecksummedFiles(FileSystem):
    """What PyTorch's FileSystemWriter creates files through; `entries` has those that are finished, by name."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}

    @contextmanager
    def create_stream(self, path: str | Path, mode: str) -> Iterator[BinaryIO]:
        """A file to write. Raises ValueError for another mode, OSError where the disk does not take it."""
        if mode != "wb":
            raise ValueError(f"got mode {mode!r}; need 'wb': a checkpoint's files are written once")
        with ChecksummedWriter(Path(path)) as stream:
            try:
                yield stream
            except RuntimeError as error:  # torch.save's, about positions, where the disk is full
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        self.entries[Path(path).name] = stream.entry

    def rename(self, path: str | Path, new_path: str | Path) -> None:
        super().rename(path, new_path)
        self.entries[Path(new_path).name] = self.entries.pop(Path(path).name)


def write_manifest(folder: Path, entries: Mapping[str, Entry]) -> None:
    """Write `files.json`; OSError if a file on disk is not as long as what was written to it."""
    for name, entry in entries.items():
        size = (folder / name).stat().st_size
        if size != entry["size"]:
            raise OSError(f"{folder / name}: got {size} bytes on disk; need the {entry['size']} that were written")
    (folder / MANIFEST).write_text(json.dumps({"version": 1, "files": dict(sorted(entries.items()))}, indent=1) + "\n")


def read_manifest(folder: Path) -> dict[str, Entry]:
    """What `files.json` says; ValueError if it is missing or damaged."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        return {str(name): {"size": int(e["size"]), "crc32": int(e["crc32"])} for name, e in files.items()}
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST}: missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST}: cannot be read: {error!r}") from None


def damaged_files(folder: Path, entries: Iterable[tuple[str, Entry]], *, checksums: bool) -> list[str]:
    """One line for each file that is not what was written, naming it and what is wrong."""
    problems = (_damage(folder / name, entry, checksums=checksums) for name, entry in entries)
    return [problem for problem in problems if problem]


def _damage(path: Path, entry: Entry, *, checksums: bool) -> str | None:
    try:
        size = path.stat().st_size
        if size != entry["size"]:
            return f"{path.name}: got {size} bytes, need {entry['size']}"
        if checksums and (found := file_crc32(path)) != entry["crc32"]:
            return f"{path.name}: got CRC-32 {found:08x}, need {entry['crc32']:08x}: its bytes changed"
    except FileNotFoundError:
        return f"{path.name}: missing"
    except OSError as error:  # a bad sector is damage, too
        return f"{path.name}: cannot be read: {error}"
    return None


def entry_of(path: Path) -> Entry:
    """Of a small file that was not written through `ChecksummedFiles`."""
    return {"size": path.stat().st_size, "crc32": file_crc32(path)}


def file_crc32(path: Path) -> int:
    """CRC-32 of a file's bytes as the disk gives them."""
    checksum = 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
