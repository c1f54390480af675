"""Attention and its Jacobian-vector product in one pass: `attention_jvp`, `merge_blocks`, the choice of the backend.

A backend is a function with the signature and the contract of `reference.attention_jvp`, and one entry of `_LOADERS`: its name
and a function that imports and returns it, raising ImportError or RuntimeError where it cannot run.
"""

import logging
from collections.abc import Callable

from rcm_kernels.flash_attention_jvp import reference
from rcm_kernels.flash_attention_jvp.reference import merge_blocks

__all__ = ["attention_jvp", "available_backends", "merge_blocks", "select_backend"]

_logger = logging.getLogger(__name__)


def _triton():
    from rcm_kernels import launch
    from rcm_kernels.flash_attention_jvp import triton_impl

    launch.check_machine()
    return triton_impl.attention_jvp


_LOADERS: dict[str, Callable[[], Callable]] = {"reference": lambda: reference.attention_jvp, "triton": _triton}
_selected: Callable | None = None


def available_backends() -> tuple[str, ...]:
    """Names that `select_backend` knows."""
    return tuple(_LOADERS)


def select_backend(name):
    """Choose, and log, the implementation behind `attention_jvp` in this process. ValueError where it cannot run."""
    global _selected
    if name not in _LOADERS:
        raise ValueError(
            f"got attention_jvp backend {name!r}; need one of {', '.join(_LOADERS)}; fix: choose one of these"
        )
    try:
        _selected = _LOADERS[name]()
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"got attention_jvp backend {name!r}, which cannot run here ({error}); need its packages and device; "
            "fix: install them or choose 'reference'"
        ) from error
    _logger.info("attention_jvp backend: %s", name)


def attention_jvp(q, k, v, tq, tk=None, tv=None, *, valid_keys=None, scale=None, carry=None, **options):
    """Softmax attention and its tangent by the selected backend: "reference" unless `select_backend` said otherwise.

    Arguments, `options` (masks, output type) and results as in `reference.attention_jvp`: `(o, to, lse, mu)`.
    """
    if _selected is None:
        select_backend("reference")
    return _selected(q, k, v, tq, tk, tv, valid_keys=valid_keys, scale=scale, carry=carry, **options)
