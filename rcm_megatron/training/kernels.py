"""Which kernels a run uses: chosen once, at its start, and logged there."""

import logging

import torch

from rcm_kernels import flash_attention, flash_attention_jvp, fused
from rcm_megatron.config import ModelConfig, PrecisionConfig
from rcm_megatron.platform.device import this_device

log = logging.getLogger(__name__)


def choose_kernels(model: ModelConfig, precision: PrecisionConfig, *, dtype: torch.dtype) -> None:
    """Settle and log what computes attention, attention with tangent, and the operations between them, for this process.

    A kernel that does not run right on this machine is found here, before any weight is read, and a slower one takes its place with a
    warning.
    """
    fused.select_ops(precision.fused_ops)
    q = torch.empty(1, 1, 1, model.head_dim, dtype=dtype, device=this_device())
    plain, dual = flash_attention.backend_for(q).name, flash_attention_jvp.backend_for(q)
    ops = [op for op in fused.OPS if fused.kernel_for(op, q) is not None]
    log.info("attention: %s; with tangent: %s; fused operations: %s", plain, dual, ", ".join(ops) or "none")
