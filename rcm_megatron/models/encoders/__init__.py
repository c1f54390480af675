"""What turns videos and captions into the transformer's inputs and back. transformers and diffusers are imported on use."""

from rcm_megatron.models.encoders.base import EncoderError, TextEncoder, VideoEncoder
from rcm_megatron.models.encoders.build import build_text_encoder, build_video_encoder, check_encoder_files
from rcm_megatron.models.encoders.quickstart import (
    EMPTY_WORD,
    QUICKSTART_VOCABULARY,
    PixelVideoEncoder,
    WordTextEncoder,
)
from rcm_megatron.models.encoders.umt5 import WAN_NEGATIVE_PROMPT, UMT5TextEncoder, clean_prompt
from rcm_megatron.models.encoders.wan_vae import WanVideoEncoder

__all__ = [
    "EMPTY_WORD",
    "QUICKSTART_VOCABULARY",
    "WAN_NEGATIVE_PROMPT",
    "EncoderError",
    "PixelVideoEncoder",
    "TextEncoder",
    "UMT5TextEncoder",
    "VideoEncoder",
    "WanVideoEncoder",
    "WordTextEncoder",
    "build_text_encoder",
    "build_video_encoder",
    "check_encoder_files",
    "clean_prompt",
]
