"""What samples are given of a video beside its caption, its first frames or an image: from batches, files and pictures to a Condition."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rcm_megatron.config import ModelConfig, RunConfig
from rcm_megatron.data.samples import decode_tensor, fit_image_embedding, fit_latent
from rcm_megatron.errors import InputError
from rcm_megatron.inference.encoding import encode_image
from rcm_megatron.inputs import Condition
from rcm_megatron.models.encoders import load_image
from rcm_megatron.models.tokens import TokenLayout
from rcm_megatron.registries import family_of
from rcm_megatron.requests import ConditioningFiles


@dataclass(frozen=True, kw_only=True, eq=False)
class Conditioning:
    """B of 1 is for every sample."""

    latent_BCTHW: Tensor | None = None
    """Clean latents, with whose first `frames` latent frames samples begin."""
    frames: int = 0
    image_latent_BCTHW: Tensor | None = None
    """Latents of the images alone (rcm_megatron.data.samples), for networks with condition channels."""
    image_LBD: Tensor | None = None
    """CLIP features of the images."""

    def condition(
        self, model: ModelConfig, layout: TokenLayout, samples: int, device: torch.device
    ) -> Condition | None:
        """As networks of ``model`` take it, for a batch of `samples`; None if nothing is given."""
        fields: dict[str, Tensor] = {}
        if self.latent_BCTHW is not None:
            fields["x0_SBP"] = layout.shard(_expanded(self.latent_BCTHW, samples, device))
            fields["frames_B"] = torch.full((samples,), self.frames, device=device)
        if self.image_latent_BCTHW is not None:
            channels_BCTHW = family_of(model).image_channels(_expanded(self.image_latent_BCTHW, samples, device))
            fields["channels_SBE"] = layout.shard(channels_BCTHW, channels=channels_BCTHW.shape[1])
        if self.image_LBD is not None:
            fields["image_LBD"] = self.image_LBD.to(device).expand(-1, samples, -1)
        return Condition(**fields) if fields else None


def _expanded(x_BCTHW: Tensor, samples: int, device: torch.device) -> Tensor:
    return x_BCTHW.to(device).expand(samples, -1, -1, -1, -1)


def image_shapes(run: RunConfig) -> dict[str, tuple[int, ...] | None]:
    """Shapes of the image members that the run's network is given: arguments of LatentLoader."""
    image = run.model.image
    return {
        "image_latent_shape": run.latent.shape_CTHW if image.channels else None,
        "image_embed_shape": (image.tokens, image.dim) if image.dim is not None else None,
    }


def check_conditioning(run: RunConfig, files: ConditioningFiles) -> None:
    """InputError, before ranks meet and weights are read, for files that the network does not take, that it lacks or that are wrong."""
    _check_image_options(run, files)
    if files.image is not None:
        _check_encoders_for(run, files.image)
        load_image(files.image)
    else:
        _check_whether_given(run, files)
        _from_files(run, files)


def load_conditioning(run: RunConfig, files: ConditioningFiles) -> Conditioning:
    """What all samples are given. Call on all ranks, before the networks take their memory: the first one encodes a picture."""
    if files.image is None:
        return _from_files(run, files)
    latent, embed = encode_image(run, load_image(files.image))
    image_LBD = None if embed is None else embed[:, None]
    if run.model.conditional_frames:
        return Conditioning(latent_BCTHW=_whole(run, latent), frames=1, image_LBD=image_LBD)
    return Conditioning(image_latent_BCTHW=latent[None], image_LBD=image_LBD)


def _check_image_options(run: RunConfig, files: ConditioningFiles) -> None:
    shapes = image_shapes(run)
    takes = {
        "image": run.model.conditional_frames or shapes["image_latent_shape"] is not None,
        "image_latent": shapes["image_latent_shape"] is not None,
        "image_embed": shapes["image_embed_shape"] is not None,
    }
    for name, taken in takes.items():
        if getattr(files, name) is not None and not taken:
            raise InputError(f"got {_option(name)} {getattr(files, name)}, but this network takes none; leave it out")
    others = [
        name for name in ("conditional_latent", "image_latent", "image_embed") if getattr(files, name) is not None
    ]
    if files.image is not None and others:
        raise InputError(f"got --image with {_option(others[0])}, which says the same; give one of them")


def _check_encoders_for(run: RunConfig, image: Path) -> None:
    needed = {"video": "wan_vae"}
    if image_shapes(run)["image_embed_shape"] is not None:
        needed["image"] = "clip"
    for field, value in needed.items():
        if getattr(run.encoders, field) != value:
            raise InputError(
                f"got --image {image} with encoders.{field}={getattr(run.encoders, field)}; set it to {value} and encoders.folder to a "
                "checkpoint that has it, or give what it makes as a file"
            )


def _check_whether_given(run: RunConfig, files: ConditioningFiles) -> None:
    trained_on = run.distillation.conditional_frames
    if trained_on is None and files.conditional_latent is not None:
        raise InputError(
            f"got --conditional-latent {files.conditional_latent}, but this network takes no frames "
            "(distillation.conditional_frames=null); leave it out"
        )
    if trained_on is not None and 0 not in trained_on and files.conditional_latent is None:
        raise InputError(
            "this network continues a video: give its latent with --conditional-latent, and --conditional-frames, or a picture with --image"
        )
    for kind in ("image_latent", "image_embed"):
        if image_shapes(run)[f"{kind}_shape"] is not None and getattr(files, kind) is None:
            raise InputError(
                f"this network makes a video of an image: give a picture with --image, or {_option(kind)}, as the data has it"
            )


def _from_files(run: RunConfig, files: ConditioningFiles) -> Conditioning:
    channels, frames, height, width = run.latent.shape_CTHW
    given: dict[str, Tensor] = {}
    if files.conditional_latent is not None:
        if not 1 <= files.conditional_frames < frames:
            raise InputError(
                f"got --conditional-frames {files.conditional_frames}, need 1 to {frames - 1} (latent.frames - 1)"
            )
        shape = (channels, files.conditional_frames, height, width)
        given["latent_BCTHW"] = _whole(run, _read("conditional_latent", files.conditional_latent, fit_latent, shape))
    shapes = image_shapes(run)
    if files.image_latent is not None:
        latent = _read("image_latent", files.image_latent, fit_latent, shapes["image_latent_shape"])
        given["image_latent_BCTHW"] = latent[None]
    if files.image_embed is not None:
        embed = _read("image_embed", files.image_embed, fit_image_embedding, shapes["image_embed_shape"])
        given["image_LBD"] = embed[:, None]
    return Conditioning(**given, frames=files.conditional_frames if files.conditional_latent is not None else 0)


def _read(name: str, path: Path, fit, shape: tuple[int, ...]) -> Tensor:
    try:
        array: np.ndarray = fit(decode_tensor(path.read_bytes(), path.suffix.removeprefix(".")), shape)
    except (OSError, ValueError) as error:
        raise InputError(f"{_option(name)} {path}: {error}") from error
    return torch.from_numpy(array)


def _whole(run: RunConfig, latent_CTHW: Tensor) -> Tensor:
    """Latents [1, C, T, H, W] of the run's length that begin with the given frames."""
    latent_1CTHW = torch.zeros(1, *run.latent.shape_CTHW)
    latent_1CTHW[0, :, : latent_CTHW.shape[1]] = latent_CTHW
    return latent_1CTHW


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
