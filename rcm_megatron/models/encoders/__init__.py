"""What turns videos and captions into the transformer's inputs and back. transformers and diffusers are imported on use."""

from rcm_megatron.models.encoders.base import EncoderError, TextEncoder, VideoEncoder
from rcm_megatron.models.encoders.build import (
    build_image_encoder,
    build_text_encoder,
    build_video_encoder,
    check_encoder_files,
)
from rcm_megatron.models.encoders.clip import CLIPImageEncoder
from rcm_megatron.models.encoders.images import image_latent, image_pixels, load_image
from rcm_megatron.models.encoders.quickstart import (
    EMPTY_WORD,
    QUICKSTART_VOCABULARY,
    PixelVideoEncoder,
    WordTextEncoder,
)
from rcm_megatron.models.encoders.t5 import (
    COSMOS_NEGATIVE_PROMPT,
    WAN_NEGATIVE_PROMPT,
    T5TextEncoder,
    UMT5TextEncoder,
    clean_prompt,
)
from rcm_megatron.models.encoders.wan_vae import WanVideoEncoder

__all__ = [
    "COSMOS_NEGATIVE_PROMPT",
    "EMPTY_WORD",
    "QUICKSTART_VOCABULARY",
    "WAN_NEGATIVE_PROMPT",
    "CLIPImageEncoder",
    "EncoderError",
    "PixelVideoEncoder",
    "T5TextEncoder",
    "TextEncoder",
    "UMT5TextEncoder",
    "VideoEncoder",
    "WanVideoEncoder",
    "WordTextEncoder",
    "build_image_encoder",
    "build_text_encoder",
    "build_video_encoder",
    "check_encoder_files",
    "clean_prompt",
    "image_latent",
    "image_pixels",
    "load_image",
]
