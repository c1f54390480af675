"""Students of the mixture: the objectives of this program, on a small network.

The arithmetic is that of training (rcm_megatron.diffusion); only the network is another: K seeds side by side, each with weights of its
own, so that one product makes a step of all. `Student.cost` counts passes, a forward of one batch as 1, a backward as 2, a tangent as 1.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from rcm_megatron.diffusion import losses, samplers, timesteps, trigflow
from rcm_megatron.training.ema import power_decay, power_exponent
from tools.evidence.mixture import Mixture

WIDTH, DEPTH, FREQUENCIES = 128, 4, 8
MAX_ROLLOUT, FAKE_UPDATES = 4, 4
"""Steps of a rollout; updates of the fake score for one of the student."""
LR, FAKE_LR, BETAS = 5e-4, 1e-3, (0.0, 0.999)
EMA_GAMMA = power_exponent(0.1)
"""Of the power-function average that is sampled (EDM2, arXiv 2312.02696): the program's default width."""


def sum_per_sample(x_KB2: Tensor) -> Tensor:
    return x_KB2.sum(-1, keepdim=True)


class Network(nn.Module):
    """RF velocity of K networks at once: a multilayer perceptron of the scaled sample and sinusoids of its time."""

    def __init__(self, seeds: int) -> None:
        super().__init__()
        widths = [2 + 2 * FREQUENCIES, *[WIDTH] * DEPTH, 2]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for into, out in pairwise(widths):
            each = [torch.randn(into, out, generator=torch.Generator().manual_seed(k)) for k in range(seeds)]
            self.weights.append(nn.Parameter(torch.stack(each) * math.sqrt(2 / into)))
            self.biases.append(nn.Parameter(torch.zeros(seeds, 1, out)))

    def forward(self, x_in: Tensor, timestep: Tensor) -> Tensor:
        angles = timestep / 1000 * math.pi * 2.0 ** torch.arange(FREQUENCIES)
        h = torch.cat([x_in, torch.sin(angles), torch.cos(angles)], dim=-1)
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.baddbmm(bias, h, weight)
            h = nn.functional.silu(h) if index < DEPTH else h
        return h

    def v(self, xt: Tensor, t: Tensor) -> Tensor:
        """At TrigFlow times, as everything here calls a network."""
        x_in, timestep = trigflow.precondition(xt, t)
        return self(x_in.float(), timestep)


@dataclass(eq=False)
class Student:
    """One method: weights of the losses, and what it has cost."""

    losses: dict[str, float]
    network: Network
    fake: Network
    mixture: Mixture
    seeds: int
    batch: int
    generator: torch.Generator
    p_g: tuple[float, float] = (-0.4, 1.6)
    shift: float = 2.0
    cost: float = 0.0
    updates: int = 0
    averaged: Network = field(init=False)
    """What is sampled."""
    optimizers: dict[str, torch.optim.Optimizer] = field(init=False)

    def __post_init__(self) -> None:
        self.averaged = copy.deepcopy(self.network)
        self.optimizers = {
            "student": torch.optim.AdamW(self.network.parameters(), LR, BETAS),
            "fake": torch.optim.AdamW(self.fake.parameters(), FAKE_LR, BETAS),
        }

    def with_losses(self, losses: dict[str, float]) -> "Student":
        """The next stage: same networks and counts, optimizers anew; the average begins anew with it."""
        return replace(self, losses=losses)

    # ---- draws

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.seeds, self.batch, *shape, generator=self.generator, dtype=torch.float64)

    def uniform(self) -> Tensor:
        return torch.rand(self.seeds, self.batch, 1, generator=self.generator, dtype=torch.float64)

    def noised(self) -> tuple[Tensor, Tensor]:
        """Data at times of p_G."""
        mean, std = self.p_g
        t = timesteps.lognormal_time(self.normal(1), mean=mean, std=std)
        x0 = self.mixture.sample(self.seeds, self.batch, generator=self.generator)
        return trigflow.add_noise(x0, self.normal(2), t), t

    def noised_again(self, G: Tensor) -> tuple[Tensor, Tensor]:
        t = timesteps.uniform_shift_time(self.uniform(), shift=self.shift)
        return trigflow.add_noise(G, self.normal(2), t), t

    # ---- losses, each a sum over the batch's elements, a mean over samples

    def scm(self) -> Tensor:
        xt, t = self.noised()
        F_teacher = self.mixture.F(xt, t)

        def F_of(x: Tensor, time: Tensor) -> Tensor:
            return trigflow.velocity(x, self.network.v(x, time), time)

        with torch.no_grad():
            _, dF = torch.func.jvp(F_of, (xt, t), losses.tangent_seed(F_teacher, t))
        F = F_of(xt, t)
        g, _, _ = losses.scm_tangent_target(
            F.detach(), F_teacher, dF, xt, t, warmup_ratio=1.0, sum_per_sample=sum_per_sample
        )
        self.cost += 2 + 1 + 2
        return losses.scm_loss(F, F.detach(), g).sum(-1).mean(-1).sum()

    def dcm(self) -> Tensor:
        u = torch.rand(self.seeds, self.batch, generator=self.generator)
        first, second = (t[..., None] for t in timesteps.dcm_times(u, skip=1, total_steps=48, shift=self.shift))
        x0 = self.mixture.sample(self.seeds, self.batch, generator=self.generator)
        xt = trigflow.add_noise(x0, self.normal(2), first)
        x = trigflow.euler_step(xt, self.mixture.F(xt, first), first, second)
        with torch.no_grad():
            target = trigflow.denoised(x, self.network.v(x, second), second)
        self.cost += 1 + 1 + 2
        return losses.dcm_loss(trigflow.denoised(xt, self.network.v(xt, first), first), target).sum(-1).mean(-1).sum()

    @torch.no_grad()
    def rollout(self, count: int) -> tuple[Tensor, Tensor]:
        """The last step's (xt, t) of a rollout of 1 to 4 steps; ``count``: updates of its kind so far."""
        steps = timesteps.rollout_steps(count, max_steps=MAX_ROLLOUT)
        times = [torch.full((self.seeds, self.batch, 1), timesteps.start_time(), dtype=torch.float64)]
        for _ in range(steps - 1):
            drawn = timesteps.uniform_shift_time(self.uniform(), shift=self.shift)
            times.append(torch.minimum(drawn, times[-1]))
        self.cost += steps - 1
        return samplers.rollout(self.denoise, self.normal(2), times=times, fresh_noise=lambda _: self.normal(2))

    def denoise(self, xt: Tensor, t: Tensor) -> Tensor:
        return trigflow.denoised(xt, self.network.v(xt, t.expand(*xt.shape[:-1], 1)), t)

    def dmd(self) -> Tensor:
        at, time = self.rollout(self.updates)
        G = self.denoise(at, time)
        xt, t = self.noised_again(G.detach())
        with torch.no_grad():
            fake = trigflow.denoised(xt, self.fake.v(xt, t), t)
        teacher = self.mixture.denoised(xt, t)
        grad, _ = losses.dmd_gradient(fake, teacher, G.detach(), num_elements=2, sum_per_sample=sum_per_sample)
        self.cost += 1 + 2 + 1
        return losses.dmd_loss(G, grad).sum(-1).mean(-1).sum()

    def train_fake(self, count: int) -> None:
        at, time = self.rollout(count)
        with torch.no_grad():
            G = self.denoise(at, time)
        xt, t = self.noised_again(G)
        loss = losses.fake_score_loss(G, trigflow.denoised(xt, self.fake.v(xt, t), t), t).sum(-1).mean(-1).sum()
        self.cost += 1 + 1 + 2
        _step(self.optimizers["fake"], loss)

    # ---- training

    def train(self) -> Iterator[None]:
        """One student update each time; the fake score's between them."""
        while True:
            total = sum(weight * getattr(self, name)() for name, weight in self.losses.items())
            _step(self.optimizers["student"], total)
            if "dmd" in self.losses:
                for index in range(FAKE_UPDATES):
                    self.train_fake(FAKE_UPDATES * self.updates + index)
            self.updates += 1
            self._average()
            yield

    @torch.no_grad()
    def _average(self) -> None:
        keep = power_decay(self.updates, gamma=EMA_GAMMA)
        for mean, weight in zip(self.averaged.parameters(), self.network.parameters(), strict=True):
            mean.lerp_(weight, 1 - keep)

    @torch.no_grad()
    def samples(self, steps: int, count: int) -> Tensor:
        """``[K, count, 2]`` of the averaged network; with the same noise for every method."""
        generator = torch.Generator().manual_seed(1234)

        def noise(_: int = 0) -> Tensor:
            return torch.randn(self.seeds, count, 2, generator=generator, dtype=torch.float64)

        def denoise(xt: Tensor, t: Tensor) -> Tensor:
            return trigflow.denoised(xt, self.averaged.v(xt, t.expand(*xt.shape[:-1], 1)), t)

        return samplers.student_sample(denoise, noise(), steps=steps, fresh_noise=noise)


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def pretrained(mixture: Mixture, *, seeds: int, batch: int, updates: int) -> Network:
    """A network that has learned the teacher's velocity: what students and fake scores start from."""
    network, generator = Network(seeds), torch.Generator().manual_seed(5)
    student = Student({}, network, network, mixture, seeds, batch, generator)
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, (0.9, 0.999))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        xt, t = student.noised()
        loss = (network.v(xt, t) - mixture.velocity(xt, t)).square().sum(-1).mean(-1).sum()
        _step(optimizer, loss)
        schedule.step()
    return network
