"""How the fused kernels are launched, and what they share."""

import contextlib

import torch
import triton

from rcm_kernels.launch import INTERPRETED, on_device_of

MAX_BLOCK = 16384
MAX_REGISTERS = 128
"""Of a forward kernel that holds whole rows. With 8 warps for 14B's 5,120 features, two programs then fit on an SM, and one loads
while the other reduces. The backward has sums over tokens too, and takes 16 warps: at 8 it would spill."""
PROGRAMS = 512
"""Programs that sum gradients over tokens, each into its own fp32 row: about four for each of the 132 SMs of an H100 or H200."""

_records = None


def launch(kernel, grid, *arguments, **meta):
    """Run `kernel` on the device of its first argument; under `recorded` only note the launch."""
    if _records is not None:
        _records.append((kernel, grid, arguments, meta))
        return
    with on_device_of(arguments[0]):
        kernel[grid](*arguments, **meta)


@contextlib.contextmanager
def recorded():
    """The launches made inside, as (kernel, grid, arguments, meta), without running them: for meta tensors."""
    global _records
    _records = []
    try:
        yield _records
    finally:
        _records = None


def prepared(*tensors):
    """The tensors with a dense last dimension. ValueError if Triton cannot run where they are."""
    device = tensors[0].device
    if device.type != "cuda" and not INTERPRETED and _records is None:
        raise ValueError(
            f"got a tensor on {device} for a fused kernel; need CUDA; fix: move it there or select_ops('auto') "
            "(TRITON_INTERPRET=1, set before the start, interprets the kernels on the CPU)"
        )
    return tuple(x if x is None or x.stride(-1) == 1 else x.contiguous() for x in tensors)


def block_of(size):
    """The power of two that holds `size` features in one program."""
    block = triton.next_power_of_2(size)
    if block > MAX_BLOCK:
        raise ValueError(
            f"got {size} features in one row; need at most {MAX_BLOCK}, which one program holds in registers; "
            "fix: select_ops without the norms"
        )
    return block


def warps_of(block, *, most=8):
    """16 elements a thread (two 16-byte loads of bf16) until that needs more than `most` warps."""
    return min(max(block // 512, 1), most)


def row_programs(rows):
    """Programs that share `rows` rows, at most PROGRAMS."""
    return max(1, min(rows, PROGRAMS))


def halves(stacked):
    """Batch of the primal, which is the first half of dimension 1."""
    return stacked.shape[1] // 2


def batch_stride(vector):
    """Elements between the vectors of two samples: `[1, b, d]`, or one for all of them, `[1, 1, d]` or `[d]`."""
    if vector.dim() == 1:
        return 0
    if vector.dim() != 3 or vector.shape[0] != 1:
        raise ValueError(
            f"got a vector of shape {tuple(vector.shape)}; need [1, b, d] or [d]; fix: one vector per sample"
        )
    return vector.stride(1) if vector.shape[1] > 1 else 0


def gradient_of(vector, sums):
    """Gradient of a vector from fp32 sums over tokens, `[b, d]` or `[d]`, in its shape and dtype."""
    return sums.sum_to_size(vector.shape[-2:]).to(vector.dtype).view(vector.shape)


def empty_like(x, dtype=None):
    """Contiguous, whatever the strides of x are."""
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
