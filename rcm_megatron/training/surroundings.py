"""What a run meets outside its ranks: data, weights to begin with, checkpoints, logs. A dry run brings others (rcm_megatron.dryrun)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from rcm_megatron.checkpoint.folders import checkpoint_folder, find_latest
from rcm_megatron.checkpoint.resuming import Resumable, begin_anew, begins_anew, check_resume
from rcm_megatron.checkpoint.saver import CheckpointSaver, SavedCheckpoint
from rcm_megatron.config import RunConfig
from rcm_megatron.data.dali import Batch, LatentLoader
from rcm_megatron.data.manifest import load_or_build_manifest
from rcm_megatron.data.samples import SampleSource
from rcm_megatron.inference.conditioning import image_shapes
from rcm_megatron.inference.encoding import load_null_text
from rcm_megatron.networks.weights import Fill, fill_with_initial_weights
from rcm_megatron.parallel.broadcast import computed_once
from rcm_megatron.parallel.groups import ParallelGroups
from rcm_megatron.platform.device import this_device
from rcm_megatron.training.metrics import MetricLogger


class Loader(Protocol):
    """Endless iterator over the micro-batches of one data-parallel rank."""

    num_micro_batches: int
    """Per global batch and rank."""

    @property
    def fingerprint(self) -> str: ...

    def __next__(self) -> Batch: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class Saver(Protocol):
    """As CheckpointSaver."""

    @property
    def idle(self) -> bool: ...

    @property
    def finished(self) -> bool: ...

    def save(self, **what: Any) -> None: ...

    def wait(self) -> SavedCheckpoint | None: ...


class Logger(Protocol):
    """As MetricLogger."""

    def log(self, iteration: int, record: Mapping[str, Any]) -> None: ...

    def log_videos(self, iteration: int, videos: Mapping[str, tuple[Path, str]]) -> None: ...

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...


def find_resumable(run: RunConfig) -> Resumable | None:
    """The checkpoint to go on from, checked; call on all ranks. With `trainer.resume=false` it is set aside first, once."""

    def prepare() -> Tensor:
        if begins_anew(run):
            begin_anew(run)
        return torch.zeros(())

    computed_once(prepare, device=this_device())
    latest = find_latest(checkpoint_folder(run), set_aside=True)
    return None if latest is None else check_resume(run, latest)


def build_loader(run: RunConfig, groups: ParallelGroups) -> LatentLoader:
    """The loader of this data-parallel rank; rank 0 indexes the shards first if nobody has."""
    folder, on_error = run.data.folder, run.data.on_error
    if dist.get_rank() == 0:
        load_or_build_manifest(folder, on_error=on_error)
    dist.barrier()
    source = SampleSource(
        load_or_build_manifest(folder, on_error=on_error),
        seed=run.seed,
        latent_shape=run.latent.shape_CTHW,
        text_len=run.model.text_len,
        text_dim=run.model.text_dim,
        on_error=on_error,
        **image_shapes(run),
    )
    return LatentLoader(
        source,
        micro_batch_size=run.trainer.micro_batch_size,
        dp_rank=groups.dp_rank,
        dp_size=groups.dp_size,
        global_batch_size=run.trainer.global_batch_size,
        num_threads=run.data.num_threads,
        prefetch=run.data.prefetch,
        device=this_device(),
    )


def build_saver(run: RunConfig) -> CheckpointSaver:
    """The saver of the run's checkpoints; call on all ranks."""
    return CheckpointSaver(
        checkpoint_folder(run),
        keep=max(run.trainer.keep_checkpoints, 2),
        keep_every=run.trainer.keep_every,
        background=run.trainer.async_checkpoint,
    )


def build_logger(run: RunConfig, start: int) -> MetricLogger:
    """The logs of the run from the iteration ``start`` on."""
    return MetricLogger(run, start=start, total=run.total_steps)


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """Each is called once, on all ranks, by the trainer; the defaults are a run's own."""

    find_resumable: Callable[[RunConfig], Resumable | None] = find_resumable
    null_text: Callable[[RunConfig], Tensor] = load_null_text
    """Embedding [L, 1, D] of the unconditional branch."""
    fill: Fill = fill_with_initial_weights
    loader: Callable[[RunConfig, ParallelGroups], Loader] = build_loader
    saver: Callable[[RunConfig], Saver] = build_saver
    logger: Callable[[RunConfig, int], Logger] = build_logger
    """Of the run and the iteration that it begins with."""
