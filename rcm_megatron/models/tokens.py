"""Latents to shards of patch tokens and back: the layout in which every network and every loss works.

x_BCTHW latents; x_SBP tokens of this rank, P = C*pt*ph*pw in the order (C, pt, ph, pw). Tokens run row-major over the patch grid
(T', H', W'), are padded at the end to a multiple of tp*cp (times what the precision asks of a shard), and are cut into contiguous
shards: context parallel outermost, tensor (sequence) parallel inside.
"""

import torch
from torch import Tensor

from rcm_megatron.parallel.groups import ParallelGroups
from rcm_megatron.parallel.mappings import gather_tokens, sum_over


class TokenLayout:
    """How the tokens of one latent shape lie on the ranks of a sample.

    ``multiple_of``: a rank's tokens are a multiple of it (FP8 asks for that), by more padding at the end.
    Raises ValueError when the latent does not divide into patches.
    """

    def __init__(
        self,
        latent_shape: tuple[int, int, int, int],
        patch: tuple[int, int, int],
        *,
        groups: ParallelGroups,
        multiple_of: int = 1,
    ) -> None:
        channels, *extent = latent_shape
        for name, size, step in zip(("frames", "height", "width"), extent, patch, strict=True):
            if size % step:
                raise ValueError(f"latent.{name}={size} must divide by its patch size {step}; crop or pad the latent")
        self.latent_shape, self.patch, self.groups = tuple(latent_shape), tuple(patch), groups
        self.grid = tuple(size // step for size, step in zip(extent, patch, strict=True))
        self.patch_features = channels * patch[0] * patch[1] * patch[2]
        self.num_tokens = self.grid[0] * self.grid[1] * self.grid[2]
        self.local_tokens = -(-self.num_tokens // (groups.token_shards * multiple_of)) * multiple_of
        self.padded_tokens = self.local_tokens * groups.token_shards
        self.start = groups.token_shard * self.local_tokens
        self.valid_local = min(max(self.num_tokens - self.start, 0), self.local_tokens)

    @property
    def num_elements(self) -> int:
        """Elements of one sample, padding not counted."""
        return self.num_tokens * self.patch_features

    @property
    def context_tokens(self) -> int:
        """Tokens of a context-parallel rank: its tensor-parallel shards together."""
        return self.local_tokens * self.groups.tp_size

    @property
    def context_start(self) -> int:
        return self.groups.cp_rank * self.context_tokens

    def grid_indices(self) -> tuple[Tensor, Tensor, Tensor]:
        """(frame, row, column) of each token of this rank in the patch grid, ``[S]`` each; of padding, the last token's."""
        _, rows, columns = self.grid
        index = torch.arange(self.start, self.start + self.local_tokens).clamp(max=self.num_tokens - 1)
        return index // (rows * columns), index // columns % rows, index % columns

    def patchify(self, x_BCTHW: Tensor, *, channels: int | None = None) -> Tensor:
        """All tokens ``[T'H'W', B, P]`` of whole latents, or of ``channels`` other channels of their size.

        Raises ValueError for another shape.
        """
        channels = channels or self.latent_shape[0]
        shape = (channels, *self.latent_shape[1:])
        if tuple(x_BCTHW.shape[1:]) != shape:
            raise ValueError(f"latents of {tuple(x_BCTHW.shape[1:])} do not have the layout's shape {shape}")
        (t, h, w), (pt, ph, pw) = self.grid, self.patch
        x = x_BCTHW.reshape(-1, channels, t, pt, h, ph, w, pw)
        return x.permute(2, 4, 6, 0, 1, 3, 5, 7).reshape(self.num_tokens, -1, channels * pt * ph * pw)

    def unpatchify(self, x_SBP: Tensor) -> Tensor:
        """Whole latents from all tokens; the inverse of :meth:`patchify`."""
        (t, h, w), (pt, ph, pw), channels = self.grid, self.patch, self.latent_shape[0]
        x = x_SBP.reshape(t, h, w, -1, channels, pt, ph, pw).permute(3, 4, 0, 5, 1, 6, 2, 7)
        return x.reshape(-1, *self.latent_shape)

    def shard(self, x_BCTHW: Tensor, *, channels: int | None = None) -> Tensor:
        """This rank's tokens ``[S, B, P]``; padding is exactly zero. ``channels`` as in :meth:`patchify`."""
        tokens = self.patchify(x_BCTHW, channels=channels)[self.start : self.start + self.valid_local]
        shard = tokens.new_zeros((self.local_tokens, *tokens.shape[1:]))
        shard[: self.valid_local] = tokens
        return shard

    def gather(self, x_SBP: Tensor) -> Tensor:
        """Whole latents on every rank of the sample from the shards (no gradient)."""
        return self.unpatchify(gather_tokens(x_SBP, group=self.groups.tp_cp)[: self.num_tokens])

    def mask(self, x_SBP: Tensor) -> Tensor:
        """Set padding to exactly zero, whatever (even NaN) the network left there."""
        if self.valid_local == self.local_tokens:
            return x_SBP
        valid = torch.arange(self.local_tokens, device=x_SBP.device) < self.valid_local
        return torch.where(valid[:, None, None], x_SBP, torch.zeros((), dtype=x_SBP.dtype, device=x_SBP.device))

    def sum_per_sample(self, x_SBP: Tensor) -> Tensor:
        """Sum over all elements of each sample, on all ranks: ``[1, B, 1]`` (no gradient)."""
        return sum_over(x_SBP.detach().sum(dim=(0, 2), keepdim=True), groups=[self.groups.tp_cp])
