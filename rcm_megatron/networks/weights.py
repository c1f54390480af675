"""Where a network's weights come from: a checkpoint of any format, the teacher's, or the run's seed."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from rcm_megatron.checkpoint.models import load_into
from rcm_megatron.checkpoint.sources import CheckpointSource, LazyTensor, open_checkpoint
from rcm_megatron.checkpoint.translate import internal_shapes
from rcm_megatron.config import ModelConfig, RunConfig
from rcm_megatron.parallel.pipeline import unwrapped

Fill = Callable[[RunConfig, str, Sequence[nn.Module]], object]
"""Called with a run, a role and this rank's chunks of its network, bare or in pieces, whose weights are then set."""


def initial_weights(run: RunConfig, role: str) -> CheckpointSource:
    """What the network ``role`` starts from: its own checkpoint, else the teacher's, else random weights of the run's seed."""
    path = run.init_of(role)
    return seeded_weights(run.model_of(role), seed=run.seed) if path is None else open_checkpoint(path)


def load_weights(chunks: Sequence[nn.Module], source: Mapping[str, Tensor]) -> list[nn.Module]:
    """Fill ``chunks`` from an open checkpoint (or tensors in any known naming); every rank reads its own slices."""
    network = unwrapped(chunks[0])
    groups, stage = network.layout.groups, network.stage
    place = {"tp_rank": groups.tp_rank, "tp_size": groups.tp_size, "partial": stage.count > 1}
    load_into(chunks, source, model_config=network.model, **place)
    return list(chunks)


def fill_with_initial_weights(run: RunConfig, role: str, chunks: Sequence[nn.Module]) -> None:
    """Every rank reads its own slices of `initial_weights`."""
    load_weights(chunks, initial_weights(run, role))


def seeded_weights(model: ModelConfig, *, seed: int) -> CheckpointSource:
    """Random full weights in internal names that depend on (seed, name) alone: equal on every layout, made when they are read.

    As diffusers initialises Wan: linears uniform in ±1/√fan_in, norms at one, tables of modulations or positions normal/√hidden_size.
    """
    shapes = internal_shapes(model)
    read = partial(_seeded_tensor, shapes, seed=seed)
    tensors = {name: LazyTensor(shape, partial(read, name)) for name, shape in shapes.items()}
    return CheckpointSource(f"random weights of seed {seed}", tensors)


def _seeded_tensor(shapes: Mapping[str, tuple[int, ...]], name: str, index: tuple[slice, ...], *, seed: int) -> Tensor:
    """Rows ``index`` of one random tensor; it is drawn whole."""
    shape = shapes[name]
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    if "norm" in name:
        return (torch.ones(shape) if name.endswith("weight") else torch.zeros(shape))[index]
    if name.endswith("modulation") or "positions" in name:
        return (torch.randn(shape, generator=generator) / math.sqrt(shape[-1]))[index]
    fan_in = shapes[name.rpartition(".")[0] + ".weight"][1]
    return ((2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(fan_in))[index]
