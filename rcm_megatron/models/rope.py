"""Three-axis rotary position embedding of Wan (arXiv 2503.20314, §4.2), for one contiguous shard of the tokens."""

import torch
from torch import Tensor


def rope_frequencies(
    grid: tuple[int, int, int], head_dim: int, *, start: int, length: int, max_position: int, theta: float = 10000.0
) -> Tensor:
    """Complex rotations ``[length, head_dim / 2]`` (complex128) of tokens ``start … start + length`` of ``grid`` = (T', H', W').

    The head is split over the axes as ``d − 4⌊d/6⌋, 2⌊d/6⌋, 2⌊d/6⌋``. Tokens past the grid are padding and get the identity.
    """
    if max(grid) > max_position:
        raise ValueError(
            f"a latent grid of {grid} patches exceeds rope_max_seq_len={max_position}; "
            "lower the resolution or raise model.rope_max_seq_len to what the checkpoint was trained for"
        )
    side = 2 * (head_dim // 6)
    frames, rows, columns = grid
    index = torch.arange(start, start + length)
    positions = (index // (rows * columns), index // columns % rows, index % columns)
    angles = []
    for position, dim in zip(positions, (head_dim - 2 * side, side, side), strict=True):
        inverse = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles.append(position[:, None].double() * inverse)
    angle = torch.cat(angles, dim=1) * (index < frames * rows * columns)[:, None]
    return torch.polar(torch.ones_like(angle), angle)
