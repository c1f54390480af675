"""What an objective is. Nothing here imports torch: a run is checked, and its FLOPs are counted, without it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from rcm_megatron.config import DistillationConfig, RunConfig, StageConfig
    from rcm_megatron.objectives.plan import Step
    from rcm_megatron.objectives.work import ObjectiveResult, Work

TEACHER_PHASE = {"teacher": "forward passes of the teacher, both branches of the guidance"}
"""Timed by Work.teacher."""
ROLLOUT_PHASE = {"rollout": "forward passes of the student in backward simulation"}
"""Timed by Work.rollout."""
STUDENT_PHASE = {"student": "other forward passes of the student: with a gradient, or for a target of its own"}


@dataclass(frozen=True)
class NoSettings:
    """Of an objective that has none."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """How often an objective runs the network of a role on each sample, as far as it is of use; guidance is two forward passes."""

    role: str
    forward: int = 0
    dual: int = 0
    """Forward passes of output and tangent at once."""
    backward: int = 0
    again: int = 0
    """Forward passes that are executed a second time, for a gradient alone: of no use."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Loss:
    """What a loss function makes of one micro-batch, on token shards. Everything but ``elements_SBP`` is reported only."""

    elements_SBP: Tensor
    """The loss element by element; its sum over a sample is what is trained."""
    nan_1B1: Tensor | None = None
    """Samples that count nothing."""
    quantities: Mapping[str, Tensor] = field(default_factory=dict)
    """One number a sample ``[1, B, 1]`` for each name of `Objective.quantities`."""
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors ``[…, B, …]`` that tests and conformance look at."""


class Objective:
    """One objective as a value: subclass it, set the fields, write `run`, and register an instance in `OBJECTIVES` (docs/EXTENDING.md)."""

    name: str
    """In `stages.N.losses`, `objectives`, metrics and plots."""
    roles: tuple[str, ...]
    """Of the networks that it asks for or trains."""
    trains: str
    """The role whose gradients it leaves."""
    companions: tuple[str, ...] = ()
    """Objectives that train what this one relies on, in iterations of their own (`stages.N.student_update_freq`)."""
    Settings: type = NoSettings
    """Frozen dataclass of its settings; every field has a default."""
    quantities: Mapping[str, str] = {}
    """What it reports of each sample beside its loss: name -> title of the plot. Metrics hold the means as ``<objective>/<name>``."""
    phases: Mapping[str, str] = {}
    """Timers' phases of its passes -> what is in them; backward is apart."""
    takes_tangent: bool = False
    """Whether it takes a tangent of the network that it trains."""
    has_warmup: bool = False
    """Whether `stages.N.tangent_warmup` means something to it."""
    second_time: Literal["refuses", "follows", "needs"] = "refuses"
    """What the network that it trains may be (`model.second_time`). refuses: of one time. follows: of one or two. needs: of two."""
    waits_for_warmup: bool = False
    """Whether it takes part only when the warm-up is over."""

    def passes(self, settings: Any, step: Step, distillation: DistillationConfig) -> tuple[Pass, ...]:
        """The passes of a step."""
        raise NotImplementedError

    def run(self, work: Work) -> ObjectiveResult:
        """Run its passes over all samples, and leave the gradients of its weighted loss."""
        raise NotImplementedError

    def check(self, run: RunConfig, settings: Any, stage: StageConfig, path: str) -> Iterator[str]:
        """Problems of ``stage`` (at ``path`` of the configuration) with this objective among its losses, as got, need, fix."""
        yield from ()

    def null_text(self, settings: Any, distillation: DistillationConfig) -> Literal["negative", "empty"] | None:
        """The caption that it trains or asks the unconditional branch with: a teacher's negative prompt, the empty caption, or none."""
        return "negative" if "teacher" in self.roles and distillation.teacher_guidance > 1 else None


def teacher_passes(distillation: DistillationConfig, *, times: int = 1) -> Pass:
    """``times`` evaluations of the guided teacher."""
    return Pass(role="teacher", forward=times * (2 if distillation.teacher_guidance > 1 else 1))
