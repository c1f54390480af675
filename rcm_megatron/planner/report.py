"""What the planner says, as plain data and as text: the fastest options, why each is behind, why others are refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rcm_megatron.config import RunConfig
from rcm_megatron.planner.hardware import Hardware
from rcm_megatron.planner.memory import GIB
from rcm_megatron.planner.search import Option, Search

RULES = (
    "seconds: FLOPs over peak times the shares below; messages over their links; the host launches a kernel in launch_us",
    "nothing hides messages of tensor parallelism and Ulysses; a ring's hop hides behind attention; gradients behind half of a backward",
    "a pipeline is empty for (pp - 1) / (micro-batches * vpp) of each pass; data, logging and checkpoints take nothing",
    "bytes of tensors on the fullest rank: what stands is exact, what a pass holds is a formula fitted to dry runs (docs/plan.md)",
)
REFUSED = 3
"""Refused layouts that are listed."""


def report_of(
    run: RunConfig, world_size: int, hardware: Hardware, search: Search, *, own: Option | None, top: int
) -> dict[str, Any]:
    """The JSON. ``own``: the layout that the configuration has."""
    best = search.fitting[0] if search.fitting else None
    return {
        "simulated": True,
        "name": run.name,
        "gpus": world_size,
        "hardware": asdict(hardware),
        "usable_gib": hardware.usable_gib,
        "tokens": run.latent.num_tokens(run.model.patch_size),
        "global_batch_size": run.trainer.global_batch_size,
        "iterations": run.total_steps,
        "layouts": {"fitting": len(search.fitting), "refused": len(search.refused)},
        "options": [option_of(o, world_size, hardware, best) for o in search.fitting[:top]],
        "as_configured": None if own is None else option_of(own, world_size, hardware, best),
        "refused": [option_of(o, world_size, hardware, None) for o in search.refused[:REFUSED]],
        "rules": list(RULES),
    }


def option_of(option: Option, world_size: int, hardware: Hardware, best: Option | None) -> dict[str, Any]:
    """One of them."""
    parallel, cost = option.run.parallel, option.cost
    found: dict[str, Any] = {
        "layout": {name: getattr(parallel, name) for name in ("tp", "ulysses", "ring", "pp", "vpp")}
        | {"dp": parallel.dp(world_size)},
        "policies": asdict(option.policies),
        "overrides": overrides_of(option),
        "peak_gib": option.peak.total / GIB,
        "peak_phase": option.peak.phase,
        "peak_stage": option.peak.stage,
        "standing_gib": {name: size / GIB for name, size in option.peak.standing.items()},
        "working_gib": option.peak.working / GIB,
        "over_gib": max(0.0, option.peak.total / GIB - hardware.usable_gib),
    }
    if cost is not None:
        found |= {
            "seconds": dict(cost.seconds),
            "seconds_per_iteration": cost.step,
            "mfu": cost.mfu(hardware, world_size),
            "gpu_hours": cost.hours * world_size,
        }
        if best is not None and best.cost is not None and best is not option:
            found["behind"] = _differences(cost.seconds, best.cost.seconds)
    return found


def overrides_of(option: Option) -> list[str]:
    """What makes the configuration this option, on the command line."""
    run, parallel, policies = option.run, option.run.parallel, option.policies
    degrees = ", ".join(f"{name}: {getattr(parallel, name)}" for name in ("tp", "ring", "ulysses", "pp", "vpp"))
    found = [f"parallel={{{degrees}}}", f"memory.recompute={policies.recompute}"]
    found.append(f"memory.free_idle_gradients={str(policies.free_idle_gradients).lower()}")
    for role in run.roles:
        if role in run.trained_roles:
            found.append(f"networks.{role}.offload_optimizer={str(policies.offload_optimizer).lower()}")
            found.append(f"networks.{role}.weights={run.networks[role].weights}")
        else:
            found.append(f"networks.{role}.weights={policies.frozen_weights}")
    return found


def _differences(own: Mapping[str, float], best: Mapping[str, float]) -> dict[str, float]:
    """Seconds more than the best, by what takes them, the largest first."""
    found = {name: own.get(name, 0.0) - best.get(name, 0.0) for name in {**own, **best}}
    return dict(sorted(found.items(), key=lambda item: -abs(item[1])))


# ---- text


def to_text(report: Mapping[str, Any]) -> str:
    """The report for a terminal."""
    return "\n".join(_lines(report))


def _lines(report: Mapping[str, Any]) -> Iterator[str]:
    hardware, layouts = report["hardware"], report["layouts"]
    yield f"# simulated, nothing measured: {report['name']} on {report['gpus']} x {hardware['name']}"
    yield (
        f"{report['tokens']:,} tokens, {report['global_batch_size']} samples an update, {report['iterations']:,} iterations; "
        f"{layouts['fitting']} of {layouts['fitting'] + layouts['refused']} legal layouts fit {report['usable_gib']:.1f} GiB of a GPU"
    )
    if report["options"]:
        yield ""
        yield from _table(report["options"], report["as_configured"])
        yield from _reasons(report["options"])
    yield from _refusals(report)
    yield ""
    yield "assumed:"
    yield from (f"  - {rule}" for rule in report["rules"])
    yield f"  - {hardware['name']}: " + ", ".join(_assumptions(hardware))


def _table(options: Sequence[Mapping[str, Any]], own: Mapping[str, Any] | None) -> Iterator[str]:
    degrees = f"{'tp':>4}{'ulysses':>9}{'ring':>6}{'pp':>4}{'vpp':>5}{'dp':>5}"
    yield f"{'':3}{degrees}{'peak GiB':>10}{'s/iteration':>13}{'MFU':>7}{'GPU-hours':>11}  memory"
    for number, option in enumerate(options, start=1):
        yield _row(str(number), option)
    if own is not None:
        yield _row("as", option=own) + "   <- as configured"


def _row(name: str, option: Mapping[str, Any]) -> str:
    at = option["layout"]
    degrees = f"{at['tp']:4d}{at['ulysses']:9d}{at['ring']:6d}{at['pp']:4d}{at['vpp']:5d}{at['dp']:5d}"
    if "seconds" in option:
        price = f"{option['seconds_per_iteration']:13.1f}{100 * option['mfu']:6.1f}%{option['gpu_hours']:11,.0f}"
    else:
        price = f"{'does not fit':>13}{'':7}{'':11}"
    return f"{name:3}{degrees}{option['peak_gib']:10.1f}{price}  {policies_text(option['policies'])}"


def policies_text(policies: Mapping[str, Any]) -> str:
    """Memory policies in a few words."""
    words = [f"recompute {policies['recompute']}"]
    if policies["free_idle_gradients"]:
        words.append("idle gradients freed")
    if policies["frozen_weights"] != "resident":
        words.append(f"teacher {policies['frozen_weights']}")
    if policies["trained_weights"] != "resident":
        words.append(f"trained {policies['trained_weights']}")
    if policies["offload_optimizer"]:
        words.append("optimizer offloaded")
    return ", ".join(words)


def _reasons(options: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield ""
    best = options[0]
    taken = ", ".join(f"{name} {seconds:.2f}" for name, seconds in _largest(best["seconds"]))
    yield f"1 takes, s: {taken}"
    holds = _largest(best["standing_gib"] | {best["peak_phase"]: best["working_gib"]}, 99)
    yield f"1 holds, GiB: {', '.join(f'{name} {size:.1f}' for name, size in holds)}"
    for number, option in enumerate(options[1:], start=2):
        more = ", ".join(f"{name} {seconds:+.2f}" for name, seconds in _largest(option["behind"]))
        slower = option["seconds_per_iteration"] - best["seconds_per_iteration"]
        yield f"{number} is {slower:.2f} s behind: {more}"


def _largest(values: Mapping[str, float], count: int = 5) -> list[tuple[str, float]]:
    """Those that show, the largest first."""
    shown = [(name, value) for name, value in values.items() if abs(value) >= 0.005]
    return sorted(shown, key=lambda item: -abs(item[1]))[:count]


def _refusals(report: Mapping[str, Any]) -> Iterator[str]:
    if not report["refused"]:
        return
    yield ""
    yield "refused, the emptiest first, each with all that saves memory:"
    for option in report["refused"]:
        at = " ".join(f"{name}={degree}" for name, degree in option["layout"].items() if name != "dp")
        parts = option["standing_gib"] | {option["peak_phase"]: option["working_gib"]}
        holds = ", ".join(f"{name} {size:.1f}" for name, size in _largest(parts, 4))
        yield f"  {at}: {option['peak_gib']:.1f} GiB, {option['over_gib']:.1f} too many ({holds}, …)"
    yield "  such a layout fits with more of any degree: tp and pp cut all of it, dp and cp what is sharded"


def _assumptions(hardware: Mapping[str, Any]) -> Iterator[str]:
    for name, value in hardware.items():
        if isinstance(value, Mapping):
            yield from (f"{inner} {share:g}" for inner, share in value.items())
        elif name != "name":
            yield f"{name} {value:g}"
