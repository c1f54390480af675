"""Three-axis rotary position embedding of Wan (arXiv 2503.20314, §4.2) and Cosmos, for one contiguous shard of the tokens."""

import torch
from torch import Tensor


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
    Tokens past the grid are padding and get the identity. Raises ValueError for a grid past ``max_position``.
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
