"""What a network is given for a noisy sample: latents scaled, the time in its unit; plain, or with a tangent."""

from torch import Tensor

from rcm_megatron.diffusion import trigflow
from rcm_megatron.dual import Dual
from rcm_megatron.inputs import Condition, NetworkInput


def network_input(xt_SBP: Tensor, t_1B1: Tensor, text_LBD: Tensor, condition: Condition | None = None) -> NetworkInput:
    """Of samples ``xt_SBP`` at TrigFlow times ``t_1B1``."""
    x_in, timestep = trigflow.precondition(xt_SBP, t_1B1)
    return NetworkInput(x_in, timestep[..., 0], text_LBD, condition)


def dual_network_input(
    xt: Tensor, t: Tensor, t_xt: Tensor, t_t: Tensor, text_LBD: Tensor, condition: Condition | None = None
) -> NetworkInput:
    """The same with the tangents ``t_xt`` of the samples and ``t_t`` of the times."""
    x_in, timestep, t_x_in, t_timestep = trigflow.precondition_jvp(xt, t, t_xt, t_t)
    times = Dual.pack(timestep[..., 0], t_timestep[..., 0])
    return NetworkInput(Dual.pack(x_in, t_x_in), times, text_LBD, condition)
