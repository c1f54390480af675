"""Run configuration: frozen dataclasses, a strict loader, checks that need no weights. Imports no torch."""

from rcm_megatron.config.errors import ConfigError
from rcm_megatron.config.loader import apply_overrides, as_dict, load_config, to_yaml, validate
from rcm_megatron.config.model import (
    LatentConfig,
    ModelConfig,
    ParallelConfig,
    PrecisionConfig,
)
from rcm_megatron.config.networks import EmaConfig, LoraConfig, NetworkConfig, OptimizerConfig
from rcm_megatron.config.reading import build
from rcm_megatron.config.run import (
    DataConfig,
    DistillationConfig,
    EncodersConfig,
    LoggingConfig,
    MemoryConfig,
    RunConfig,
    SamplingConfig,
    StageConfig,
    TimeDistribution,
    TrainerConfig,
)

__all__ = [
    "ConfigError",
    "DataConfig",
    "DistillationConfig",
    "EmaConfig",
    "EncodersConfig",
    "LatentConfig",
    "LoggingConfig",
    "LoraConfig",
    "MemoryConfig",
    "ModelConfig",
    "NetworkConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "RunConfig",
    "SamplingConfig",
    "StageConfig",
    "TimeDistribution",
    "TrainerConfig",
    "apply_overrides",
    "as_dict",
    "build",
    "load_config",
    "to_yaml",
    "validate",
]
