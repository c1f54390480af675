"""What objectives take, made of what the loader gives; and random batches of the same shapes, for benchmarks."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rcm_megatron.config import RunConfig
from rcm_megatron.data.dali import Batch, micro_batch_indices
from rcm_megatron.diffusion.noise import SeededDraws
from rcm_megatron.inference.conditioning import Conditioning, image_shapes
from rcm_megatron.models.tokens import TokenLayout
from rcm_megatron.parallel.groups import ParallelGroups
from rcm_megatron.platform.device import this_device
from rcm_megatron.training.objectives import MicroBatch, draw_condition


def micro_batch(run: RunConfig, layout: TokenLayout, batch: Batch, null_text_L1D: Tensor, iteration: int) -> MicroBatch:
    """A loader's batch as tokens of this rank, with the draws of ``iteration``."""
    device, samples = this_device(), batch.latent_BCTHW.shape[0]
    given = Conditioning(image_latent_BCTHW=batch.image_latent_BCTHW, image_LBD=batch.image_LBD)
    made = MicroBatch(
        layout.shard(batch.latent_BCTHW.to(device)),
        batch.text_LBD.to(device),
        null_text_L1D.expand(-1, samples, -1),
        SeededDraws(run.seed, iteration, batch.sample_indices.tolist()),
        given.condition(layout, samples, device),
    )
    conditional_frames = run.distillation.conditional_frames
    if conditional_frames is None:
        return made
    return replace(made, condition=draw_condition(made, conditional_frames=conditional_frames))


def random_batches(run: RunConfig, layout: TokenLayout, groups: ParallelGroups) -> list[MicroBatch]:
    """This rank's micro-batches of a step, of random latents, texts and images; equal on every layout."""
    trainer, model = run.trainer, run.model
    place = {"micro_batch_size": trainer.micro_batch_size, "dp_rank": groups.dp_rank, "dp_size": groups.dp_size}
    count = trainer.global_batch_size // (trainer.micro_batch_size * groups.dp_size)
    null = SeededDraws(0, 0, [0]).normal("data/null_text", (model.text_len, model.text_dim)).transpose(0, 1)
    rows = [micro_batch_indices(first=0, micro_batch=index, **place) for index in range(count)]
    return [micro_batch(run, layout, _random_batch(run, of), null.to(this_device()), 0) for of in rows]


def _random_batch(run: RunConfig, indices: Sequence[int]) -> Batch:
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
