"""From `encoders` of a run's configuration to the encoders it names, and to what is wrong with their files."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch

from rcm_megatron.config import ConfigError, EncodersConfig
from rcm_megatron.config.model import ImageInputs
from rcm_megatron.dtypes import DTYPES
from rcm_megatron.models.encoders.base import EncoderError, TextEncoder, VideoEncoder
from rcm_megatron.models.encoders.clip import CLIPImageEncoder
from rcm_megatron.models.encoders.pretrained import folder_problems
from rcm_megatron.models.encoders.quickstart import PixelVideoEncoder, WordTextEncoder
from rcm_megatron.models.encoders.t5 import T5TextEncoder, UMT5TextEncoder
from rcm_megatron.models.encoders.wan_vae import WanVideoEncoder

_CPU = torch.device("cpu")


def build_video_encoder(config: EncodersConfig, *, channels: int, device: torch.device = _CPU) -> VideoEncoder:
    """The video encoder of `config.video`, for latents of `channels`; EncoderError where there is none, or none that fits."""
    if config.video == "none":
        raise EncoderError("got encoders.video=none, need a video encoder here; set it to pixels or wan_vae")
    if config.video == "pixels":
        return PixelVideoEncoder(channels=channels)
    folder = Path(config.folder) / "vae"
    encoder = WanVideoEncoder(folder, dtype=DTYPES[config.vae_dtype], device=device, tiling=config.vae_tiling)
    if encoder.latent_channels != channels:
        raise EncoderError(
            f"{folder} has latents of {encoder.latent_channels} channels, need {channels}; use its sibling"
        )
    return encoder


def build_text_encoder(
    config: EncodersConfig, *, text_len: int, text_dim: int, device: torch.device = _CPU
) -> TextEncoder:
    """The text encoder of `config.text`; EncoderError where there is none, or none that fits."""
    if config.text == "none":
        raise EncoderError(
            "got encoders.text=none, need a text encoder here; set it to words, umt5 or t5, or give "
            "data.negative_embedding and captions as embeddings"
        )
    if config.text == "words":
        return WordTextEncoder(text_len=text_len, text_dim=text_dim, negative_prompt=config.negative_prompt or "")
    name = config.text_dtype if config.text_dtype != "auto" else "fp32" if device.type == "cpu" else "bf16"
    build = {"umt5": UMT5TextEncoder, "t5": T5TextEncoder}[config.text]
    encoder = build(
        config.folder,
        text_len=text_len,
        dtype=DTYPES[name],
        device=device,
        negative_prompt=config.negative_prompt,
    )
    if encoder.text_dim != text_dim:
        raise EncoderError(f"{config.folder}/text_encoder has width {encoder.text_dim}, need model.text_dim={text_dim}")
    return encoder


def build_image_encoder(config: EncodersConfig, image: ImageInputs, *, device: torch.device = _CPU) -> CLIPImageEncoder:
    """The image encoder of `config.image`; EncoderError where there is none, or none that fits what the network takes."""
    if config.image == "none":
        raise EncoderError("got encoders.image=none, need an image encoder here; set it to clip")
    encoder = CLIPImageEncoder(config.folder, device=device)
    got, need = (encoder.image_len, encoder.image_dim), (image.tokens, image.dim)
    if got != need:
        raise EncoderError(
            f"{config.folder}/image_encoder makes features {got} of an image in [L, D], need {need} (model); use its sibling"
        )
    return encoder


def check_encoder_files(
    config: EncodersConfig, *, latent_channels: int, text_dim: int, image_dim: int | None = None
) -> None:
    """ConfigError with everything that will keep the run's encoders from loading; reads no weights, imports no library."""
    problems = list(_file_problems(config, latent_channels=latent_channels, text_dim=text_dim, image_dim=image_dim))
    if problems:
        parts = "vae/, text_encoder/ and tokenizer/" + (
            ", image_encoder/ and image_processor/" * (config.image == "clip")
        )
        need = f"need a diffusers checkpoint with {parts}, weights as safetensors"
        raise ConfigError("\n".join(f"encoders.folder={config.folder}: {problem}; {need}" for problem in problems))


def _file_problems(
    config: EncodersConfig, *, latent_channels: int, text_dim: int, image_dim: int | None
) -> Iterator[str]:
    if config.image == "clip":
        expected = {"model_type": "clip_vision_model", "hidden_size": image_dim}
        yield from folder_problems(Path(config.folder) / "image_encoder", stem="model", expected=expected)
        if not (Path(config.folder) / "image_processor" / "preprocessor_config.json").is_file():
            yield f"{config.folder}/image_processor/preprocessor_config.json is missing"
    if config.video == "wan_vae":
        expected = {"_class_name": "AutoencoderKLWan", "z_dim": latent_channels}
        yield from folder_problems(Path(config.folder) / "vae", stem="diffusion_pytorch_model", expected=expected)
    if config.text in ("umt5", "t5"):
        expected = {"model_type": config.text, "d_model": text_dim}
        yield from folder_problems(Path(config.folder) / "text_encoder", stem="model", expected=expected)
        if not (Path(config.folder) / "tokenizer" / "tokenizer.json").is_file():
            yield f"{config.folder}/tokenizer/tokenizer.json is missing"
        for package in ("transformers", "ftfy"):
            if importlib.util.find_spec(package) is None:
                yield f"encoders.text={config.text} needs the package {package}: pip install -r requirements.txt"
