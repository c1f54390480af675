"""Time of attention_jvp against plain attention forward: `python -m rcm_kernels.flash_attention_jvp.benchmark [--device cpu]`.

Six matmuls of 2 s l d operations per head (plain: two). Prints the best of `--repeats` runs, one line per shape: CUDA wall time,
or CPU time of one thread, which a busy machine disturbs less.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from rcm_kernels.flash_attention import attention_forward
from rcm_kernels.flash_attention_jvp import attention_jvp, select_backend

# tokens, batch, heads, head dim: the quick start's (whole and half the heads or tokens), then longer sequences
CPU_SHAPES = [(64, 16, 6, 32), (64, 16, 3, 32), (256, 4, 6, 32), (1024, 1, 6, 32), (4096, 1, 2, 64)]
CUDA_SHAPES = [(4096, 1, 12, 128), (32760, 1, 12, 128), (32760, 1, 40, 128)]


def best_seconds(fn: Callable[[], Any], repeats: int, device: str) -> float:
    """Shortest of `repeats` runs after one that warms up: wall time on CUDA, time of the process on CPU."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    synchronize = torch.cuda.synchronize if device == "cuda" else int
    times = []
    for _ in range(repeats + 1):
        synchronize()
        start = clock()
        fn()
        synchronize()
        times.append(clock() - start)
    return min(times[1:])


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="reference")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    select_backend(args.backend)
    if args.device == "cpu":
        torch.set_num_threads(1)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    print(
        f"device={args.device} dtype={dtype} threads={torch.get_num_threads()} backend={args.backend} torch={torch.__version__}"
    )
    print("tokens batch heads dim | jvp ms  GFLOP/s | jvp, no tk tv ms | plain forward ms | jvp/plain")
    for s, b, n, d in CPU_SHAPES if args.device == "cpu" else CUDA_SHAPES:
        dual = torch.randn(6, s, b, n, d, device=args.device).to(dtype).unbind(0)
        jvp, cross, plain = (
            best_seconds(functools.partial(fn, *tensors), args.repeats, args.device)
            for fn, tensors in ((attention_jvp, dual), (attention_jvp, dual[:4]), (attention_forward, dual[:3]))
        )
        rate = 12 * s * s * d * b * n / jvp / 1e9
        times = f"{jvp * 1e3:7.2f} {rate:7.1f} | {cross * 1e3:7.2f} | {plain * 1e3:7.2f} | {jvp / plain:5.2f}"
        print(f"{s:6d} {b:5d} {n:5d} {d:3d} | {times}")


if __name__ == "__main__":
    main()
