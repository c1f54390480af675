"""Tile sizes of the Triton kernels by kernel, GPU generation, head dim and type: a table, since tuning while training costs
minutes on every rank and gives each rank its own rounding. `python -m rcm_kernels.tune --write` measures and rewrites entries;
tests/kernels/test_triton_compile.py holds that none of them spills registers or needs more shared memory than there is.
"""

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rcm_kernels.gpu import capability, kind_of


@dataclass(frozen=True)
class Config:
    """How one program is cut."""

    block_m: int
    """Rows that stay: queries, or keys in the backward of k and v."""
    block_n: int
    """Rows of one step of the loop."""
    block_d: int
    """Head dims read at once; less than the head dim where all of q would not fit."""
    block_e: int
    """Value dims of a program; more programs share the rest."""
    warps: int
    stages: int


Key = tuple[str, int, int, str]
"""Of TABLE: kernel, GPU generation, head dim up to, "half" or "fp32"."""

# (kernel, GPU generation, head dim up to, "half" or "fp32"). Generation 80 stands for all GPUs without the matmul instructions of 9.0
# and 10.0: 8.x, 12.x. Filled from compiler output (no spills, registers used well), not yet from measurements: no GPU was at hand.
TABLE: dict[Key, Config] = {
    ("jvp", 80, 32, "half"): Config(128, 32, 32, 32, 8, 2),
    ("jvp", 80, 64, "half"): Config(128, 32, 64, 64, 8, 2),
    ("jvp", 80, 128, "half"): Config(128, 16, 128, 128, 8, 2),
    ("jvp", 80, 256, "half"): Config(128, 32, 64, 64, 8, 2),
    ("jvp", 80, 256, "fp32"): Config(64, 16, 32, 32, 4, 1),
    ("jvp", 90, 32, "half"): Config(128, 64, 32, 32, 8, 3),
    ("jvp", 90, 64, "half"): Config(128, 64, 64, 64, 8, 2),
    ("jvp", 90, 128, "half"): Config(128, 64, 128, 128, 8, 2),
    ("jvp", 90, 256, "half"): Config(128, 32, 256, 64, 8, 2),
    ("jvp", 90, 256, "fp32"): Config(64, 16, 32, 32, 4, 1),
    ("jvp", 100, 32, "half"): Config(128, 64, 32, 32, 8, 2),
    ("jvp", 100, 64, "half"): Config(128, 64, 64, 64, 8, 2),
    ("jvp", 100, 128, "half"): Config(64, 64, 128, 128, 8, 2),
    ("jvp", 100, 256, "half"): Config(128, 32, 256, 64, 8, 1),
    ("jvp", 100, 256, "fp32"): Config(64, 16, 32, 32, 4, 1),
    ("forward", 80, 32, "half"): Config(128, 64, 32, 32, 8, 2),
    ("forward", 80, 64, "half"): Config(128, 64, 64, 64, 8, 2),
    ("forward", 80, 128, "half"): Config(128, 64, 128, 128, 8, 2),
    ("forward", 80, 256, "half"): Config(64, 32, 64, 128, 4, 2),
    ("forward", 80, 256, "fp32"): Config(64, 32, 32, 32, 4, 1),
    ("forward", 90, 32, "half"): Config(128, 64, 32, 32, 8, 3),
    ("forward", 90, 64, "half"): Config(128, 128, 64, 64, 8, 3),
    ("forward", 90, 128, "half"): Config(128, 128, 128, 128, 8, 2),
    ("forward", 90, 256, "half"): Config(128, 64, 256, 128, 8, 2),
    ("forward", 90, 256, "fp32"): Config(64, 32, 32, 32, 4, 1),
    ("forward", 100, 32, "half"): Config(128, 64, 32, 32, 8, 2),
    ("forward", 100, 64, "half"): Config(128, 128, 64, 64, 8, 2),
    ("forward", 100, 128, "half"): Config(128, 64, 128, 128, 8, 2),
    ("forward", 100, 256, "half"): Config(128, 32, 256, 64, 8, 1),
    ("forward", 100, 256, "fp32"): Config(64, 32, 32, 32, 4, 1),
    ("dq", 80, 32, "half"): Config(128, 32, 32, 32, 8, 2),
    ("dq", 80, 64, "half"): Config(128, 32, 64, 64, 8, 2),
    ("dq", 80, 128, "half"): Config(128, 32, 128, 128, 8, 2),
    ("dq", 80, 256, "half"): Config(128, 32, 64, 64, 8, 2),
    ("dq", 80, 256, "fp32"): Config(64, 64, 32, 32, 4, 1),
    ("dq", 90, 32, "half"): Config(128, 64, 32, 32, 8, 2),
    ("dq", 90, 64, "half"): Config(128, 128, 64, 64, 8, 2),
    ("dq", 90, 128, "half"): Config(128, 64, 128, 128, 8, 2),
    ("dq", 90, 256, "half"): Config(128, 32, 256, 128, 8, 1),
    ("dq", 90, 256, "fp32"): Config(64, 32, 32, 32, 4, 1),
    ("dq", 100, 32, "half"): Config(128, 64, 32, 32, 8, 2),
    ("dq", 100, 64, "half"): Config(128, 128, 64, 64, 8, 2),
    ("dq", 100, 128, "half"): Config(128, 64, 128, 128, 8, 2),
    ("dq", 100, 256, "half"): Config(128, 32, 256, 64, 8, 1),
    ("dq", 100, 256, "fp32"): Config(64, 32, 32, 32, 4, 1),
    ("dkdv", 80, 32, "half"): Config(128, 32, 32, 32, 8, 2),
    ("dkdv", 80, 64, "half"): Config(128, 32, 64, 64, 8, 2),
    ("dkdv", 80, 128, "half"): Config(128, 32, 128, 64, 8, 2),
    ("dkdv", 80, 256, "half"): Config(64, 32, 32, 64, 4, 2),
    ("dkdv", 80, 256, "fp32"): Config(64, 32, 32, 32, 4, 1),
    ("dkdv", 90, 32, "half"): Config(128, 64, 32, 32, 8, 2),
    ("dkdv", 90, 64, "half"): Config(128, 64, 64, 64, 8, 2),
    ("dkdv", 90, 128, "half"): Config(128, 64, 128, 128, 8, 2),
    ("dkdv", 90, 256, "half"): Config(128, 32, 256, 64, 8, 1),
    ("dkdv", 90, 256, "fp32"): Config(64, 32, 32, 32, 4, 1),
    ("dkdv", 100, 32, "half"): Config(128, 64, 32, 32, 8, 2),
    ("dkdv", 100, 64, "half"): Config(128, 64, 64, 64, 8, 2),
    ("dkdv", 100, 128, "half"): Config(128, 64, 128, 128, 8, 2),
    ("dkdv", 100, 256, "half"): Config(128, 32, 256, 64, 8, 1),
    ("dkdv", 100, 256, "fp32"): Config(64, 32, 32, 32, 4, 1),
}

INTERPRETER = Config(32, 32, 256, 256, 4, 1)

SHARED_MEMORY = {80: 101_376, 90: 232_448, 100: 232_448}
"""Bytes that one program can have. For 80 the least of the GPUs that it stands for; an A100 has 166,912."""


def config_for(kernel: str, q: Tensor, *, irregular: bool = False) -> Config:
    """The configuration for tensors like q. `irregular`: see `narrower`."""
    bucket = block_dim(q.shape[-1])
    if kind_of(q.device.type) != "cuda":
        return replace(INTERPRETER, block_d=bucket, block_e=bucket)
    key = table_key(kernel, generation(q.device.index), q.shape[-1], q.dtype)
    return narrower(TABLE[key]) if irregular or q.shape[-1] != bucket else TABLE[key]


def table_key(kernel: str, generation: int, head_dim: int, dtype: torch.dtype) -> Key:
    """Key of TABLE. fp32 is cut into pieces of the head dim, so that one entry serves all."""
    if dtype == torch.float32:
        return kernel, generation, 256, "fp32"
    return kernel, generation, max(32, block_dim(head_dim)), "half"


def narrower(config: Config) -> Config:
    """Smaller steps, for calls that need more registers: masks by chunk, unequal strides, a head dim that is no power of two."""
    if config.block_n > 16:
        return replace(config, block_n=config.block_n // 2)
    return replace(config, block_e=max(16, config.block_e // 2))


def block_dim(head_dim: int) -> int:
    """The power of two, at least 16, that holds the head dim."""
    return max(16, 1 << (head_dim - 1).bit_length())


@functools.cache
def generation(device_index: int | None) -> int:
    """The GPU generation of the table: 80, 90 or 100. Raises ValueError for an older GPU."""
    major, minor = capability(device_index)
    if (major, minor) < (8, 0):
        raise ValueError(
            f"got a GPU of capability {major}.{minor}; need 8.0 or later; fix: choose the backend 'reference'"
        )
    return {9: 90, 10: 100}.get(major, 80)
