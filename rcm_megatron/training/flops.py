"""FLOPs that a step needs, and what share of the hardware's peak it reaches (MFU).

Counted are matrix products, two FLOPs a multiply-add, of the tokens that exist. What is computed a second time is no use and does not
count: recomputation, a second forward for a gradient alone, the scores that a fused attention's backward makes again, padding.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from rcm_megatron.checkpoint.translate import internal_shapes
from rcm_megatron.config import DistillationConfig, LatentConfig, ModelConfig, RunConfig
from rcm_megatron.objectives.plan import Step, passes_of
from rcm_megatron.registries import family_of

log = logging.getLogger(__name__)

PEAK_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
}
"""Dense bf16 peaks of NVIDIA's data sheets, TFLOP/s; the first that is part of CUDA's name of the device counts."""


@dataclass(frozen=True)
class NetworkFlops:
    """FLOPs of one sample's plain forward through a whole network, by what a tangent makes of them."""

    linears: int
    """Of tokens and times: primal and tangent."""
    context_linears: int
    """Of text and images, which have no tangent."""
    self_attention: int
    """Two products; with tangents six."""
    cross_attention: int
    """Two products; four, because keys and values have no tangent."""
    trains_lora: bool = False
    """The weights have no gradient; the products of a LoRA's own factors are too few to count."""

    @property
    def forward(self) -> int:
        return self.linears + self.context_linears + self.self_attention + self.cross_attention

    @property
    def dual(self) -> int:
        """Output and tangent."""
        return 2 * self.linears + self.context_linears + 3 * self.self_attention + 2 * self.cross_attention

    @property
    def backward(self) -> int:
        """Of the primal: gradients of both factors of each product (the few of given inputs, which nobody needs, included)."""
        if self.trains_lora:
            return self.linears + 2 * (self.self_attention + self.cross_attention)
        return 2 * self.forward


def network_flops(model: ModelConfig, latent: LatentConfig) -> NetworkFlops:
    """Raises KeyError for a linear of unknown rows."""
    tokens, frames = latent.num_tokens(model.patch_size), latent.frames // model.patch_size[0]
    image = model.image.tokens
    rows = {
        "tokens": tokens,
        "text": model.text_len,
        "image": image,
        "times": frames if model.conditional_frames else 1,
    }
    linears, kinds = dict.fromkeys(rows, 0), family_of(model).flop_rows
    for name, shape in internal_shapes(model).items():
        if name.endswith(".weight") and len(shape) == 2:
            kind = rows_of(name, kinds)
            linears[kind] += 2 * rows[kind] * math.prod(shape)
    attention = 4 * tokens * model.hidden_size * model.num_layers
    return NetworkFlops(
        linears=linears["tokens"] + linears["times"],
        context_linears=linears["text"] + linears["image"],
        self_attention=attention * tokens,
        cross_attention=attention * (model.text_len + image),
    )


def rows_of(name: str, kinds: Mapping[str, str]) -> str:
    """What the linear ``name`` works on; ``kinds``: `Family.flop_rows`. Raises KeyError for one that is not there."""
    local = name.split(".", 2)[2] if name.startswith("blocks.") else name
    found = next((rows for start, rows in kinds.items() if local.startswith(start + ".")), None)
    if found is None:
        raise KeyError(f"got a linear {name}; need one of {', '.join(kinds)}; fix: add it to the family's flop_rows")
    return found


def step_flops(
    networks: Mapping[str, NetworkFlops], step: Step, *, distillation: DistillationConfig, objectives: Mapping[str, Any]
) -> int:
    """FLOPs of one sample in ``step``, all objectives together; ``networks`` by role."""
    total = 0
    for p in passes_of(step, distillation=distillation, objectives=objectives):
        network = networks[p.role]
        total += p.forward * network.forward + p.dual * network.dual + p.backward * network.backward
    return total


def peak_tflops(run: RunConfig) -> float | None:
    """Peak of one device, TFLOP/s: as configured, or of a known GPU for a bf16 run; else None."""
    if run.logging.peak_tflops is not None:
        return run.logging.peak_tflops
    if not torch.cuda.is_available() or run.precision.params_dtype != "bf16":
        return None
    name = torch.cuda.get_device_name()
    known = next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
    if known is None:
        log.info("no MFU: got a %s, need a peak of it; fix: logging.peak_tflops", name)
    return known


class Throughput:
    """Rates of the steps of ``run`` on ``devices`` devices."""

    def __init__(self, run: RunConfig, *, devices: int) -> None:
        self._run, self._devices, self._peak = run, devices, peak_tflops(run)
        self._tokens = run.latent.num_tokens(run.model.patch_size)
        self._networks = {
            role: replace(
                network_flops(run.model_of(role), run.latent), trains_lora=run.networks[role].lora is not None
            )
            for role in run.roles
        }

    def rates(self, step: Step, seconds: Mapping[str, float]) -> dict[str, float]:
        """Metrics from what `timers.step_seconds` gave; sample videos are not part of the step."""
        run = self._run
        step_seconds = seconds["seconds/step"] - seconds.get("seconds/preview", 0.0)
        samples = run.trainer.global_batch_size / step_seconds
        flops = step_flops(self._networks, step, distillation=run.distillation, objectives=run.objectives)
        tflops = samples * flops / self._devices / 1e12
        rates = {"samples_per_second": samples, "tokens_per_second": samples * self._tokens}
        rates |= {"tflops_per_device": tflops}
        return rates if self._peak is None else rates | {"mfu": tflops / self._peak}
