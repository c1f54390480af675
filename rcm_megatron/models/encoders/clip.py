"""CLIP's image encoder (Wan2.1 image-to-video: ViT-H/14) from `image_encoder/` and `image_processor/` of a diffusers checkpoint.

Features equal those of diffusers' WanImageToVideoPipeline (`encode_image`). Shapes: B batch, L tokens (1 + patches), D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rcm_megatron.models.encoders.base import EncoderError
from rcm_megatron.models.encoders.pretrained import free_memory, load_pretrained

if TYPE_CHECKING:
    from PIL.Image import Image


class CLIPImageEncoder:
    """CLIPVisionModel and its preprocessing on one device until `close`; in fp32, as diffusers advises for Wan (2.5 GB)."""

    def __init__(self, checkpoint: str | Path, *, device: torch.device | str = "cpu") -> None:
        """`checkpoint` holds `image_encoder/` and `image_processor/`. EncoderError for files that cannot be used."""
        from transformers import CLIPVisionModel

        self._device = torch.device(device)
        self._processor = _load_processor(Path(checkpoint) / "image_processor")
        folder = Path(checkpoint) / "image_encoder"
        self._model = load_pretrained(CLIPVisionModel, folder, dtype=torch.float32).to(self._device)
        config = self._model.config
        self.image_len: int = 1 + (config.image_size // config.patch_size) ** 2
        self.image_dim: int = config.hidden_size

    @torch.no_grad()
    def encode(self, images: Sequence[Image]) -> Tensor:
        """Features [B, L, D] of RGB pictures of any size, before CLIP's last layer; float32 on the CPU.

        CLIP sees the middle square of a picture. Raises RuntimeError after `close`.
        """
        if self._model is None:
            raise RuntimeError("got an image after close(), need an open encoder; build a new one")
        if not images:
            return torch.zeros(0, self.image_len, self.image_dim)
        return torch.stack([self._encode_one(image) for image in images])

    def close(self) -> None:
        """Free the weights, on the GPU too."""
        self._model = self._processor = None
        free_memory(self._device)

    def _encode_one(self, image: Image) -> Tensor:
        pixels_1CHW = self._processor(images=image, return_tensors="pt").pixel_values.to(self._device)
        return self._model(pixels_1CHW, output_hidden_states=True).hidden_states[-2][0].cpu()


def _load_processor(folder: Path):
    """The preprocessing as Pillow does it: the library's other way, by torchvision, gives slightly other pixels."""
    from transformers import CLIPImageProcessorPil

    if not (folder / "preprocessor_config.json").is_file():
        raise EncoderError(
            f"{folder}/preprocessor_config.json is missing; take the image_processor/ folder of an image-to-video checkpoint"
        )
    try:
        return CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # OSError, ValueError, TypeError …
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise EncoderError(f"{folder} holds no usable image processor: {reason}; copy the folder again") from error
