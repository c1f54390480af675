"""Stands in for Transformer Engine on a machine without CUDA; `install` it in a process that has not imported megatron.core.

Megatron-Core's own wrappers (TEColumnParallelLinear, TERowParallelLinear) then run on a `Linear` with the signature of
transformer_engine 2.20.2, whose matmul is torch's, with the fused accumulation of weight gradients as TE does it. It shows that our
arguments fit, that names, marks and gradients are the local spec's, and where FP8 is on; it shows nothing about TE's numbers
(tests/gpu/test_transformer_engine.py does).
"""

import contextlib
import dataclasses
import importlib
import importlib.abc
import importlib.machinery
import sys
import types

import torch

VERSION = "2.20.2"
SUBMODULES = ("pytorch", "ops", "common", "recipe")
FP8_ON: list[object] = []
"""Recipes of the autocast regions that are entered now."""
CALLS: list[tuple[bool, bool]] = []
"""Of each Linear.forward: (in FP8, with gradient)."""


class _Fused(torch.autograd.Function):
    """y = x Wᵀ; the weight's gradient is added to ``main_grad`` (TE: pytorch/module/linear.py, fuse_wgrad_accumulation)."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        weight = ctx.needs_input_grad[1] and weight
        if weight is not False:
            weight.main_grad.add_(gradient.flatten(0, -2).float().T @ x.flatten(0, -2).float())
            weight.grad_added_to_main_grad = True
        dummy = torch.full_like(ctx.saved_tensors[1], float("nan")) if weight is not False else None
        return gradient @ ctx.saved_tensors[1], dummy


class Linear(torch.nn.Module):
    def __init__(
        self,
        in_features,
        out_features,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        rng_tracker_name=None,
        init_method=None,
        bias=True,
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        parameters_split=None,
        device="cuda",
        ub_overlap_ag=False,
        ub_overlap_rs=False,
        ub_overlap_rs_dgrad=False,
        ub_bulk_dgrad=False,
        ub_bulk_wgrad=False,
        ub_name=None,
        delay_wgrad_compute=False,
        symmetric_ar_type=None,
        save_original_input=False,
        name=None,
    ):
        super().__init__()
        assert tp_size == 1 and tp_group.size() == 1 and parallel_mode in ("column", "row")
        assert bias and return_bias, "a bias inside the GEMM would be added to tangents"
        self.weight = torch.nn.Parameter(torch.full((out_features, in_features), float("nan"), dtype=params_dtype))
        self.bias = torch.nn.Parameter(torch.full((out_features,), float("nan"), dtype=params_dtype))
        init_method(self.weight)
        assert self.weight.isnan().all(), "initialised although weights are loaded"
        self.fused = fuse_wgrad_accumulation

    def get_extra_state(self):
        return torch.zeros(1)

    def set_extra_state(self, state):
        pass

    def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        assert is_first_microbatch is None, "an FP8 weight would be cached and never renewed"
        CALLS.append((bool(FP8_ON), torch.is_grad_enabled()))
        if FP8_ON:
            assert inp.flatten(0, -2).shape[0] % 16 == 0 and inp.shape[-1] % 16 == 0, tuple(inp.shape)
        fused = self.fused and torch.is_grad_enabled() and self.weight.requires_grad
        out = _Fused.apply(inp, self.weight) if fused else torch.nn.functional.linear(inp, self.weight)
        return out, self.bias


@contextlib.contextmanager
def autocast(enabled=True, calibrating=False, recipe=None, amax_reduction_group=None, _graph=False):
    assert enabled and recipe is not None
    FP8_ON.append(recipe)
    try:
        yield
    finally:
        FP8_ON.pop()


class Format:
    HYBRID = "hybrid"


@dataclasses.dataclass
class Float8CurrentScaling:
    fp8_format: str = "hybrid"


def is_fp8_available(return_reason=False):
    return (True, "") if return_reason else True


class _Module(types.ModuleType):
    """Any name that Megatron-Core asks for is an empty class, but for SUBMODULES."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name in SUBMODULES:
            return importlib.import_module(f"{self.__name__}.{name}")
        value = type(name, (torch.nn.Module,), {"apply": staticmethod(lambda *args: None)})
        setattr(self, name, value)
        return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("transformer_engine", "transformer_engine_torch"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        if module.__name__ == "transformer_engine":
            module.__version__ = VERSION
        if module.__name__ == "transformer_engine.pytorch":
            module.Linear, module.autocast, module.is_fp8_available = Linear, autocast, is_fp8_available
        if module.__name__ == "transformer_engine.common.recipe":
            module.Float8CurrentScaling, module.Format = Float8CurrentScaling, Format


def install():
    """Before megatron.core is imported."""
    sys.meta_path.insert(0, _Finder())
