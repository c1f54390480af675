"""The numbers of a checkpoint: rounding that stays finite, and float8 weights that come with scales."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rcm_megatron.errors import CheckpointError
from rcm_megatron.finite import find_nonfinite

if TYPE_CHECKING:
    from rcm_megatron.checkpoint.sources import LazyTensor

log = logging.getLogger(__name__)

DTYPES_IN_HEADERS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""safetensors' names of floating-point dtypes."""
_SCALES = (".scale_weight", ".weight_scale")
"""Ends of keys of ComfyUI's scaled float8 files, the older and the newer: `W = weight * scale`."""
_SCALE_COMPANIONS = (".scale_input", ".input_scale", ".comfy_quant")
"""Ends of keys beside them that are about activations, or say `{"format": "float8_e4m3fn"}`."""
_SCALED_MARK = "scaled_fp8"


def rounded(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor in `dtype` (None: its own). CheckpointError where a value does not fit, which names the key."""
    if dtype in (None, tensor.dtype):
        return tensor
    result = tensor.to(dtype)
    if find_nonfinite(result) is not None:
        worst = float(tensor.abs().max())
        raise CheckpointError(
            f"{name!r} holds values up to {worst:g}; {str(dtype).removeprefix('torch.')} ends at {torch.finfo(dtype).max:g}; "
            "take --dtype bf16, which has the range of fp32"
        )
    return result


def dequantised(tensors: Mapping[str, LazyTensor], *, where: str) -> dict[str, LazyTensor]:
    """The tensors with float8 weights multiplied by the scales beside them, in float32; scales and their marks are gone."""
    scales = {
        f"{name.removesuffix(end)}.weight": name
        for end in _SCALES
        for name in tensors
        if name.endswith(end) and f"{name.removesuffix(end)}.weight" in tensors
    }
    if not scales:
        return {name: tensor for name, tensor in tensors.items() if name != _SCALED_MARK}
    say_once(f"{where}: {len(scales)} float8 weights are multiplied by their scales, in float32")
    plain = {}
    for name, tensor in tensors.items():
        if name in scales:
            read = partial(_read_scaled, tensor, tensors[scales[name]], name, where)
            plain[name] = type(tensor)(tensor.shape, read, torch.float32)
        elif name not in scales.values() and name != _SCALED_MARK and not name.endswith(_SCALE_COMPANIONS):
            plain[name] = tensor
    return plain


def _read_scaled(weight: LazyTensor, scale: LazyTensor, name: str, where: str, index: tuple[slice, ...]) -> Tensor:
    """Scales: one number, one a row, or [rows, blocks, 1] with blocks of columns."""
    stored, factors = (tensor.read((slice(None),) * len(tensor.shape)) for tensor in (weight, scale))
    if stored.dtype.itemsize != 1 or not stored.is_floating_point():
        raise CheckpointError(f"{where}: {name!r} is quantised to {stored.dtype}; need float8, or the unquantised file")
    rows, values, factors = stored.shape[0], stored.float(), factors.float()
    if factors.numel() == 1:
        values = values * factors.reshape(())
    elif factors.numel() == rows and factors.shape[0] == rows:
        values = values * factors.reshape(rows, *[1] * (values.ndim - 1))
    elif factors.ndim == 3 and factors.shape[::2] == (rows, 1) and values.shape[1] % factors.shape[1] == 0:
        values = (values.unflatten(1, (factors.shape[1], -1)) * factors).flatten(1)
    else:
        raise CheckpointError(
            f"{where}: the scale of {name!r} has shape {list(factors.shape)}; need one number, one for each of {rows} rows, or "
            f"[{rows}, blocks, 1]; take the unquantised file"
        )
    return values[index]


@functools.cache
def say_once(message: str) -> None:
    """A warning that a process gives once, however often it opens a file."""
    log.warning(message)
