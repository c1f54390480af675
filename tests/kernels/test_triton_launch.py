"""The launchers up to the launch itself, without a GPU: how often Triton compiles, and that its argument binder takes the calls.

A driver that names a GPU is enough for Triton to specialise arguments and to compile.
"""

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from rcm_kernels.configs import TABLE
from rcm_kernels.flash_attention import triton_impl as plain
from rcm_kernels.flash_attention_jvp import triton_impl as jvp

DEVICE = 63  # an index that no real GPU of a test machine has: its own cache of compiled kernels


class Hopper:
    """As much of a driver as compiling needs."""

    def get_current_device(self):
        return DEVICE

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


class Compiled:
    """Stands for a kernel: compiles it as a launch would, and keeps what was asked for."""

    def __init__(self, kernel):
        self.kernel, self.grids = kernel, []
        kernel.device_caches.pop(DEVICE, None)

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **kwargs: self.kernel.run(*args, grid=grid, warmup=True, **kwargs)

    @property
    def count(self):
        return len(self.kernel.device_caches[DEVICE][0])


@pytest.fixture
def compiled(monkeypatch):
    """Replaces all kernels; config_for gives those of Hopper."""
    monkeypatch.setattr(driver, "_active", Hopper())
    found = {}
    for module, name in (
        (jvp, "forward_kernel"),
        (plain, "forward_kernel"),
        (plain, "delta_kernel"),
        (plain, "backward_kernel"),
    ):
        key = f"{module.__name__.split('.')[-2]}.{name}"
        found[key] = Compiled(getattr(module, name))
        monkeypatch.setattr(module, name, found[key])
    for module in (jvp, plain):
        monkeypatch.setattr(module, "check_tensors", lambda *tensors: None)
        monkeypatch.setattr(module, "config_for", lambda kernel, q, **options: TABLE[kernel, 90, 32, "half"])
    return found


def stacked(length, b=1, n=2, d=32):
    dual = torch.zeros(length, 2 * b, n, d, dtype=torch.bfloat16)
    return dual[:, :b], dual[:, b:]


def test_one_compilation_for_all_lengths(compiled):
    """Lengths, valid keys and offsets are run-time arguments; flags are not."""
    kernel = compiled["flash_attention_jvp.forward_kernel"]
    for queries, keys, valid in ((1, 1, 1), (16, 15, 15), (4095, 4095, 4000), (4096, 32, 16)):
        (q, tq), (k, tk), (v, tv) = stacked(queries), stacked(keys), stacked(keys)
        carry = jvp.attention_jvp(q, k, v, tq, tk, tv, valid_keys=valid)
        assert kernel.grids[-1] == (-(-queries // 128) * 2, 1)
    assert kernel.count == 1
    for offset in (0, 1, 4096):
        jvp.attention_jvp(q, k, v, tq, tk, tv, carry=carry, update_carry=True, chunk=offset + 1, q_offset=offset)
    assert kernel.count == 2
    jvp.attention_jvp(q, k, v, tq)
    assert kernel.count == 3


def test_the_plain_kernels_too(compiled):
    for queries, keys in ((1, 1), (33, 512), (4096, 77)):
        (q, do), (k, v) = stacked(queries), stacked(keys)
        o, lse = plain.forward(q, k, v, 0.2)
        plain.backward(do, q, k, v, o, lse, 0.2, dq=torch.zeros(q.shape))
    counts = {name: kernel.count for name, kernel in compiled.items()}
    assert counts["flash_attention.forward_kernel"] == 1
    assert counts["flash_attention.delta_kernel"] == 1
    assert counts["flash_attention.backward_kernel"] == 2, "one for dq, one for dk and dv"
