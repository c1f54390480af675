"""What a network is given for a noisy sample: latents scaled, the time in its unit; plain, or with a tangent."""

from torch import Tensor

from rcm_megatron.diffusion import flow_maps, trigflow
from rcm_megatron.dual import Dual
from rcm_megatron.inputs import Condition, NetworkInput


def network_input(
    xt_SBP: Tensor,
    t_1B1: Tensor,
    text_LBD: Tensor,
    condition: Condition | None = None,
    *,
    s_1B1: Tensor | None = None,
) -> NetworkInput:
    """Of samples ``xt_SBP`` at TrigFlow times ``t_1B1``; ``s_1B1``: the second times, for a network of two."""
    x_in, timestep = trigflow.precondition(xt_SBP, t_1B1)
    interval_1B = None if s_1B1 is None else flow_maps.interval(t_1B1, s_1B1)[..., 0]
    return NetworkInput(x_in, timestep[..., 0], text_LBD, condition, interval_1B=interval_1B)


def dual_network_input(
    xt: Tensor,
    t: Tensor,
    t_xt: Tensor,
    t_t: Tensor,
    text_LBD: Tensor,
    condition: Condition | None = None,
    *,
    s: Tensor | None = None,
    t_s: Tensor | None = None,
) -> NetworkInput:
    """The same with the tangents ``t_xt`` of the samples, ``t_t`` of the times and ``t_s`` of the second ones (None: zero)."""
    x_in, timestep, t_x_in, t_timestep = trigflow.precondition_jvp(xt, t, t_xt, t_t)
    times = Dual.pack(timestep[..., 0], t_timestep[..., 0])
    interval = None
    if s is not None:
        interval = Dual.pack(
            *(half[..., 0] for half in flow_maps.interval_jvp(t, s, t_t, 0 * s if t_s is None else t_s))
        )
    return NetworkInput(Dual.pack(x_in, t_x_in), times, text_LBD, condition, interval_1B=interval)
