"""Bytes that a Wan block moves outside GEMMs and attention: PyTorch's rules operation by operation, against one pass over the data.

    python tools/fused_ops_bytes.py                    # Wan2.1 1.3B and 14B, 32,760 tokens, bf16

Nothing is computed: the rules of rcm_megatron.models.dual_ops run on meta tensors, and every aten operation that is no view counts
its inputs and outputs once (so the eager figure is a lower bound: CUDA's LayerNorm backward reads twice). `fused` is what cannot be
avoided: the op's inputs and outputs once. Milliseconds are bytes over the memory bandwidth, no measurement.

Shapes: S tokens, B batch, D features, N heads, K head dim, F features of the MLP.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from rcm_megatron.dual import Dual, add_bias, map_linear, primal_of
from rcm_megatron.models import dual_ops
from rcm_megatron.models.layers import split_heads

EPS = 1e-6
PASSES = ("dual", "plain", "backward")
BF16, FP32 = torch.bfloat16, torch.float32
H100_TB_S, H200_TB_S = 3.35, 4.8
BF16_TFLOP_S = 989.0
"""Data sheets of H100 SXM and H200: memory bandwidth, dense bf16 peak of both."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One network's block on one GPU."""

    name: str
    features: int
    heads: int
    ffn: int
    layers: int
    tokens: int = 32760
    text: int = 512
    batch: int = 1


SHAPES = (
    Shape(name="Wan2.1 1.3B", features=1536, heads=12, ffn=8960, layers=30),
    Shape(name="Wan2.1 14B", features=5120, heads=40, ffn=13824, layers=40),
)


aten = torch.ops.aten
FREE = {aten._unsafe_view, aten.detach, aten.empty, aten.empty_like, aten.empty_strided}


class Traffic(TorchDispatchMode):
    """Bytes read and written by every operation that is no view."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        aliases = [value.alias_info for value in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        if not is_view and func.overloadpacket not in FREE:
            self.bytes += tensor_bytes(args, kwargs, outputs)
        return outputs


def tensor_bytes(*trees) -> int:
    """Bytes of all tensors in `trees`; an expanded dimension costs nothing."""
    total = 0
    for value in tree_iter(trees):
        if isinstance(value, Tensor):
            sizes = [size for size, stride in zip(value.shape, value.stride(), strict=True) if stride or size == 0]
            total += torch.Size(sizes).numel() * value.element_size()
    return total


@dataclass(frozen=True)
class Case:
    """One operation of a block.

    `make(rows)` gives the inputs with batch `rows`, which become duals in a dual pass; `constants()` those without a tangent.
    """

    name: str
    count: int
    make: Callable[[int], list[Tensor]]
    call: Callable
    constants: Callable[[], list[Tensor]] = list
    has_kernel: bool = True
    """Whether rcm_kernels.fused has it; the fused figure of the others is the eager one."""


def empty(*sizes: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


def cases(shape: Shape) -> list[Case]:
    s, d, n, f = shape.tokens, shape.features, shape.heads, shape.ffn
    k = d // n
    rotation = torch.empty(s, k // 2, dtype=torch.complex64, device="meta")

    def vector(rows: int) -> Tensor:
        return empty(1, rows, d, dtype=FP32)

    def norm_modulate(x, shift, scale):
        return dual_ops.modulate(dual_ops.layer_norm(x, eps=EPS), shift, scale, dtype=BF16)

    def norm_affine(x, weight, bias):
        return map_linear(lambda v: v.to(BF16), dual_ops.layer_norm(x, eps=EPS, weight=weight, bias=bias))

    def rms_norm(x, weight):
        return dual_ops.rms_norm_across_heads(x, weight, eps=EPS, num_features=d, sum_over_tp=lambda total: total)

    def rms_norm_rope(x, weight, rotation_SK):
        return dual_ops.apply_rope(rms_norm(x, weight), rotation_SK)

    def head_view(rows: int, parts: int) -> Tensor:
        return split_heads(empty(s, rows, parts * d), parts, k)[0]

    norm_weight = empty(n, k, dtype=FP32)
    return [
        Case("LayerNorm + modulation", 2, lambda r: [empty(s, r, d), vector(r), vector(r)], norm_modulate),
        Case(
            "LayerNorm with weight and bias",
            1,
            lambda r: [empty(s, r, d)],
            norm_affine,
            lambda: [empty(d, dtype=FP32), empty(d, dtype=FP32)],
        ),
        Case(
            "RMSNorm + RoPE of self q, k",
            2,
            lambda r: [head_view(r, 3)],
            rms_norm_rope,
            lambda: [norm_weight, rotation],
        ),
        Case("RMSNorm of cross q", 1, lambda r: [head_view(r, 1)], rms_norm, lambda: [norm_weight]),
        Case(
            "gate + residual",
            2,
            lambda r: [empty(s, r, d), empty(s, r, d), vector(r)],
            dual_ops.gated_residual,
        ),
        Case(
            "bias of fc1 + GELU-tanh",
            1,
            lambda r: [empty(s, r, f)],
            lambda x, bias: dual_ops.gelu_tanh(add_bias(x, bias)),
            lambda: [empty(f)],
        ),
        Case("residual add", 1, lambda r: [empty(s, r, d), empty(s, r, d)], dual_ops.add, has_kernel=False),
        Case("bias of qkv (all three)", 1, lambda r: [empty(s, r, 3 * d)], add_bias, lambda: [empty(3 * d)], False),
        Case("bias of D features", 4, lambda r: [empty(s, r, d)], add_bias, lambda: [empty(d)], False),
    ]


def count(case: Case, which: str, batch: int) -> tuple[int, int]:
    """(eager, unavoidable) bytes of one pass of one op."""
    constants = case.constants()
    if which == "dual":
        stacks = case.make(2 * batch)
        with torch.no_grad(), Traffic() as traffic:
            output = case.call(*(Dual(x) for x in stacks), *constants).stacked
        return traffic.bytes, tensor_bytes(stacks, constants, output)
    inputs = case.make(batch)
    if which == "plain":
        with torch.no_grad(), Traffic() as traffic:
            output = primal_of(case.call(*inputs, *constants))
        return traffic.bytes, tensor_bytes(inputs, constants, output)
    leaves = [x.requires_grad_() for x in (*inputs, *constants) if not x.is_complex()]
    output = case.call(*inputs, *constants)
    with Traffic() as traffic:
        gradients = torch.autograd.grad(output, leaves, torch.empty_like(output))
    passed_on = gradients[0] if case.call is dual_ops.gated_residual else ()  # the incoming gradient itself
    return traffic.bytes, tensor_bytes(output, inputs, constants, gradients) - tensor_bytes(passed_on, passed_on)


def block_flops(shape: Shape) -> dict[str, float]:
    """FLOPs of the GEMMs and of attention (self and cross) of one block."""
    s, d = shape.tokens * shape.batch, shape.features
    gemm = 2 * s * (6 * d * d + 2 * d * shape.ffn) + 2 * shape.text * shape.batch * 2 * d * d
    attention, cross = 4 * s * shape.tokens * d, 4 * s * shape.text * d
    return {
        "dual": 2 * gemm + 3 * attention + 2 * cross,
        "plain": gemm + attention + cross,
        "backward": 2 * gemm + 2.5 * (attention + cross),
    }


def print_table(shape: Shape) -> None:
    print(f"\n{shape.name}: one block, {shape.tokens} tokens x batch {shape.batch}, bf16")
    print("GB eager -> fused (ms saved at 4.8-3.35 TB/s: H200-H100)")
    print(f"{'op':34s} " + " ".join(f"{name:^32s}" for name in PASSES))
    totals = {name: [0, 0] for name in PASSES}
    for case in cases(shape):
        cells = []
        for name in PASSES:
            eager, fused = (case.count * value for value in count(case, name, shape.batch))
            fused = fused if case.has_kernel else eager
            saved = (eager - fused) / 1e9
            cells.append(
                f"{eager / 1e9:6.2f} -> {fused / 1e9:5.2f} ({saved / H200_TB_S:5.2f}-{saved / H100_TB_S:5.2f})"
            )
            totals[name][0] += eager
            totals[name][1] += fused
        print(f"{case.count} x {case.name:30s} " + " ".join(f"{cell:^32s}" for cell in cells))
    flops = block_flops(shape)
    for name, (eager, fused) in totals.items():
        matmul_ms = flops[name] / BF16_TFLOP_S / 1e9
        print(
            f"  {name:8s}: {eager / 1e9:6.2f} -> {fused / 1e9:5.2f} GB; on H100 {eager / 1e9 / H100_TB_S:5.2f} -> "
            f"{fused / 1e9 / H100_TB_S:5.2f} ms beside {flops[name] / 1e12:6.2f} TFLOP = {matmul_ms:5.2f} ms at the bf16 peak, "
            f"{2 * matmul_ms:5.2f} ms at half of it"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=32760)
    parser.add_argument("--batch", type=int, default=1)
    args = parser.parse_args()
    for shape in SHAPES:
        sizes = {**vars(shape), "tokens": args.tokens, "batch": args.batch}
        print_table(Shape(**sizes))


if __name__ == "__main__":
    main()
