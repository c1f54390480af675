"""Attention and its Jacobian-vector product in one pass: `attention_jvp`, `merge_blocks`, the choice of the backend.

A backend is a function with the signature and the contract of `reference.attention_jvp`, and one entry of `_LOADERS`: its name
and a function that imports and returns it, raising ImportError or RuntimeError where it cannot run.
"""

import functools
import logging
from collections.abc import Callable

import torch

from rcm_kernels.flash_attention_jvp import reference
from rcm_kernels.flash_attention_jvp.reference import merge_blocks

__all__ = ["attention_jvp", "available_backends", "backend_for", "merge_blocks", "select_backend"]

_logger = logging.getLogger(__name__)
_forced: str | None = None


def _triton():
    from rcm_kernels import launch
    from rcm_kernels.flash_attention_jvp import triton_impl

    launch.check_machine()
    return triton_impl.attention_jvp if launch.INTERPRETED else _checked(triton_impl.attention_jvp)


def _checked(kernel):
    """Refuse a kernel that this GPU, driver or Triton makes something else of: one small case against the reference."""
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = torch.randn(6, 130, 1, 2, 128, device="cuda", generator=generator).bfloat16().unbind(0)
    results = kernel(*inputs), reference.attention_jvp(*inputs)
    for name, got, want in zip(("o", "to", "lse", "mu"), *results, strict=True):
        error = float((got - want).norm() / want.norm())
        if not error <= 1e-2:
            raise RuntimeError(f"the kernel's {name} is {error:.1e} off the reference on this GPU")
    return kernel


_LOADERS: dict[str, Callable[[], Callable]] = {"reference": lambda: reference.attention_jvp, "triton": _triton}


def available_backends() -> tuple[str, ...]:
    """Names that `select_backend` knows, beside "auto"."""
    return tuple(_LOADERS)


def select_backend(name):
    """Force one implementation of `attention_jvp` in this process; "auto" undoes it. ValueError where it cannot run."""
    global _forced
    if name != "auto" and name not in _LOADERS:
        raise ValueError(
            f"got attention_jvp backend {name!r}; need one of {', '.join(_LOADERS)}, auto; fix: choose one of these"
        )
    if name != "auto":
        _load(name)
    _forced = None if name == "auto" else name
    _choose.cache_clear()


@functools.cache
def _load(name):
    try:
        return _LOADERS[name]()
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"got attention_jvp backend {name!r}, which cannot run here ({error}); need its packages and device; "
            "fix: install them or choose 'reference'"
        ) from error


@functools.cache
def _choose(device, dtype, head_dim):
    """(name, implementation) for tensors of this kind; chosen and logged once per kind."""
    fast = device == "cuda" and head_dim <= 256 and dtype in (torch.bfloat16, torch.float16, torch.float32)
    name = _forced or ("triton" if fast else "reference")
    try:
        backend = _load(name)
    except ValueError as error:
        if _forced:
            raise
        _logger.warning("slow attention with tangent: %s", error)
        name, backend = "reference", _load("reference")
    _logger.info("attention_jvp backend on %s, %s, head dim %d: %s", device, dtype, head_dim, name)
    return name, backend


def backend_for(q):
    """Name of the implementation for q's device, dtype and head dim; chosen and logged once per combination."""
    return _choose(q.device.type, q.dtype, q.shape[-1])[0]


def attention_jvp(q, k, v, tq, tk=None, tv=None, *, valid_keys=None, scale=None, carry=None, **options):
    """Softmax attention and its tangent: by Triton on a GPU, by the reference elsewhere, or as `select_backend` said.

    Arguments, `options` (masks, output type) and results as in `reference.attention_jvp`: `(o, to, lse, mu)`.
    """
    _, backend = _choose(q.device.type, q.dtype, q.shape[-1])
    return backend(q, k, v, tq, tk, tv, valid_keys=valid_keys, scale=scale, carry=carry, **options)
