"""What the launchers of the Triton kernels share. Import it where Triton is installed."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from rcm_kernels.configs import Config

INTERPRETED = triton.knobs.runtime.interpret
"""TRITON_INTERPRET=1 was set when Triton was imported: kernels run on the CPU, in numpy."""

_TRITON_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

Launch = tuple[JITFunction, tuple[int, ...], tuple[Any, ...], dict[str, Any]]
"""(kernel, grid, arguments, meta)."""
_noted: Callable[[Launch], None] | None = None


def launch(kernel: JITFunction, grid: tuple[int, ...], *arguments: Any, **meta: Any) -> None:
    """Run `kernel` on the device of its first argument; inside `instead` and `recorded` the launch is only noted."""
    if _noted is not None:
        _noted((kernel, grid, arguments, meta))
        return
    with on_device_of(arguments[0]):
        kernel[grid](*arguments, **meta)


@contextlib.contextmanager
def instead(note: Callable[[Launch], None]) -> Iterator[None]:
    """Launches made inside go to `note` and do not run: for tensors without memory."""
    global _noted
    before, _noted = _noted, note
    try:
        yield
    finally:
        _noted = before


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches made inside, which do not run: for meta tensors."""
    records: list[Launch] = []
    with instead(records.append):
        yield records


def runs_nothing() -> bool:
    """Whether launches are only noted, so that tensors may be anywhere."""
    return _noted is not None


def check_machine() -> None:
    """Raise where Triton kernels cannot run."""
    if not INTERPRETED and not runs_nothing() and not torch.cuda.is_available():
        raise RuntimeError(
            "no CUDA device; TRITON_INTERPRET=1, set before the start, interprets the kernels on the CPU"
        )


def check_tensors(q: Tensor, *others: Tensor | None) -> None:
    """All tensors on one device that Triton can run on, of one dtype that it can multiply, with a head dim up to 256.

    Raises ValueError for others.
    """
    if q.dtype not in _TRITON_TYPES:
        raise ValueError(f"got {q.dtype}; need float32, bfloat16 or float16; fix: convert it or choose 'reference'")
    if q.device.type != "cuda" and not INTERPRETED and not runs_nothing():
        raise ValueError(
            f"got a tensor on {q.device}; need CUDA; fix: move it there, choose the backend 'reference', or set "
            "TRITON_INTERPRET=1 before the start, which interprets the kernels on the CPU"
        )
    odd = next((x for x in others if x is not None and (x.device != q.device or x.dtype != q.dtype)), None)
    if odd is not None:
        raise ValueError(
            f"got {odd.dtype} on {odd.device} beside {q.dtype} on {q.device}; need one dtype and device; fix: convert it"
        )
    far = next((x for x in (q, *others) if x is not None and x.stride(0) >= 2**24), None)
    if far is not None:  # offsets within a tile of 128 rows are 32-bit
        raise ValueError(
            f"got tokens {far.stride(0)} elements apart; need less than {2**24}; fix: call contiguous() on it"
        )
    if q.shape[-1] > 256:
        raise ValueError(f"got head dim {q.shape[-1]}; need at most 256; fix: choose the backend 'reference'")


def dot_types(dtype: torch.dtype) -> tuple[tl.dtype, tl.dtype]:
    """(type to which factors of a matmul are rounded, type in which they are multiplied); the same but for the interpreter.

    The interpreter multiplies the bits of bf16 as integers, silently. A product of two bf16 is exact in fp32, so multiplying
    the rounded factors in fp32 is what tensor cores do.
    """
    rounded = _TRITON_TYPES[dtype]
    return rounded, tl.float32 if INTERPRETED and dtype == torch.bfloat16 else rounded


def dot_precision(dtype: torch.dtype) -> str:
    """How factors in fp32 are multiplied: three tf32 products on tensor cores, as good as fp32. Means nothing for the others."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def tile_sizes(config: Config, head_dim: int) -> dict[str, int]:
    """What a kernel of attention is compiled for by its configuration."""
    sizes = {"HEAD_DIM": head_dim, "BLOCK_D": config.block_d, "BLOCK_E": config.block_e, "BLOCK_M": config.block_m}
    return sizes | {"BLOCK_N": config.block_n, "num_warps": config.warps, "num_stages": config.stages}


def tile_types(dtype: torch.dtype) -> dict[str, Any]:
    """What a kernel of attention is compiled for by the type of its tensors."""
    p_type, dot_type = dot_types(dtype)
    return {"P_TYPE": p_type, "DOT_TYPE": dot_type, "PRECISION": dot_precision(dtype)}


def strides(*tensors: Tensor | None) -> list[int]:
    """Of all dimensions but the last, which is dense; zeros for a tensor that is not there."""
    return [stride for x in tensors for stride in ((0, 0, 0) if x is None else x.stride()[:3])]


def last_dim_dense(x: Tensor | None) -> Tensor | None:
    """`x` itself unless its last dimension is strided: the kernels take any stride for the others."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Context in which Triton launches on x's device: it launches on the current one otherwise."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()
