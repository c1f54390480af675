"""What rounding the timestep to bf16 does to the tangent of the consistency objective, on a network that fits a laptop.

    python tools/timestep_rounding.py

Neighbouring bf16 numbers near 1000 are 4 apart. The released code of rCM (NVlabs/rcm, `t2v_model_distill_rcm.py`) casts timestep and its
tangent to the network's bf16; here neither drops below fp32. Both run the quick start's teacher with bf16 weights and linears at the same
points; the tangent dF/dt (JVP of F at (xt, t) along (cos sin F_teacher, cos sin)) is compared with the same network in fp64.
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
from tools.quickstart.digits import make_samples

SAMPLES = 256


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

    def of(self, dtype: torch.dtype, *, rounding: Callable[[Tensor], Tensor] = exact) -> Tensor:
        """dF ``[S, B, P]`` in fp64 of the network in `dtype`, its timestep and that one's tangent passed through `rounding`."""
        (network,) = load_network(self.run, self.groups, weights="teacher", dtype=dtype)
        shard = network.layout.shard
        xt = trigflow.add_noise(shard(self.x0_BCTHW), shard(self.noise_BCTHW), self.t_1B1)
        if self.F_teacher is None:
            x_in, timestep = trigflow.precondition(xt, self.t_1B1)
            self.F_teacher = trigflow.velocity(xt, network(x_in, timestep[..., 0], self.text_LBD), self.t_1B1)
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
    reference = tangents.of(torch.float64)
    print("| timestep and its tangent | relative error of dF | cosine |")
    print("| --- | ---: | ---: |")
    for name, rounding in (("rounded to bf16, as released", to_bf16), ("fp32, as here", exact)):
        got = tangents.of(torch.bfloat16, rounding=rounding)
        error = float((got - reference).norm() / reference.norm())
        cosine = float(torch.nn.functional.cosine_similarity(got.flatten(), reference.flatten(), dim=0))
        print(f"| {name} | {error:.3f} | {cosine:.4f} |")


if __name__ == "__main__":
    main()
