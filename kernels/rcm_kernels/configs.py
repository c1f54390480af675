"""Tile sizes of the Triton kernels by kernel, GPU generation, head dim and type: a table, since tuning while training costs
minutes on every rank and gives each rank its own rounding. `python -m rcm_kernels.tune --write` measures and rewrites entries;
tests/kernels/test_triton_compile.py holds that none of them spills registers or needs more shared memory than there is.
"""

import functools
from dataclasses import dataclass, replace

import torch


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


# (kernel, GPU generation, head dim up to, "half" or "fp32"). Generation 89 stands for all GPUs with 99 KiB of shared memory (8.6, 8.9,
# 12.x). Filled from compiler output (no spills, registers used well), not yet from measurements: no GPU was at hand.
TABLE = {
    ("jvp", 90, 128, "half"): Config(128, 64, 128, 128, 8, 2),
}

INTERPRETER = Config(32, 32, 256, 256, 4, 1)

SHARED_MEMORY = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448}
"""Bytes that one program can have, per generation."""


def config_for(kernel, q, *, irregular=False):
    """The configuration for tensors like q. `irregular`: strides that share no offsets, for which registers run out earlier."""
    bucket = block_dim(q.shape[-1])
    if q.device.type != "cuda":
        return replace(INTERPRETER, block_d=bucket, block_e=bucket)
    kind = "fp32" if q.dtype == torch.float32 else "half"
    config = TABLE[kernel, generation(q.device.index), bucket, kind]
    return narrower(config) if irregular or q.shape[-1] != bucket else config


def narrower(config):
    """Half the rows per step, for calls that need more registers: unequal strides, a head dim that is no power of two."""
    return replace(config, block_n=max(16, config.block_n // 2))


def block_dim(head_dim):
    """The power of two, at least 16, that holds the head dim."""
    return max(16, 1 << (head_dim - 1).bit_length())


@functools.cache
def generation(device_index):
    """The GPU generation of the table: 80, 89, 90 or 100."""
    major, minor = torch.cuda.get_device_capability(device_index)
    if (major, minor) < (8, 0):
        raise ValueError(
            f"got a GPU of capability {major}.{minor}; need 8.0 or later; fix: choose the backend 'reference'"
        )
    return {(8, 0): 80, (9, 0): 90, (10, 0): 100, (10, 3): 100}.get((major, minor), 89)
