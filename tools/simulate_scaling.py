"""Wan2.1 14B on 8 to 1,024 GPUs by the planner's formulas: docs/scaling_simulated.md and its picture. Nothing is measured.

python tools/simulate_scaling.py [--gpu h100-80g] [--output docs/scaling_simulated]
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rcm_megatron.config import ParallelConfig, RunConfig, load_config  # noqa: E402
from rcm_megatron.planner.command import inventories_of  # noqa: E402
from rcm_megatron.planner.hardware import Hardware, hardware_of  # noqa: E402
from rcm_megatron.planner.memory import GIB  # noqa: E402
from rcm_megatron.planner.report import policies_text  # noqa: E402
from rcm_megatron.planner.search import Option, search  # noqa: E402
from rcm_megatron.planner.shapes import Inventories  # noqa: E402
from tools.measuring import provenance  # noqa: E402

WORLDS = (8, 16, 32, 64, 128, 256, 512, 1024)
WAITS = {
    "tensor parallel": "tensor parallelism's messages",
    "context parallel": "context parallelism's messages",
    "stages": "messages between stages",
    "pipeline fills and drains": "stages that wait",
    "launches": "launches",
    "sharded weights": "gathering weights",
    "gradients and weights": "reducing gradients",
    "optimizer and offload": "optimizer and offload",
}
"""Of `Cost.seconds` what is neither a matrix product nor a norm or gate -> what a table calls it."""
VIDEOS = ((480, 5), (480, 10), (480, 20), (720, 5), (720, 10), (720, 20))
SIZES = {480: (60, 104), 720: (90, 160)}
"""Rows of pixels -> (height, width) of the latent."""


class Planner:
    """Options of one configuration on one kind of hardware."""

    def __init__(self, run: RunConfig, inventories: Inventories, hardware: Hardware) -> None:
        self.run, self.inventories, self.hardware = run, inventories, hardware

    def fastest(self, world: int) -> Option | None:
        fitting = search(self.run, world, self.inventories, self.hardware).fitting
        return fitting[0] if fitting else None

    def among(self, world: int, allowed: Callable[[ParallelConfig], bool]) -> Option:
        """The fastest of some layouts that fits, else the emptiest."""
        found = search(self.run, world, self.inventories, self.hardware, allowed=allowed)
        return (found.fitting or found.refused)[0]

    def with_video(self, rows: int, seconds: int) -> "Planner":
        height, width = SIZES[rows]
        latent = replace(self.run.latent, frames=4 * seconds + 1, height=height, width=width)
        return Planner(replace(self.run, latent=latent), self.inventories, self.hardware)


def layout_text(option: Option, world: int) -> str:
    parallel = option.run.parallel
    degrees = {name: getattr(parallel, name) for name in ("tp", "ulysses", "ring", "pp", "vpp")}
    degrees["dp"] = parallel.dp(world)
    return " ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1) or "one GPU"


def cells(option: Option, world: int, hardware: Hardware) -> list[str]:
    """Layout, policies, peak, seconds, MFU, and what waits most."""
    peak = f"{option.peak.total / GIB:.1f}"
    given = [layout_text(option, world), policies_text(vars(option.policies)), peak]
    if option.cost is None:
        return [*given, "does not fit", "", ""]
    waits = {name: option.cost.seconds.get(name, 0.0) for name in WAITS}
    most = max(waits, key=waits.__getitem__)
    share = sum(waits.values()) / option.cost.step
    bound = f"{100 * share:.0f} %, most of it {WAITS[most]}" if share > 0.01 else ""
    return [*given, f"{option.cost.step:.2f}", f"{100 * option.cost.mfu(hardware, world):.0f} %", bound]


def strong(planner: Planner) -> Iterator[list[str]]:
    base = None
    for world in WORLDS:
        option = planner.fastest(world)
        if option is None:
            continue
        base = base or (world, option.cost.step)
        speed_up = base[1] / option.cost.step
        efficiency = 100 * speed_up * base[0] / world
        row = cells(option, world, planner.hardware)
        yield [str(world), *row[:4], f"{speed_up:.1f}", f"{efficiency:.0f} %", *row[4:]]


def videos(planner: Planner, world: int) -> Iterator[list[str]]:
    for rows, seconds in VIDEOS:
        own = planner.with_video(rows, seconds)
        tokens = own.run.latent.num_tokens(own.run.model.patch_size)
        option = own.fastest(world)
        if option is None:
            yield [f"{rows}p {seconds} s", f"{tokens:,}", "nothing fits", *[""] * 6]
            continue
        attention = sum(value for name, value in option.cost.seconds.items() if name.startswith("attention"))
        row = cells(option, world, planner.hardware)
        hours = f"{option.cost.hours * world / 1000:.0f} k"
        share = f"{100 * attention / option.cost.step:.0f} %"
        yield [f"{rows}p {seconds} s", f"{tokens:,}", *row[:4], hours, share, row[5]]


def context(planner: Planner, world: int, degree: int) -> Iterator[list[str]]:
    ways: Sequence[tuple[str, int, int]] = [
        (f"ulysses {ulysses} ring {degree // ulysses}", ulysses, degree // ulysses)
        for ulysses in (1, 2, 4, 8)
        if degree % ulysses == 0
    ]
    for name, ulysses, ring in ways:
        option = planner.among(world, lambda p, u=ulysses, r=ring: (p.ulysses, p.ring, p.tp) == (u, r, 1))
        yield [name, *cells(option, world, planner.hardware)]


KINDS: dict[str, Callable[[ParallelConfig], bool]] = {
    "no cp, no pp": lambda p: p.pp == 1 and p.cp == 1,
    "tp and cp, no pp": lambda p: p.pp == 1 and p.tp > 1 and p.cp > 1,
    "cp and pp, no tp": lambda p: p.tp == 1 and p.pp > 1,
    "tp, cp and pp": lambda p: min(p.tp, p.cp, p.pp) > 1,
    "cp or dp alone": lambda p: p.tp == p.pp == 1,
}
"""What a layout is made of."""


def kinds(planner: Planner, world: int) -> Iterator[list[str]]:
    for name, allowed in KINDS.items():
        yield [name, *cells(planner.among(world, allowed), world, planner.hardware)]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(rows: Sequence[Sequence[str]], path: Path) -> None:
    """Seconds against GPUs, beside a straight line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    worlds, seconds = [int(row[0]) for row in rows], [float(row[4]) for row in rows]
    figure, panel = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    panel.loglog(worlds, seconds, "o-", color="#1f4e79", label="the fastest layout that fits")
    panel.loglog(worlds, [seconds[0] * worlds[0] / world for world in worlds], ":", color="gray", label="no waits")
    for world, second, row in zip(worlds, seconds, rows, strict=True):
        panel.annotate(row[1], (world, second), textcoords="offset points", xytext=(4, 6), fontsize=7)
    panel.set_xticks(worlds, [str(world) for world in worlds])
    panel.set(xlabel="GPUs", ylabel="seconds of a mean iteration", title="Wan2.1 14B at 480p, 64 samples, simulated")
    panel.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


DOCUMENT = """# Scaling, simulated

**Nothing here is measured.** It is what the planner's formulas ([plan.md](plan.md)) say of {name} on {gpu}: seconds rest on assumed
shares of the peak, memory on counts that dry runs confirm. What was measured, on CPUs, is in [scaling.md](scaling.md). Written by

    {command}

{versions}. {batch} samples an update, one student update in {period} iterations, rollouts of one to {rollout} steps, both branches of
the guidance; a mean iteration.
*Waits*: the share of a step that is neither matrix products nor norms and gates.

## One batch on more and more GPUs, 480p

{strong}

![seconds against GPUs](scaling_simulated.png)

## Longer and larger videos on {videos_world} GPUs

16 frames a second. *Hours*: GPU-hours of {iterations:,} iterations.

{videos}

## Ring, Ulysses, and both: context parallelism of {degree} on {context_world} GPUs, 480p

No tensor parallelism; the fastest of what else fits around it.

{context}

## What a layout is made of, {kinds_world} GPUs, 480p

The fastest of each kind that fits, or the one that is the least too large.

{kinds}
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="h100-80g", help="as for rcm plan")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "scaling_simulated", help="without suffix")
    return parser.parse_args()


def main() -> None:
    args = parse()
    run = load_config("wan2.1-t2v-14b")
    hardware = hardware_of(args.gpu)
    planner = Planner(run, inventories_of(run), hardware)
    heads = ["layout", "policies", "peak GiB", "s", "MFU", "waits"]
    rows = list(strong(planner))
    source: dict[str, Any] = provenance()
    text = DOCUMENT.format(
        name=run.name,
        gpu=hardware.name,
        command=source["command"],
        versions=f"commit {source['commit']}{' with changes' if source['uncommitted_changes'] else ''}",
        batch=run.trainer.global_batch_size,
        period=run.stages[0].student_update_freq,
        rollout=run.distillation.max_rollout_steps,
        iterations=run.total_steps,
        strong=table(["GPUs", *heads[:4], "speed-up", "efficiency", *heads[4:]], rows),
        videos=table(["video", "tokens", *heads[:4], "hours", "attention", "waits"], list(videos(planner, 64))),
        videos_world=64,
        context=table(["", *heads], list(context(planner, 64, 8))),
        context_world=64,
        degree=8,
        kinds=table(["", *heads], list(kinds(planner, 64))),
        kinds_world=64,
    )
    args.output.with_suffix(".md").write_text(text)
    draw(rows, args.output.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
