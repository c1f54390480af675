"""Reading the golden files (numbers of NVlabs/rcm): cases, tensors, the order of their random draws, their bounds.

The format is that of a safetensors file whose metadata key `golden` is JSON with `config` and `cases`; tensors are
`<network>/<parameter>`, `x0 cond uncond`, `net/...`, `<case>/drawN`, `<case>/out/...` and `<case>/grad/...`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rcm_megatron.diffusion.timesteps import companion_updates_before, rollout_steps, student_updates_before
from rcm_megatron.objectives.dcm import DcmSettings
from rcm_megatron.objectives.scm import ScmSettings

NETWORKS = ("student", "teacher", "fake_score")


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Relative Frobenius errors that one rank stays below in fp32; `output_overrides` by the name of the output."""

    loss: float
    outputs: float
    gradients: float
    output_overrides: Mapping[str, float]

    def output(self, name: str) -> float:
        return self.output_overrides.get(name, self.outputs)

    def scaled(self, factor: float) -> "Bounds":
        """The bounds of another summation order: parallel layouts take factor 2."""
        overrides = {name: factor * bound for name, bound in self.output_overrides.items()}
        return Bounds(
            loss=factor * self.loss,
            outputs=factor * self.outputs,
            gradients=factor * self.gradients,
            output_overrides=overrides,
        )


_SCM = Bounds(loss=1e-8, outputs=1e-5, gradients=2e-5, output_overrides={})
_DIFFERENCE = Bounds(loss=1e-6, outputs=1e-5, gradients=1e-3, output_overrides={"df_dt": 1e-3})
_ROLLOUT = Bounds(loss=1e-6, outputs=5e-6, gradients=2e-5, output_overrides={})

BOUNDS: Mapping[str, Bounds] = {
    "scm": _SCM,
    "scm_warmup": _SCM,
    "scm_guidance1": _SCM,
    "scm_semicontinuous": _DIFFERENCE,
    "scm_discrete_fd": _DIFFERENCE,
    "dcm": Bounds(loss=1e-5, outputs=1e-6, gradients=5e-5, output_overrides={}),
    "dmd": _ROLLOUT,
    "dmd_fixed_timesteps": _ROLLOUT,
    "critic": _ROLLOUT,
}


OBJECTIVES = {"scm": "scm", "dcm": "dcm", "dmd": "dmd", "critic": "fake_score"}
"""How the name of a case begins -> the objective of this program that it is a case of."""

_LOSSES = {
    "scm": ("scm", "loss_scale"),
    "dcm": ("dcm", "loss_scale"),
    "dmd": ("dmd", "loss_scale_dmd"),
    "fake_score": ("dmd", "loss_scale_dmd"),
}
"""Objective -> the loss of the stage whose step it is, and what official configurations call the weight of that."""
_DRAWS = {"scm": ("time", "noise"), "dcm": ("noise", "dcm_u")}
"""Objective without a rollout -> the purposes of its draws, in their documented order."""


@dataclass(frozen=True, kw_only=True)
class GoldenCase:
    """One replayable loss: its settings, the official loss per sample `[b]` fp64, draws, outputs and gradients."""

    name: str
    iteration: int
    config: Mapping[str, object]
    trained: str
    draw_names: tuple[str, ...]
    loss: Tensor
    grad_norm: float
    draws: tuple[Tensor, ...]
    outputs: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]

    @property
    def objective(self) -> str:
        """The objective of this program. By the case's name: every case carries the same `cm_type`. Raises ValueError for another name."""
        for begin, objective in OBJECTIVES.items():
            if self.name == begin or self.name.startswith(begin + "_"):
                return objective
        raise ValueError(f"got golden case {self.name!r}, need a name that begins with {', '.join(OBJECTIVES)}")

    @property
    def loss_weights(self) -> dict[str, float]:
        """Of the stage that the case is a step of."""
        loss, scale = _LOSSES[self.objective]
        return {loss: self.config[scale]}

    @property
    def settings(self) -> dict[str, Any]:
        """Of the objectives, by name."""
        c = self.config
        kind = {"jvp": "exact", "semicontinuous": "semicontinuous", "discrete": "finite_difference"}[self.dF_kind]
        return {
            "scm": ScmSettings(jvp_kind=kind, fd_size=c["fd_size"]),
            "dcm": DcmSettings(
                total_steps=c["dcm_total_steps"], skip=c["dcm_skipping_interval_steps"], shift=c["dcm_timestep_shift"]
            ),
        }

    @property
    def bounds(self) -> Bounds:
        """By the name of the case. Raises ValueError where it has none."""
        if self.name not in BOUNDS:
            raise ValueError(f"got golden case {self.name!r}, need one of {sorted(BOUNDS)}; add its bounds to BOUNDS")
        return BOUNDS[self.name]

    @property
    def dF_kind(self) -> str:
        """How scm cases get dF: jvp | semicontinuous | discrete."""
        return {0: "jvp", 1: "semicontinuous", 2: "discrete"}[self.config["fd_type"]]

    @property
    def rollout_steps(self) -> int:
        """n of the cases with a rollout."""
        count = student_updates_before if self.trained == "student" else companion_updates_before
        k = count(
            self.iteration,
            warmup=self.config["tangent_warmup"],
            student_update_freq=self.config["student_update_freq"],
        )
        return rollout_steps(k, max_steps=self.config["max_simulation_steps_fake"])

    @property
    def mid_times(self) -> tuple[float, ...] | None:
        """The fixed mid times of the rollout, or None where they are drawn."""
        return tuple(self.config["backward_timesteps"]) if self.config["dmd_fix_timesteps"] else None


@dataclass(frozen=True, kw_only=True)
class Golden:
    """A golden file: the network's configuration, three state dicts, inputs, the network's JVP and the cases."""

    config: Mapping[str, object]
    weights: Mapping[str, Mapping[str, Tensor]]
    x0: Tensor
    cond: Tensor
    uncond: Tensor
    net: Mapping[str, Tensor]
    cases: tuple[GoldenCase, ...]

    def case(self, name: str) -> GoldenCase:
        return next(case for case in self.cases if case.name == name)


def load_golden(path: str | Path) -> Golden:
    """Reads a whole golden file into memory."""
    with safe_open(str(path), "pt") as file:
        metadata = json.loads(file.metadata()["golden"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    return Golden(
        config=metadata["config"],
        weights={network: _below(tensors, f"{network}/") for network in NETWORKS},
        x0=tensors["x0"],
        cond=tensors["cond"],
        uncond=tensors["uncond"],
        net=_below(tensors, "net/"),
        cases=tuple(_case(entry, tensors) for entry in metadata["cases"]),
    )


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _case(entry: Mapping, tensors: Mapping[str, Tensor]) -> GoldenCase:
    name = entry["name"]
    return GoldenCase(
        name=name,
        iteration=entry["iteration"],
        config=entry["config"],
        trained=entry["trained"],
        draw_names=tuple(entry["draws"]),
        loss=torch.tensor(entry["loss"], dtype=torch.float64),
        grad_norm=entry["grad_norm"],
        draws=tuple(tensors[f"{name}/draw{n}"] for n in range(len(entry["draws"]))),
        outputs=_below(tensors, f"{name}/out/"),
        gradients=_below(tensors, f"{name}/grad/"),
    )


def draw_purposes(case: GoldenCase) -> tuple[str, ...]:
    """The purposes of `<case>/draw0, draw1, ...` in their documented order."""
    if case.objective in _DRAWS:
        return _DRAWS[case.objective]
    middle = range(case.rollout_steps - 1)
    times = () if case.mid_times is not None else tuple(f"rollout_time/{j}" for j in middle)
    noises = tuple(f"rollout_noise/{j}" for j in middle)
    return ("rollout_init", *times, *noises, "score_time", "score_noise")


class ReplayDraws:
    """The `Draws` of a golden case: hands out what the official run drew. `samples` picks a part of the batch.

    An unknown purpose, or a shape that the official run did not draw, is an error.
    """

    def __init__(self, case: GoldenCase, samples: slice = slice(None)):
        purposes = draw_purposes(case)
        if len(purposes) != len(case.draws):
            raise ValueError(
                f"case {case.name!r}: got {len(case.draws)} draws {case.draw_names}, need {len(purposes)} {purposes}; "
                "check iteration, student_update_freq and dmd_fix_timesteps of the case"
            )
        self._draws = {purpose: draw[samples] for purpose, draw in zip(purposes, case.draws, strict=True)}

    @property
    def batch_size(self) -> int:
        return len(next(iter(self._draws.values())))

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        return self._get(purpose, tuple(shape))

    def uniform(self, purpose: str) -> Tensor:
        return self._get(purpose, (1,)).squeeze(1)

    def normal_scalar(self, purpose: str) -> Tensor:
        return self._get(purpose, (1,)).squeeze(1)

    def _get(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        if purpose not in self._draws:
            raise KeyError(f"got purpose {purpose!r}, need one of {sorted(self._draws)}")
        draw = self._draws[purpose]
        if tuple(draw.shape[1:]) != shape:
            raise ValueError(f"purpose {purpose!r}: got shape {shape}, need {tuple(draw.shape[1:])}")
        return draw


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| in fp64."""
    actual, expected = actual.detach().double(), expected.double()
    return (torch.linalg.vector_norm(actual - expected) / torch.linalg.vector_norm(expected)).item()
