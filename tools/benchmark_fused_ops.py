"""What a Wan block costs outside GEMMs and attention: PyTorch's rules operation by operation, against the fused kernels.

    python tools/benchmark_fused_ops.py                                      # bytes, no GPU: 1.3B and 14B, 32,760 tokens, bf16
    python tools/benchmark_fused_ops.py --measure --csv runs/fused_ops.csv   # times on a GPU

Bytes: the ops of rcm_megatron.models.dual_ops run on meta tensors. Every aten operation that is no view counts its inputs and
outputs once (a lower bound for eager PyTorch: CUDA's LayerNorm backward reads twice), every launch of a fused kernel its arguments.
Milliseconds beside bytes are bytes over a data sheet's bandwidth; only `--measure` measures.

Shapes: S tokens, B batch, D features, N heads, K head dim, F features of the MLP.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rcm_kernels.fused import select_ops
from rcm_kernels.launch import recorded
from rcm_megatron.config import LatentConfig
from rcm_megatron.dual import Dual, add_bias
from rcm_megatron.models import dual_ops
from rcm_megatron.models.layers import split_heads
from rcm_megatron.training.flops import PEAK_TFLOPS, network_flops
from tools.measuring import wan_model

EPS = 1e-6
PASSES = ("dual", "plain", "backward")
BF16, FP32 = torch.bfloat16, torch.float32
H100_TB_S, H200_TB_S = 3.35, 4.8
"""Data sheets of H100 SXM and H200: memory bandwidth. The dense bf16 peak is the same."""


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
    device: str = "meta"

    def empty(self, *sizes: int, dtype: torch.dtype = BF16) -> Tensor:
        """Random numbers where there are any."""
        if self.device == "meta":
            return torch.empty(sizes, dtype=dtype, device="meta")
        return torch.randn(sizes, device=self.device).to(dtype)


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

    `make(rows)` gives the inputs with batch `rows`, which become duals in a dual pass; `constants` are those without a tangent.
    """

    name: str
    count: int
    make: Callable[[int], list[Tensor]]
    call: Callable
    constants: Sequence[Tensor] = ()
    has_kernel: bool = True


def cases(shape: Shape) -> list[Case]:
    s, d, n, f, empty = shape.tokens, shape.features, shape.heads, shape.ffn, shape.empty
    k = d // n
    rotation = torch.ones(s, k // 2, dtype=torch.complex64, device=shape.device)

    def vector(rows: int) -> Tensor:
        return empty(1, rows, d, dtype=FP32)

    def head_view(rows: int, parts: int) -> Tensor:
        return split_heads(empty(s, rows, parts * d), parts, k)[0]

    def rms_norm(x, weight, rotation_SK=None):
        options = {"eps": EPS, "num_features": d, "sum_over_tp": None}
        return dual_ops.rms_norm_across_heads(x, weight, rotation_SK=rotation_SK, **options)

    norm_modulate = partial(dual_ops.layer_norm_modulate, eps=EPS, dtype=BF16)
    norm_affine = partial(dual_ops.layer_norm_affine, eps=EPS, dtype=BF16)
    affine, heads = [empty(d, dtype=FP32), empty(d, dtype=FP32)], [empty(n, k, dtype=FP32)]
    return [
        Case("LayerNorm + modulation", 2, lambda r: [empty(s, r, d), vector(r), vector(r)], norm_modulate),
        Case("LayerNorm with weight and bias", 1, lambda r: [empty(s, r, d)], norm_affine, affine),
        Case("RMSNorm + RoPE of self q, k", 2, lambda r: [head_view(r, 3)], rms_norm, [*heads, rotation]),
        Case("RMSNorm of cross q", 1, lambda r: [head_view(r, 1)], rms_norm, heads),
        Case("gate + residual", 2, lambda r: [empty(s, r, d), empty(s, r, d), vector(r)], dual_ops.gated_residual),
        Case("bias of fc1 + GELU-tanh", 1, lambda r: [empty(s, r, f)], dual_ops.gelu_tanh, [empty(f)]),
        Case("residual add", 1, lambda r: [empty(s, r, d), empty(s, r, d)], dual_ops.add, has_kernel=False),
        Case("bias of qkv (all three)", 1, lambda r: [empty(s, r, 3 * d)], add_bias, [empty(3 * d)], False),
        Case("bias of D features", 4, lambda r: [empty(s, r, d)], add_bias, [empty(d)], False),
    ]


def prepare(case: Case, which: str, batch: int) -> Callable[[], object]:
    """One pass of one op as a function without arguments; the forward of a backward has run."""
    if which == "dual":
        stacks = [Dual(x) for x in case.make(2 * batch)]
        return torch.no_grad()(lambda: case.call(*stacks, *case.constants))
    inputs = [*case.make(batch), *case.constants]
    if which == "plain":
        return torch.no_grad()(lambda: case.call(*inputs))
    leaves = [x.detach().requires_grad_(not x.is_complex()) for x in inputs]
    output = case.call(*leaves)
    upstream, wanted = torch.ones_like(output), [x for x in leaves if x.requires_grad]
    return lambda: torch.autograd.grad(output, wanted, upstream, retain_graph=True)


def count(case: Case, which: str, batch: int) -> tuple[int, int]:
    """(eager, fused) bytes of one pass of one op on meta tensors."""
    totals = []
    for setting in ("none", "all"):
        select_ops(setting)
        with recorded() as launches:
            step = prepare(case, which, batch)
            launches.clear()
            with Traffic() as traffic:
                step()
        # an argument that a kernel does not read is stood for by another one
        arguments = [list({id(x): x for x in arguments}.values()) for _, _, arguments, _ in launches]
        totals.append(traffic.bytes + tensor_bytes(arguments))
    return totals[0], totals[1]


def block_flops(shape: Shape) -> dict[str, float]:
    """FLOPs of the GEMMs and of attention (self and cross) of one block; a fused attention's backward computes its scores again."""
    sizes = {"hidden": shape.features, "head_dim": shape.features // shape.heads, "ffn_hidden_size": shape.ffn}
    sizes |= {"text_dim": 4096, "text_len": shape.text}
    latent = LatentConfig(channels=16, frames=1, height=2, width=2 * shape.tokens)
    one, two = (network_flops(wan_model(layers=layers, **sizes), latent) for layers in (1, 2))
    scores = (two.self_attention - one.self_attention + two.cross_attention - one.cross_attention) / 2
    return {
        "dual": shape.batch * (two.dual - one.dual),
        "plain": shape.batch * (two.forward - one.forward),
        "backward": shape.batch * (two.backward - one.backward + scores),
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
            saved = (eager - fused) / 1e9
            cells.append(
                f"{eager / 1e9:6.2f} -> {fused / 1e9:5.2f} ({saved / H200_TB_S:5.2f}-{saved / H100_TB_S:5.2f})"
            )
            totals[name][0] += eager
            totals[name][1] += fused
        print(f"{case.count} x {case.name:30s} " + " ".join(f"{cell:^32s}" for cell in cells))
    flops = block_flops(shape)
    for name, (eager, fused) in totals.items():
        matmul_ms = flops[name] / PEAK_TFLOPS["H100"] / 1e9
        print(
            f"  {name:8s}: {eager / 1e9:6.2f} -> {fused / 1e9:5.2f} GB; on H100 {eager / 1e9 / H100_TB_S:5.2f} -> "
            f"{fused / 1e9 / H100_TB_S:5.2f} ms beside {flops[name] / 1e12:6.2f} TFLOP = {matmul_ms:5.2f} ms at the bf16 peak, "
            f"{2 * matmul_ms:5.2f} ms at half of it"
        )


def milliseconds(function: Callable[[], object], repeats: int) -> float:
    """Median of CUDA event times; the tensors are far larger than the L2 cache."""
    times = []
    for _ in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:])


def copy_bandwidth(repeats: int) -> float:
    """GB/s of a device copy, read and write: the 100 % of the table."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    return 2 * source.numel() / milliseconds(partial(torch.empty_like(source).copy_, source), repeats) / 1e6


def measure(shape: Shape, *, repeats: int, copy_gb_s: float) -> Iterator[dict]:
    """One row per op that has a kernel and per pass. GB/s of the fused kernels: the bytes they must move over their time."""
    on_gpu = cases(replace(shape, device="cuda"))
    for case, meta in zip(on_gpu, cases(shape), strict=True):
        for which in PASSES if case.has_kernel else ():
            times = {}
            for setting in ("none", "all"):
                select_ops(setting)
                times[setting] = milliseconds(prepare(case, which, shape.batch), repeats)
            rate = count(meta, which, shape.batch)[1] / times["all"] / 1e6
            yield {
                "model": shape.name,
                "op": case.name,
                "pass": which,
                "eager_ms": round(times["none"], 4),
                "fused_ms": round(times["all"], 4),
                "speedup": round(times["none"] / times["all"], 2),
                "fused_gb_s": round(rate),
                "percent_of_copy": round(100 * rate / copy_gb_s, 1),
                "per_block": case.count,
            }


def provenance() -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, Triton {triton.__version__}"
    return f"{torch.cuda.get_device_name()}, {versions}, commit {commit.strip()}"


def print_times(shapes: Sequence[Shape], *, repeats: int, path: Path | None) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("--measure: no CUDA device here; need one; fix: leave it out for the byte count")
    copy_gb_s = copy_bandwidth(repeats)
    print(f"{provenance()}; device copy {copy_gb_s:.0f} GB/s; {shapes[0].tokens} tokens, batch {shapes[0].batch}, bf16")
    rows = []
    for shape in shapes:
        for row in measure(shape, repeats=repeats, copy_gb_s=copy_gb_s):
            print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
            rows.append(
                row | {"copy_gb_s": round(copy_gb_s), "tokens": shape.tokens, "batch": shape.batch, "on": provenance()}
            )
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=32760)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--measure", action="store_true", help="times on a GPU instead of bytes")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args(argv)
    shapes = [replace(shape, tokens=args.tokens, batch=args.batch) for shape in SHAPES]
    if args.measure:
        print_times(shapes, repeats=args.repeats, path=args.csv)
        return
    for shape in shapes:
        print_table(shape)


if __name__ == "__main__":
    main()
