"""What a trainer meets without files: random batches, no checkpoint, no log; weights as they are allocated, or of the run's seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rcm_megatron.config import RunConfig
from rcm_megatron.data.dali import Batch, micro_batch_indices
from rcm_megatron.models.dit import DiffusionTransformer
from rcm_megatron.networks.weights import load_weights, seeded_weights
from rcm_megatron.parallel.groups import ParallelGroups
from rcm_megatron.platform.device import this_device
from rcm_megatron.training.batches import random_batch
from rcm_megatron.training.surroundings import Surroundings


class RandomLoader:
    """Random micro-batches in the shapes of the run's data, on the device, in the order of a loader."""

    fingerprint = "random"

    def __init__(self, run: RunConfig, groups: ParallelGroups) -> None:
        self._run, self._count = run, 0
        self._place = {"micro_batch_size": run.trainer.micro_batch_size}
        self._place |= {"dp_rank": groups.dp_rank, "dp_size": groups.dp_size}
        self.num_micro_batches = run.trainer.global_batch_size // (run.trainer.micro_batch_size * groups.dp_size)

    def __next__(self) -> Batch:
        step, micro_batch = divmod(self._count, self.num_micro_batches)
        self._count += 1
        first = step * self._run.trainer.global_batch_size
        batch = random_batch(self._run, micro_batch_indices(first=first, micro_batch=micro_batch, **self._place))
        names = ("latent_BCTHW", "text_LBD", "image_latent_BCTHW", "image_LBD")
        return replace(batch, **{name: _on_device(getattr(batch, name)) for name in names})

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def _on_device(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(this_device())


class NoSaver:
    """Never saves."""

    idle = finished = False

    def save(self, **what: Any) -> None: ...

    def wait(self) -> None: ...


class NoLogger:
    """Drops what it is told."""

    def log(self, *record: Any) -> None: ...

    def log_videos(self, *videos: Any) -> None: ...

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...


def _leave(run: RunConfig, role: str, chunks: Sequence[DiffusionTransformer]) -> None:
    """Weights stay as they were allocated."""


def _seeded(run: RunConfig, role: str, chunks: Sequence[DiffusionTransformer]) -> None:
    load_weights(chunks, seeded_weights(run.model_of(role), seed=run.seed))


def no_files(*, has_memory: bool = False) -> Surroundings:
    """``has_memory``: weights are drawn by the run's seed, for a real run that a dry one is compared with."""
    return Surroundings(
        find_resumable=lambda run: None,
        null_text=lambda run: torch.zeros(run.model.text_len, 1, run.model.text_dim),
        fill=_seeded if has_memory else _leave,
        loader=RandomLoader,
        saver=lambda run: NoSaver(),
        logger=lambda run, start: NoLogger(),
    )
