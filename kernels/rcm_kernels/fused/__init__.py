"""Element-wise and norm operations of a DiT block in one pass over the data, plain and with a tangent: the choice of kernels.

Each op is a module with `plain(...)`, differentiable, and `dual(...)` on a stacked `[s, 2b, ...]` tensor, primal rows first. The
kernels compute in fp32. `kernel_for(op, x)` is the module to use for x, or None: the caller then applies its own PyTorch rules.
"""

import importlib
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from rcm_kernels.choice import Choice

__all__ = ["OPS", "kernel_for", "select_ops"]

OPS = ("layer_norm_modulate", "rms_norm_rope", "gated_residual", "gelu_tanh")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""fp64 always takes the caller's rules."""

_setting = "auto"


def select_ops(setting: str) -> None:
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
        for name in _names(setting):
            _CHOICES[name].load("triton")
    _setting = setting
    for choice in _CHOICES.values():
        choice.reconsider()


def kernel_for(op: str, x: Tensor) -> ModuleType | None:
    """The module that computes `op` on a tensor like x, or None; chosen and logged once per op, device type and dtype."""
    return _CHOICES[op].settle(x.device.type, x.dtype)[1]


def _candidates(op: str, device: str, dtype: torch.dtype, head_dim: None) -> list[str]:
    wanted = dtype in DTYPES and (device == "cuda" if _setting == "auto" else op in _names(_setting))
    return ["triton", "pytorch"] if wanted else ["pytorch"]


def _names(setting: str) -> tuple[str, ...]:
    return () if setting == "none" else OPS if setting == "all" else tuple(name.strip() for name in setting.split(","))


def _choice(op: str) -> Choice[ModuleType | None]:
    loaders = {"triton": partial(importlib.import_module, f"rcm_kernels.fused.{op}"), "pytorch": lambda: None}
    return Choice(op, loaders, partial(_candidates, op), slow="pytorch")


_CHOICES = {op: _choice(op) for op in OPS}
