"""Folders of checkpoints: found only when complete, complete only by a rename.

root/iter_0000200/     renamed from iter_0000200.tmp after its last byte had reached the disk
root/latest            names the checkpoint to resume from
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path

import torch.distributed as dist

log = logging.getLogger(__name__)

_FOLDER = re.compile(r"iter_(\d{7,})(\.replaced)?")
_FILES = ("common.pt", ".metadata", "metadata.json")
"""Without these a folder is no checkpoint; metadata.json is written last."""


def prepare(root: str | Path, *, iteration: int) -> tuple[Path, Path]:
    """An empty folder to write into and the name it will have when complete; call on all ranks."""
    final = Path(root) / f"iter_{iteration:07d}"
    partial = final.with_name(final.name + ".tmp")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    return partial, final


def publish(partial: Path, final: Path) -> None:
    """Make a fully written folder a checkpoint, then the latest one; call on all ranks."""
    if dist.get_rank() == 0:
        _make_final(partial, final)
    dist.barrier()


def find_latest(root: str | Path) -> Path | None:
    """The checkpoint to resume from, the same on all ranks; None when there is none.

    The one that `latest` names, or, if that is missing or incomplete, the complete one with the most iterations."""
    found: list[Path | None] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        found = [_search(Path(root))]
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    return found[0]


def remove_old(root: str | Path, *, keep: int) -> None:
    """Delete all complete checkpoints but the `keep` with the most iterations and the latest; call on one rank."""
    latest = _search(Path(root))
    complete = sorted(_complete(Path(root)), key=_iteration)
    for folder in complete[: max(len(complete) - keep, 0)]:
        if folder != latest:
            _discard(folder)


def _search(root: Path) -> Path | None:
    complete = _complete(root)
    for folder in sorted(set(root.glob("iter_*")) - set(complete)):
        log.warning("skipping %s: an unfinished checkpoint", folder)
    pointer = root / "latest"
    named = root / pointer.read_text().strip() if pointer.is_file() else None
    if named in complete:
        return named
    if named is not None:
        log.warning("%s names %s, which is not a complete checkpoint", pointer, named.name)
    return max(complete, key=_iteration, default=None)


def _complete(root: Path) -> list[Path]:
    return [
        folder
        for folder in root.glob("iter_*")
        if _FOLDER.fullmatch(folder.name) and all((folder / file).is_file() for file in _FILES)
    ]


def _iteration(folder: Path) -> int:
    return int(_FOLDER.fullmatch(folder.name)[1])


def _discard(folder: Path) -> None:
    """Delete a checkpoint under a name that find_latest refuses: a kill leaves it half deleted."""
    doomed = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _make_final(partial: Path, final: Path) -> None:
    """Make a fully written folder a checkpoint, then the latest one. Each step leaves a state that can be resumed from."""
    for file in _FILES:
        sync_to_disk(partial / file)
    sync_to_disk(partial)
    replaced = final.with_name(final.name + ".replaced")  # find_latest knows it: a kill can come between two renames
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    pointer = final.parent / "latest.tmp"
    pointer.write_text(final.name + "\n")
    sync_to_disk(pointer)
    pointer.rename(final.parent / "latest")
    sync_to_disk(final.parent)
    if replaced.exists():
        _discard(replaced)


def sync_to_disk(path: Path) -> None:
    """Return when a file, or the entries of a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
