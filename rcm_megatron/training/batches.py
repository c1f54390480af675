"""What objectives take, made of what the loader gives; and random batches of the same shapes, for benchmarks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rcm_megatron.config import RunConfig
from rcm_megatron.data.dali import Batch, micro_batch_indices
from rcm_megatron.diffusion.noise import SeededDraws
from rcm_megatron.inference.conditioning import Conditioning, image_shapes
from rcm_megatron.models.tokens import TokenLayout
from rcm_megatron.objectives.samples import Samples
from rcm_megatron.parallel.groups import ParallelGroups
from rcm_megatron.platform.device import this_device


def samples_of(
    run: RunConfig, layout: TokenLayout, loaded: Sequence[Batch], null_text_L1D: Tensor, iteration: int
) -> Samples:
    """The loader's micro-batches of a step as one value, as tokens of this rank, with the draws of ``iteration``."""
    device, size = this_device(), run.trainer.micro_batch_size
    count = size * len(loaded)
    indices = torch.cat([batch.sample_indices for batch in loaded]).tolist()
    given = Conditioning(
        image_latent_BCTHW=_joined([batch.image_latent_BCTHW for batch in loaded], dim=0),
        image_LBD=_joined([batch.image_LBD for batch in loaded], dim=1),
    )
    samples = Samples(
        layout.shard(_joined([batch.latent_BCTHW for batch in loaded], dim=0).to(device)),
        _joined([batch.text_LBD for batch in loaded], dim=1).to(device),
        null_text_L1D.expand(-1, count, -1),
        SeededDraws(run.seed, iteration, indices),
        given.condition(run.model, layout, count, device),
        micro_batch_size=size,
    )
    choices = run.distillation.conditional_frames
    return samples if choices is None else samples.with_conditional_frames(choices)


def _joined(parts: Sequence[Tensor | None], *, dim: int) -> Tensor | None:
    """Micro-batches one after the other; None where they have none."""
    return None if parts[0] is None else torch.cat(parts, dim)


def random_samples(run: RunConfig, layout: TokenLayout, groups: ParallelGroups) -> Samples:
    """This rank's samples of a step, of random latents, texts and images; equal on every layout."""
    trainer, model = run.trainer, run.model
    place = {"micro_batch_size": trainer.micro_batch_size, "dp_rank": groups.dp_rank, "dp_size": groups.dp_size}
    count = trainer.global_batch_size // (trainer.micro_batch_size * groups.dp_size)
    null = SeededDraws(0, 0, [0]).normal("data/null_text", (model.text_len, model.text_dim)).transpose(0, 1)
    rows = [micro_batch_indices(first=0, micro_batch=index, **place) for index in range(count)]
    return samples_of(run, layout, [random_batch(run, of) for of in rows], null.to(this_device()), 0)


def random_batch(run: RunConfig, indices: Sequence[int]) -> Batch:
    """A micro-batch of random latents, texts and images for the samples ``indices``, on the CPU; the same in every run."""
    draws, model, images = SeededDraws(0, 0, indices), run.model, image_shapes(run)
    latent, embed = images["image_latent_shape"], images["image_embed_shape"]
    return Batch(
        latent_BCTHW=draws.normal("data/latent", run.latent.shape_CTHW),
        text_LBD=draws.normal("data/text", (model.text_len, model.text_dim)).transpose(0, 1).contiguous(),
        prompts=("",) * len(indices),
        sample_indices=torch.tensor(indices),
        dataset_rows=torch.tensor(indices),
        num_skipped=0,
        image_latent_BCTHW=None if latent is None else draws.normal("data/image_latent", latent),
        image_LBD=None if embed is None else draws.normal("data/image", embed).transpose(0, 1).contiguous(),
    )
