"""What bf16 leaves of the tangent of the consistency objective: timesteps rounded or not, JVP or finite differences.

    python tools/tangent_precision.py

Neighbouring bf16 numbers near 1000 are 4 apart. The released code of rCM (NVlabs/rcm, `t2v_model_distill_rcm.py`) casts timestep and its
tangent to the network's bf16; here neither drops below fp32. The quick start's teacher runs at the same points: the tangent dF/dt (JVP of F
at (xt, t) along (cos sin F_teacher, cos sin)) in bf16, and the finite difference in its place, are compared with the JVP in fp64.
Prints a Markdown table of the relative error and the cosine over 256 samples, times from the quick start's p_G.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rcm_megatron.config import load_config
from rcm_megatron.diffusion import losses, timesteps, trigflow
from rcm_megatron.dual import Dual
from rcm_megatron.inference.networks import init_parallel, load_network
from rcm_megatron.models.dit import DiffusionTransformer
from tools.quickstart.digits import make_samples

SAMPLES = 256
STEPS = (1e-4, 1e-3, 1e-2, 1e-1)


def exact(value: Tensor) -> Tensor:
    return value


def to_bf16(value: Tensor) -> Tensor:
    return value.bfloat16().float()


class Tangents:
    """The tangent dF of one network at fixed points (xt, t) along a fixed direction."""

    def __init__(self, config: str) -> None:
        self.run = load_config(config, ["parallel.ring=1"])
        self.groups = init_parallel(self.run)
        self.x0_BCTHW, _ = make_samples(seed=11, start=0, count=SAMPLES, split="heldout")
        generator = torch.Generator().manual_seed(0)
        self.text_LBD = torch.zeros(self.run.model.text_len, SAMPLES, self.run.model.text_dim)
        self.noise_BCTHW = torch.randn(self.x0_BCTHW.shape, generator=generator)
        p_g = self.run.distillation.p_g
        z_B = torch.randn(SAMPLES, generator=generator, dtype=torch.float64)
        self.t_1B1 = timesteps.lognormal_time(z_B, mean=p_g.mean, std=p_g.std)[None, :, None]
        self.F_teacher: Tensor | None = None

    def _points(self, dtype: torch.dtype) -> tuple[DiffusionTransformer, Tensor]:
        """The network in `dtype` and xt ``[S, B, P]``."""
        (network,) = load_network(self.run, self.groups, weights="teacher", dtype=dtype)
        shard = network.layout.shard
        xt = trigflow.add_noise(shard(self.x0_BCTHW), shard(self.noise_BCTHW), self.t_1B1)
        if self.F_teacher is None:
            self.F_teacher = self._velocity(network, xt, self.t_1B1)
        return network, xt

    def _velocity(self, network: DiffusionTransformer, xt: Tensor, t_1B1: Tensor) -> Tensor:
        x_in, timestep = trigflow.precondition(xt, t_1B1)
        return trigflow.velocity(xt, network(x_in, timestep[..., 0], self.text_LBD), t_1B1)

    def difference(self, dtype: torch.dtype, *, h: float) -> Tensor:
        """dF ``[S, B, P]`` by a finite difference of step `h` in TrigFlow time, of the network in `dtype`."""
        network, xt = self._points(dtype)
        before = losses.discrete_xt_before(xt, self.F_teacher, h=h)
        F_before = self._velocity(network, before, self.t_1B1 - h)
        return losses.discrete_dF(self._velocity(network, xt, self.t_1B1), F_before, self.t_1B1, h=h).double()

    def jvp(self, dtype: torch.dtype, *, rounding: Callable[[Tensor], Tensor] = exact) -> Tensor:
        """dF ``[S, B, P]`` by the JVP of the network in `dtype`, its timestep and that one's tangent passed through `rounding`."""
        network, xt = self._points(dtype)
        t_xt, t_t = losses.tangent_seed(self.F_teacher, self.t_1B1)
        x_in, timestep, t_x_in, t_timestep = trigflow.precondition_jvp(xt, self.t_1B1, t_xt, t_t)
        times = Dual.pack(rounding(timestep[..., 0]), rounding(t_timestep[..., 0]))
        v = network(Dual.pack(x_in, t_x_in), times, self.text_LBD)
        return trigflow.velocity_jvp(xt, v.primal, self.t_1B1, t_xt, v.tangent, t_t)[1].double()


@torch.no_grad()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="model_configs/quickstart.yaml")
    tangents = Tangents(parser.parse_args().config)
    reference = tangents.jvp(torch.float64)
    print("| dF of the bf16 network | relative error | cosine |")
    print("| --- | ---: | ---: |")
    show("JVP, timestep and its tangent in fp32 (here)", tangents.jvp(torch.bfloat16), reference)
    show("JVP, both rounded to bf16 (as released)", tangents.jvp(torch.bfloat16, rounding=to_bf16), reference)
    for h in STEPS:
        show(f"finite difference, h = {h:g}", tangents.difference(torch.bfloat16, h=h), reference)
    show(
        f"finite difference, h = {STEPS[0]:g}, network in fp32",
        tangents.difference(torch.float32, h=STEPS[0]),
        reference,
    )


def show(name: str, got: Tensor, reference: Tensor) -> None:
    """One row of the table."""
    error = float((got - reference).norm() / reference.norm())
    cosine = float(torch.nn.functional.cosine_similarity(got.flatten(), reference.flatten(), dim=0))
    print(f"| {name} | {error:.3f} | {cosine:.4f} |", flush=True)


if __name__ == "__main__":
    main()
