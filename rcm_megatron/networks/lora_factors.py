"""The LoRA of a built network in whole tensors, as files hold it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rcm_megatron.checkpoint.lora.write import Factors
from rcm_megatron.checkpoint.models import gather_full
from rcm_megatron.checkpoint.translate import entries_for
from rcm_megatron.config import ModelConfig
from rcm_megatron.models.dit import DiffusionTransformer


def whole_factors(chunks: Sequence[DiffusionTransformer], model: ModelConfig, *, scale: float) -> Factors | None:
    """(A, scale B) of every external linear, on the CPU, on the first rank of the network's groups; None on the others.

    A collective over tp and pp.
    """
    groups = chunks[0].layout.groups
    gathered = dict(gather_full(chunks, tp_group=groups.tp, pp_group=groups.pp))
    if groups.tp.rank() or groups.pp.rank():
        return None
    entries, factors = entries_for("diffusers", model), {}
    for name in sorted(key.removesuffix(".lora.A") for key in gathered if key.endswith(".lora.A")):
        internal = f"{name}.weight"
        downs = gathered[f"{name}.lora.A"].chunk(len(entries[internal].external))
        ups = _by_part(gathered[f"{name}.lora.B"], parts=len(downs), head_dim=model.head_dim)
        for index, (down, up) in enumerate(zip(downs, ups, strict=True)):
            factors[(internal, index)] = (down.float().cpu(), scale * up.float().cpu())
    return factors


def _by_part(up: Tensor, *, parts: int, head_dim: int) -> tuple[Tensor, ...]:
    """B of each external linear, of rows that are interleaved per head."""
    if parts == 1:
        return (up,)
    by_head = up.unflatten(0, (-1, parts, head_dim))
    return tuple(part.flatten(0, 1) for part in torch.unbind(by_head, dim=1))
