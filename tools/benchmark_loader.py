"""Speed of the data loader on this machine, against decoding the same samples inline.

    python tools/benchmark_loader.py --wan --processes 2

Writes a dataset of random latents to a temporary folder (quick-start shapes, or with --wan those of Wan2.1 480p with 81 frames)
and prints for each process: samples/s decoded inline and through the loader, and how long a consumer that computes between the
batches still waits for one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable

import torch

from rcm_megatron.data.dali import LatentLoader
from rcm_megatron.data.manifest import build_manifest, load_manifest
from rcm_megatron.data.samples import SampleSource
from rcm_megatron.data.shards import ShardWriter

SMALL = {"latent_shape": (1, 4, 16, 16), "text_len": 6, "text_dim": 32}
WAN_480P = {"latent_shape": (16, 21, 60, 104), "text_len": 512, "text_dim": 4096}


def _write(folder: str, shapes: dict, *, num_samples: int) -> None:
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(folder) as writer:
        for index in range(num_samples):
            latent_CTHW = torch.randn(shapes["latent_shape"], generator=generator).bfloat16()
            embed_LD = torch.zeros(shapes["text_len"], shapes["text_dim"], dtype=torch.bfloat16)
            embed_LD[: 3 + shapes["text_len"] // 8] = 0.5
            writer.add(f"{index:09d}", latent_CTHW=latent_CTHW, embed_LD=embed_LD, prompt="a prompt")
    build_manifest(folder, on_error="raise").save()


def _rate(step: Callable[[int], object], *, samples: int, seconds: float) -> str:
    """Runs `step(i)`, which yields `samples` samples, for `seconds`; "… samples/s, … ms of CPU each"."""
    start, start_cpu, steps = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start < seconds:
        step(steps)
        steps += 1
    elapsed, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    total = steps * samples
    return f"{total / elapsed:.0f} samples/s, {1e3 * cpu / total:.2f} ms of CPU each"


def _wait_per_batch(batches: LatentLoader, *, compute_ms: float, count: int) -> float:
    """Milliseconds that `next` takes when `compute_ms` of matrix products lie between the calls."""
    matrix, waited = torch.randn(512, 512), 0.0
    for _ in range(count):
        end = time.perf_counter() + compute_ms / 1e3
        while time.perf_counter() < end:
            matrix @ matrix
        start = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - start
    return 1e3 * waited / count


def _measure(rank: int, folder: str, shapes: dict, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    manifest, size = load_manifest(folder), arguments.micro_batch_size
    source = SampleSource(manifest, seed=0, on_error="raise", **shapes)
    source[0]
    inline = _rate(source.__getitem__, samples=1, seconds=arguments.seconds)
    start = time.perf_counter()
    with LatentLoader(
        manifest,
        micro_batch_size=size,
        dp_rank=0,
        dp_size=1,
        global_batch_size=size,
        seed=0,
        num_threads=arguments.threads,
        on_error="raise",
        **shapes,
    ) as batches:
        next(batches)
        first = time.perf_counter() - start
        loaded = _rate(lambda _: next(batches), samples=size, seconds=arguments.seconds)
        wait = _wait_per_batch(batches, compute_ms=arguments.compute_ms, count=20)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"process {rank}: inline {inline}; loader {loaded}; first batch after {first:.2f} s; waits {wait:.1f} ms per batch of "
        f"{size} beside {arguments.compute_ms:.0f} ms of compute; peak memory {memory:.0f} MB",
        flush=True,
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wan", action="store_true", help="shapes of Wan2.1 480p in place of the quick start's")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--num-samples", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of each measurement")
    parser.add_argument("--compute-ms", type=float, default=200.0)
    arguments = parser.parse_args()
    shapes = WAN_480P if arguments.wan else SMALL
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        _write(folder, shapes, num_samples=arguments.num_samples)
        processes = [
            context.Process(target=_measure, args=(rank, folder, shapes, arguments))
            for rank in range(arguments.processes)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()


if __name__ == "__main__":
    main()
