"""Time of attention_jvp against plain attention forward: `python -m rcm_kernels.flash_attention_jvp.benchmark [--device cpu]`.

Six matmuls of 2 s l d operations per head (plain: two). Prints the best of `--repeats` runs, one line per shape.
"""

import argparse
import time

import torch

from rcm_kernels.flash_attention import attention_forward
from rcm_kernels.flash_attention_jvp import attention_jvp, select_backend

# tokens, batch, heads, head dim: the quick start's (whole and half the heads or tokens), then longer sequences
CPU_SHAPES = [(64, 16, 6, 32), (64, 16, 3, 32), (256, 4, 6, 32), (1024, 1, 6, 32), (4096, 1, 2, 64)]
CUDA_SHAPES = [(4096, 1, 12, 128), (32760, 1, 12, 128), (32760, 1, 40, 128)]


def best_seconds(fn, repeats, device):
    """Shortest of `repeats` runs after one that warms up."""
    fn()
    times = []
    for _ in range(repeats):
        _synchronize(device)
        start = time.perf_counter()
        fn()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def _synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def main():
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="reference")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    select_backend(args.backend)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    print(f"device={args.device} dtype={dtype} threads={torch.get_num_threads()} backend={args.backend} torch={torch.__version__}")
    print("tokens batch heads dim | jvp ms  GFLOP/s | jvp, no tk tv ms | plain forward ms | jvp/plain")
    for s, b, n, d in CPU_SHAPES if args.device == "cpu" else CUDA_SHAPES:
        q, k, v, tq, tk, tv = torch.randn(6, s, b, n, d, device=args.device).to(dtype)
        jvp = best_seconds(lambda: attention_jvp(q, k, v, tq, tk, tv), args.repeats, args.device)  # noqa: B023
        cross = best_seconds(lambda: attention_jvp(q, k, v, tq), args.repeats, args.device)  # noqa: B023
        plain = best_seconds(lambda: attention_forward(q, k, v), args.repeats, args.device)  # noqa: B023
        rate = 12 * s * s * d * b * n / jvp / 1e9
        print(
            f"{s:6d} {b:5d} {n:5d} {d:3d} | {jvp * 1e3:7.2f} {rate:7.1f} | {cross * 1e3:7.2f} | {plain * 1e3:7.2f} | {jvp / plain:5.2f}"
        )


if __name__ == "__main__":
    main()
