"""Methods trained side by side, each looked at after equal updates of the student and after equal cost."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rcm_megatron.diffusion import samplers, trigflow
from tools.evidence.mixture import Mixture, distances
from tools.evidence.students import Network, Student, pretrained

STEPS = (1, 2, 4)
SAMPLES = 4096
Rows = list[dict[str, float]]
"""What `distances` says of each seed's samples."""


@dataclass(frozen=True)
class Method:
    """Losses with their weights, one after the other for a share of the updates."""

    name: str
    stages: tuple[tuple[float, Mapping[str, float]], ...]

    @staticmethod
    def of(name: str, **losses: float) -> "Method":
        return Method(name, ((1.0, losses),))


SWEEP = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Weights of DMD beside sCM's 1."""
RCM = 0.1
METHODS = (
    Method.of("sCM", scm=1.0),
    Method.of("dCM", dcm=1.0),
    Method.of("DMD", dmd=1.0),
    *(Method.of(f"rCM {weight:g}", scm=1.0, dmd=weight) for weight in SWEEP),
    Method("dCM, sCM, DMD", ((1 / 3, {"dcm": 1.0}), (1 / 3, {"scm": 1.0}), (1 / 3, {"dmd": 1.0}))),
    Method("dCM, sCM, rCM", ((1 / 3, {"dcm": 1.0}), (1 / 3, {"scm": 1.0}), (1 / 3, {"scm": 1.0, "dmd": RCM}))),
)


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    seeds: int = 5
    batch: int = 256
    pretraining: int = 6000
    updates: int = 3000


@dataclass(frozen=True)
class Outcome:
    """One method at one moment."""

    updates: int
    cost: float
    rows: Mapping[int, Rows]
    """Steps of the sampler -> one row a seed."""
    first_seed_N2: Tensor
    """Its samples of one step, for the picture."""


def run(
    method: Method, start: Network, mixture: Mixture, sizes: Sizes, *, budget: float, say: Callable[[str], None]
) -> dict[str, Outcome]:
    """Train until both moments have come: `updates`, after equal updates, and `cost`, after equal cost."""
    began, found = time.perf_counter(), {}
    lengths = [share * sizes.updates for share, _ in method.stages]
    student = Student(
        dict(method.stages[0][1]),
        copy.deepcopy(start),
        copy.deepcopy(start),
        mixture,
        sizes.seeds,
        sizes.batch,
        _fresh(),
    )
    steps, stage = student.train(), 0
    while len(found) < 2:
        if stage + 1 < len(method.stages) and student.updates >= sum(lengths[: stage + 1]):
            stage += 1
            student = student.with_losses(dict(method.stages[stage][1]))
            steps = student.train()
        next(steps)
        if "updates" not in found and student.updates >= sizes.updates:
            found["updates"] = look_at(student, mixture)
        if "cost" not in found and student.cost >= budget:
            found["cost"] = look_at(student, mixture)
    say(f"{method.name}: {student.updates} updates, {time.perf_counter() - began:.0f} s")
    return found


def look_at(student: Student, mixture: Mixture) -> Outcome:
    samples = {steps: student.samples(steps, SAMPLES) for steps in STEPS}
    rows = {steps: [distances(mixture, x_N2) for x_N2 in x_KN2] for steps, x_KN2 in samples.items()}
    return Outcome(student.updates, student.cost, rows, samples[1][0])


def of_teacher(network: Network, mixture: Mixture, *, steps: int, exact: bool) -> Rows:
    """Euler's method on the exact velocity, or on the network that has learned it."""
    seeds = network.weights[0].shape[0]
    noise = torch.randn(seeds, SAMPLES, 2, generator=_fresh(), dtype=torch.float64)

    def velocity(x: Tensor, s: float) -> Tensor:
        if not exact:
            return network(x.float(), torch.full((*x.shape[:-1], 1), 1000 * s))
        t = trigflow.to_trigflow(torch.full((*x.shape[:-1], 1), s, dtype=torch.float64))
        return mixture.velocity(x * (torch.cos(t) + torch.sin(t)), t)

    return [distances(mixture, x) for x in samplers.euler_sample(velocity, noise, steps=steps, shift=1.0)]


def study(methods: Sequence[Method], sizes: Sizes, *, say: Callable[[str], None]) -> dict[str, dict[str, Outcome]]:
    """Method -> moment -> outcome; and under `teacher` what the start and the truth give. All begin at one network a seed."""
    mixture = Mixture.unequal()
    start = pretrained(mixture, seeds=sizes.seeds, batch=sizes.batch, updates=sizes.pretraining)
    say("the network of the teacher's velocity is trained")
    probe = Student(
        {"dmd": 1.0}, copy.deepcopy(start), copy.deepcopy(start), mixture, sizes.seeds, sizes.batch, _fresh()
    )
    steps = probe.train()
    for _ in range(4):
        next(steps)
    # every four updates cost the same
    budget = probe.cost / 4 * sizes.updates
    found = {method.name: run(method, start, mixture, sizes, budget=budget, say=say) for method in methods}
    exact = {steps: of_teacher(start, mixture, steps=steps, exact=True) for steps in (50, 4)}
    learned = {steps: of_teacher(start, mixture, steps=steps, exact=False) for steps in (50, 4)}
    nothing = torch.empty(0, 2)
    teachers = {"exact": Outcome(0, 0.0, exact, nothing), "learned": Outcome(0, 0.0, learned, nothing)}
    return {"teacher": teachers, **found}


def _fresh() -> torch.Generator:
    return torch.Generator().manual_seed(7)
