"""Latent frames that are given: seen clean and at a time of their own, and kept by a velocity that leads exactly to them.

Shapes: x_SBP tokens of this rank, frame_S their latent frames, F all latent frames; B is 2B inside a Dual.
"""

import torch
from torch import Tensor

from rcm_megatron.dual import Dual, map_linear

TIME_UNIT = 1000.0
"""Networks are given 1000 s."""


def frame_timesteps(timestep_1B: Tensor | Dual, frames_B: Tensor, *, frames: int, given: float) -> Tensor | Dual:
    """Timesteps ``[F, B]`` in fp64: ``given`` in the first ``frames_B`` frames, which carries no tangent."""
    known_FB = torch.arange(frames, device=frames_B.device)[:, None] < frames_B
    timestep_FB = map_linear(lambda value: value.double().expand(frames, -1), timestep_1B)
    return where_known(known_FB, torch.full((), given, dtype=torch.float64, device=known_FB.device), timestep_FB)


def of_tokens(value_FBD: Tensor, frame_S: Tensor) -> Tensor:
    """Each token's vector from its frame's; one frame serves all tokens by broadcasting."""
    return value_FBD if value_FBD.shape[0] == 1 else value_FBD.index_select(0, frame_S)


def where_known(known: Tensor, given: Tensor, value: Tensor | Dual) -> Tensor | Dual:
    """``given`` where ``known``, which carries no tangent."""
    if not isinstance(value, Dual):
        return torch.where(known, given.to(value.dtype), value)
    zero = torch.zeros((), dtype=value.tangent.dtype, device=value.tangent.device)
    primal = torch.where(known, given.to(value.primal.dtype), value.primal)
    return Dual.pack(primal, torch.where(known, zero, value.tangent))


def lead_to(
    x0_SBP: Tensor, known: Tensor, v_SBP: Tensor | Dual, x_SBP: Tensor | Dual, timestep_1B: Tensor | Dual
) -> Tensor | Dual:
    """The velocity ``v_SBP``, and where ``known`` (``[S, B, 1]``) the one that leads to ``x0_SBP``."""
    primal, tangent = _towards(x0_SBP, x_SBP, timestep_1B)
    if not isinstance(v_SBP, Dual):
        return torch.where(known, primal.to(v_SBP.dtype), v_SBP)
    kept = torch.cat([primal, tangent], dim=1).to(v_SBP.stacked.dtype)
    stacked = torch.where(known.repeat(1, 2, 1), kept, v_SBP.stacked)
    graph = None if v_SBP.graph is None else torch.where(known, primal.to(v_SBP.graph.dtype), v_SBP.graph)
    return Dual(stacked, graph)


def _towards(x0_SBP: Tensor, x_SBP: Tensor | Dual, timestep_1B: Tensor | Dual) -> tuple[Tensor, Tensor | None]:
    """The velocity v = (x_in − x0) / s whose x0 is ``x0_SBP``, in fp64, and its tangent (t_x − v t_s) / s for duals."""
    if not isinstance(x_SBP, Dual):
        return (x_SBP.double() - x0_SBP.double()) / (timestep_1B.double()[..., None] / TIME_UNIT), None
    s, t_s = (half.double()[..., None] / TIME_UNIT for half in (timestep_1B.primal, timestep_1B.tangent))
    v = (x_SBP.primal.double() - x0_SBP.double()) / s
    return v, (x_SBP.tangent.double() - v * t_s) / s


def with_graph(function, value: Tensor | Dual) -> Tensor | Dual:
    """A linear ``function`` of a tensor, or of both halves of a dual and of the primal's graph."""
    if not isinstance(value, Dual):
        return function(value)
    return Dual(function(value.stacked), None if value.graph is None else function(value.graph))
