"""Plain softmax attention with log-sum-exp, whose backward takes both from outside: a ring merges them.

`attention` is the autograd function; `attention_forward` and `attention_backward` are its two halves, for the ring.
All tensors are [s, b, n, d] (strided views are fine), lse is [b, n, s] in fp32 (fp64 for fp64).
"""

from rcm_kernels.flash_attention.backends import backend_for, select_backend
from rcm_kernels.flash_attention.interface import attention, attention_backward, attention_forward

__all__ = ["attention", "attention_backward", "attention_forward", "backend_for", "select_backend"]
