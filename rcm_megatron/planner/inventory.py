"""What a network is made of: its parameters, where in a pipeline they are, and which of them tensor parallelism cuts.

The formulas of the planner are arithmetic on this. It is read from the network itself, built once without memory, so that no second list
of a family's layers exists.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rcm_megatron.config import ModelConfig, ParallelConfig, RunConfig
from rcm_megatron.registries import family_of
from rcm_megatron.training.flops import rows_of
from rcm_megatron.training.footprint import Held

Place = Literal["block", "first", "last", "every"]
"""Of a parameter in a pipeline: in a block, on the first or last piece, or on every piece (what embeds time and text)."""


@dataclass(frozen=True)
class Weight:
    """One parameter tensor of a network; of a block that of each block."""

    name: str
    place: Place
    shape: tuple[int, ...]
    """Whole, of tp = 1."""
    width: int
    """Bytes an element."""
    is_split: bool
    """Over tensor-parallel ranks."""
    rows: str | None
    """What a linear works on (`Family.flop_rows`); None: no matrix product."""

    @property
    def module(self) -> str:
        """Of which it is a parameter."""
        return self.name.rpartition(".")[0]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def on(self, tp: int) -> int:
        """Elements on each of ``tp`` ranks."""
        return self.elements // tp if self.is_split else self.elements


Inventory = tuple[Weight, ...]


def _held(weights: Sequence[Weight], *, tp: int) -> Held:
    """Of these weights one rank of ``tp``."""
    sizes = [(weight.on(tp), weight.width) for weight in weights]
    return Held(
        sum(n for n, _ in sizes), sum(n * width for n, width in sizes), sum(n for n, width in sizes if width < 4)
    )


def held_on_stage(inventory: Inventory, parallel: ParallelConfig, num_layers: int, *, stage: int) -> Held:
    """Of a network a rank of pipeline stage ``stage``."""
    of = {place: _held([w for w in inventory if w.place == place], tp=parallel.tp) for place in Place.__args__}
    pieces = parallel.layer_ranges(num_layers)
    total = Held()
    for index in range(stage, len(pieces), parallel.pp):
        total += of["every"]
        for _ in pieces[index]:
            total += of["block"]
        if index == 0:
            total += of["first"]
        if index == len(pieces) - 1:
            total += of["last"]
    return total


def held_of_block(inventory: Inventory, *, tp: int) -> Held:
    """Of one block of a network a rank."""
    return _held([w for w in inventory if w.place == "block"], tp=tp)


def place_of(name: str) -> Place:
    """By the name, as DiffusionTransformer says what is built where."""
    start = name.split(".")[0]
    return {"blocks": "block", "patch_embedding": "first", "head": "last"}.get(start, "every")


def read_inventory(run: RunConfig, role: str) -> Inventory:
    """Of the network ``role`` of ``run``. Call it in a process of its own, which this makes a rank of a job that is not there."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from rcm_megatron.checkpoint.translate import internal_shapes
    from rcm_megatron.dryrun.world import become
    from rcm_megatron.networks.build import build_network
    from rcm_megatron.parallel.groups import initialize_parallel

    model = run.model_of(role)
    cut = _smallest_cut(model)
    become(0, world_size=cut, kind="gpu")
    networks = {role: replace(run.networks[role], model=replace(model, num_layers=1), chunk_layers=None)}
    small = replace(run, networks={**run.networks, **networks}, parallel=ParallelConfig(tp=cut))
    whole, rows = internal_shapes(small.model_of(role)), family_of(model).flop_rows
    with FakeTensorMode():
        (chunk,) = build_network(small, role, initialize_parallel(small.parallel))
    found = []
    for name, parameter in chunk.named_parameters():
        is_linear = name.endswith(".weight") and len(whole[name]) == 2
        found.append(
            Weight(
                name=name.removeprefix("blocks.0."),
                place=place_of(name),
                shape=tuple(whole[name]),
                width=parameter.element_size(),
                is_split=parameter.numel() < math.prod(whole[name]),
                rows=rows_of(name, rows) if is_linear else None,
            )
        )
    return tuple(found)


def _smallest_cut(model: ModelConfig) -> int:
    """The smallest degree of tensor parallelism above 1 that cuts the network; 1 if none does."""
    common = math.gcd(model.num_heads, model.ffn_hidden_size)
    return next((factor for factor in range(2, common + 1) if common % factor == 0), 1)
