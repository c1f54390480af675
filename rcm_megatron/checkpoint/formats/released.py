"""The formats of the programs whose networks are distilled here: the Wan release, NVlabs/rcm, NVIDIA's Cosmos-Predict2."""

from rcm_megatron.checkpoint.formats.base import Format
from rcm_megatron.checkpoint.writers import OneFile, SafetensorsFolder

WAN = Format("wan", SafetensorsFolder("diffusion_pytorch_model"))
NVLABS = Format("nvlabs", OneFile())
NVIDIA = Format("nvidia", OneFile())
