"""The LoRA of a built network in whole tensors, as files hold it."""

from collections.abc import Sequence

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
        internal, up = f"{name}.weight", gathered[f"{name}.lora.B"]
        entry = entries[internal]
        downs = gathered[f"{name}.lora.A"].chunk(len(entry.external))
        ups = entry.split(up) if entry.fused else (up,)
        for index, (down, up) in enumerate(zip(downs, ups, strict=True)):
            factors[(internal, index)] = (down.float().cpu(), scale * up.float().cpu())
    return factors
