"""Numbers that are not finite, named: which value, where, and how many of them."""

from __future__ import annotations

import torch
from torch import Tensor

from rcm_megatron.errors import InputError


class NonFiniteError(InputError):
    """NaN or Inf where numbers are about to be shown or kept."""


def require_finite(tensor: Tensor, *, what: str) -> None:
    """NonFiniteError that says what, where and how many; `what`: the sample and its tensor."""
    if (bad := find_nonfinite(tensor)) is not None:
        raise NonFiniteError(
            f"{what} holds {bad}; need finite numbers: take other weights, or a wider dtype (precision.params_dtype=fp32)"
        )


def find_nonfinite(tensor: Tensor) -> str | None:
    """`nan at [0, 3], 2 of 100 values are not finite`, of a tensor of any floating-point dtype; None where all are finite.

    The usual case costs one pass and no memory: a sum is finite only if every addend is.
    """
    if tensor.dtype.itemsize == 1:  # float8 knows neither sums nor isfinite
        tensor = tensor.float()
    if bool(torch.isfinite(tensor.sum())):
        return None
    bad = ~torch.isfinite(tensor)  # a sum of finite values may overflow
    count = int(bad.sum())
    if count == 0:
        return None
    index = bad.nonzero()[0].tolist()
    return f"{float(tensor[tuple(index)])} at {index}, {count} of {tensor.numel()} values are not finite"
