"""A device type that stands for a GPU: PyTorch's PrivateUse1, named "gpu", whose tensors are all fake.

Fake CUDA tensors abort on a build of PyTorch without CUDA, and fake CPU tensors would not tell the device's memory from the host's.
"""

from __future__ import annotations

import contextlib
import functools
import types

import torch
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from rcm_kernels import flash_attention_jvp, gpu
from rcm_kernels.flash_attention import backends
from rcm_megatron.errors import InstallationError

NAME = "gpu"
CAPABILITY = (9, 0)
"""Of an H100 or H200: kernels are chosen as there."""
_MODULE = ("is_initialized", "is_available", "current_device", "_is_in_bad_fork", "manual_seed_all", "device_count")


class _Stream:
    """Orders nothing: operations run one after the other."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def wait_stream(self, stream: object) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: object = None) -> object:
        return event or _Event()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exception: object) -> None: ...


class _Event:
    """Has always happened."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def record(self, stream: object = None) -> None: ...

    def wait(self, stream: object = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


@functools.cache
def register() -> torch.device:
    """The device, registered with PyTorch and with the kernels, once in a process. Raises InstallationError where Triton is missing."""
    dummy, module = _DummyBackendModule(), types.SimpleNamespace()
    for name in _MODULE:
        setattr(module, name, getattr(dummy, name))
    module.Stream, module.Event = _Stream, _Event
    module.current_stream = lambda device=None: _Stream()
    module.stream = module.device = lambda which: contextlib.nullcontext()
    module.synchronize = module.set_device = lambda device=None: None
    module.memory_allocated = lambda device=None: 0
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    _setup_privateuseone_for_python_backend(NAME, backend_module=module)
    _provide_kernels()
    return torch.device(NAME, 0)


def _provide_kernels() -> None:
    """What an H100 without further packages takes: PyTorch's flash attention, and Triton's kernels, of which the launchers run alone."""
    try:
        from rcm_kernels.flash_attention import triton_impl as plain
        from rcm_kernels.flash_attention_jvp import triton_impl as jvp
    except ImportError as error:
        raise InstallationError(
            f"got no Triton ({error}); need it for its kernels' launchers; fix: pip install triton"
        ) from error
    gpu.stand_in(NAME, capability=CAPABILITY)
    backends.CHOICE.provide("aten_cuda", backends.aten_cuda())
    backends.CHOICE.provide("triton", backends.Backend("triton", plain.forward, plain.backward, accumulates=True))
    flash_attention_jvp.CHOICE.provide("triton", jvp.attention_jvp)
