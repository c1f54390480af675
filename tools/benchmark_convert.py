"""Time and peak memory of a conversion: `python tools/benchmark_convert.py SCRATCH --gigabytes 10`; prints JSON, deletes what it wrote.

A random Wan network with the 14B's 40 layers is written in diffusers' format, as wide as the size asks for, and goes through
a chain of formats. Each conversion is a process of its own. Memory is counted from when its libraries are loaded (a first conversion of
a tiny network): `anonymous` is the most of RssAnon, what the process itself holds; `resident` the most of VmRSS, which counts pages
of the mapped source too: those of tensors that are not written yet. Both are sampled every millisecond by a thread.
The C library's allocator is told to map tensors of 64 KiB and more, as it does by itself with those of a network of full width (from
32 MiB); otherwise the holes between small ones are measured. GB are 10^9 bytes, of the source.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rcm_megatron.checkpoint.convert import convert
from rcm_megatron.checkpoint.formats.base import WriteOptions
from rcm_megatron.checkpoint.models import write_checkpoint
from rcm_megatron.checkpoint.translate import internal_shapes
from rcm_megatron.config import ModelConfig
from rcm_megatron.requests import ConvertRequest
from tools.measuring import wan_model

CHAIN = ("wan", "torch_dist", "diffusers")


def network(head_dim: int, *, layers: int = 40) -> ModelConfig:
    """Wan2.1 14B with heads of another size: 40 heads, 40 layers, every key."""
    hidden = 40 * head_dim
    text = {"text_dim": 4096 if head_dim > 32 else 64, "text_len": 512}
    return wan_model(layers=layers, hidden=hidden, head_dim=head_dim, ffn_hidden_size=hidden * 27 // 10, **text)


def write_network(folder: Path, model: ModelConfig, *, max_shard_bytes: int) -> None:
    """Weights of one repeated pattern: random numbers for 10 GB take longer than what is measured."""
    pattern = torch.randn(1_000_003)

    def tensors():
        for name, shape in internal_shapes(model).items():
            count = math.prod(shape)
            yield name, pattern.repeat(-(-count // len(pattern)))[:count].view(shape)

    write_checkpoint(tensors(), model, folder, WriteOptions(max_shard_bytes=max_shard_bytes))


def largest_group(model: ModelConfig, itemsize: int = 4) -> int:
    """Bytes of the largest internal parameter: q, k and v of one layer."""
    return itemsize * max(math.prod(shape) for shape in internal_shapes(model).values())


def status() -> dict[str, int]:
    """Bytes of this process now, by the names of /proc/self/status."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {line[0].rstrip(":"): 1024 * int(line[1]) for line in lines if line[-1] == "kB"}


class Peaks(threading.Thread):
    """The most of RssAnon and VmRSS above what they are at the start, sampled."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._start, self._done = status(), threading.Event()
        self.most = dict.fromkeys(("RssAnon", "VmRSS"), 0)

    def run(self) -> None:
        while not self._done.wait(1e-3):
            now = status()
            self.most = {name: max(most, now[name] - self._start[name]) for name, most in self.most.items()}

    def stop(self) -> dict[str, int]:
        self._done.set()
        self.join()
        return self.most


def measured(source: Path, target: Path, form: str, *, warm_up: Path, max_shard_bytes: int) -> dict[str, float]:
    """Convert in this process; what it took."""
    request = ConvertRequest(source=str(source), target=str(target), to=form, max_shard_size=max_shard_bytes)
    convert(replace(request, source=str(warm_up), target=str(target.with_name("warm_up"))), progress=False)
    shutil.rmtree(target.with_name("warm_up"))
    peaks, start = Peaks(), time.perf_counter()
    peaks.start()
    convert(request, progress=False)
    seconds = time.perf_counter() - start
    most = peaks.stop()
    size = sum(file.stat().st_size for file in source.iterdir())
    return {
        "conversion": f"{source.name} -> {form}",
        "bytes": size,
        "seconds": round(seconds, 2),
        "gb_per_second": round(size / seconds / 1e9, 3),
        "anonymous_bytes": most["RssAnon"],
        "resident_bytes": most["VmRSS"],
    }


def run_chain(scratch: Path, model: ModelConfig, *, max_shard_bytes: int, chain: Sequence[str] = CHAIN) -> list[dict]:
    """Each conversion of the chain, with the bounds that its memory is to be compared with."""
    write_network(scratch / "source", model, max_shard_bytes=max_shard_bytes)
    write_network(scratch / "tiny", network(6, layers=1), max_shard_bytes=max_shard_bytes)
    source, results = scratch / "source", []
    for form in chain:
        paths = [str(path) for path in (source, scratch / form, scratch / "tiny")]
        command = [sys.executable, __file__, scratch, "--one", *paths, form, "--max-shard-bytes", str(max_shard_bytes)]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        command = [str(part) for part in command]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        results.append(json.loads(done.stdout))
        shutil.rmtree(source)
        source = scratch / form
    shutil.rmtree(source)
    shutil.rmtree(scratch / "tiny")
    bounds = {"max_shard_bytes": max_shard_bytes, "largest_group_bytes": largest_group(model)}
    return [{**result, **bounds} for result in results]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scratch", type=Path, help="folder on the disk to be measured")
    parser.add_argument("--gigabytes", type=float, default=10.0, help="least size of the fp32 checkpoint")
    parser.add_argument("--max-shard-bytes", type=int, default=10**9)
    parser.add_argument("--chain", nargs="+", choices=CHAIN, default=CHAIN, metavar="FORMAT")
    parser.add_argument("--one", nargs=4, metavar=("SOURCE", "TARGET", "WARM_UP", "FORMAT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        source, target, warm_up = map(Path, arguments.one[:3])
        options = {"warm_up": warm_up, "max_shard_bytes": arguments.max_shard_bytes}
        print(json.dumps(measured(source, target, arguments.one[3], **options)))
        return
    head_dim = 12
    while 4 * sum(map(math.prod, internal_shapes(network(head_dim)).values())) < 1e9 * arguments.gigabytes:
        head_dim += 4
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    results = run_chain(
        arguments.scratch, network(head_dim), max_shard_bytes=arguments.max_shard_bytes, chain=arguments.chain
    )
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
