"""The one place that chooses layer classes, and the precision of the passes through them.

A tensor-parallel linear of any library keeps Megatron-Core's contract: parameters ``weight`` and ``bias``, a forward that returns
``(output without bias, bias)``, the same arguments. Transformer Engine's runs on CUDA alone. Checkpoints hold parameters by name and
nothing else, so Transformer Engine's ``_extra_state`` never enters them and one checkpoint serves both libraries.
"""

import copy
import functools
import importlib.util
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from rcm_megatron.config import ConfigError, PrecisionConfig
from rcm_megatron.dual import Dual

log = logging.getLogger(__name__)

TRANSFORMER_ENGINE_MIN = "2.9"
"""The first with `autocast`, and the first that megatron-core 0.16.1 asks for."""


@dataclass(frozen=True)
class LayerSpec:
    """Classes of which a DiT block builds its tensor-parallel linears, and what its passes run in."""

    column_linear: type
    row_linear: type
    config_options: Mapping[str, bool] = field(default_factory=dict)
    """Fields of Megatron's configuration that these classes need."""
    fp8: bool = False
    """Plain passes run the linears in FP8. Weights, their gradients and the messages between stages stay what they are."""

    def adapt(self, config: TransformerConfig) -> TransformerConfig:
        """A copy of Megatron's configuration as these classes need it."""
        adapted = copy.copy(config)
        vars(adapted).update(self.config_options)
        return adapted

    def pass_context(self, hidden: Tensor | Dual) -> AbstractContextManager:
        """What a block's forward runs in; its recomputation in the backward goes through the block and so enters it again.

        Raises TypeError for a Dual in FP8: e4m3's three bits of mantissa leave nothing of a tangent.
        """
        if not self.fp8:
            return nullcontext()
        if isinstance(hidden, Dual):
            raise TypeError(
                "got a Dual in a network that runs in FP8; need bf16 for a tangent; fix: set its networks.ROLE.fp8 to false"
            )
        return _fp8_autocast()


def local_layer_spec() -> LayerSpec:
    """Megatron-Core's pure-PyTorch linears: run on CPU and CUDA."""
    return LayerSpec(column_linear=ColumnParallelLinear, row_linear=RowParallelLinear)


def transformer_engine_layer_spec(*, fp8: bool = False) -> LayerSpec:
    """Transformer Engine's linears in Megatron-Core's wrappers, for networks in bf16 on CUDA."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

    options = {
        "gradient_accumulation_fusion": True,  # weight gradients straight into DDP's fp32 main_grad; needs no apex here
        # A cached FP8 weight would never be renewed: Megatron marks the first micro-batch only where its own config.fp8 is set.
        "disable_parameter_transpose_cache": True,
    }
    return LayerSpec(TEColumnParallelLinear, TERowParallelLinear, config_options=options, fp8=fp8)


def choose_layer_spec(precision: PrecisionConfig, *, fp8_role: str | None = None) -> LayerSpec:
    """The layers that the configuration asks for and this machine has, in FP8 for the network ``fp8_role`` (`networks.ROLE.fp8`).

    Raises ConfigError where the two do not meet. Reads no weights: call it before any are read.
    """
    missing = _missing_for_transformer_engine()
    required = precision.linear_layers == "transformer_engine" or fp8_role is not None
    asked = f"precision.linear_layers={precision.linear_layers}"
    off = "precision.linear_layers=local"
    if fp8_role is not None:
        asked, off = f"{asked}, networks.{fp8_role}.fp8=true", f"{off} and networks.{fp8_role}.fp8=false"
    if required and missing:
        raise ConfigError(
            f"got {asked}, but {missing}; need Transformer Engine {TRANSFORMER_ENGINE_MIN} or newer and a CUDA device; fix: "
            f"pip install --no-build-isolation '.[gpu]', or {off}"
        )
    if not required and (why := _why_local(precision, missing)):
        _log_once(f"linear layers: Megatron-Core's own ({why})")
        return local_layer_spec()
    if fp8_role is not None:
        _check_fp8_device(fp8_role)
        _log_once(f"linear layers of {fp8_role}: Transformer Engine's, in FP8")
    else:
        _log_once("linear layers: Transformer Engine's")
    return transformer_engine_layer_spec(fp8=fp8_role is not None)


def _why_local(precision: PrecisionConfig, missing: str | None) -> str | None:
    if precision.linear_layers == "local":
        return "as configured"
    return missing or ("Transformer Engine multiplies fp32 in TF32" if precision.params_dtype == "fp32" else None)


def _missing_for_transformer_engine() -> str | None:
    """What keeps Transformer Engine from running here, or None."""
    if importlib.util.find_spec("transformer_engine") is None:
        return "Transformer Engine is not installed"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.utils import get_te_version, is_te_min_version

    if not HAVE_TE:
        return "Megatron-Core cannot import the Transformer Engine that is installed"
    if not is_te_min_version(TRANSFORMER_ENGINE_MIN):
        return f"Transformer Engine {get_te_version()} is older than {TRANSFORMER_ENGINE_MIN}"
    return None


def _check_fp8_device(role: str) -> None:
    from transformer_engine.pytorch import is_fp8_available

    available, reason = is_fp8_available(return_reason=True)
    if not available:
        raise ConfigError(
            f"got networks.{role}.fp8=true on a device without FP8 ({reason}); need Ada, Hopper or newer; fix: set it to false"
        )


def _fp8_autocast() -> AbstractContextManager:
    from transformer_engine.pytorch import autocast

    return autocast(enabled=True, recipe=_fp8_recipe())


@functools.cache
def _fp8_recipe():
    """Each tensor scaled by its own largest element of this very pass: no history, so passes may come in any order and be recomputed.

    (Delayed scaling's history would mix teacher, rollout and fake score passes, and count recomputed ones twice.) e4m3 forward, e5m2 for
    gradients. Tensor-parallel ranks share a scale where they gather tokens, others do not: outputs depend on the layout by FP8's rounding.
    """
    from transformer_engine.common.recipe import Float8CurrentScaling, Format

    return Float8CurrentScaling(fp8_format=Format.HYBRID)


@functools.cache
def _log_once(message: str) -> None:
    log.info(message)
