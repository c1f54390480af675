"""sCM and DMD of tests.distributed.test_parity's step in fp64, from the papers: diffusers' networks, torch.func.jvp, autograd.

Random numbers are the program's draws (functions of seed, iteration and sample); everything that is made of them is written out here.
Shapes: x_BCTHW latents, text_BLD, t_B TrigFlow times; all samples of the global batch at once.
"""

import math

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from rcm_megatron.diffusion.noise import SeededDraws
from tests.distributed import test_parity
from tests.distributed.layouts import SAMPLES
from tests.unit.test_wan_model import Case, float_means_double, wide_twin


def oracle(models, objectives):
    """{objective: {"loss of …", "tangent_norm of …", "dF of …", "gradient of <diffusers' name>"}} of networks of ``models`` (by role)."""
    networks = {role: twin(model, test_parity.SEEDS[role]) for role, model in models.items()}
    with float_means_double(), sdpa_kernel(SDPBackend.MATH):
        return {name: {"scm": scm, "dmd": dmd}[name](networks) for name in objectives}


def twin(model, seed):
    """diffusers' class in fp64 with the weights of `test_parity`'s network of ``seed``."""
    from diffusers import WanTransformer3DModel

    from rcm_megatron.checkpoint.translate import from_internal, naming_of

    config = naming_of("diffusers", model).write_config(model)
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    network = WanTransformer3DModel(**config)
    network.load_state_dict(dict(from_internal(test_parity.weights_of(model, seed).items(), model, "diffusers")))
    return wide_twin(network, Case(model, 0, 0, 0, 0, 0)).requires_grad_(True)


class Point:
    """A step's data and draws."""

    def __init__(self, objective):
        _, _, self.iteration = test_parity.OBJECTIVES[objective]
        self.settings = test_parity.distillation_of()
        data, latent = SeededDraws(99, 0, range(SAMPLES)), test_parity.LATENT.shape_CTHW
        self.x0 = data.normal("latent", latent).double()
        self.text, self.null = (data.normal(name, (5, 10)).double() for name in ("text", "null"))
        self.draws, self.latent = SeededDraws(7, self.iteration, range(SAMPLES)), latent

    def noise(self, purpose):
        return self.draws.normal(purpose, self.latent).double()


def wide(t_B):
    return t_B.double()[:, None, None, None, None]


def velocity(network, text, xt, t_B):
    """TrigFlow's F of a rectified-flow network v: its input is xt/(cos + sin) at RF time s = sin/(cos + sin)."""
    cos, sin = torch.cos(t_B), torch.sin(t_B)
    (v,) = network(xt / wide(cos + sin), 1000 * sin / (cos + sin), text, return_dict=False)
    return (wide(cos - sin) * xt + v) / wide(cos + sin)


def denoised(network, text, xt, t_B):
    return wide(torch.cos(t_B)) * xt - wide(torch.sin(t_B)) * velocity(network, text, xt, t_B)


def guided_velocity(network, point, xt, t_B):
    with torch.no_grad():
        conditional, unconditional = (velocity(network, text, xt, t_B) for text in (point.text, point.null))
    return unconditional + point.settings.teacher_guidance * (conditional - unconditional)


def scm(networks):
    """sCM (arXiv 2410.11081) section 5.1 with rCM's tangent, r = 1."""
    point, student = Point("scm"), networks["student"]
    p_g = point.settings.p_g
    t_B = torch.atan(torch.exp(p_g.std * point.draws.normal_scalar("time").double() + p_g.mean))
    cos, sin = wide(torch.cos(t_B)), wide(torch.sin(t_B))
    xt = cos * point.x0 + sin * point.noise("noise")
    F_teacher = guided_velocity(networks["teacher"], point, xt, t_B)
    with torch.no_grad():
        seed = (cos * sin * F_teacher, torch.cos(t_B) * torch.sin(t_B))
        _, dF = torch.func.jvp(lambda x, t: velocity(student, point.text, x, t), (xt, t_B), seed)
    F = velocity(student, point.text, xt, t_B)
    g = -cos * torch.sqrt(1 - sin**2) * (F.detach() - F_teacher) - (cos * sin * xt + dF)
    norm_B = g.flatten(1).norm(dim=1)
    g = g / (wide(norm_B) + 0.1)
    loss_B = (F - F.detach() - g).square().flatten(1).sum(1)
    found = gradients_of(student, 100.0 * loss_B.mean())
    return found | {"loss of scm": loss_B.detach(), "tangent_norm of scm": norm_B, "dF of scm": dF}


def dmd(networks):
    """DMD2 (arXiv 2405.14867) on the last step of a backward simulation."""
    point, student = Point("dmd"), networks["student"]
    steps = point.iteration // 2 % point.settings.max_rollout_steps + 1  # every second iteration trained the student

    def drawn(purpose):
        u, shift = point.draws.uniform(purpose).double(), point.settings.p_d.shift
        s = shift * u / (1 + (shift - 1) * u)
        return torch.atan(s / (1 - s))

    t_B, x0 = torch.full((SAMPLES,), math.pi / 2, dtype=torch.float64), None
    xt = point.noise("rollout_init")
    for step in range(steps - 1):
        with torch.no_grad():
            x0 = denoised(student, point.text, xt, t_B)
        t_B = torch.minimum(t_B, drawn(f"rollout_time/{step}"))
        xt = wide(torch.cos(t_B)) * x0 + wide(torch.sin(t_B)) * point.noise(f"rollout_noise/{step}")
    G = denoised(student, point.text, xt, t_B)
    s_B = drawn("score_time")
    again = wide(torch.cos(s_B)) * G.detach() + wide(torch.sin(s_B)) * point.noise("score_noise")
    cos, sin = wide(torch.cos(s_B)), wide(torch.sin(s_B))
    x0_teacher = cos * again - sin * guided_velocity(networks["teacher"], point, again, s_B)
    with torch.no_grad():
        x0_fake = denoised(networks["fake_score"], point.text, again, s_B)
    scale_B = (G.detach() - x0_teacher).abs().flatten(1).mean(1).clamp(min=1e-5)
    grad = (x0_fake - x0_teacher) / wide(scale_B)
    loss_B = (G - (G.detach() - grad)).square().flatten(1).sum(1)
    return gradients_of(student, loss_B.mean()) | {"loss of dmd": loss_B.detach()}


def gradients_of(network, loss):
    network.zero_grad()
    loss.backward()
    return {f"gradient of {name}": p.grad.clone() for name, p in network.named_parameters()}
