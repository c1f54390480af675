"""Brings checkpoints to disk behind the run's back: the step waits for a copy in host memory only.

A thread of each rank writes, through a Gloo group of these threads' own, so that no collective of theirs meets one of the training's:

    training   copy tensors to the host │ next steps …
    thread                              │ write and fsync own files, CRC-32 on the way │ rank 0: files.json, rename, latest, old ones go

Why not Megatron's writers: they fork out of a process that has threads and CUDA, and first spawn a queue's server (5 s each time).
PyTorch's own async_save is such a thread too, but knows nothing of folders, checksums and publishing. A thread shares the interpreter's
lock with training; writing, fsync and CRC-32 give it up.
"""

from __future__ import annotations

import copy
import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch.distributed.checkpoint.api import CheckpointException

from rcm_megatron.checkpoint import folders
from rcm_megatron.checkpoint.dist import NetworkState, state_to_save
from rcm_megatron.checkpoint.integrity import ChecksummedFiles, Entry, entry_of, write_manifest
from rcm_megatron.checkpoint.torch_dist import save_with_torch
from rcm_megatron.errors import CheckpointError

log = logging.getLogger(__name__)

_PATIENCE = timedelta(hours=1)
"""How long the threads wait for the slowest writer."""
_ERRORS = (Exception, CheckpointException)
"""PyTorch's CheckpointException is no Exception."""


@dataclass(frozen=True, kw_only=True)
class SavedCheckpoint:
    """A checkpoint that is complete, or, with `error`, is not: then the ones before it are as they were."""

    path: Path
    seconds: float
    """From the call of `save` to its end."""
    error: str | None = None


class CheckpointSaver:
    """Writes the checkpoints of a run into `root`, one at a time. Build and call it on all ranks.

    `background=False` waits for the disk instead of copying: no second copy of the tensors in host memory. `keep` and `keep_every` as
    `remove_old` has them. Killed at any moment, a save leaves the earlier checkpoints as they were.
    """

    def __init__(self, root: str | Path, *, keep: int, keep_every: int = 0, background: bool = True) -> None:
        self._root, self._keep, self._keep_every, self._background = Path(root), keep, keep_every, background
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self._thread: threading.Thread | None = None
        self._outcome: SavedCheckpoint | None = None

    def save(self, *, iteration: int, networks: Mapping[str, NetworkState], progress: dict[str, Any]) -> None:
        """Begin to write `root/iter_<iteration>` as the networks are now; `wait` has the outcome. Needs the one before to be waited for.

        Raises RuntimeError where it was not.
        """
        if self._thread is not None:
            raise RuntimeError("got a save while another is under way; need wait() first")
        final, start = folders.final_folder(self._root, iteration), time.perf_counter()
        tensors, common = save_preprocess(state_to_save(networks, progress))
        by_key, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(tensors, keep_only_main_replica=True)
        if self._background:
            by_key, common = _copied_to_host(by_key), copy.deepcopy(common)
        self._outcome = None
        self._thread = threading.Thread(
            target=self._run, args=(final, by_key, common, start), name="checkpoint", daemon=True
        )
        self._thread.start()
        if not self._background:
            self._thread.join()

    @property
    def finished(self) -> bool:
        """Whether `wait` has an outcome to give and will not block. May differ between ranks for a moment."""
        return self._thread is not None and not self._thread.is_alive()

    @property
    def idle(self) -> bool:
        """No save is under way, and none waits to be reported."""
        return self._thread is None

    def wait(self) -> SavedCheckpoint | None:
        """Wait for the save under way; its outcome, the same on all ranks, or None when there is none."""
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        return self._outcome

    def _run(self, final: Path, by_key: dict[str, list[ShardedTensor]], common: dict[str, Any], start: float) -> None:
        error = None
        try:
            self._write(final, by_key, common)
        except _ERRORS as problem:  # whatever it is, the thread has nobody above it
            error = _describe(problem)
        self._outcome = SavedCheckpoint(path=final, seconds=time.perf_counter() - start, error=error)

    def _write(self, final: Path, by_key: dict[str, list[ShardedTensor]], common: dict[str, Any]) -> None:
        partial = folders.unfinished(final)
        try:
            self._on_first_rank(lambda: _begin(final, common))
            writer = torch_checkpoint.FileSystemWriter(partial)
            writer.fs = ChecksummedFiles()
            torch_checkpoint.save(
                torch_dist.mcore_to_pyt_state_dict(by_key),
                storage_writer=writer,
                planner=torch_dist.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
                process_group=self._group,
            )
            entries: list[dict[str, Entry]] = [{} for _ in range(self._group.size())]
            dist.all_gather_object(entries, writer.fs.entries, group=self._group)
            self._on_first_rank(lambda: self._finish(final, entries))
        except (CheckpointError, CheckpointException):  # those that all ranks raise
            # A disk that is full needs the room.
            self._on_first_rank(lambda: shutil.rmtree(partial, ignore_errors=True))
            raise

    def _finish(self, final: Path, entries: list[dict[str, Entry]]) -> None:
        """Publish the folder that all ranks have written, then delete what is too old."""
        partial = folders.unfinished(final)
        save_config(CheckpointingConfig("torch_dist", 1), str(partial))
        small = {name: entry_of(partial / name) for name in (COMMON_STATE_FNAME, CONFIG_FNAME)}
        write_manifest(partial, small | {name: entry for of_rank in entries for name, entry in of_rank.items()})
        folders.publish(partial, final)
        try:
            folders.remove_old(self._root, keep=self._keep, keep_every=self._keep_every)
        except OSError as problem:
            log.warning("%s is complete, but older checkpoints could not be deleted: %s", final, problem)

    def _on_first_rank(self, action: Callable[[], None]) -> None:
        """Run `action` on rank 0; what it raises there is raised on all ranks."""
        error = [None]
        if self._group.rank() == 0:
            try:
                action()
            except Exception as problem:  # any error: the other ranks wait for word of it
                error = [_describe(problem)]
        dist.broadcast_object_list(error, src=0, group=self._group)
        if error[0] is not None:
            raise CheckpointError(f"rank 0: {error[0]}")


def _begin(final: Path, common: dict[str, Any]) -> None:
    with open(folders.prepare(final) / COMMON_STATE_FNAME, "wb") as file:
        save_with_torch(common, file)


def _copied_to_host(by_key: Mapping[str, list[ShardedTensor]]) -> dict[str, list[ShardedTensor]]:
    """The tensors as they are now; complete when this returns. From a CUDA device through pinned memory, which PyTorch keeps and reuses."""
    copies = {}
    for key, shards in by_key.items():
        copies[key] = []
        for shard in shards:
            host = torch.empty(shard.data.shape, dtype=shard.data.dtype, pin_memory=shard.data.is_cuda)
            copies[key].append(replace(shard, data=host.copy_(shard.data.detach(), non_blocking=True)))
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
    return copies


def _describe(problem: Exception) -> str:
    if isinstance(problem, CheckpointException):  # of PyTorch: {rank: (exception, stack)}
        return "; ".join(f"rank {rank}: {error!r}" for rank, (error, _) in sorted(problem.failures.items()))
    return str(problem) if isinstance(problem, CheckpointError) else repr(problem)
