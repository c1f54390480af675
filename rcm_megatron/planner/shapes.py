"""Sizes of a layout that the planner's formulas are written in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from rcm_megatron.config import ParallelConfig, RunConfig
from rcm_megatron.dtypes import DTYPES
from rcm_megatron.planner.inventory import Inventory, held_on_stage
from rcm_megatron.training.footprint import Held


@dataclass(frozen=True)
class Shapes:
    """A configuration on a number of ranks."""

    run: RunConfig
    world_size: int

    @property
    def parallel(self) -> ParallelConfig:
        return self.run.parallel

    @cached_property
    def frozen_roles(self) -> tuple[str, ...]:
        """The networks that do not train."""
        return tuple(role for role in self.run.roles if role not in self.run.trained_roles)

    def in_pieces(self, role: str) -> bool:
        """Whether a network trains and rests in pieces."""
        trains = role in self.run.trained_roles
        return trains and self.run.networks[role].is_in_pieces and self.shards > 1

    def is_gathered(self, role: str) -> bool:
        """Whether passes gather a network's weights."""
        return self.in_pieces(role) or (role in self.frozen_roles and self.run.networks[role].weights != "resident")

    @cached_property
    def tokens(self) -> int:
        """Of a sample, padding not counted."""
        return self.run.latent.num_tokens(self.run.model.patch_size)

    @cached_property
    def local_tokens(self) -> int:
        """Of a sample on each rank, as `TokenLayout` cuts and pads them."""
        shards, multiple = self.parallel.tp * self.parallel.cp, self.run.token_multiple
        return -(-self.tokens // (shards * multiple)) * multiple

    @property
    def context_tokens(self) -> int:
        """Of a sample on the ranks of one tensor-parallel group together."""
        return self.local_tokens * self.parallel.tp

    @property
    def width(self) -> int:
        """Bytes of an element of the hidden state."""
        return DTYPES[self.run.precision.params_dtype].itemsize

    @property
    def shards(self) -> int:
        """Ranks that share optimizer state: dp * cp."""
        return self.world_size // (self.parallel.tp * self.parallel.pp)

    @property
    def samples(self) -> int:
        """Of one update on each rank."""
        return self.run.trainer.global_batch_size // self.parallel.dp(self.world_size)

    @property
    def micro_batches(self) -> int:
        """Of one update."""
        return self.samples // self.run.trainer.micro_batch_size

    def rows(self, role: str) -> dict[str, int]:
        """What linears work on -> rows of a sample on a rank; `tokens` as if every linear of tokens were cut over tp."""
        model = self.run.model_of(role)
        times = self.run.latent.frames // model.patch_size[0] if model.conditional_frames else 1
        return {"tokens": self.context_tokens, "text": model.text_len, "image": model.image.tokens, "times": times}

    def blocks(self, role: str, stage: int) -> int:
        """Of a network on a pipeline stage."""
        parallel = self.run.parallel_of(role)
        ranges = parallel.layer_ranges(self.run.model_of(role).num_layers)
        return sum(len(layers) for layers in ranges[stage :: parallel.pp])

    def pieces(self, stage: int) -> range:
        """Of a network on a pipeline stage, by their place in the network."""
        return range(stage, self.parallel.num_chunks, self.parallel.pp)


Inventories = dict[str, Inventory]
"""By role."""


def held_of(shapes: Shapes, inventories: Inventories, *, stage: int) -> dict[str, Held]:
    """Role -> parameters of a rank of ``stage``."""
    run = shapes.run
    return {
        role: held_on_stage(inventories[role], run.parallel_of(role), run.model_of(role).num_layers, stage=stage)
        for role in run.roles
    }
