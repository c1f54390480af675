"""Networks of a run without its training: weights from a checkpoint on any layout, and batches of samples from them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch import Tensor

from rcm_megatron.checkpoint import dist as run_checkpoints
from rcm_megatron.checkpoint.folders import checkpoint_folder, find_latest
from rcm_megatron.checkpoint.sources import open_checkpoint
from rcm_megatron.config import RunConfig
from rcm_megatron.config.roles import low_noise_weights, split_weights
from rcm_megatron.dtypes import DTYPES
from rcm_megatron.errors import CheckpointError
from rcm_megatron.inference.conditioning import Conditioning
from rcm_megatron.inference.sampler import LowNoiseExpert, Sampler, student_latents
from rcm_megatron.models.dit import DiffusionTransformer
from rcm_megatron.models.layer_specs import choose_layer_spec
from rcm_megatron.networks.adapters import as_trained
from rcm_megatron.networks.build import build_network, frozen
from rcm_megatron.networks.kernels import choose_kernels
from rcm_megatron.networks.weights import initial_weights, load_weights
from rcm_megatron.parallel.groups import ParallelGroups, initialize_parallel
from rcm_megatron.platform.device import init_distributed, this_device
from rcm_megatron.platform.megatron import prepare_megatron


def init_parallel(run: RunConfig) -> ParallelGroups:
    """Join the process group of the environment and form the groups of ``run``; quiet on all ranks but the first."""
    prepare_megatron()
    init_distributed()
    logging.basicConfig(level=logging.WARNING if dist.get_rank() == 0 else logging.ERROR, format="%(message)s")
    return initialize_parallel(run.parallel)


def resolve_checkpoint(run: RunConfig, checkpoint: str | Path | None = None) -> Path:
    """A complete checkpoint: `checkpoint` itself, the latest in that folder, or the run's latest. Call on all ranks.

    Raises CheckpointError where there is none.
    """
    root = checkpoint_folder(run) if checkpoint is None else Path(checkpoint)
    if (root / "metadata.json").is_file():
        return root
    latest = find_latest(root, checksums=False)
    if latest is None:
        raise CheckpointError(
            f"{root} holds no complete checkpoint; train the run first, or name one with --checkpoint"
        )
    return latest


def load_network(
    run: RunConfig,
    groups: ParallelGroups,
    *,
    weights: str,
    checkpoint: Path | None = None,
    dtype: torch.dtype | None = None,
) -> list[DiffusionTransformer]:
    """The chunks of one frozen network of ``run`` on this rank, in `dtype` (default: the run's).

    ``weights``: as `stored_in` takes it. Passes run in that dtype, never in FP8. Networks that the run trains come from `checkpoint` (of
    `resolve_checkpoint`), whose fp32 values are rounded; the others from ``networks.ROLE.init``.
    Raises CheckpointError where these weights are not there.
    """
    role, kind = stored_in(run, weights)
    spec = choose_layer_spec(run.precision) if dtype is None else None
    dtype = dtype or DTYPES[run.precision.params_dtype]
    choose_kernels(run, [role], dtype=dtype)
    chunks = frozen(build_network(run, role, groups, spec=spec, dtype=dtype))
    if kind is None:
        path = run.networks[role].init
        if path is None:
            raise CheckpointError(
                f"networks.{role}.init=null: this run has no {role}; choose other --weights or set networks.{role}.init"
            )
        return load_weights(chunks, open_checkpoint(path))
    if run.networks[role].lora is not None:
        chunks = as_trained(run, role, load_weights(chunks, initial_weights(run, role)))
    try:
        run_checkpoints.load_weights(checkpoint, chunks, network=role, kind=kind)
    except CheckpointingException as error:
        raise CheckpointError(f"{checkpoint} does not hold the {weights} weights of this network: {error}") from error
    return chunks


def is_trained(run: RunConfig, weights: str) -> bool:
    """Whether what ``weights`` names lies in the run's checkpoints."""
    return stored_in(run, weights)[1] is not None


def stored_in(run: RunConfig, weights: str) -> tuple[str, str | None]:
    """(role, kind) of what ``weights`` names: a role, the average of its weights as ROLE.ema, or ema for the student's.

    The kind is that of the run's checkpoints, in fp32; None for a network that the run does not train, whose checkpoint is its ``init``.
    Raises CheckpointError for a network that the run has not.
    """
    role, part = split_weights(weights)
    networks, averaged = run.networks, part == "ema"
    if role not in networks or part not in ("", "ema") or (averaged and networks[role].ema is None):
        known = [*networks, *(f"{name}.ema" for name, settings in networks.items() if settings.ema is not None)]
        raise CheckpointError(f"got --weights {weights}; this run has {', '.join(known)}; fix: name one of them")
    if role in run.trained_roles:
        return role, "ema" if averaged else "main"
    return role, None


@dataclass(frozen=True, eq=False)
class SampleBatches:
    """Samples for many captions, `batch_size` at a time.

    Sample i has noise of (seed, i) alone, so it is the same for every network, layout and batch size. A data-parallel rank takes
    samples dp_rank, dp_rank + dp_size, ...; all ranks that share a sample return it whole.
    """

    text_LBD: Tensor
    """[L, N, D] for all N samples."""
    null_text_L1D: Tensor | None
    """Of guidance's unconditional branch; None will do without guidance."""
    seed: int
    batch_size: int
    given: Conditioning = Conditioning()
    """What the network is given of a video or image, for all samples."""
    low_noise: LowNoiseExpert | None = None
    """The second network, of a role that is two."""

    def __call__(
        self, network: Sequence[DiffusionTransformer], sample: Callable[[Sampler], Tensor]
    ) -> Iterator[tuple[list[int], Tensor]]:
        """(sample indices, latents [B, C, T, H, W]) of each batch; `sample` calls one of `Sampler`'s methods."""
        layout, device = network[0].layout, this_device()
        mine = list(range(layout.groups.dp_rank, self.text_LBD.shape[1], layout.groups.dp_size))
        for start in range(0, len(mine), self.batch_size):
            indices = mine[start : start + self.batch_size]
            text_LBD = self.text_LBD[:, indices].to(device)
            null_LBD = self.null_text_L1D
            if null_LBD is not None:
                null_LBD = null_LBD.to(device).expand(-1, len(indices), -1)
            condition = self.given.condition(network[0].model, layout, len(indices), device)
            sampler = Sampler(network, layout, text_LBD, null_LBD, self.seed, indices, condition, self.low_noise)
            yield indices, sample(sampler)

    def all(self, network: Sequence[DiffusionTransformer], sample: Callable[[Sampler], Tensor]) -> Tensor:
        """Latents [N, C, T, H, W] of all samples in their order, on every rank, on the CPU."""
        mine = [(indices, latents.cpu()) for indices, latents in self(network, sample)]
        groups = network[0].layout.groups
        parts: list = [None] * groups.dp_size
        dist.all_gather_object(parts, mine, group=groups.dp)
        pairs = [pair for part in parts for pair in part]
        order = torch.tensor([index for indices, _ in pairs for index in indices])
        return torch.cat([latents for _, latents in pairs])[order.argsort()]


def teacher_sampling(run: RunConfig, *, steps: int, guidance: float | None = None) -> Callable[[Sampler], Tensor]:
    """Sampling of the teacher as ``run.sampling`` says."""
    settings = run.sampling
    guidance = settings.guidance if guidance is None else guidance
    return lambda sampler: sampler.teacher(
        steps=steps,
        guidance=guidance,
        shift=settings.teacher_shift,
        method=settings.teacher_sampler,
    )


def low_noise_expert(
    run: RunConfig, groups: ParallelGroups, weights: str, *, checkpoint: Path | None = None
) -> LowNoiseExpert | None:
    """The second network of what ``weights`` names, where it is two."""
    second = low_noise_weights(weights, run.networks)
    if second is None:
        return None
    chunks = load_network(run, groups, weights=second, checkpoint=checkpoint)
    return LowNoiseExpert(chunks, run.distillation.expert_boundary)


def student_sampling(run: RunConfig, *, steps: int) -> Callable[[Sampler], Tensor]:
    """Sampling of the student as ``run.sampling`` says."""
    return lambda sampler: student_latents(sampler, run.sampling, steps=steps)
