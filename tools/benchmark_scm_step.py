"""The student part of an sCM step: one dual pass that carries gradient, against the way NVlabs/rcm does it.

    OMP_NUM_THREADS=2 .venv/bin/python tools/benchmark_scm_step.py --output docs/benchmark_scm_step.json

`single`: a dual forward without a graph, each block's primal recomputed with gradient in the backward (rcm_megatron.dual).
`separate`: a dual forward without gradient for the tangent, then a block-wise checkpointed primal forward and backward.
Same network, inputs and process; repeats alternate. Prints the median of each, the median of the paired ratios, the peak of live
tensor bytes beyond the weights and their gradients, and the largest difference between the two gradients; the ratio of the whole
step adds the guided teacher pass that both share.

Shapes: S tokens, B batch, P patch features, L text length.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rcm_kernels.fused import select_ops
from rcm_megatron.config import LatentConfig, ParallelConfig
from rcm_megatron.dtypes import DTYPES
from rcm_megatron.dual import Dual
from rcm_megatron.families.wan.network import WanModel
from rcm_megatron.networks.build import build_chunks
from rcm_megatron.networks.weights import load_weights, seeded_weights
from rcm_megatron.parallel.groups import initialize_parallel
from rcm_megatron.platform.device import init_distributed, this_device
from rcm_megatron.platform.megatron import prepare_megatron
from tools.measuring import TOKENS_OF_FRAME, PeakBytes, check_sizes, provenance, wan_model


class Bench:
    """The two ways of one student step on one network."""

    def __init__(self, args: argparse.Namespace) -> None:
        model = wan_model(layers=args.layers, hidden=args.hidden, head_dim=args.head_dim)
        latent = LatentConfig(channels=16, frames=args.tokens // TOKENS_OF_FRAME, height=32, width=32)
        groups = initialize_parallel(ParallelConfig())
        chunks = build_chunks(model, latent, ParallelConfig(), groups=groups, params_dtype=DTYPES[args.dtype])
        load_weights(chunks, seeded_weights(model, seed=0))
        self.network: WanModel = chunks[0]
        generator, device = torch.Generator().manual_seed(1), this_device()

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        shape = (self.network.layout.local_tokens, args.batch, self.network.layout.patch_features)
        self.x, self.t_x, self.target = (normal(*shape) for _ in range(3))
        self.timestep, self.t_timestep = 1000 * normal(1, args.batch).sigmoid(), 100 * normal(1, args.batch)
        self.text = normal(model.text_len, args.batch, model.text_dim)
        self.gradients: dict[str, Tensor] = {}

    def inputs(self) -> tuple[Dual, Dual, Tensor]:
        return Dual.pack(self.x, self.t_x), Dual.pack(self.timestep, self.t_timestep), self.text

    def backward(self, primal: Tensor, tangent: Tensor) -> None:
        g = self.target - tangent.float()
        (primal.float() - primal.detach().float() - g / (g.norm() + 0.1)).square().sum().backward()

    def single(self) -> None:
        v = self.network(*self.inputs())
        self.backward(v.primal, v.tangent)

    def separate(self) -> None:
        with torch.no_grad():
            tangent = self.network(*self.inputs()).tangent
        self.backward(self.network(self.x, self.timestep, self.text), tangent)

    def teacher(self) -> None:
        with torch.no_grad():
            both = (self.x.repeat(1, 2, 1), self.timestep.repeat(1, 2), self.text.repeat(1, 2, 1))
            self.network(*both)

    def gradient_of(self, step: Callable[[], None]) -> dict[str, Tensor]:
        self.network.zero_grad(set_to_none=True)
        step()
        return {name: p.grad.clone() for name, p in self.network.named_parameters()}

    def peak_mib(self, step: Callable[[], None]) -> float:
        """Gradients exist already, so that only what the step holds in between is counted."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        with PeakBytes() as tracker:
            step()
        return tracker.peak / 2**20

    def seconds(self, step: Callable[[], None]) -> float:
        self.network.zero_grad(set_to_none=False)
        start = self._now()
        step()
        return self._now() - start

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    return max(float((ours[name] - g).norm() / g.norm()) for name, g in theirs.items() if g.norm() > 0)


def measure(args: argparse.Namespace) -> dict:
    bench = Bench(args)
    difference = largest_difference(bench.gradient_of(bench.single), bench.gradient_of(bench.separate))
    memory = {"single": bench.peak_mib(bench.single), "separate": bench.peak_mib(bench.separate)}
    times: dict[str, list[float]] = {"single": [], "separate": [], "teacher": []}
    for repeat in range(args.repeats):
        for name in times:
            times[name].append(bench.seconds(getattr(bench, name)))
        print(f"{repeat + 1}/{args.repeats} " + " ".join(f"{k} {v[-1]:.2f} s" for k, v in times.items()), flush=True)
    pairs = list(zip(times["single"], times["separate"], times["teacher"], strict=True))
    return {
        "gradient_difference": difference,
        "median_seconds": {name: statistics.median(values) for name, values in times.items()},
        "ratio_student_part": statistics.median(single / separate for single, separate, _ in pairs),
        "ratio_whole_step": statistics.median((s + t) / (r + t) for s, r, t in pairs),
        "peak_mib": memory,
        "shape": {
            "tokens": bench.network.layout.num_tokens,
            **{k: vars(args)[k] for k in ("hidden", "head_dim", "layers", "batch", "dtype")},
        },
    }


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--hidden", type=int, default=512, help="a multiple of the head dim")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="fp32")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024, help="a multiple of 256")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--fused", default="auto", help="fused ops: auto, none, all, or names joined by commas")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args(argv)
    check_sizes(hidden=args.hidden, head_dim=args.head_dim, tokens=args.tokens)
    select_ops(args.fused)
    prepare_megatron()
    init_distributed()
    result = {**measure(args), **provenance()}
    print(json.dumps(result, indent=2))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
