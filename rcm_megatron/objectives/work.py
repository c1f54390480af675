"""What an objective works with: a step's samples, their random draws, and passes of the networks over all of them.

Every objective is a sequence of passes over *all* samples (rcm_megatron.parallel.pipeline), never a pass inside another's loss function,
so the same code runs on one stage and through a pipeline. The arithmetic is in rcm_megatron.diffusion. Everything stays in token shards
x_SBP (rcm_megatron.models.tokens), B all samples of the step on this data-parallel rank; a network's pass alone cuts them into
micro-batches. t_1B1 are TrigFlow times [1, B, 1] in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from rcm_megatron.config import DistillationConfig, TimeDistribution
from rcm_megatron.config.roles import low_noise_of
from rcm_megatron.diffusion import flow_maps, samplers, timesteps, trigflow
from rcm_megatron.dual import Dual
from rcm_megatron.inputs import NetworkInput, Rows, nonfinite_on_rank, take, zeroed
from rcm_megatron.models.tokens import TokenLayout
from rcm_megatron.networks.inputs import dual_network_input, network_input
from rcm_megatron.networks.roles import Networks
from rcm_megatron.networks.sharding import is_gathered
from rcm_megatron.objectives.base import Loss, Objective
from rcm_megatron.objectives.plan import Step
from rcm_megatron.objectives.samples import Samples
from rcm_megatron.parallel.pipeline import accumulate_gradients, evaluate, share_from_last_stage, timed, unwrapped

S = TypeVar("S")
LossOf = Callable[..., Loss]
"""(Output of the trained network, targets by keyword) -> loss, of one micro-batch."""
VelocityOf = Callable[[Sequence[nn.Module], Tensor, Tensor, Rows], Tensor]
"""(A network's chunks, xt, t, which of the samples they are) -> v."""


def has_second_time(chunks: Sequence[nn.Module]) -> bool:
    """Whether a network is a flow map of two times."""
    return unwrapped(chunks[0]).model.second_time


@dataclass(frozen=True, eq=False)
class ObjectiveResult:
    """What an objective reports of the rank's samples, on every stage; ``outputs`` that a loss computes are on the last stage only."""

    loss_B: Tensor
    """Unweighted, over the whole sample."""
    nan_B: Tensor
    """Masked samples, whose loss counts 0."""
    quantities: Mapping[str, Tensor]
    """[B] for each name of `Objective.quantities`."""
    outputs: dict[str, Tensor] = field(default_factory=dict)
    """Token shards [S, B, P] and times [1, B, 1] that tests and conformance look at."""


@dataclass(frozen=True, eq=False)
class Rollout:
    """The last step of a backward simulation: its input xt at time t, and the sample G that the student makes of it."""

    xt_SBP: Tensor
    t_1B1: Tensor
    G_SBP: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Work(Generic[S]):
    """One objective's part of a step."""

    objective: Objective
    settings: S
    distillation: DistillationConfig
    step: Step
    weight: float
    networks: Networks
    samples: Samples
    is_last: bool = True
    """Whether no other objective of the step follows."""

    @property
    def layout(self) -> TokenLayout:
        return self.networks.layout

    # ---- randomness

    def uniform(self, purpose: str) -> Tensor:
        """One draw from U[0, 1) a sample, ``[B]``."""
        return self.samples.draws.uniform(purpose)

    def times(self, purpose: str, distribution: TimeDistribution, *, side: str | None = None) -> Tensor:
        """TrigFlow times ``[1, B, 1]`` from a configured distribution, or from its part on one side of `expert_boundary`."""
        return self.as_tokens(self._times(purpose, distribution, side=side))

    def within(self, side: str | None) -> timesteps.Within | None:
        """The times on one side of `expert_boundary`; None: all."""
        if side is None:
            return None
        boundary = float(trigflow.to_trigflow(torch.tensor(self.distillation.expert_boundary, dtype=torch.float64)))
        low = boundary, timesteps.PURE_NOISE_TIME
        return timesteps.Within(*(low if side == "high" else (0.0, math.nextafter(boundary, 0.0))))

    def noise(self, purpose: str) -> Tensor:
        """Noise tokens of this rank: drawn whole from each sample's own generator, then sharded."""
        drawn = self.samples.draws.normal(purpose, self.layout.latent_shape)
        return self.layout.shard(drawn).to(self.samples.device)

    def as_tokens(self, t_B: Tensor) -> Tensor:
        """Times ``[B]`` in the shape that broadcasts against tokens, ``[1, B, 1]``, in fp64."""
        return t_B.to(self.samples.device, torch.float64)[None, :, None]

    def _times(self, purpose: str, distribution: TimeDistribution, *, side: str | None = None) -> Tensor:
        draws, within = self.samples.draws, self.within(side)
        if distribution.kind == "lognormal":
            z, about = draws.normal_scalar(purpose), {"mean": distribution.mean, "std": distribution.std}
            return timesteps.lognormal_time(z, **about, within=within)
        return timesteps.uniform_shift_time(draws.uniform(purpose), shift=distribution.shift, within=within)

    # ---- passes without gradient

    def evaluate(self, role: str, xt_SBP: Tensor, t_1B1: Tensor, *, s_1B1: Tensor | None = None, phase: str) -> Tensor:
        """The output v of a network at (xt, t), with the samples' own text; of one of two times on the way to s (None: v at t itself)."""

        def plain(chunks: Sequence[nn.Module], xt_SBP: Tensor, t_1B1: Tensor, rows: Rows) -> Tensor:
            condition = None if self.samples.condition is None else self.samples.condition.rows(rows)
            s = take(s_1B1, rows) if s_1B1 is not None and has_second_time(chunks) else None
            given = network_input(xt_SBP, t_1B1, take(self.samples.text_LBD, rows), condition, s_1B1=s)
            return evaluate(chunks, given, micro_batch_size=self.samples.at_a_time, phase=phase)

        return self._by_time(role, plain, xt_SBP, t_1B1)

    def teacher(self, xt_SBP: Tensor, t_1B1: Tensor) -> Tensor:
        """The teacher's v with classifier-free guidance."""
        return self._by_time("teacher", self._guided, xt_SBP, t_1B1)

    def _by_time(self, role: str, v_of: VelocityOf, xt_SBP: Tensor, t_1B1: Tensor) -> Tensor:
        """v of a role; where it is two networks (Wan2.2 A14B), each sample's from the one of its time.

        A network sees its own samples; with sharded weights, which ranks of other samples gather too, all of them.
        """
        low_noise = self.networks.get(low_noise_of(role))
        if low_noise is None:
            return v_of(self.networks[role], xt_SBP, t_1B1, slice(None))
        is_high_B = (trigflow.to_rf(t_1B1) >= self.distillation.expert_boundary)[0, :, 0]
        found, places = [], []
        for chunks, own_B in ((self.networks[role], is_high_B), (low_noise, ~is_high_B)):
            seen_B = torch.ones_like(own_B) if is_gathered(chunks) else own_B
            rows = seen_B.nonzero()[:, 0]
            if len(rows):
                v = v_of(chunks, take(xt_SBP, rows), take(t_1B1, rows), rows)
                found.append(take(v, own_B[rows]))
                places.append(rows[own_B[rows]])
        return take(torch.cat(found, dim=1), torch.cat(places).argsort())

    def _guided(self, chunks: Sequence[nn.Module], xt_SBP: Tensor, t_1B1: Tensor, rows: Rows) -> Tensor:
        """v of the samples ``rows``: conditional and unconditional ones in passes of twice the micro-batch.

        F and x0 are affine in v, so guiding v guides them alike.
        """
        samples, guidance = self.samples, self.distillation.teacher_guidance
        text_LBD = take(samples.text_LBD, rows)
        condition = None if samples.condition is None else samples.condition.rows(rows)
        if not trigflow.needs_guidance(guidance):
            given = network_input(xt_SBP, t_1B1, text_LBD, condition)
            return evaluate(chunks, given, micro_batch_size=samples.at_a_time, phase="teacher")
        text_LBD = torch.cat([text_LBD, take(samples.null_text_LBD, rows)], dim=1)
        condition = None if condition is None else condition.repeated(2)
        given = network_input(xt_SBP.repeat(1, 2, 1), t_1B1.repeat(1, 2, 1), text_LBD, condition)
        v = evaluate(chunks, given, micro_batch_size=2 * samples.at_a_time, phase="teacher")
        return trigflow.guided(*v.double().chunk(2, dim=1), scale=guidance)

    def rollout(self, *, side: str | None = None) -> Rollout:
        """Backward simulation: `step.rollout_steps` student steps from pure noise, re-noised in between or along its flow map.

        ``side``: where the last of them lies, of a student that is two networks; those before the last of the low-noise side lie anywhere.
        """
        last = f"rollout_time/{self.step.rollout_steps - 2}"

        def draw(purpose: str) -> Tensor:
            return self._times(purpose, self.distillation.p_d, side=side if side == "high" or purpose == last else None)

        def denoise(xt: Tensor, t: Tensor) -> Tensor:
            v = self.evaluate("student", xt, t, s_1B1=torch.zeros_like(t), phase="rollout")
            return trigflow.denoised(xt, v, t)

        def follow(xt: Tensor, t: Tensor, s: Tensor) -> Tensor:
            v = self.evaluate("student", xt, t, s_1B1=s, phase="rollout")
            return flow_maps.flow_map(xt, trigflow.velocity(xt, v, t), t, s)

        times = timesteps.rollout_times(
            batch_size=self.samples.count,
            steps=self.step.rollout_steps,
            draw=draw,
            mid_times=self.distillation.fixed_rollout_times,
        )
        times, xt = [self.as_tokens(t_B) for t_B in times], self.noise("rollout_init").double()
        if self.distillation.rollout == "flow_map":
            xt, t = samplers.follow(follow, xt, times=times), times[-1]
        else:
            xt, t = samplers.rollout(denoise, xt, times=times, fresh_noise=lambda j: self.noise(f"rollout_noise/{j}"))
        return Rollout(xt, t, denoise(xt, t))

    def noise_again(self, x0_SBP: Tensor, *, side: str | None = None) -> tuple[Tensor, Tensor]:
        """(xt, t) of samples at times from p_D (on one side), where teacher and fake score are asked."""
        t = self.times("score_time", self.distillation.p_d, side=side)
        return trigflow.add_noise(x0_SBP, self.noise("score_noise"), t), t

    def generated_elements(self) -> Tensor:
        """How many elements of each sample the networks make, ``[1, B, 1]``: those of latent frames that they are given do not count."""
        layout, condition = self.layout, self.samples.condition
        if condition is None or condition.frames_B is None:
            return torch.full((1, self.samples.count, 1), layout.num_elements, device=self.samples.device)
        of_frame = layout.num_elements // layout.grid[0]
        return (layout.num_elements - of_frame * condition.frames_B)[None, :, None]

    # ---- the pass with gradient

    def network_input(
        self, xt_SBP: Tensor, t_1B1: Tensor, *, s_1B1: Tensor | None = None, text_LBD: Tensor | None = None
    ) -> NetworkInput:
        """The point (xt, t) with the samples' text, or another. A trained network of two times is asked for the way to s."""
        text_LBD = self.samples.text_LBD if text_LBD is None else text_LBD
        s_1B1 = s_1B1 if has_second_time(self.networks[self.step.trained]) else None
        return network_input(xt_SBP, t_1B1, text_LBD, self.samples.condition, s_1B1=s_1B1)

    def dual_network_input(
        self, xt: Tensor, t: Tensor, t_xt: Tensor, t_t: Tensor, *, s: Tensor | None = None, t_s: Tensor | None = None
    ) -> NetworkInput:
        """The point (xt, t), or (xt, t, s), and its tangent."""
        return dual_network_input(xt, t, t_xt, t_t, self.samples.text_LBD, self.samples.condition, s=s, t_s=t_s)

    def train(
        self,
        given: NetworkInput,
        loss: LossOf,
        *,
        phase: str,
        outputs: Mapping[str, Tensor] | None = None,
        **targets: Tensor,
    ) -> ObjectiveResult:
        """Forward and backward of the objective's network: ``loss(v, **targets)`` on each micro-batch's part of the targets ``[…, B, …]``.

        A loss function returns (sum over this rank's tokens) / micro-batch (rcm_megatron.parallel.pipeline has the convention).
        Samples that come with a NaN or an infinity, in what they are or in what other networks made of them, are dropped alone: the network
        sees zeros, their loss counts 0.
        """
        dropped_1B1 = self.layout.sum_per_sample(nonfinite_on_rank([*given.tensors, *targets.values()])) > 0

        def of_micro_batch(v: Tensor | Dual, *, dropped: Tensor, **part: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            found = _masked(loss(v, **{name: zeroed(value, dropped) for name, value in part.items()}), dropped)
            mean = self.weight * found.elements_SBP.sum() / found.elements_SBP.shape[1]
            return mean, self._reported(found)

        chunks = self.networks[self.step.trained]
        reported = accumulate_gradients(
            chunks,
            replace(given, dropped_1B1=dropped_1B1),
            of_micro_batch,
            targets | {"dropped": dropped_1B1},
            micro_batch_size=self.samples.at_a_time,
            is_last=self.is_last,
            phase=phase,
        )
        return self._result(reported, dict(outputs or {}))

    def _reported(self, found: Loss) -> dict[str, Tensor]:
        """New tensors, because schedules scale losses in place. Numbers of a sample are over all ranks."""
        loss_1B1 = self.layout.sum_per_sample(found.elements_SBP)
        nan_1B1 = found.nan_1B1.to(loss_1B1.dtype)
        return {"loss": loss_1B1, "nan": nan_1B1, **found.quantities, **found.outputs}

    def _result(self, reported: dict[str, Tensor], outputs: dict[str, Tensor]) -> ObjectiveResult:
        """Numbers of a sample on every stage. What else the losses report stays on the last one, which computed it."""
        names = ("loss", "nan", *self.objective.quantities)
        values = torch.zeros(len(names), self.samples.count, dtype=torch.float64, device=self.samples.device)
        for row, name in zip(values, names, strict=True):
            if reported:
                row.copy_(reported.pop(name)[0, :, 0])
        with timed(self.networks[self.step.trained], "stages"):
            share_from_last_stage(values, group=self.layout.groups.pp)
        by_name = dict(zip(names, values, strict=True))
        loss_B, nan_B = by_name.pop("loss"), by_name.pop("nan").bool()
        return ObjectiveResult(loss_B, nan_B, by_name, outputs | reported)


def _masked(found: Loss, dropped_1B1: Tensor) -> Loss:
    """The loss without the samples that were dropped before the network saw them."""
    nan_1B1 = dropped_1B1 if found.nan_1B1 is None else found.nan_1B1 | dropped_1B1
    elements = found.elements_SBP.where(~dropped_1B1, 0.0)
    quantities = {name: value.where(~dropped_1B1, 0.0) for name, value in found.quantities.items()}
    return replace(found, elements_SBP=elements, nan_1B1=nan_1B1, quantities=quantities)
