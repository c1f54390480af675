"""rCM distillation of video diffusion transformers on Megatron-Core."""

__version__ = "0.1.0"
