"""Speed of the data loader on this machine, against a plain PyTorch loader of the same shards, alternating in one run.

    pip install webdataset==1.0.2 braceexpand==0.1.7
    python tools/benchmark_loader.py --wan --output docs/loader

The plain loader is `webdataset` in a torch DataLoader with as many worker processes as ours has threads, which decodes, converts to fp32,
fills texts up and collates as ours does (plain_bf16: leaves tensors as they are stored, half the bytes between processes); its shuffle, of
a buffer, is off. Samples are random latents and embeddings (quick-start
shapes, or with --wan those of Wan2.1 480p: [16, 20, 60, 104] and [512, 4096] in bf16), in the page cache, twice: with all text positions
as the published dataset has them, and with those of a prompt alone, as `rcm build-dataset` writes them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rcm_megatron.data.dali import LatentLoader
from rcm_megatron.data.manifest import build_manifest, load_manifest
from rcm_megatron.data.samples import SampleSource
from rcm_megatron.data.shards import ShardWriter
from tools.measuring import provenance

SMALL = {"latent_shape": (1, 4, 16, 16), "text_len": 6, "text_dim": 32}
WAN_480P = {"latent_shape": (16, 20, 60, 104), "text_len": 512, "text_dim": 4096}
WEBDATASET = "webdataset==1.0.2 braceexpand==0.1.7"
LOADERS = ("ours", "plain", "plain_bf16")


@dataclass(frozen=True)
class Case:
    """One dataset, and what reads it."""

    folder: str
    shapes: dict
    batch: int
    workers: int

    @contextlib.contextmanager
    def batches(self, loader: str) -> Iterator[Iterator]:
        """Endless batches of fp32 tensors ([B, C, T, H, W] and the texts filled up to text_len)."""
        if loader != "ours":
            yield iter(_plain_loader(self, None if loader == "plain_bf16" else torch.float32))
            return
        with LatentLoader(
            SampleSource(load_manifest(self.folder), seed=0, on_error="raise", **self.shapes),
            micro_batch_size=self.batch,
            dp_rank=0,
            dp_size=1,
            global_batch_size=self.batch,
            num_threads=self.workers,
        ) as ours:
            yield ours


def _plain_loader(case: Case, dtype: torch.dtype | None):
    """What one writes with `webdataset` and a DataLoader. `dtype` None: as stored."""
    try:
        import webdataset
    except ImportError as error:
        raise SystemExit(
            f"benchmark_loader: the plain loader needs webdataset; pip install {WEBDATASET}, or --no-plain"
        ) from error
    urls = sorted(str(path) for path in Path(case.folder).glob("*.tar"))

    def decoded(sample: tuple[bytes, bytes, bytes]) -> tuple[Tensor, Tensor, str]:
        latent, embed = (torch.load(io.BytesIO(data), weights_only=True).to(dtype) for data in sample[:2])
        return latent, functional.pad(embed, (0, 0, 0, case.shapes["text_len"] - len(embed))), sample[2].decode()

    dataset = webdataset.WebDataset(urls, shardshuffle=False, nodesplitter=None, workersplitter=None).repeat()
    dataset = dataset.to_tuple("latent.pt", "embed.pt", "prompt.txt").map(decoded)
    return torch.utils.data.DataLoader(
        dataset, batch_size=case.batch, num_workers=case.workers, prefetch_factor=2, multiprocessing_context="fork"
    )


def write_dataset(folder: str, shapes: dict, *, num_samples: int, positions: int) -> None:
    """Random samples in eight shards, whose embeddings have so many positions."""
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(folder, samples_per_shard=max(1, num_samples // 8)) as writer:
        for index in range(num_samples):
            latent_CTHW = torch.randn(shapes["latent_shape"], generator=generator).bfloat16()
            embed_LD = torch.full((positions, shapes["text_dim"]), 0.5, dtype=torch.bfloat16)
            writer.add(f"{index:09d}", latent_CTHW=latent_CTHW, embed_LD=embed_LD, prompt="a prompt")
    build_manifest(folder, on_error="raise").save()
    for path in Path(folder).glob("*.tar"):
        path.read_bytes()  # into the page cache


def samples_per_second(step: Callable[[], object], *, samples: int, seconds: float) -> float:
    """Calls `step`, which yields `samples` samples, for `seconds`."""
    start, steps = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        step()
        steps += 1
    return steps * samples / elapsed


def waiting_share(step: Callable[[], object], *, compute_ms: float, seconds: float) -> float:
    """Share of the time that `step` takes when `compute_ms` of matrix products lie between the calls."""
    matrix, waited, start = torch.randn(512, 512), 0.0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        end = time.perf_counter() + compute_ms / 1e3
        while time.perf_counter() < end:
            matrix @ matrix
        asked = time.perf_counter()
        step()
        waited += time.perf_counter() - asked
    return waited / (time.perf_counter() - start)


def measure(case: Case, arguments: argparse.Namespace) -> dict[str, object]:
    """Samples/s inline and through each loader, in alternating rounds, and each one's waiting share."""
    source = SampleSource(load_manifest(case.folder), seed=0, on_error="raise", **case.shapes)
    numbers = iter(range(10**9))
    inline = samples_per_second(lambda: source[next(numbers)], samples=1, seconds=arguments.seconds)
    loaders = LOADERS[:1] if arguments.no_plain else LOADERS
    rates: dict[str, list[float]] = {loader: [] for loader in loaders}
    shares: dict[str, list[float]] = {loader: [] for loader in loaders}
    for _ in range(arguments.rounds):
        for loader in loaders:
            with case.batches(loader) as batches:
                for _ in range(2 * case.workers + 2):  # what was read ahead while it started
                    next(batches)
                step = lambda batches=batches: next(batches)  # noqa: E731
                rates[loader].append(samples_per_second(step, samples=case.batch, seconds=arguments.seconds))
                shares[loader].append(waiting_share(step, compute_ms=arguments.compute_ms, seconds=arguments.seconds))
    result = {"workers": case.workers, "batch": case.batch, "inline_samples_per_s": inline}
    for loader in loaders:
        result[f"{loader}_samples_per_s"] = median(rates[loader])
        result[f"{loader}_waiting_share"] = median(shares[loader])
    for loader in loaders[1:]:
        ratios = [ours / plain for ours, plain in zip(rates["ours"], rates[loader], strict=True)]
        result[f"ratio_{loader}"] = [median(ratios), min(ratios), max(ratios)]
    return result


def table(rows: list[dict[str, object]], arguments: argparse.Namespace) -> str:
    """The results as Markdown."""
    loaders = [loader for loader in LOADERS if f"{loader}_samples_per_s" in rows[0]]
    names = [loader.replace("_", " ") for loader in loaders]
    heads = ["text positions", "workers", "inline", *names, *(f"ours / {name} (range)" for name in names[1:])]
    heads += [f"{name} waits beside {arguments.compute_ms:g} ms" for name in names]
    lines = ["| " + " | ".join(heads) + " |", "|" + " ---: |" * len(heads)]
    for row in rows:
        cells = [f"{row['positions']}", f"{row['workers']}", f"{row['inline_samples_per_s']:.1f}"]
        cells += [f"{row[f'{loader}_samples_per_s']:.1f}" for loader in loaders]
        cells += ["{:.2f} ({:.2f}-{:.2f})".format(*row[f"ratio_{loader}"]) for loader in loaders[1:]]
        cells += [f"{row[f'{loader}_waiting_share']:.1%}" for loader in loaders]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def document(
    rows: list[dict[str, object]], facts: dict[str, object], shapes: dict, arguments: argparse.Namespace
) -> str:
    """The page docs/loader.md."""
    name = Path(arguments.output).name
    text = f"""# Throughput of the data loader

Samples a second of `LatentLoader` and of a plain loader (`webdataset` in a torch DataLoader, as many worker processes as ours has
threads) that gives the same fp32 batches; *plain bf16* leaves tensors as they are stored. Medians of {arguments.rounds} alternating rounds
of {arguments.seconds:g} s. Latents {list(shapes["latent_shape"])} and embeddings of width {shapes["text_dim"]}, stored in bf16;
micro-batches of {arguments.micro_batch_size}; shards in the page cache. *Inline*: decoding in the consumer's thread, without filling
texts up. *Waits*: the share of the time in which a consumer that computes between the batches waits for one.

{table(rows, arguments)}
{facts["cpu"]}, {facts["cores"]} cores, Python {facts["python"]}, torch {facts["torch"]}, commit {facts["commit"]};
`uptime` at the end: `{facts["uptime"]}`. All figures: [{name}.json]({name}.json). Written by

    {facts["command"]}
"""
    return text


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wan", action="store_true", help="shapes of Wan2.1 480p in place of the quick start's")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="ours: threads, plain: processes")
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compute-ms", type=float, default=200.0)
    parser.add_argument("--no-plain", action="store_true", help="without the plain loader")
    parser.add_argument("--output", metavar="STEM", help="write STEM.json and STEM.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shapes, rows = WAN_480P if arguments.wan else SMALL, []
    for positions in (shapes["text_len"], 3 + shapes["text_len"] // 8):
        with tempfile.TemporaryDirectory() as folder:
            write_dataset(folder, shapes, num_samples=arguments.num_samples, positions=positions)
            for workers in arguments.workers:
                case = Case(folder, shapes, arguments.micro_batch_size, workers)
                rows.append({"positions": positions, **measure(case, arguments)})
                print(rows[-1], flush=True)
    print(table(rows, arguments))
    print(f"peak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")
    if arguments.output:
        facts = provenance()
        Path(f"{arguments.output}.json").write_text(json.dumps({"provenance": facts, "rows": rows}, indent=1) + "\n")
        Path(f"{arguments.output}.md").write_text(document(rows, facts, shapes, arguments))


if __name__ == "__main__":
    main()
