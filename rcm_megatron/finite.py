"""Numbers that are not finite, named: which value, where, and how many of them."""

from __future__ import annotations

import torch
from torch import Tensor


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
