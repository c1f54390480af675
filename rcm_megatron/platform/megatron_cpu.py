"""What makes Megatron-Core run on CPU/Gloo, or on a dry run's stand-in; nothing here is needed, or done, where there is CUDA.

Megatron-Core has no CPU device. It asks for one in three ways, and `install()` answers each:
`torch.cuda.*` functions (replaced), random-state helpers of `tensor_parallel.random` (replaced), and the literals
"cuda" and "torch.cuda.FloatTensor" inside functions (rewritten in those functions' constants: no cost at run time, and
the same in every thread, autograd's too). Each replaced place is counted, and other counts are an error: upstream tests
none of this on CPU.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from rcm_megatron.errors import InstallationError

LITERALS = ("cuda", "torch.cuda.FloatTensor", "torch.cuda.HalfTensor", "torch.cuda.BFloat16Tensor")

REWRITTEN_FUNCTIONS = {
    "0.16.1": {
        "megatron.core.optimizer.optimizer": 3,
        "megatron.core.optimizer.distrib_optimizer": 2,
        "megatron.core.optimizer.clip_grads": 3,
        "megatron.core.pipeline_parallel.schedules": 4,
        "megatron.core.utils": 3,
        "megatron.core.dist_checkpointing.exchange_utils": 2,
        "megatron.core.dist_checkpointing.strategies.state_dict_saver": 1,
    },
    "0.19.2": {
        "megatron.core.optimizer.optimizer": 4,
        "megatron.core.optimizer.distrib_optimizer": 2,
        "megatron.core.optimizer.clip_grads": 3,
        "megatron.core.pipeline_parallel.schedules": 4,
        "megatron.core.utils": 1,
        "megatron.core.dist_checkpointing.exchange_utils": 2,
        "megatron.core.dist_checkpointing.strategies.state_dict_saver": 1,
    },
}
"""Version of megatron-core -> module -> how many of its functions hold one of LITERALS."""


def install(version: str, device: torch.device) -> None:
    """Count, rewrite and replace what megatron-core `version` needs to run on `device`; once in a process, by
    `megatron.prepare_megatron`.

    Raises InstallationError, with nothing changed, where a module does not have as many places as that version."""
    need = REWRITTEN_FUNCTIONS[version]
    literals = _literals_of(device)
    rewritten = {name: _rewritten_functions(importlib.import_module(name), literals) for name in need}
    for name, functions in rewritten.items():
        _check_count(name, got=len(functions), need=need[name], version=version)
    _replace_random_state(version)
    _replace_cuda_functions(device)
    for functions in rewritten.values():
        for function, code in functions.items():
            function.__code__ = code


def _check_count(module_name: str, *, got: int, need: int, version: str) -> None:
    if got != need:
        raise InstallationError(
            f"{module_name}: got {got} functions with CUDA literals; need {need}, as in megatron-core "
            f"{version}; fix: pip install --force-reinstall megatron-core=={version}, or, for a "
            "new version, review that module and megatron_cpu.REWRITTEN_FUNCTIONS"
        )


def _literals_of(device: torch.device) -> dict[str, str]:
    """What takes the place of each of LITERALS: "cpu" and "torch.FloatTensor", or "gpu" and "torch.gpu.FloatTensor"."""
    module = "torch." if device.type == "cpu" else f"torch.{device.type}."
    return {name: name.replace("torch.cuda.", module) if "." in name else device.type for name in LITERALS}


def _replace_cuda_functions(device: torch.device) -> None:
    torch.cuda.current_device = lambda: device  # Megatron passes its result on as device=...
    torch.cuda.synchronize = lambda device=None: None
    # From 0.19 on, DDP asks for the stream before it knows whether there is anything to wait for.
    torch.cuda.current_stream = lambda device=None: None
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.Tensor.cuda = lambda self, *args, **kwargs: self


def _replace_random_state(version: str) -> None:
    """Megatron's tracker and `checkpoint` then save, set and restore the CPU generator's state."""
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    for name in ("_get_cuda_rng_state", "_set_cuda_rng_state"):
        if not hasattr(random, name):
            raise InstallationError(f"{random.__name__}: got no {name}; need it to be there to replace it; fix: install "
                               f"megatron-core=={version}")  # fmt: skip
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # On the CPU both generators are one, so the tracker's check that they are two always fires.
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _rewritten_functions(
    module: types.ModuleType, literals: Mapping[str, str]
) -> dict[types.FunctionType, types.CodeType]:
    """The functions of `module` that hold one of ``literals``, each with its code without them."""
    rewritten = {function: _with_literals(function.__code__, literals) for function in _functions_of(module)}
    return {function: code for function, code in rewritten.items() if code is not function.__code__}


def _functions_of(module: types.ModuleType) -> Iterator[types.FunctionType]:
    """Functions and methods (properties, class methods and decorated ones too) that `module` itself defines."""
    classes = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    for owner in (module, *classes):
        for value in vars(owner).values():
            for candidate in (value, getattr(value, "fget", None), getattr(value, "__func__", None)):
                function = inspect.unwrap(candidate) if callable(candidate) else None
                if isinstance(function, types.FunctionType) and function.__module__ == module.__name__:
                    yield function


def _with_literals(constant: Any, literals: Mapping[str, str]) -> Any:
    """`constant` (of a code object; code objects and tuples nest) with ``literals`` replaced; itself if it holds none."""
    if isinstance(constant, str):
        return literals.get(constant, constant)
    if isinstance(constant, tuple):
        replaced = tuple(_with_literals(part, literals) for part in constant)
        return constant if all(new is old for new, old in zip(replaced, constant, strict=True)) else replaced
    if isinstance(constant, types.CodeType):
        constants = _with_literals(constant.co_consts, literals)
        return constant if constants is constant.co_consts else constant.replace(co_consts=constants)
    return constant
