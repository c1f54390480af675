"""Cases of the fused ops, for the interpreter and for a GPU: inputs, the kernel's module, its reference, and the two comparisons.

Features are no power of two; x is a strided view, as a slice of a fused projection is.
"""

import torch

from rcm_kernels.fused import gated_residual, gelu_tanh, layer_norm_modulate, reference, rms_norm_rope
from tests.helpers import assert_close

EPS = 1e-6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def strided(*shape, seed, dtype):
    """A view [s, b, ..., last] into a wider tensor."""
    return normal(*shape[:-1], 2, shape[-1], seed=seed, dtype=dtype).select(-2, 1)


def vector(batch, features, seed):
    """One of six modulation vectors [1, b, d]."""
    return normal(6, batch, features, seed=seed)[2:3]


def rotation(tokens, head_dim):
    angle = normal(tokens, head_dim // 2, seed=9, dtype=torch.float64)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def norm_case(s, b, d, dtype):
    return [strided(s, b, d, seed=1, dtype=dtype) + 2, vector(b, d, 2), vector(b, d, 3)], {}


def affine_case(s, b, d, dtype):
    return [strided(s, b, d, seed=1, dtype=dtype), normal(d, seed=2), normal(d, seed=3)], {"one": 0.0}


def gate_case(s, b, d, dtype):
    return [strided(s, b, d, seed=1, dtype=dtype), strided(s, b, d, seed=2, dtype=dtype), vector(b, d, 3)], {}


def gelu_case(s, b, d, dtype):
    return [3 * strided(s, b, d, seed=1, dtype=dtype)], {}


def bias_gelu_case(s, b, d, dtype):
    return [*gelu_case(s, b, d, dtype)[0], normal(d, seed=2, dtype=dtype)], {}


def heads_of(d):
    """(heads, head dim) of about d features."""
    head_dim = next((k for k in (128, 22) if d % k == 0), d + d % 2)
    return max(d // head_dim, 1), head_dim


def rms_case(s, b, d, dtype):
    n, k = heads_of(d)
    return [strided(s, b, n, k, seed=1, dtype=dtype), normal(n, k, seed=2)], {}


def rms_rope_case(s, b, d, dtype):
    inputs, options = rms_case(s, b, d, dtype)
    return [*inputs, rotation(s, inputs[0].shape[-1])], options


# name: (module, makes inputs and options, arguments of the kernel alone, reference)
CASES = {
    "layer_norm_modulate": (layer_norm_modulate, norm_case),
    "layer_norm_affine": (layer_norm_modulate, affine_case),
    "gated_residual": (gated_residual, gate_case),
    "gelu_tanh": (gelu_tanh, gelu_case),
    "bias_gelu_tanh": (gelu_tanh, bias_gelu_case),
    "rms_norm": (rms_norm_rope, rms_case),
    "rms_norm_rope": (rms_norm_rope, rms_rope_case),
}


def settings(module, inputs, options):
    """(options of the kernel, options of the reference)"""
    if module is layer_norm_modulate:
        return {"eps": EPS, "dtype": inputs[0].dtype, **options}, {"eps": EPS, **options}
    if module is rms_norm_rope:
        features = {"num_features": inputs[0].shape[-2:].numel()}
        return {"eps": EPS, **features}, {"eps": EPS, **features}
    return {}, {}


def reference_of(module):
    return getattr(reference, module.__name__.rpartition(".")[2])


def wide(inputs):
    return [x.to(torch.complex128) if x.is_complex() else x.double() for x in inputs]


def gradients(function, inputs, upstream, **options):
    leaves = [x.detach().requires_grad_(not x.is_complex()) for x in inputs]
    output = function(*leaves, **options)
    return output.detach(), torch.autograd.grad(output, [x for x in leaves if x.requires_grad], upstream)


def check_forward_and_gradients(name, s, b, d, dtype, *, rel):
    module, make = CASES[name]
    inputs, options = make(s, b, d, dtype)
    kernel_options, reference_options = settings(module, inputs, options)
    upstream = strided(*inputs[0].shape, seed=7, dtype=dtype)
    got, got_gradients = gradients(module.plain, inputs, upstream, **kernel_options)
    expected, expected_gradients = gradients(reference_of(module), wide(inputs), upstream.double(), **reference_options)
    assert got.dtype == dtype
    assert_close(f"{name}: y", expected, got, rel=rel, row=10 * rel)
    assert [g.dtype for g in got_gradients] == [x.dtype for x in inputs if not x.is_complex()]
    for i, (ref, out) in enumerate(zip(expected_gradients, got_gradients, strict=True)):
        assert_close(f"{name}: gradient {i}", ref, out, rel=rel)


def check_tangent(name, s, b, d, dtype, *, rel):
    """The stacked dual of batch b is read in place: primal rows first."""
    module, make = CASES[name]
    inputs, options = make(s, 2 * b, d, dtype)
    kernel_options, reference_options = settings(module, inputs, options)
    if name == "layer_norm_affine":
        kernel_options["vector_tangents"] = False
    got = module.dual(*inputs, **kernel_options).chunk(2, dim=1)
    expected = reference.jvp_of(reference_of(module), *wide(inputs), **reference_options).chunk(2, dim=1)
    for part, ref, out in zip(("primal", "tangent"), expected, got, strict=True):
        assert_close(f"{name}: {part}", ref, out, rel=rel, row=10 * rel)
