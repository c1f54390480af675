"""Attention and its Jacobian-vector product in one pass: `attention_jvp`, `merge_blocks`, the choice of the backend.

A backend is a function with the signature and the contract of `reference.attention_jvp`, and one entry of `_LOADERS`: its name
and a function that imports and returns it, raising ImportError or RuntimeError where it cannot run.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rcm_kernels.choice import Choice
from rcm_kernels.flash_attention_jvp import reference
from rcm_kernels.flash_attention_jvp.reference import Carry, merge_blocks

__all__ = ["attention_jvp", "backend_for", "merge_blocks", "select_backend"]

"""What `reference.attention_jvp` is."""

AttentionJvp = Callable[..., Carry]
"""What `reference.attention_jvp` is."""


def _triton() -> AttentionJvp:
    from rcm_kernels import launch
    from rcm_kernels.flash_attention_jvp import triton_impl

    launch.check_machine()
    return triton_impl.attention_jvp if launch.INTERPRETED else _checked(triton_impl.attention_jvp)


def _checked(kernel: AttentionJvp) -> AttentionJvp:
    """Refuse a kernel that this GPU, driver or Triton makes something else of: one small case against the reference."""
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = torch.randn(6, 130, 1, 2, 128, device="cuda", generator=generator).bfloat16().unbind(0)
    results = kernel(*inputs), reference.attention_jvp(*inputs)
    for name, got, want in zip(("o", "to", "lse", "mu"), *results, strict=True):
        error = float((got - want).norm() / want.norm())
        if not error <= 1e-2:
            raise RuntimeError(f"the kernel's {name} is {error:.1e} off the reference on this GPU")
    return kernel


_LOADERS: dict[str, Callable[[], AttentionJvp]] = {"reference": lambda: reference.attention_jvp, "triton": _triton}


def _candidates(device: str, dtype: torch.dtype, head_dim: int) -> list[str]:
    fast = device == "cuda" and head_dim <= 256 and dtype in (torch.bfloat16, torch.float16, torch.float32)
    return ["triton", "reference"] if fast else ["reference"]


CHOICE = Choice("attention_jvp", _LOADERS, _candidates, slow="reference")
select_backend = CHOICE.select


def backend_for(q: Tensor) -> str:
    """Name of the implementation for q's device, dtype and head dim; chosen and logged once per combination."""
    return CHOICE.settle(q.device.type, q.dtype, q.shape[-1])[0]


def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor,
    tk: Tensor | None = None,
    tv: Tensor | None = None,
    *,
    valid_keys: int | None = None,
    scale: float | None = None,
    carry: Carry | None = None,
    **options: Any,
) -> Carry:
    """Softmax attention and its tangent: by Triton on a GPU, by the reference elsewhere, or as `select_backend` said.

    Arguments, `options` (masks, output type) and results as in `reference.attention_jvp`: `(o, to, lse, mu)`.
    """
    _, backend = CHOICE.settle(q.device.type, q.dtype, q.shape[-1])
    return backend(q, k, v, tq, tk, tv, valid_keys=valid_keys, scale=scale, carry=carry, **options)
