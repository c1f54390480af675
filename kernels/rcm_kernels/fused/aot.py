"""Registers, spills and shared memory of every fused kernel, compiled ahead of time: `python -m rcm_kernels.fused.aot`.

Needs no GPU. The ops run on meta tensors of Wan2.1's sizes, their launches are recorded, and each is compiled as Triton would at
its first launch (same types, same divisibility of sizes and strides, same warps) for sm_80, sm_90a and sm_100.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rcm_kernels.benchmark import DTYPES
from rcm_kernels.fused import gated_residual, gelu_tanh, layer_norm_modulate, rms_norm_rope
from rcm_kernels.fused.launcher import recorded

CAPABILITIES = (80, 90, 100)
# features, local heads, head dim: 14B and 1.3B on one GPU, 14B with tp=4
SIZES = ((5120, 40, 128), (1536, 12, 128), (5120, 10, 128))
FFN = 13824
TOKENS = 32760
OPTIONS = ("num_warps", "maxnreg")


def launches(dtype=torch.bfloat16, sizes=SIZES):
    """Every distinct launch of a training step: (kernel, arguments, meta)."""
    with recorded() as records:
        for features, heads, head_dim in sizes:
            split = heads * head_dim < features
            _run_norms_of_heads(dtype, features, heads, head_dim, sum_over_tp=_add if split else None)
            if not split:
                _run_norms(dtype, features)
        _run_tiled(dtype, sizes[0][0], FFN)
    distinct = {(_signature(launch[0], launch[2])[1], str(launch[3])): launch for launch in records}
    return [(kernel, arguments, meta) for kernel, _, arguments, meta in distinct.values()]


def _add(total):
    return total + 0


def _empty(*sizes, dtype=torch.float32):
    return torch.empty(sizes, dtype=dtype, device="meta")


def _run_norms(dtype, features):
    h, dual_h = _empty(TOKENS, 1, features, dtype=dtype), _empty(TOKENS, 2, features, dtype=dtype)
    vector, dual_vector, weight = _empty(1, 1, features), _empty(1, 2, features), _empty(features)
    options = {"eps": 1e-6, "dtype": dtype}
    _both(layer_norm_modulate.plain, h, vector, vector, **options)
    _both(layer_norm_modulate.plain, h, weight, weight, one=0.0, **options)
    layer_norm_modulate.dual(dual_h, dual_vector, dual_vector, **options)
    layer_norm_modulate.dual(dual_h, weight, weight, one=0.0, vector_tangents=False, **options)


def _run_tiled(dtype, features, ffn):
    """Ops in tiles of one size, whatever the number of features."""
    h, dual_h = _empty(TOKENS, 1, features, dtype=dtype), _empty(TOKENS, 2, features, dtype=dtype)
    x, dual_x, bias = (_empty(*sizes, ffn, dtype=dtype) for sizes in ((TOKENS, 1), (TOKENS, 2), ()))
    _both(gated_residual.plain, h, h, _empty(1, 1, features))
    gated_residual.dual(dual_h, dual_h, _empty(1, 2, features))
    _both(gelu_tanh.plain, x, bias)
    gelu_tanh.dual(dual_x, bias)


def _run_norms_of_heads(dtype, features, heads, head_dim, sum_over_tp):
    weight, rotation = _empty(heads, head_dim), _empty(TOKENS, head_dim // 2, dtype=torch.complex64)
    options = {"eps": 1e-6, "num_features": features, "sum_over_tp": sum_over_tp}
    for parts, turn in ((3, rotation), (1, None)):
        plain, dual = (_empty(TOKENS, rows, heads, parts, head_dim, dtype=dtype).select(3, 0) for rows in (1, 2))
        _both(rms_norm_rope.plain, plain, weight, turn, **options)
        rms_norm_rope.dual(dual, weight, turn, **options)


def _both(function, *inputs, **options):
    """Forward and backward."""
    leaves = [x if x is None or x.is_complex() else x.detach().requires_grad_() for x in inputs]
    output = function(*leaves, **options)
    output.backward(torch.empty(output.shape, dtype=output.dtype, device="meta"))


def _signature(kernel, arguments):
    """(types by name, (kernel name, types and divisibility), constants, attributes), as Triton specialises a launch."""
    types, constants, attributes = {}, {}, {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        if isinstance(value, torch.Tensor):
            types[name] = "*" + next(key for key, dtype in DTYPES.items() if dtype == value.dtype)
        elif isinstance(value, float):
            types[name] = "fp32"
        elif value == 1:
            types[name], constants[name] = "constexpr", 1
        else:
            types[name] = "i32" if value < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value != 1 and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return types, (kernel.__name__, str(types), str(attributes)), constants, attributes


def compile_for(capability, kernel, arguments, meta):
    """{registers, spills, shared, ...} of one launch."""
    types, _, constants, attributes = _signature(kernel, arguments)
    options = {name: value for name, value in meta.items() if name in OPTIONS}
    constants |= {name: value for name, value in meta.items() if name not in OPTIONS}
    types |= dict.fromkeys(kernel.arg_names[len(arguments) :], "constexpr")
    source = ASTSource(kernel, types, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    shape = " ".join(f"{name}={value}" for name, value in meta.items() if name not in ("ROWS", *OPTIONS))
    return {
        "kernel": f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}",
        "shape": shape,
        "capability": capability,
        "warps": meta["num_warps"],
        "shared": compiled.metadata.shared,
        **_resources(compiled.asm["cubin"], capability),
    }


def _resources(cubin, capability):
    """What cuobjdump reads in the binary. A thread's stack holds spilled registers and nothing else here."""
    ptxas = triton.knobs.nvidia.ptxas_blackwell if capability >= 100 else triton.knobs.nvidia.ptxas
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return {"registers": used["REG"], "spills": used["STACK"] + used["LOCAL"], "ptxas": ptxas.version}


def main():
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the hidden state")
    parser.add_argument("--capability", type=int, choices=CAPABILITIES, action="append")
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set: nothing would be compiled; fix: unset it")
    capabilities = args.capability or CAPABILITIES
    results = [
        compile_for(capability, *launch) for capability in capabilities for launch in launches(DTYPES[args.dtype])
    ]
    if args.json:
        print(json.dumps({"triton": triton.__version__, "results": results}))
        return
    print(f"Triton {triton.__version__}, ptxas {', '.join(sorted({r['ptxas'] for r in results}))}")
    for r in sorted(results, key=lambda r: (r["kernel"], r["shape"], r["capability"])):
        print(
            f"sm_{r['capability']:<4d}{r['kernel']:36s} {r['registers']:4d} registers {r['spills']:4d} B spilled {r['shared']:6d} B shared "
            f"{r['warps']:2d} warps  {r['shape']}"
        )


if __name__ == "__main__":
    main()
