"""What a dry run says: the numbers of each rank by kind, phase, group and link, as plain data and as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from rcm_megatron.config import RunConfig
from rcm_megatron.dryrun.driver import SEPARATOR, Numbers
from rcm_megatron.requests import DryRunRequest

SITES = 8
"""Most places that are named of a peak."""
STANDING = ("weights", "gradients", "optimizer", "EMA", "buffers")
ASSUMPTIONS = {
    "gpu": (
        "a GPU of capability 9.0 with PyTorch and Triton alone: Megatron-Core's linears, PyTorch's flash attention, Triton's kernels",
        "bytes of tensors; the CUDA context, NCCL's buffers, DALI and the allocator's fragments come on top: some GiB",
        "every gradient is finite and no sample is masked",
    ),
    "cpu": ("the CPU's operations, as on Gloo", "bytes of tensors", "every gradient is finite and no sample is masked"),
}
GIB = 2**30


def report_of(run: RunConfig, request: DryRunRequest, found: list[Numbers]) -> dict[str, Any]:
    """The JSON; ``found``: what `simulate` said of each rank."""
    return {
        "simulated": True,
        "name": run.name,
        "layout": run.layout_summary(request.world_size),
        "world_size": request.world_size,
        "gpus_per_node": request.gpus_per_node,
        "device": request.device,
        "assumptions": list(ASSUMPTIONS[request.device]),
        "ranks": [_rank(numbers) for numbers in found],
    }


def _rank(numbers: Numbers) -> dict[str, Any]:
    return numbers | {"updates": {name: update_of(update) for name, update in numbers["updates"].items()}}


def update_of(numbers: Numbers) -> dict[str, Any]:
    """One update: sums over what `driver.measure` says of it, its peak and who holds it."""
    held = numbers["held"]
    peaks = {phase: sum(owners.values()) for phase, owners in held.items()}
    fullest = max(peaks, key=peaks.__getitem__)
    owners = Counter({tuple(owner.split(SEPARATOR)): size for owner, size in held[fullest].items()})
    passing = [(owner, size) for owner, size in owners.most_common() if not owner[0].startswith(STANDING[:-1])]
    sites = [{"kind": kind, "site": site, "bytes": size} for (kind, site), size in passing[:SITES] if size]
    traffic = [_route(route) | of for route, of in sorted(numbers["traffic"].items())]
    return {
        "peak": peaks[fullest],
        "peak_phase": fullest,
        "at_peak": by_kind(owners),
        "sites_at_peak": sites,
        "phase_peaks": peaks,
        "host_peak": numbers["host"]["peak"],
        "flops": numbers["flops"],
        "launches": numbers["launches"],
        "host_reads": numbers["host_reads"],
        "traffic": traffic,
    }


def by_kind(owners: Mapping[tuple[str, ...], int]) -> dict[str, int]:
    """Bytes of each kind, over all sites, the largest first."""
    total: Counter[str] = Counter()
    for (kind, *_), size in owners.items():
        total[kind] += size
    return {kind: size for kind, size in total.most_common() if size}


def _route(key: str) -> dict[str, Any]:
    phase, group, size, operation, link = key.split(SEPARATOR)
    return {"phase": phase, "group": group, "size": int(size), "operation": operation, "link": link}


# ---- text


def to_text(report: Mapping[str, Any]) -> str:
    """The report for a terminal."""
    lines = [line for rank in report["ranks"] for line in _rank_lines(rank)]
    lines += ["", "assumed:", *(f"  - {text}" for text in report["assumptions"])]
    return "\n".join(lines)


def _rank_lines(rank: Mapping[str, Any]) -> Iterator[str]:
    how = f"concluded from {rank['concluded_from']} shallower runs" if rank["concluded_from"] else "executed whole"
    yield ""
    yield f"rank {rank['rank']} (stage {rank['stage']}), {how}: {rank['seconds']:.0f} s, {rank['process_gib']:.2f} GiB of this machine"
    yield f"  between updates {_size(sum(rank['standing'].values()))}: {_parts(rank['standing'])}"
    for name, update in rank["updates"].items():
        yield f"  {name}"
        yield f"    peak {_size(update['peak'])}, in {update['peak_phase']}: {_parts(update['at_peak'])}"
        for place in update["sites_at_peak"]:
            yield f"      {_size(place['bytes']):>12}  {place['kind']:11}  {place['site']}"
        if update["host_peak"]:
            yield f"    host: at most {_size(update['host_peak'])} of tensors"
        yield from _phase_lines(update)
        yield from _traffic_lines(update)


def _phase_lines(update: Mapping[str, Any]) -> Iterator[str]:
    yield f"    {'phase':14}{'peak':>12}{'TFLOP':>12}{'launches':>10}{'host reads':>12}"
    phases = dict.fromkeys((*update["phase_peaks"], *update["flops"], *update["launches"]))
    for phase in phases:
        flops = sum(update["flops"].get(phase, {}).values()) / 1e12
        peak = update["phase_peaks"].get(phase)
        counts = f"{update['launches'].get(phase, 0):10d}{update['host_reads'].get(phase, 0):12d}"
        yield f"    {phase:14}{'' if peak is None else _size(peak):>12}{flops:12.4g}{counts}"
    total = sum(sum(of.values()) for of in update["flops"].values()) / 1e12
    yield f"    {'all':14}{_size(update['peak']):>12}{total:12.4g}{sum(update['launches'].values()):10d}"


def _traffic_lines(update: Mapping[str, Any]) -> Iterator[str]:
    """Over phases and operations summed up, but for what each group is."""
    total: dict[tuple[str, int, str, str], Counter[str]] = {}
    for route in update["traffic"]:
        if route["size"] > 1:
            key = route["group"], route["size"], route["link"], route["operation"]
            total.setdefault(key, Counter()).update({name: route[name] for name in ("calls", "message", "sent")})
    if total:
        yield f"    {'group':10}{'ranks':>6}  {'link':14}{'operation':36}{'calls':>8}{'messages':>13}{'sent':>13}"
    for (group, size, link, operation), of in sorted(total.items()):
        sizes = f"{_size(of['message']):>13}{_size(of['sent']):>13}"
        yield f"    {group:10}{size:6d}  {link:14}{operation:36}{of['calls']:8d}{sizes}"


def _parts(sizes: Mapping[str, int]) -> str:
    ordered = sorted(sizes.items(), key=lambda item: -item[1])
    return ", ".join(f"{kind} {_size(size)}" for kind, size in ordered if size)


def _size(number: int) -> str:
    """In GiB, MiB or kiB, three or more digits."""
    for unit, divisor in (("GiB", GIB), ("MiB", 2**20), ("kiB", 2**10)):
        if number >= divisor:
            return f"{number / divisor:.2f} {unit}"
    return f"{number} B"
