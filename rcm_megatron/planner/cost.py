"""Seconds of a step from what a rank computes and sends, a table of hardware, and rules of what hides behind what.

The rules, all of them assumptions: messages of tensor parallelism and Ulysses wait for nobody and everybody waits for them; a hop of the
ring hides behind the attention of its block; gradients travel behind half of the last micro-batch's backward; stages idle while a
pipeline fills and drains, once for each pass; kernels take no less than the host needs to launch them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

from rcm_megatron.config import RunConfig, StageConfig
from rcm_megatron.objectives.plan import Step, plan_step
from rcm_megatron.planner.hardware import Hardware
from rcm_megatron.planner.shapes import Inventories, Shapes
from rcm_megatron.planner.work import (
    ATTENTION,
    ATTENTION_BACKWARD,
    ATTENTION_JVP,
    LINEAR,
    Kind,
    StageWork,
    Work,
    gathers_of,
    passes_of,
)
from rcm_megatron.training.flops import network_flops, step_flops

EFFICIENCY = {
    LINEAR: "linear",
    ATTENTION: "attention",
    ATTENTION_BACKWARD: "attention_backward",
    ATTENTION_JVP: "attention_jvp",
}
"""Operation -> its field of `Efficiency`."""
Passes = Sequence[tuple[str, Kind, int]]
"""(Role, kind of pass, how often a sample goes through it)."""
PassSeconds = Callable[[str, Kind], tuple[Mapping[str, float], float]]
"""(Role, kind of pass) -> seconds of it for all samples of an update, by what takes them, and all of them but those of launches."""
HIDDEN_BACKWARD = 0.5
"""Share of the last micro-batch's backward behind which gradients travel; of every one's, where the network is in pieces."""


@dataclass(frozen=True)
class Cost:
    """Of a configuration on a number of GPUs."""

    seconds: Mapping[str, float]
    """Of a mean iteration, by what takes them."""
    useful_flops: float
    """Of a mean iteration, all GPUs together: what MFU counts."""
    hours: float
    """Of all stages of the run."""

    @property
    def step(self) -> float:
        return sum(self.seconds.values())

    def mfu(self, hardware: Hardware, world_size: int) -> float:
        return self.useful_flops / (self.step * world_size * hardware.peak_tflops * 1e12)


@dataclass(frozen=True)
class Schedule:
    """What a run's iterations are, on whatever layout."""

    steps: Sequence[tuple[float, Step, Passes]]
    """(Share of the iterations, step, what it executes) of each kind."""
    useful_flops: float
    """Of a mean iteration, all GPUs together."""
    iterations: int

    @staticmethod
    def of(run: RunConfig) -> Schedule:
        networks = {role: network_flops(run.model_of(role), run.latent) for role in run.roles}
        steps, given = _weighted_steps(run), {"distillation": run.distillation, "objectives": run.objectives}
        useful = sum(share * step_flops(networks, step, **given) for share, step in steps)
        known = [(share, step, tuple(passes_of(run, step))) for share, step in steps]
        return Schedule(known, useful * run.trainer.global_batch_size, run.total_steps)


def cost_of(shapes: Shapes, inventories: Inventories, hardware: Hardware, schedule: Schedule) -> Cost:
    """Of the whole run, as a mean over its iterations."""
    total: Counter[str] = Counter()
    works = [StageWork(shapes, inventories, stage=stage) for stage in _slowest(shapes)]
    stages = [(work, _passes_on(work, hardware)) for work in works]
    for share, step, passes in schedule.steps:
        each = [_on_stage(work, step, passes, one_pass, hardware) for work, one_pass in stages]
        for name, seconds in max(each, key=lambda seconds: sum(seconds.values())).items():
            total[name] += share * seconds
    hours = schedule.iterations * sum(total.values()) / 3600
    return Cost(seconds=dict(total), useful_flops=schedule.useful_flops, hours=hours)


def _slowest(shapes: Shapes) -> list[int]:
    """Pipeline stages of which one takes the longest."""
    stages = range(shapes.parallel.pp)
    blocks = [sum(shapes.blocks(role, stage) for role in shapes.run.roles) for stage in stages]
    return sorted({0, stages[-1], max(stages, key=blocks.__getitem__)})


def _weighted_steps(run: RunConfig) -> list[tuple[float, Step]]:
    """(Share of the run's iterations, step) of each kind of iteration."""
    found: Counter[tuple] = Counter()
    steps: dict[tuple, Step] = {}
    for stage in run.stages:
        for share, step in _of_stage(run, stage):
            key = step.trained, step.objectives, step.rollout_steps, step.side
            found[key] += share * Fraction(stage.steps, run.total_steps)
            steps[key] = step
    return [(float(share), steps[key]) for key, share in found.items()]


def _of_stage(run: RunConfig, stage: StageConfig) -> Iterator[tuple[Fraction, Step]]:
    rollouts, sides = run.distillation.max_rollout_steps, run.sides

    def step(iteration: int) -> Step:
        return plan_step(stage, iteration, max_rollout_steps=rollouts, sides=sides)

    warmup = min(stage.tangent_warmup, stage.steps)
    if warmup:
        yield Fraction(warmup, stage.steps), step(0)
    if left := stage.steps - warmup:
        period = min(left, stage.student_update_freq * rollouts * 2)
        for iteration in range(warmup, warmup + period):
            yield Fraction(left, stage.steps * period), step(iteration)


def _passes_on(work: StageWork, hardware: Hardware) -> PassSeconds:
    """Each kind of pass is worked out once, for its seconds are proportional to how often it is made."""

    @cache
    def one_pass(role: str, kind: Kind) -> tuple[Mapping[str, float], float]:
        done = work.all_samples(role, kind)
        own = _pass_seconds(work.shapes, done, hardware)
        busy = sum(own.values())
        own["launches"] = max(0.0, done.launches * hardware.launch_us * 1e-6 - busy)
        return own, busy

    return one_pass


def _on_stage(
    work: StageWork, step: Step, passes: Passes, one_pass: PassSeconds, hardware: Hardware
) -> dict[str, float]:
    """Seconds of one update, by what takes them."""
    shapes = work.shapes
    seconds: Counter[str] = Counter()
    backward = gathered = 0.0
    fill = (shapes.parallel.pp - 1) / (shapes.micro_batches * shapes.parallel.vpp)
    for role, kind, times in passes:
        own, busy = one_pass(role, kind)
        for name, value in own.items():
            seconds[name] += times * value
        seconds["pipeline fills and drains"] += times * (busy + own["launches"]) * fill
        if "backward" in kind:
            backward += times * busy / shapes.micro_batches
        if shapes.is_gathered(role):
            gathered += times * busy
    reduce = _link_seconds(shapes, work.once(step), hardware)
    hidden = min(reduce.get("dp_cp", 0.0) / 2, HIDDEN_BACKWARD * backward)
    if shapes.in_pieces(step.trained):
        hidden = min(reduce.get("dp_cp", 0.0), HIDDEN_BACKWARD * backward * shapes.micro_batches)
    gathering = reduce.pop("weights", 0.0) + _from_host_seconds(work, step, hardware)
    seconds["sharded weights"] += max(0.0, gathering - gathered)
    seconds["gradients and weights"] += max(0.0, sum(reduce.values()) - hidden)
    seconds["optimizer and offload"] += _optimizer_seconds(work, step, hardware)
    return dict(seconds)


def _pass_seconds(shapes: Shapes, work: Work, hardware: Hardware) -> Counter[str]:
    seconds: Counter[str] = Counter()
    for operation, flops in work.flops.items():
        share = getattr(hardware.efficiency, EFFICIENCY[operation])
        seconds[operation] += flops / (hardware.peak_tflops * 1e12 * share)
    seconds["norms and gates"] += work.touched / (hardware.memory_gbs * 1e9 * hardware.efficiency.memory)
    links = _link_seconds(shapes, work, hardware)
    attention = sum(seconds[name] for name in (ATTENTION, ATTENTION_BACKWARD, ATTENTION_JVP))
    seconds["tensor parallel"] += links.get("tp", 0.0)
    seconds["context parallel"] += links.get("ulysses", 0.0) + max(0.0, links.get("ring", 0.0) - attention)
    seconds["stages"] += 0.0 if shapes.parallel.vpp > 1 else links.get("pp", 0.0)
    return seconds


def _link_seconds(shapes: Shapes, work: Work, hardware: Hardware) -> dict[str, float]:
    found = {}
    for group, size in work.sent.items():
        inside = is_inside(shapes, group, hardware.gpus_per_node)
        rate = hardware.inside_gbs if inside else hardware.between_gbs
        latency = hardware.inside_latency_us if inside else hardware.between_latency_us
        found[group] = size / (rate * 1e9 * hardware.efficiency.links) + work.calls[group] * latency * 1e-6
    return found


def is_inside(shapes: Shapes, group: str, gpus_per_node: int) -> bool:
    """Whether the ranks of a group are in one node: tp lies innermost, then Ulysses, ring, dp, pp."""
    parallel = shapes.parallel
    reach = {
        "tp": parallel.tp,
        "ulysses": parallel.tp * parallel.ulysses,
        "ring": parallel.tp * parallel.cp,
        "dp_cp": shapes.world_size // parallel.pp,
        "weights": shapes.world_size // parallel.pp,
        "pp": shapes.world_size,
    }[group]
    return reach <= gpus_per_node


def _from_host_seconds(work: StageWork, step: Step, hardware: Hardware) -> float:
    """The way of offloaded weights, each rank its part."""
    shapes, run = work.shapes, work.shapes.run
    offloaded = [role for role in shapes.frozen_roles if run.networks[role].weights == "offloaded"]
    size = sum(work.held[role].bytes * gathers_of(shapes, role, step) for role in offloaded)
    return size / shapes.shards / (hardware.host_gbs * 1e9)


def _optimizer_seconds(work: StageWork, step: Step, hardware: Hardware) -> float:
    """Adam reads and writes 28 bytes an element of this rank's part, gradients are zeroed; what is offloaded comes and goes."""
    shapes, held = work.shapes, work.held[step.trained]
    memory = hardware.memory_gbs * 1e9 * hardware.efficiency.memory
    zeroed = held.elements // (shapes.shards if shapes.in_pieces(step.trained) else 1)
    seconds = (28 * held.elements / shapes.shards + 4 * zeroed) / memory
    if shapes.run.networks[step.trained].offload_optimizer:
        seconds += (
            2 * held.optimizer_bytes(shapes.run.networks[step.trained]) / shapes.shards / (hardware.host_gbs * 1e9)
        )
    return seconds
