"""Proof that weights arrived: two networks run on the same random input, each in its own library where that is installed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from rcm_megatron.checkpoint.sources import CheckpointSource, open_checkpoint
from rcm_megatron.checkpoint.translate import internal_shapes
from rcm_megatron.config import LatentConfig, ModelConfig, ParallelConfig
from rcm_megatron.diffusion.noise import SeededDraws
from rcm_megatron.errors import CheckpointError
from rcm_megatron.inputs import Condition, NetworkInput, WholeInput
from rcm_megatron.models.dit import DiffusionTransformer
from rcm_megatron.models.tokens import TokenLayout
from rcm_megatron.networks.build import build_chunks
from rcm_megatron.networks.weights import load_weights
from rcm_megatron.parallel.groups import initialize_parallel
from rcm_megatron.parallel.pipeline import evaluate
from rcm_megatron.platform.device import init_distributed, this_device
from rcm_megatron.platform.megatron import prepare_megatron
from rcm_megatron.registries import FORMATS, family_of

BOUND = 1e-5
"""Largest relative error of one network's velocity against the other's, both fp32 on the values that were written."""
_TIMES = (937.5, 250.0)
_TEXT_BESIDE_IMAGES = 512
"""Text positions that diffusers' WanTransformer3DModel assumes where it is given CLIP tokens."""


def verify_conversion(
    source: CheckpointSource, model: ModelConfig, dtype: torch.dtype | None
) -> Callable[[Path], None]:
    """Run the source, rounded to `dtype`; the function that comes back runs a target and raises CheckpointError if it differs.

    Each network is read in fp32, one after the other; CheckpointError now if the memory for that is not there.
    """
    _announce_memory(model)
    model = family_of(model).as_diffusers(model)
    latent = _small_latent(model)
    given = random_input(model, latent, seed=0, text_len=min(model.text_len, 16))
    library, expected_BCTHW = _run(source, model, latent, given, dtype)

    def check(target: Path) -> None:
        other, got_BCTHW = _run(open_checkpoint(target), model, latent, given, None)
        error = relative_error(expected_BCTHW, got_BCTHW)
        require_bound(error, what=f"the target in {other}", reference=f"the source in {library}")

    return check


def random_input(model: ModelConfig, latent: LatentConfig, *, seed: int, text_len: int) -> WholeInput:
    """A batch of two, with what the network is given of an image, but without given frames."""
    draws, image = SeededDraws(seed, 0, range(len(_TIMES))), None
    if model.image.dim is not None:
        text_len = _TEXT_BESIDE_IMAGES
        image = draws.normal("verify_image", (model.image.tokens, model.image.dim))
    return WholeInput(
        x_BCTHW=draws.normal("verify_latent", latent.shape_CTHW),
        timestep_B=torch.tensor(_TIMES),
        text_BLD=draws.normal("verify_text", (text_len, model.text_dim)),
        channels_BCTHW=draws.normal("verify_channels", (model.image.channels, *latent.shape_CTHW[1:])),
        image_BLD=image,
    )


@torch.no_grad()
def network_forward(network: Sequence[DiffusionTransformer], given: WholeInput, *, dtype: torch.dtype | None) -> Tensor:
    """Velocity [B, C, T, H, W], fp64 on the CPU, of the network with its weights rounded to `dtype`; call on all ranks."""
    for chunk in network:
        for parameter in chunk.parameters():
            parameter.copy_(parameter.to(dtype or parameter.dtype))
    device, layout = this_device(), network[0].layout
    x_SBP = layout.shard(given.x_BCTHW.to(device))
    text_LBD = given.text_BLD.transpose(0, 1).to(device)
    network_input = NetworkInput(x_SBP, given.timestep_B[None].to(device), text_LBD, _condition(given, layout, device))
    v_SBP = evaluate(network, network_input)
    return layout.gather(v_SBP).double().cpu()


def _condition(given: WholeInput, layout: TokenLayout, device: torch.device) -> Condition | None:
    channels_SBE = image_LBD = None
    if channels := given.channels_BCTHW.shape[1]:
        channels_SBE = layout.shard(given.channels_BCTHW.to(device), channels=channels)
    if given.image_BLD is not None:
        image_LBD = given.image_BLD.transpose(0, 1).contiguous().to(device)
    present = channels_SBE is not None or image_LBD is not None
    return Condition(channels_SBE=channels_SBE, image_LBD=image_LBD) if present else None


def relative_error(expected: Tensor, got: Tensor) -> float:
    """||got - expected|| / ||expected||, as a Frobenius norm."""
    return float((got - expected).norm() / expected.norm())


def require_bound(error: float, *, what: str, reference: str) -> None:
    """CheckpointError where the velocity of `what` is too far from that of `reference`."""
    if not error <= BOUND:
        raise CheckpointError(
            f"{what} differs from {reference}: relative error of the velocity {error:.1e}, need at most {BOUND:.0e}; it was not kept"
        )
    print(f"verified {what} against {reference}: relative error of the velocity {error:.1e} (at most {BOUND:.0e})")


def _run(
    source: CheckpointSource, model: ModelConfig, latent: LatentConfig, given: WholeInput, dtype: torch.dtype | None
) -> tuple[str, Tensor]:
    """(library, velocity) of a checkpoint, by the library of its format, or this program."""
    form = FORMATS[source.format]
    if form.library is not None:
        return form.library, form.forward(model, source.folder, given, dtype=dtype)
    with _one_rank() as groups:
        chunks = build_chunks(
            model, latent, ParallelConfig(), groups=groups, params_dtype=torch.float32, recompute="none"
        )
        return "rcm_megatron", network_forward(load_weights(chunks, source), given, dtype=dtype)


@contextmanager
def _one_rank() -> Iterator:
    """Process groups of this process alone."""
    from megatron.core import parallel_state

    prepare_megatron()
    init_distributed()
    try:
        yield initialize_parallel(ParallelConfig())
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _small_latent(model: ModelConfig) -> LatentConfig:
    """2 x 3 x 5 tokens, or what a smaller network has positions for."""
    most = family_of(model).largest_latent(model)
    sizes = (tokens * step for tokens, step in zip((2, 3, 5), model.patch_size, strict=True))
    frames, height, width = (min(size, limit) for size, limit in zip(sizes, most, strict=True))
    return LatentConfig(channels=model.in_channels, frames=frames, height=height, width=width)


def _announce_memory(model: ModelConfig) -> None:
    """Say what verifying needs; CheckpointError where it is not free."""
    need = 4 * sum(math.prod(shape) for shape in internal_shapes(model).values()) / 2**30
    free = _free_memory() / 2**30
    print(
        f"verifying runs source and target one after the other in fp32: {need:.1f} GiB of memory for the weights, {free:.1f} GiB free"
    )
    if need > free:
        raise CheckpointError(
            f"got {free:.1f} GiB of free memory; need {need:.1f} GiB to verify; fix: convert on a larger machine, or without --verify"
        )


def _free_memory() -> int:
    """Bytes that processes can have without swapping, page cache included."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
