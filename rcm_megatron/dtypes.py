"""The names that dtypes have in configurations and on the command line, and which of them go together."""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def common_dtype(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """The narrowest dtype that holds all values of both. Every float8 value is one of bfloat16 and of float16."""
    if a == b:
        return a
    narrow = [dtype.itemsize == 1 for dtype in (a, b)]
    if all(narrow):
        return torch.bfloat16
    if any(narrow):
        return b if narrow[0] else a
    return torch.promote_types(a, b)
