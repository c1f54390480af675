"""Every launch of the fused kernels in a training step, of which `rcm_kernels.compile_report --fused` compiles each.

Needs no GPU: the ops run on meta tensors of Wan2.1's sizes and their launches are recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from rcm_kernels.benchmark import DTYPES
from rcm_kernels.fused import gated_residual, gelu_tanh, layer_norm_modulate, rms_norm_rope
from rcm_kernels.launch import Launch, recorded

# features, local heads, head dim: 14B and 1.3B on one GPU, 14B with tp=4
SIZES = ((5120, 40, 128), (1536, 12, 128), (5120, 10, 128))
FFN = 13824
TOKENS = 32760


def launches(dtype: torch.dtype = torch.bfloat16, sizes: Sequence[tuple[int, int, int]] = SIZES) -> list[Launch]:
    """The launches of a training step, one of each that Triton compiles on its own."""
    with recorded() as records:
        for features, heads, head_dim in sizes:
            split = heads * head_dim < features
            _run_norms_of_heads(dtype, features, heads, head_dim, sum_over_tp=_add if split else None)
            if not split:
                _run_norms(dtype, features)
        _run_tiled(dtype, sizes[0][0], FFN)
    return list({_identity(*launch): launch for launch in records}.values())


def _identity(
    kernel: JITFunction, grid: tuple[int, ...], arguments: Sequence[Any], meta: dict[str, Any]
) -> tuple[str, ...]:
    """Equal for launches that run the same binary."""
    types, _, attributes = signature(kernel, arguments)
    return kernel.__name__, str(types), str(attributes), str(meta)


def _add(total: Tensor) -> Tensor:
    return total + 0


def _empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


def _run_norms(dtype: torch.dtype, features: int) -> None:
    h, dual_h = _empty(TOKENS, 1, features, dtype=dtype), _empty(TOKENS, 2, features, dtype=dtype)
    vector, dual_vector, weight = _empty(1, 1, features), _empty(1, 2, features), _empty(features)
    options = {"eps": 1e-6, "dtype": dtype}
    _both(layer_norm_modulate.plain, h, vector, vector, **options)
    _both(layer_norm_modulate.plain, h, weight, weight, one=0.0, **options)
    layer_norm_modulate.dual(dual_h, dual_vector, dual_vector, **options)
    layer_norm_modulate.dual(dual_h, weight, weight, one=0.0, vector_tangents=False, **options)


def _run_tiled(dtype: torch.dtype, features: int, ffn: int) -> None:
    """Ops in tiles of one size, whatever the number of features."""
    h, dual_h = _empty(TOKENS, 1, features, dtype=dtype), _empty(TOKENS, 2, features, dtype=dtype)
    x, dual_x, bias = (_empty(*sizes, ffn, dtype=dtype) for sizes in ((TOKENS, 1), (TOKENS, 2), ()))
    _both(gated_residual.plain, h, h, _empty(1, 1, features))
    gated_residual.dual(dual_h, dual_h, _empty(1, 2, features))
    _both(gelu_tanh.plain, x, bias)
    gelu_tanh.dual(dual_x, bias)


def _run_norms_of_heads(
    dtype: torch.dtype, features: int, heads: int, head_dim: int, sum_over_tp: Callable[[Tensor], Tensor] | None
) -> None:
    weight, rotation = _empty(heads, head_dim), _empty(TOKENS, head_dim // 2, dtype=torch.complex64)
    options = {"eps": 1e-6, "num_features": features, "sum_over_tp": sum_over_tp}
    for parts, turn in ((3, rotation), (1, None)):
        plain, dual = (_empty(TOKENS, rows, heads, parts, head_dim, dtype=dtype).select(3, 0) for rows in (1, 2))
        _both(rms_norm_rope.plain, plain, weight, turn, **options)
        rms_norm_rope.dual(dual, weight, turn, **options)


def _both(function: Callable[..., Tensor], *inputs: Tensor | None, **options: Any) -> None:
    """Forward and backward."""
    leaves = [x if x is None or x.is_complex() else x.detach().requires_grad_() for x in inputs]
    output = function(*leaves, **options)
    output.backward(torch.empty(output.shape, dtype=output.dtype, device="meta"))


def signature(
    kernel: JITFunction, arguments: Sequence[Any]
) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """(type by name, constants, attributes by index) of the arguments, as Triton specialises a launch."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        if isinstance(value, torch.Tensor):
            types[name] = "*" + next(key for key, dtype in DTYPES.items() if dtype == value.dtype)
        elif isinstance(value, float):
            types[name] = "fp32"
        elif value == 1:
            types[name], constants[name] = "constexpr", 1
        else:
            types[name] = "i32" if value < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value != 1 and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return types, constants, attributes
