"""Three-axis rotary position embedding of Wan (arXiv 2503.20314, §4.2) and Cosmos, for one contiguous shard of the tokens."""

import torch
from torch import Tensor

from rcm_megatron.dual import Dual
from rcm_megatron.models.dual_ops import upcast


def rope_frequencies(
    grid: tuple[int, int, int],
    head_dim: int,
    *,
    start: int,
    length: int,
    max_position: int,
    thetas: tuple[float, float, float] = (10000.0, 10000.0, 10000.0),
    frame_step: float = 1.0,
) -> Tensor:
    """Complex rotations ``[length, head_dim / 2]`` (complex128) of tokens ``start … start + length`` of ``grid`` = (T', H', W').

    The head is split over the axes as in :func:`split_head`, each with its base in ``thetas``; a frame lasts ``frame_step`` positions.
    Tokens past the grid are padding and get the identity.
    """
    if max(grid) > max_position:
        raise ValueError(
            f"a latent grid of {grid} patches exceeds rope_max_seq_len={max_position}; "
            "lower the resolution or raise model.rope_max_seq_len to what the checkpoint was trained for"
        )
    frames, rows, columns = grid
    index = torch.arange(start, start + length)
    positions = ((index // (rows * columns)).double() * frame_step, index // columns % rows, index % columns)
    angles = []
    for position, dim, theta in zip(positions, split_head(head_dim), thetas, strict=True):
        inverse = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles.append(position[:, None].double() * inverse)
    angle = torch.cat(angles, dim=1) * (index < frames * rows * columns)[:, None]
    return torch.polar(torch.ones_like(angle), angle)


def split_head(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head for (frames, rows, columns): ``d − 4⌊d/6⌋, 2⌊d/6⌋, 2⌊d/6⌋``."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def stretched_thetas(head_dim: int, scale: tuple[float, float, float]) -> tuple[float, ...]:
    """Bases that stretch each axis by ``scale``, "NTK-aware": ``10000 scale^(d / (d − 2))`` for an axis of d channels (Cosmos)."""
    return tuple(10000.0 * s ** (d / (d - 2)) for s, d in zip(scale, split_head(head_dim), strict=True))


def apply_rope(x_SBNK: Tensor | Dual, rotation_SK: Tensor) -> Tensor | Dual:
    """Rotate interleaved pairs of the head dimension in fp32; linear, so a Dual rotates as one tensor."""
    if isinstance(x_SBNK, Dual):
        return Dual(_rotate(x_SBNK.stacked, rotation_SK))
    return _rotate(x_SBNK, rotation_SK)


def _rotate(x_SBNK: Tensor, rotation_SK: Tensor) -> Tensor:
    wide = upcast(x_SBNK).contiguous()
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    rotation = rotation_SK.to(pairs.dtype)[:, None, None, :]
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x_SBNK.dtype)


def apply_rope_halves(x_SBNK: Tensor | Dual, rotation_SK: Tensor) -> Tensor | Dual:
    """As :func:`apply_rope`, with pairs (k, k + K/2): the halves of a head are real and imaginary parts (Cosmos)."""
    if isinstance(x_SBNK, Dual):
        return Dual(_rotate_halves(x_SBNK.stacked, rotation_SK))
    return _rotate_halves(x_SBNK, rotation_SK)


def _rotate_halves(x_SBNK: Tensor, rotation_SK: Tensor) -> Tensor:
    real, imaginary = upcast(x_SBNK).chunk(2, dim=-1)
    rotation = rotation_SK[:, None, None, :]
    cos, sin = rotation.real.to(real.dtype), rotation.imag.to(real.dtype)
    return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=-1).to(x_SBNK.dtype)
