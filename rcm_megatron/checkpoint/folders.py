"""Folders of checkpoints: complete only by a rename, resumed from only when their files are what was written.

root/iter_0000200/           renamed from iter_0000200.tmp after its last byte had reached the disk
root/iter_0000100.damaged/   set aside: its files are not what `files.json` in it says
root/latest                  names the checkpoint to resume from
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from rcm_megatron.checkpoint.integrity import damaged_files, read_manifest
from rcm_megatron.config import RunConfig
from rcm_megatron.errors import CheckpointError
from rcm_megatron.files import write_atomically

log = logging.getLogger(__name__)

_FOLDER = re.compile(r"iter_(\d{7,})(\.replaced)?")
_T = TypeVar("_T")


def checkpoint_folder(run: RunConfig) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(run.output_dir) / "checkpoints"


def final_folder(root: Path, iteration: int) -> Path:
    """The name of a complete checkpoint."""
    return root / f"iter_{iteration:07d}"


def unfinished(final: Path) -> Path:
    """Where a checkpoint is written until it is complete."""
    return final.with_name(final.name + ".tmp")


def prepare(final: Path) -> Path:
    """An empty folder to write `final` into; what an interrupted save left behind goes. Call on one rank."""
    for leftover in final.parent.glob("iter_*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    partial = unfinished(final)
    partial.mkdir(parents=True)
    return partial


def publish(partial: Path, final: Path) -> None:
    """Make a fully written folder a checkpoint, then the latest one; call on one rank. Each step leaves a state to resume from."""
    for file in partial.iterdir():
        sync_to_disk(file)
    sync_to_disk(partial)
    replaced = final.with_name(final.name + ".replaced")  # find_latest knows it: a kill can come between two renames
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    _point_to(final)
    if replaced.exists():
        _discard(replaced)


def _point_to(final: Path) -> None:
    write_atomically(final.parent / "latest", f"{final.name}\n".encode())
    sync_to_disk(final.parent)


def find_latest(root: str | Path, *, checksums: bool = True, set_aside: bool = False) -> Path | None:
    """The checkpoint to resume from, the same on all ranks; None when there is none at all. Call on all ranks.

    The one that `latest` names, or, if that is missing, the one with the most iterations; if its files are not what was written, the
    one before it, and a warning names the files. `checksums`: read all files, each rank its share, and not only compare sizes.
    `set_aside`: rename what is damaged to *.damaged, so that it no longer counts. CheckpointError when there are
    checkpoints and none of them is good.
    """
    damage: dict[Path, list[str]] = {}
    for folder in _from_first_rank(lambda: _candidates(Path(root))):
        problems = _problems(folder, checksums=checksums)
        if not problems:
            _report(damage, going_back_to=folder)
            if damage and set_aside and (not dist.is_initialized() or dist.get_rank() == 0):
                _set_aside(damage, going_back_to=folder)
            return folder
        damage[folder] = problems
    if damage:
        listed = "\n".join(f"  {folder.name}: {'; '.join(problems[:3])}" for folder, problems in damage.items())
        raise CheckpointError(
            f"got {len(damage)} damaged checkpoints in {root} and no good one; need one whose files are what was written; fix: "
            f"restore the files, or begin anew with trainer.resume=false or another output_dir\n{listed}"
        )
    return None


def set_aside_after(root: Path, iteration: int, *, why: str) -> Path | None:
    """Rename checkpoints of more than ``iteration`` iterations to *.``why``; the newest that is left, which is the latest now, or None.
    Call on one rank."""
    folders = sorted(_all(root), key=_age)
    for folder in [folder for folder in folders if _iteration(folder) > iteration]:
        aside = folder.with_name(f"{folder.name}.{why}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        folders.remove(folder)
    if folders:
        _point_to(folders[-1])
        return folders[-1]
    (root / "latest").unlink(missing_ok=True)
    return None


def remove_old(root: Path, *, keep: int, keep_every: int = 0) -> None:
    """Delete checkpoints but the `keep` with the most iterations, the latest, and those of iterations divisible by `keep_every` (0:
    none); call on one rank."""
    latest, *_ = _candidates(root)
    folders = sorted(_all(root), key=_age)
    for folder in folders[: max(len(folders) - keep, 0)]:
        if folder != latest and not (keep_every and _iteration(folder) % keep_every == 0):
            _discard(folder)


def _all(root: Path) -> list[Path]:
    return [folder for folder in root.glob("iter_*") if _FOLDER.fullmatch(folder.name)]


def _candidates(root: Path) -> list[Path]:
    """The checkpoint that `latest` names and those before it, newest first."""
    folders = sorted(_all(root), key=_age, reverse=True)
    for leftover in sorted(root.glob("iter_*.tmp")):
        log.warning("skipping %s: an unfinished checkpoint", leftover)
    pointer = root / "latest"
    name = pointer.read_text(errors="replace").strip() if pointer.is_file() else None
    named = next((folder for folder in folders if folder.name == name), None)
    if named is not None:
        return folders[folders.index(named) :]
    if name is not None:
        log.warning("%s names %r, which is not a checkpoint", pointer, name)
    return folders


def _age(folder: Path) -> tuple[int, bool]:
    """Sorts checkpoints by iteration, a replaced one before the one that replaced it."""
    return _iteration(folder), not folder.name.endswith(".replaced")


def _iteration(folder: Path) -> int:
    return int(_FOLDER.fullmatch(folder.name)[1])


def _problems(folder: Path, *, checksums: bool) -> list[str]:
    """What is damaged in a checkpoint, the same on all ranks; each has looked at a share of the files."""
    entries, error = _from_first_rank(lambda: _manifest_or_error(folder))
    if error is not None:
        return [error]
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    by_size = sorted(entries.items(), key=lambda item: (-item[1]["size"], item[0]))
    found = [damaged_files(folder, by_size[rank::world], checksums=checksums)]
    if world > 1:
        mine, found = found[0], [[] for _ in range(world)]
        dist.all_gather_object(found, mine)
    return [problem for problems in found for problem in problems]


def _manifest_or_error(folder: Path) -> tuple[dict, str | None]:
    try:
        return read_manifest(folder), None
    except ValueError as error:
        return {}, str(error)


def _report(damage: dict[Path, list[str]], *, going_back_to: Path) -> None:
    for folder, problems in damage.items():
        lost = _iteration(folder) - _iteration(going_back_to)
        log.warning(
            "DAMAGED CHECKPOINT %s: %s. Going back to %s: %d iterations are lost and have to be done again",
            *(folder, "; ".join(problems), going_back_to.name, lost),
        )


def _set_aside(damaged: Iterable[Path], *, going_back_to: Path) -> None:
    _point_to(going_back_to)
    for folder in damaged:
        aside = folder.with_name(folder.name + ".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        log.warning("%s is now %s; delete it when you have looked at it", folder, aside.name)


def _from_first_rank(find: Callable[[], _T]) -> _T:
    found = [find() if not dist.is_initialized() or dist.get_rank() == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    return found[0]


def _discard(folder: Path) -> None:
    """Delete a checkpoint under a name that find_latest refuses: a kill leaves it half deleted."""
    doomed = unfinished(folder)
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def sync_to_disk(path: Path) -> None:
    """Return when a file, or the entries of a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
