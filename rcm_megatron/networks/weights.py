"""Where a network's weights come from: a checkpoint of any format, the teacher's, or the run's seed."""

import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from rcm_megatron.checkpoint.models import load_into
from rcm_megatron.checkpoint.second_time import holds_second_time, second_time_names, start_of, with_second_time
from rcm_megatron.checkpoint.sources import CheckpointSource, LazyTensor, open_checkpoint
from rcm_megatron.checkpoint.translate import internal_shapes
from rcm_megatron.config import ModelConfig, RunConfig
from rcm_megatron.parallel.pipeline import unwrapped

log = logging.getLogger(__name__)

Fill = Callable[[RunConfig, str, Sequence[nn.Module]], object]
"""Called with a run, a role and this rank's chunks of its network, bare or in pieces, whose weights are then set."""


def initial_weights(run: RunConfig, role: str) -> CheckpointSource:
    """What the network ``role`` starts from: its own checkpoint, else the teacher's, else random weights of the run's seed.

    A trained network of two times may start from one of one: what the second adds then changes nothing yet.
    """
    path, model = run.init_of(role), run.model_of(role)
    if path is None:
        return seeded_weights(model, seed=run.seed)
    source = open_checkpoint(path)
    if not model.second_time or role not in run.trained_roles or holds_second_time(source, model):
        return source
    log.info("%s: %s is of one time; its second time starts without effect", role, source.where)
    return with_second_time(source, model)


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
    A second time starts without effect.
    """
    shapes = internal_shapes(model)
    read = partial(_seeded_tensor, shapes, seed=seed)
    tensors = {name: LazyTensor(shape, partial(read, name)) for name, shape in shapes.items()}
    for name in second_time_names(model):
        copied, shape = start_of(name, model), shapes[name]
        zeros = LazyTensor(shape, lambda index, shape=shape: torch.zeros(shape)[index])
        tensors[name] = zeros if copied is None else tensors[copied]
    return CheckpointSource(f"random weights of seed {seed}", tensors)


def _seeded_tensor(shapes: Mapping[str, tuple[int, ...]], name: str, index: tuple[slice, ...], *, seed: int) -> Tensor:
    """Rows ``index`` of one random tensor; it is drawn whole."""
    shape = shapes[name]
    if "norm" in name:
        return (torch.ones(shape) if name.endswith("weight") else torch.zeros(shape))[index]
    if name.endswith("modulation") or "positions" in name:
        return (torch.randn(shape, generator=_generator(f"{seed}/{name}")) / math.sqrt(shape[-1]))[index]
    fan_in = shapes[name.rpartition(".")[0] + ".weight"][1]
    return seeded_uniform(f"{seed}/{name}", shape, fan_in=fan_in)[index]


def seeded_uniform(key: str, shape: tuple[int, ...], *, fan_in: int) -> Tensor:
    """Uniform in ±1/√fan_in, by ``key`` alone."""
    return (2 * torch.rand(shape, generator=_generator(key)) - 1) / math.sqrt(fan_in)


def _generator(key: str) -> torch.Generator:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
