"""The points of a scaling benchmark: layouts as text, the run that each of them times, and why one cannot. Imports no torch."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rcm_megatron.config import (
    ConfigError,
    ParallelConfig,
    RunConfig,
    StageConfig,
    as_dict,
    build,
    validate,
)
from rcm_megatron.registries import OBJECTIVES

if TYPE_CHECKING:
    from rcm_megatron.objectives.plan import Step

DEGREES = ("dp", "tp", "ring", "ulysses", "pp", "vpp")

SERIES = {
    "strong": "the same global batch and tokens on every layout",
    "weak_tokens": "tokens (frames) grow with the ranks, the global batch stays",
    "weak_batch": "the global batch grows with the ranks, tokens stay",
}

RECIPES = {"student": {"scm": 100.0, "dmd": 1.0}}
"""Name of a timed step of several objectives -> their weights. ``student`` is the student step of rCM."""
STEPS = (*RECIPES, *OBJECTIVES)
"""The timed steps: recipes, and every objective alone."""


def _preset(model: dict[str, Any], latent: dict[str, int], batch: int) -> dict[str, Any]:
    adam = {"lr": 1e-4, "betas": [0.0, 0.999], "lr_warmup_steps": 1}
    return {
        "name": "scaling",
        "output_dir": "unused",
        "model": {"family": "wan", "patch_size": [1, 2, 2], "text_dim": 64, "text_len": 16}
        | {"in_channels": 16, "out_channels": 16}
        | model,
        "latent": {"channels": 16} | latent,
        "precision": {"params_dtype": "fp32"},
        "networks": {
            "teacher": {"init": "random weights"},
            "student": {"optimizer": adam, "ema": {}},
            "fake_score": {"optimizer": adam},
        },
        "distillation": {
            "teacher_guidance": 5.0,
            "p_g": {"kind": "lognormal", "mean": 0.7, "std": 1.6},
            "p_d": {"kind": "uniform_shift", "shift": 5.0},
        },
        "stages": [],
        "encoders": {"video": "none", "text": "words"},
        "data": {"folder": "random data"},
        "trainer": {"global_batch_size": batch, "micro_batch_size": 1, "checkpoint_every": 1},
    }


PRESETS = {
    "tiny": _preset(
        {"num_layers": 2, "hidden_size": 48, "num_heads": 4, "ffn_hidden_size": 96},
        {"frames": 2, "height": 8, "width": 8},
        batch=2,
    ),
    "small": _preset(
        {"num_layers": 4, "hidden_size": 256, "num_heads": 4, "ffn_hidden_size": 1024},
        {"frames": 4, "height": 16, "width": 16},
        batch=4,
    ),
}
"""``tiny``: 32 tokens, to try the program itself. ``small``: 256 tokens, a step of seconds on one CPU core."""


@dataclass(frozen=True)
class Point:
    """One layout of one series: how many ranks, and the run whose steps they time."""

    series: str
    layout: str
    ranks: int
    run: RunConfig
    rollout_steps: int = 2

    @property
    def name(self) -> str:
        return f"{self.series} {self.layout}"

    def as_dict(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in ("series", "layout", "ranks", "rollout_steps")}
        return fields | {"run": as_dict(self.run)}


def point_from_dict(data: dict[str, Any]) -> Point:
    return Point(**{**data, "run": build(RunConfig, data["run"])})


def parse_layout(text: str) -> dict[str, int]:
    """``tp=2,pp=2,vpp=2`` as all degrees; those left out are 1."""
    degrees = dict.fromkeys(DEGREES, 1)
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in degrees:
            near = difflib.get_close_matches(name, DEGREES, n=1)
            raise ConfigError(
                f"layout {text!r}: got {name!r}, need one of {', '.join(DEGREES)}; "
                + (f"did you mean {near[0]}?" if near else "write e.g. tp=2,pp=2")
            )
        if not value.isdigit() or int(value) < 1:
            raise ConfigError(f"layout {text!r}: got {part!r}, need {name}=N with N of 1 or more; write e.g. {name}=2")
        degrees[name] = int(value)
    return degrees


def ranks_of(degrees: dict[str, int]) -> int:
    """Processes of a layout: the product of its degrees, virtual stages aside."""
    return math.prod(value for name, value in degrees.items() if name != "vpp")


def make_points(
    run: RunConfig, series: dict[str, Sequence[str]], *, steps: Sequence[str], rollout_steps: int
) -> list[Point]:
    """All points, checked. ``run`` gives everything but layout and stages; series -> its layouts, the reference first.

    Raises ConfigError with every reason why some of them cannot run."""
    points, problems = [], []
    stages = tuple(_stage(name) for name in steps)
    for name, layouts in series.items():
        first = None
        for layout in layouts:
            try:
                degrees = parse_layout(layout)
                ranks = ranks_of(degrees)
                first = first or ranks
                grown = _grown(run, name, ranks, first)
                parallel = ParallelConfig(**{k: v for k, v in degrees.items() if k != "dp"})
                point = Point(name, layout, ranks, replace(grown, parallel=parallel, stages=stages), rollout_steps)
                validate(point.run, ranks)
                points.append(point)
            except ConfigError as error:
                problems += [f"{name} {layout}: {line}" for line in str(error).splitlines()]
    if problems:
        raise ConfigError("\n".join(problems))
    return points


def _stage(step: str) -> StageConfig:
    """A stage of which the timed step is one: an objective that comes along with another has its iterations in the other's stage."""
    owner = next((name for name in OBJECTIVES if step in OBJECTIVES[name].companions), step)
    weights = RECIPES.get(step, {owner: 1.0})
    frequency = 2 if any(OBJECTIVES[name].companions for name in weights) else 1
    return StageConfig(name=step, steps=1, losses=weights, student_update_freq=frequency)


def plan_of(stage: StageConfig, *, rollout_steps: int) -> Step:
    """The timed step of a stage of :func:`make_points`: its first iteration, or the first one of what the stage is named after."""
    from rcm_megatron.objectives.plan import plan_step

    steps = [plan_step(stage, iteration, max_rollout_steps=1) for iteration in range(2)]
    timed = next((step for step in steps if step.objectives == (stage.name,)), steps[0])
    return replace(timed, rollout_steps=rollout_steps)


def _grown(run: RunConfig, series: str, ranks: int, first: int) -> RunConfig:
    """``run`` at the size that a weak series has on ``ranks``."""
    factor, rest = divmod(ranks, first)
    if series == "strong":
        return run
    if rest:
        raise ConfigError(
            f"got {ranks} ranks after {first} of the first layout, need a multiple of {first}: the size grows with them; "
            "drop this layout or put a smaller one first"
        )
    if series == "weak_tokens":
        return replace(run, latent=replace(run.latent, frames=run.latent.frames * factor))
    return replace(run, trainer=replace(run.trainer, global_batch_size=run.trainer.global_batch_size * factor))
