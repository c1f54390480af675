"""How much of a ring's hops hides behind compute, on ONE GPU: device copies stand in for the messages between ranks.

    python tools/trace_ring_overlap.py --output runs/overlap                  # 4 blocks of 8,190 tokens, Wan2.1-14B's heads
    python tools/trace_ring_overlap.py --trace runs/overlap/ring_dual.json    # the arithmetic again, on any machine

Runs rcm_megatron.parallel.ring itself, with a copy for `Ring.exchange`: the same stream, events and buffers as between ranks. Each
pass (dual, forward, backward) is recorded with torch's profiler as Chrome JSON (for ui.perfetto.dev). The share that hides is the time in
which a copy and a kernel of the compute stream run together, over the time of all copies. A copy on the device is faster than a link:
`--times N` copies N times a hop. (By data sheets an H100 copies 1.7 TB/s and sends 0.45 TB/s over NVLink: N = 4.)

It shows that nothing in the program keeps hops and compute apart. It says nothing of NCCL, whose kernels take SMs and whose links are
shared: that stays unmeasured until it runs on several GPUs.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from rcm_kernels.benchmark import environment, milliseconds  # noqa: E402
from rcm_megatron.parallel.ring import Ring, ring_attention_jvp, ring_backward, ring_forward  # noqa: E402

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
Interval = tuple[float, float]


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points in time as disjoint intervals in order."""
    union: list[Interval] = []
    for begin, end in sorted(intervals):
        if union and begin <= union[-1][1]:
            union[-1] = (union[-1][0], max(end, union[-1][1]))
        else:
            union.append((begin, end))
    return union


def duration(intervals: Iterable[Interval]) -> float:
    return sum(end - begin for begin, end in merged(intervals))


def common(first: Iterable[Interval], second: Iterable[Interval]) -> float:
    """Time in which an interval of both sets runs."""
    first, second = merged(first), merged(second)
    return duration(first) + duration(second) - duration([*first, *second])


def overlap(events: Sequence[dict]) -> dict[str, float]:
    """Milliseconds of copies and compute in a Chrome trace, of both at once, and the share of the copies that hides.

    The stream with the most kernel time is the compute's; whatever runs on another one belongs to a hop. ValueError without a hop.
    """
    streams: dict[object, list[Interval]] = defaultdict(list)
    kernel_time: dict[object, float] = defaultdict(float)
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in ON_DEVICE:
            stream = event["args"]["stream"]
            streams[stream].append((event["ts"], event["ts"] + event["dur"]))
            kernel_time[stream] += event["dur"] if event["cat"] == "kernel" else 0.0
    if len(streams) < 2:
        raise ValueError(
            f"got device work on {len(streams)} streams in this trace; need two, compute and hops; fix: record a ring of 2 or more "
            "blocks on a CUDA device"
        )
    compute_stream = max(streams, key=lambda stream: kernel_time[stream])
    compute = streams.pop(compute_stream)
    copies = [interval for found in streams.values() for interval in found]
    copying, both = duration(copies), common(copies, compute)
    return {
        "copy_ms": copying / 1e3,
        "compute_ms": duration(compute) / 1e3,
        "both_ms": both / 1e3,
        "hidden_share": both / copying,
    }


def copy_hop(times: int, send: torch.Tensor, receive: torch.Tensor) -> tuple[()]:
    """Stands in for a message: what leaves arrives here again."""
    for _ in range(times):
        receive.copy_(send)
    return ()


def no_hop(send: torch.Tensor, receive: torch.Tensor) -> tuple[()]:
    """For the time of the compute alone. The numbers are wrong then."""
    return ()


def passes(args: argparse.Namespace, ring: Ring, device: str) -> dict[str, Callable[[], object]]:
    """The three passes of a training step through the ring, by name."""
    shape = (args.tokens, 1, args.heads, args.head_dim)
    q, k, v, tq, tk, tv, do = (torch.randn(shape, device=device).to(torch.bfloat16) for _ in range(7))
    valid = ring.size * args.tokens
    o, lse = ring_forward(ring, q, k, v, valid)
    return {
        "dual": functools.partial(ring_attention_jvp, ring, q, k, v, tq, tk, tv, valid),
        "forward": functools.partial(ring_forward, ring, q, k, v, valid),
        "backward": functools.partial(ring_backward, ring, do, q, k, v, o, lse, valid),
    }


def record(run: Callable[[], object], path: Path, *, repeats: int) -> None:
    """Write a Chrome trace of `repeats` runs, after two that warm up."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    recorded.export_chrome_trace(str(path))


@torch.no_grad()
def measure(args: argparse.Namespace) -> list[dict]:
    """One row per pass; traces go to the output folder."""
    copying = Ring(0, args.blocks, functools.partial(copy_hop, args.times))
    with_hops, without = passes(args, copying, "cuda"), passes(args, Ring(0, args.blocks, no_hop), "cuda")
    shape = {name: vars(args)[name] for name in ("blocks", "tokens", "heads", "head_dim", "times")}
    rows = []
    for name, run in with_hops.items():
        path = args.output / f"ring_{name}.json"
        record(run, path, repeats=args.repeats)
        times = {"ms": milliseconds(run, args.repeats), "ms_without_hops": milliseconds(without[name], args.repeats)}
        rows.append({"pass": name} | overlap(read_events(path)) | times | shape | environment())
        print(
            describe(rows[-1]) + f"; {times['ms']:.3f} ms, {times['ms_without_hops']:.3f} ms without hops", flush=True
        )
    return rows


def read_events(path: Path) -> list[dict]:
    return json.loads(path.read_text())["traceEvents"]


def describe(row: dict) -> str:
    return (
        f"{row['pass']:9s} copies {row['copy_ms']:8.3f} ms, compute {row['compute_ms']:8.3f} ms, both at once {row['both_ms']:8.3f} ms: "
        f"{100 * row['hidden_share']:5.1f} % of the copies hide"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="a Chrome trace to read instead of recording one")
    parser.add_argument("--blocks", type=int, default=4, help="ranks of the ring that is stood for; default: 4")
    parser.add_argument("--tokens", type=int, default=8190, help="of one block; default: 480p over 4 ranks")
    parser.add_argument("--heads", type=int, default=40)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--times", type=int, default=1, help="how often each hop is copied, to last as long as a link")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/overlap"), help="folder of traces and overlap.csv")
    args = parser.parse_args(argv)
    if args.trace:
        print(describe({"pass": args.trace.stem} | overlap(read_events(args.trace))))
        return
    if args.blocks < 2 or args.times < 1 or args.repeats < 1:
        parser.error(
            f"got --blocks {args.blocks} --times {args.times} --repeats {args.repeats}; need at least 2, 1 and 1"
        )
    if not torch.cuda.is_available():
        sys.exit("got no CUDA device; need one to record a trace; fix: run this on a GPU, or read a trace with --trace")
    args.output.mkdir(parents=True, exist_ok=True)
    rows = measure(args)
    with (args.output / "overlap.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
