"""Proof that weights arrived: two networks run on the same random input, each in its own library where that is installed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor

from rcm_megatron.checkpoint.errors import CheckpointError
from rcm_megatron.checkpoint.formats import internal_shapes
from rcm_megatron.checkpoint.model_card import DIFFUSERS_CLASSES
from rcm_megatron.checkpoint.sources import CheckpointSource, open_checkpoint
from rcm_megatron.config import LatentConfig, ModelConfig, ParallelConfig, WanConfig
from rcm_megatron.diffusion.noise import SeededDraws
from rcm_megatron.inputs import Condition, NetworkInput
from rcm_megatron.models.dit import DiffusionTransformer
from rcm_megatron.models.tokens import TokenLayout
from rcm_megatron.networks.build import build_chunks
from rcm_megatron.networks.weights import load_weights
from rcm_megatron.parallel.groups import initialize_parallel
from rcm_megatron.parallel.pipeline import evaluate
from rcm_megatron.platform.device import init_distributed, this_device
from rcm_megatron.platform.megatron import prepare_megatron

BOUND = 1e-5
"""Largest relative error of one network's velocity against the other's, both fp32 on the values that were written."""
_TIMES = (937.5, 250.0)
_DIFFUSERS_QK_EPS = 1e-5
"""Cosmos' q/k norms in diffusers; NVIDIA's release computes with 1e-6, which is no matter of the weights."""
_IMAGE_TOKENS = 6
_TEXT_BESIDE_IMAGES = 512
"""Text positions that diffusers' WanTransformer3DModel assumes where it is given CLIP tokens."""


@dataclass(frozen=True, eq=False)
class Input:
    """What a network is run on, equal on all ranks."""

    x_BCTHW: Tensor
    timestep_B: Tensor
    text_BLD: Tensor
    channels_BCTHW: Tensor
    """Of Wan's image condition; C may be 0."""
    image_BLD: Tensor | None
    """CLIP features, for a network that takes them."""


def verify_conversion(
    source: CheckpointSource, model: ModelConfig, dtype: torch.dtype | None
) -> Callable[[Path], None]:
    """Run the source, rounded to `dtype`; the function that comes back runs a target and raises CheckpointError if it differs.

    Each network is read in fp32, one after the other; CheckpointError now if the memory for that is not there.
    """
    _announce_memory(model)
    if model.cosmos is not None:
        model = replace(model, cosmos=replace(model.cosmos, qk_norm_eps=_DIFFUSERS_QK_EPS))
    latent = _small_latent(model)
    given = random_input(model, latent, seed=0, text_len=min(model.text_len, 16))
    library, expected_BCTHW = _run(source, model, latent, given, dtype)

    def check(target: Path) -> None:
        other, got_BCTHW = _run(open_checkpoint(target), model, latent, given, None)
        error = relative_error(expected_BCTHW, got_BCTHW)
        require_bound(error, what=f"the target in {other}", reference=f"the source in {library}")

    return check


def random_input(model: ModelConfig, latent: LatentConfig, *, seed: int, text_len: int) -> Input:
    """A batch of two, with what the network is given of an image, but without given frames."""
    draws, wan = SeededDraws(seed, 0, range(len(_TIMES))), model.wan or WanConfig()
    image = None
    if wan.image_dim is not None:
        text_len = _TEXT_BESIDE_IMAGES
        image = draws.normal("verify_image", (wan.image_positions or _IMAGE_TOKENS, wan.image_dim))
    return Input(
        x_BCTHW=draws.normal("verify_latent", latent.shape_CTHW),
        timestep_B=torch.tensor(_TIMES),
        text_BLD=draws.normal("verify_text", (text_len, model.text_dim)),
        channels_BCTHW=draws.normal("verify_channels", (wan.condition_channels, *latent.shape_CTHW[1:])),
        image_BLD=image,
    )


@torch.no_grad()
def network_forward(network: Sequence[DiffusionTransformer], given: Input, *, dtype: torch.dtype | None) -> Tensor:
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


def _condition(given: Input, layout: TokenLayout, device: torch.device) -> Condition | None:
    channels_SBE = image_LBD = None
    if channels := given.channels_BCTHW.shape[1]:
        channels_SBE = layout.shard(given.channels_BCTHW.to(device), channels=channels)
    if given.image_BLD is not None:
        image_LBD = given.image_BLD.transpose(0, 1).contiguous().to(device)
    present = channels_SBE is not None or image_LBD is not None
    return Condition(channels_SBE=channels_SBE, image_LBD=image_LBD) if present else None


@torch.no_grad()
def diffusers_forward(model: ModelConfig, folder: Path, given: Input, *, dtype: torch.dtype | None) -> Tensor:
    """The same of diffusers' class on a folder in its format."""
    import diffusers

    network = getattr(diffusers, DIFFUSERS_CLASSES[model.family])
    network = network.from_pretrained(folder, torch_dtype=torch.float32).eval()
    for parameter in network.parameters():
        parameter.copy_(parameter.to(dtype or parameter.dtype))
    x_BCTHW, timestep_B, extra = torch.cat([given.x_BCTHW, given.channels_BCTHW], dim=1), given.timestep_B, {}
    if given.image_BLD is not None:  # of two images, one after the other in the batch
        two = model.wan.image_positions is not None
        extra["encoder_hidden_states_image"] = given.image_BLD.unflatten(1, (1 + two, -1)).flatten(0, 1)
    if model.family == "cosmos":  # no frames given, a whole picture, and time in [0, 1]
        timestep_B, extra["fps"] = timestep_B / 1000, model.cosmos.rope_fps
        extra["padding_mask"] = x_BCTHW.new_zeros(1, 1, *x_BCTHW.shape[-2:])
        extra["condition_mask"] = torch.zeros_like(x_BCTHW[:, :1]) if model.cosmos.conditional_frames else None
    extra |= {"timestep": timestep_B, "encoder_hidden_states": given.text_BLD}
    with _own_padding_mask():
        (v_BCTHW,) = network(x_BCTHW, return_dict=False, **extra)
    return v_BCTHW.double()


@contextmanager
def _own_padding_mask() -> Iterator[None]:
    """Where torchvision is not installed, diffusers cannot resize Cosmos' padding mask; one of the right size needs none."""
    from diffusers.models.transformers import transformer_cosmos

    if hasattr(transformer_cosmos, "transforms"):
        yield
        return

    def resize(mask: Tensor, size: list[int], *, interpolation: object) -> Tensor:
        if list(mask.shape[-2:]) != size:
            raise CheckpointError(
                f"got a padding mask of {list(mask.shape[-2:])}; need {size}, or torchvision to resize it"
            )
        return mask

    functional, modes = SimpleNamespace(resize=resize), SimpleNamespace(NEAREST=None)
    transformer_cosmos.transforms = SimpleNamespace(functional=functional, InterpolationMode=modes)
    try:
        yield
    finally:
        del transformer_cosmos.transforms


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
    source: CheckpointSource, model: ModelConfig, latent: LatentConfig, given: Input, dtype: torch.dtype | None
) -> tuple[str, Tensor]:
    """(library, velocity) of a checkpoint: diffusers for its own format, this program for every other."""
    if source.format == "diffusers":
        return "diffusers", diffusers_forward(model, source.folder, given, dtype=dtype)
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
    """2 x 3 x 5 tokens, or what a smaller Cosmos network has positions for."""
    most = model.cosmos.max_size if model.cosmos is not None else (math.inf,) * 3
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
