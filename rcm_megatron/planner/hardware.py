"""Tables of hardware: what a GPU and its links can do, and what share of it a step is assumed to reach."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from rcm_megatron.config import ConfigError
from rcm_megatron.config.declare import Bounds, Positive, PositiveFloat
from rcm_megatron.config.reading import read
from rcm_megatron.text import TextError, read_text
from rcm_megatron.training.flops import PEAK_TFLOPS

Share = Annotated[float, Bounds(gt=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Shares of the peak that operations reach. The defaults are assumed: of H100s, from what the kernels' authors publish."""

    linear: Share = 0.70
    """Matrix products of linears, of the peak in bf16."""
    attention: Share = 0.60
    """Attention's forward."""
    attention_backward: Share = 0.50
    attention_jvp: Share = 0.40
    """Attention of the dual pass, primal and tangent."""
    memory: Share = 0.75
    """Of the memory's bandwidth: norms, modulation, gates, GELU, RoPE, the optimizer."""
    links: Share = 0.80
    """Of the links' bandwidth."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A cluster of one kind of GPU."""

    name: str
    peak_tflops: PositiveFloat
    """Dense bf16."""
    memory_gib: PositiveFloat
    """As CUDA says it."""
    reserve_gib: PositiveFloat = 5.5
    """Not for tensors: CUDA's context, NCCL's and DALI's buffers, the allocator's fragments."""
    memory_gbs: PositiveFloat
    """GB/s of the GPU's own memory."""
    gpus_per_node: Positive = 8
    inside_gbs: PositiveFloat
    """GB/s a GPU sends inside a node, in one direction."""
    between_gbs: PositiveFloat
    """GB/s a GPU sends between nodes, in one direction."""
    host_gbs: PositiveFloat = 55.0
    """GB/s between a GPU and its host's memory, for what is offloaded."""
    inside_latency_us: PositiveFloat = 15.0
    """Of a collective inside a node."""
    between_latency_us: PositiveFloat = 40.0
    launch_us: PositiveFloat = 4.0
    """Time of the host for one kernel: where they are too small a step takes no less."""
    efficiency: Efficiency = field(default_factory=Efficiency)

    @property
    def usable_gib(self) -> float:
        """For tensors."""
        return self.memory_gib - self.reserve_gib


HARDWARE: Mapping[str, Hardware] = {
    hardware.name: hardware
    for hardware in (
        Hardware(
            name="a100-80g",
            peak_tflops=PEAK_TFLOPS["A100"],
            memory_gib=79.2,
            memory_gbs=2039.0,
            inside_gbs=300.0,
            between_gbs=25.0,
            host_gbs=25.0,
        ),
        Hardware(
            name="h100-80g",
            peak_tflops=PEAK_TFLOPS["H100"],
            memory_gib=79.6,
            memory_gbs=3350.0,
            inside_gbs=450.0,
            between_gbs=50.0,
        ),
        Hardware(
            name="h200-141g",
            peak_tflops=PEAK_TFLOPS["H200"],
            memory_gib=139.8,
            memory_gbs=4800.0,
            inside_gbs=450.0,
            between_gbs=50.0,
        ),
        Hardware(
            name="b200-180g",
            peak_tflops=PEAK_TFLOPS["B200"],
            memory_gib=178.4,
            memory_gbs=8000.0,
            inside_gbs=900.0,
            between_gbs=50.0,
        ),
    )
}
"""Data sheets: SXM boards in nodes of eight, one network card of 200 (A100) or 400 Gbit/s a GPU."""


def hardware_of(name: str) -> Hardware:
    """A table of `HARDWARE`, or of a JSON file with the fields of `Hardware`; "like" names one that it takes the rest from.

    Raises ConfigError for another name and for a file that is none."""
    if name in HARDWARE:
        return HARDWARE[name]
    path = Path(name)
    if path.suffix != ".json":
        raise ConfigError(
            f"--gpu: got {name}; need one of {', '.join(HARDWARE)}, or a JSON file with such a table (docs/plan.md)"
        )
    try:
        given = json.loads(read_text(path))
    except (TextError, ValueError) as error:
        raise ConfigError(f"--gpu: {path}: {error}; need a JSON file with the fields of a table of hardware") from None
    return _read(path, given)


def _read(path: Path, given: Any) -> Hardware:
    if not isinstance(given, dict):
        raise ConfigError(
            f"--gpu: {path}: got {type(given).__name__}, need an object with the fields of a table of hardware"
        )
    like = given.pop("like", None)
    if like is not None and like not in HARDWARE:
        raise ConfigError(f"--gpu: {path}: like: got {like!r}; need one of {', '.join(HARDWARE)}")
    base = {} if like is None else asdict(HARDWARE[like])
    merged = {"name": path.stem} | {key: value for key, value in base.items() if key != "name"} | given
    if like is not None and isinstance(given.get("efficiency"), dict):
        merged["efficiency"] = base["efficiency"] | given["efficiency"]
    hardware, problems = read(Hardware, merged)
    if problems:
        raise ConfigError("\n".join(f"--gpu: {path}: {problem}" for problem in problems))
    return hardware
