"""Networks of tests and tools: small ones, with only what matters said, and those that files of others describe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rcm_megatron.config import ModelConfig
from rcm_megatron.families.cosmos.settings import CosmosModelConfig
from rcm_megatron.families.wan.settings import WanModelConfig
from rcm_megatron.registries import FAMILIES, FORMATS

SIZES = {
    "num_layers": 2,
    "hidden_size": 48,
    "num_heads": 4,
    "ffn_hidden_size": 72,
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": (1, 2, 2),
    "text_dim": 10,
    "text_len": 512,
}


def wan(**fields: Any) -> WanModelConfig:
    """A small Wan, text-to-video unless ``fields`` say otherwise; ``channels`` are those of in and out."""
    return WanModelConfig(**_of(fields, freq_dim=26))


def cosmos(**fields: Any) -> CosmosModelConfig:
    """A small Cosmos-Predict2, Text2Image unless ``fields`` say otherwise; ``channels`` are those of in and out."""
    return CosmosModelConfig(**_of(fields, adaln_lora_dim=6, rope_scale=(1.0, 4.0, 3.0)))


def _of(fields: dict[str, Any], **own: Any) -> dict[str, Any]:
    channels = fields.pop("channels", None)
    fields |= {} if channels is None else {"in_channels": channels, "out_channels": channels}
    return SIZES | own | fields


def model_of(
    family: str, format: str, config: Mapping[str, Any], shapes: Mapping[str, tuple] | None = None
) -> ModelConfig:
    """The network that the `config.json` of a format describes."""
    naming = FORMATS[format].naming(FAMILIES[family])
    return FAMILIES[family].settings(**naming.read_config(config, shapes or {}))


def config_of(format: str, model: ModelConfig) -> Mapping[str, Any]:
    """The `config.json` of a network in a format."""
    return FORMATS[format].naming_of(model).write_config(model)
