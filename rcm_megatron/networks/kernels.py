"""Which kernels a run uses: chosen once, at its start, and logged there."""

import logging
from collections.abc import Iterable

import torch

from rcm_kernels import flash_attention, flash_attention_jvp, fused
from rcm_megatron.config import RunConfig
from rcm_megatron.platform.device import this_device

log = logging.getLogger(__name__)


def choose_kernels(run: RunConfig, roles: Iterable[str], *, dtype: torch.dtype) -> None:
    """Settle and log what computes attention, attention with tangent, and the operations between them, for the networks ``roles``.

    A kernel that does not run right on this machine, at the head dim of one of them, is found here, before any weight is read, and a
    slower one takes its place with a warning.
    """
    fused.select_ops(run.precision.fused_ops)
    for head_dim in sorted({run.model_of(role).head_dim for role in roles}):
        q = torch.empty(1, 1, 1, head_dim, dtype=dtype, device=this_device())
        plain, dual = flash_attention.backend_for(q).name, flash_attention_jvp.backend_for(q)
        ops = [op for op in fused.OPS if fused.kernel_for(op, q) is not None]
        fast = ", ".join(ops) or "none"
        log.info(
            "attention of %d channels a head: %s; with tangent: %s; fused operations: %s", head_dim, plain, dual, fast
        )
