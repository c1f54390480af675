"""Element-wise and norm operations of a DiT block in one pass over the data, plain and with a tangent: the choice of kernels.

Each op is a module with `plain(...)`, differentiable, and `dual(...)` on a stacked `[s, 2b, ...]` tensor, primal rows first. The
kernels compute in fp32. `kernel_for(op, x)` is the module to use for x, or None: the caller then applies its own PyTorch rules.
"""

import functools
import importlib
import logging

import torch

__all__ = ["OPS", "kernel_for", "select_ops"]

OPS = ("layer_norm_modulate", "rms_norm_rope", "gated_residual", "gelu_tanh")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""fp64 always takes the caller's rules."""

_logger = logging.getLogger(__name__)
_setting = "auto"


def select_ops(setting):
    """Which ops run fused in this process: "auto" (all, on CUDA tensors), "none", "all", or names joined by commas.

    "all" and names are an order: a tensor that Triton cannot take is then an error. ValueError where they cannot run.
    """
    global _setting
    if setting not in ("auto", "none"):
        unknown = [name for name in _names(setting) if name not in OPS]
        if unknown:
            raise ValueError(
                f"got fused ops {setting!r} with the unknown {', '.join(unknown)}; need auto, none, all or some of "
                f"{', '.join(OPS)}; fix: choose of these"
            )
        try:
            for name in _names(setting):
                _module(name)
        except ImportError as error:
            raise ValueError(
                f"got fused ops {setting!r}, which cannot run here ({error}); need Triton; fix: install it or choose 'none'"
            ) from error
    _setting = setting
    _kernel_for.cache_clear()


def kernel_for(op, x):
    """The module that computes `op` on a tensor like x, or None; chosen and logged once per op, device type and dtype."""
    return _kernel_for(op, x.device.type, x.dtype)


@functools.cache
def _kernel_for(op, device, dtype):
    assert op in OPS, op
    wanted = dtype in DTYPES and (device == "cuda" if _setting == "auto" else op in _names(_setting))
    module = None
    if wanted:
        try:
            module = _module(op)
        except ImportError as error:
            _logger.warning("slow %s on %s: Triton is missing (%s)", op, device, error)
    _logger.info("%s on %s, %s: %s", op, device, dtype, "PyTorch" if module is None else "fused Triton kernel")
    return module


def _names(setting):
    return () if setting == "none" else OPS if setting == "all" else tuple(name.strip() for name in setting.split(","))


@functools.cache
def _module(op):
    return importlib.import_module(f"rcm_kernels.fused.{op}")
