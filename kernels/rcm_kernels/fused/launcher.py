"""What the launchers of the fused kernels share."""

from typing import Any

import torch
import triton
from torch import Tensor

from rcm_kernels.launch import INTERPRETED, runs_nothing

MAX_BLOCK = 16384
MAX_REGISTERS = 128
"""Of a forward kernel that holds whole rows. With 8 warps for 14B's 5,120 features, two programs then fit on an SM, and one loads
while the other reduces. The backward has sums over tokens too, and takes 16 warps: at 8 it would spill."""
PROGRAMS = 512
"""Programs that sum gradients over tokens, each into its own fp32 row: about four for each of the 132 SMs of an H100 or H200."""


def prepared(first: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The tensors with a dense last dimension. ValueError if Triton cannot run where they are."""
    device = first.device
    if device.type != "cuda" and not INTERPRETED and not runs_nothing():
        raise ValueError(
            f"got a tensor on {device} for a fused kernel; need CUDA; fix: move it there or select_ops('auto') "
            "(TRITON_INTERPRET=1, set before the start, interprets the kernels on the CPU)"
        )
    return tuple(x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (first, *others))


def block_of(size: int) -> int:
    """The power of two that holds `size` features in one program. Raises ValueError for more than one can hold."""
    block = triton.next_power_of_2(size)
    if block > MAX_BLOCK:
        raise ValueError(
            f"got {size} features in one row; need at most {MAX_BLOCK}, which one program holds in registers; "
            "fix: select_ops without the norms"
        )
    return block


def warps_of(block: int, *, most: int = 8) -> int:
    """16 elements a thread (two 16-byte loads of bf16) until that needs more than `most` warps."""
    return min(max(block // 512, 1), most)


def row_programs(rows: int) -> int:
    """Programs that share `rows` rows, at most PROGRAMS."""
    return max(1, min(rows, PROGRAMS))


def halves(stacked: Tensor) -> int:
    """Batch of the primal, which is the first half of dimension 1."""
    return stacked.shape[1] // 2


def batch_stride(vector: Tensor) -> int:
    """Elements between the vectors of two samples: `[1, b, d]`, or one for all of them, `[1, 1, d]` or `[d]`.

    Raises ValueError for other shapes.
    """
    if vector.dim() == 1:
        return 0
    if vector.dim() != 3 or vector.shape[0] != 1:
        raise ValueError(
            f"got a vector of shape {tuple(vector.shape)}; need [1, b, d] or [d]; fix: one vector per sample"
        )
    return vector.stride(1) if vector.shape[1] > 1 else 0


def gradient_of(vector: Tensor, sums: Tensor) -> Tensor:
    """Gradient of a vector from fp32 sums over tokens, `[b, d]` or `[d]`, in its shape and dtype."""
    return sums.sum_to_size(vector.shape[-2:]).to(vector.dtype).view(vector.shape)


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Contiguous, whatever the strides of x are."""
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
