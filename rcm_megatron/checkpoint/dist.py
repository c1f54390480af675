"""Whole-run checkpoints through Megatron's dist_checkpointing (torch_dist format), resumable on another layout.

A checkpoint holds, for every trained network NAME, tensors under `NAME.model.*` (the weights), `NAME.main.*`, `NAME.exp_avg.*`,
`NAME.exp_avg_sq.*` (fp32 main parameters and Adam's moments) and `NAME.ema.*`, each in the shape of the model parameter and without a
trace of dp, so tp, pp, cp and dp may all change; and in common.pt the run's plain state. Megatron's own `fully_reshardable`
optimizer format is not used: it gathers everything on every rank, and it misplaces parameters of a buffer with several
buckets. Here each rank writes the parameters that begin in its own piece, after receiving the ends of those that it shares.
`saver.py` brings them to disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor, nn

from rcm_megatron.checkpoint.torch_dist import read_metadata
from rcm_megatron.errors import CheckpointError
from rcm_megatron.parallel.optimizer_shards import OwnedShard, owned_shards
from rcm_megatron.parallel.sharded import ShardedDataParallel

FORMAT = 2
"""2: counters by role, and the architectures that were trained."""


@dataclass(kw_only=True)
class NetworkState:
    """A trained network: what of it a checkpoint holds."""

    chunks: Sequence[_BaseDataParallel]
    optimizer: MegatronOptimizer
    ema: Sequence[Tensor] | None = None
    """The averages of `owned_shards(optimizer)`, in that order: `PowerEMA.shards`."""

    @property
    def in_pieces(self) -> bool:
        """Whether no rank holds its parameters: they are their main parameters, rounded."""
        return isinstance(self.chunks[0], ShardedDataParallel)


def state_to_save(networks: Mapping[str, NetworkState], progress: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds: this rank's tensors, not copied, and plain state; call on all ranks, which exchange ends of shards.

    `progress` is the run's plain state, equal on all ranks: dicts, lists, tuples, numbers, strings, None and tensors (iteration,
    stage, data position, counters, random state)."""
    _require_plain(progress, "progress")
    state: dict[str, Any] = {
        "format": FORMAT,
        "progress": progress,
        "adam_steps": {name: _adam_step(network.optimizer) for name, network in networks.items()},
        "tensors": {},
    }
    for name, network in networks.items():
        weights = _weights(name, network.chunks)
        state["tensors"] |= _optimizer_tensors(network, weights) | ({} if network.in_pieces else weights)
    return state


def load_checkpoint(checkpoint: str | Path, *, networks: Mapping[str, NetworkState]) -> dict[str, Any]:
    """Fill weights, optimizers and EMA of `networks` from a complete checkpoint, on any layout; returns `progress`.

    A network or an EMA that only one of them has is left as it is. Raises CheckpointingException where a tensor's shape differs."""
    checkpoint = Path(checkpoint)
    read_metadata(checkpoint)  # PyTorch would unpickle anything
    common = _common_state(checkpoint)
    keys = read_metadata(checkpoint).state_dict_metadata
    networks = {name: network for name, network in networks.items() if name in common["adam_steps"]}
    tensors: dict[str, ShardedTensor] = {}
    partial: dict[str, tuple[OwnedShard, Tensor]] = {}
    for name, network in networks.items():
        weights = _weights(name, network.chunks)
        tensors |= {} if network.in_pieces else weights
        for key, sharded, shard, target in _load_requests(network, weights):
            if sharded.key.split(".", 2)[1] == "ema" and sharded.key not in keys:
                continue
            tensors[key] = sharded
            if not shard.whole:
                partial[key] = (shard, target)
    loaded = dist_checkpointing.load({"tensors": tensors}, str(checkpoint), strict=StrictHandling.RAISE_UNEXPECTED)
    for key, (shard, target) in partial.items():
        target.copy_(loaded["tensors"][key].view(-1)[shard.start : shard.stop])
    for name, network in networks.items():
        for group in network.optimizer.param_groups:
            group["step"] = common["adam_steps"][name]
    return common["progress"]


def load_weights(checkpoint: str | Path, model_chunks: Iterable[nn.Module], *, network: str, kind: str) -> None:
    """Fill the parameters of `model_chunks` alone, for sampling, export or another run's start, on any layout.

    `kind`: "model", "main" (its fp32 original) or "ema". Values are rounded to each parameter's dtype."""
    checkpoint = Path(checkpoint)
    read_metadata(checkpoint)  # PyTorch would unpickle anything
    weights = _weights(network, model_chunks)
    tensors = {key: replace(sharded, key=_key(sharded, kind)) for key, sharded in weights.items()}
    dist_checkpointing.load({"tensors": tensors}, str(checkpoint), validate_access_integrity=False)


def _common_state(checkpoint: Path) -> dict[str, Any]:
    """common.pt: format, progress and step counts, of the format that is asked for."""
    common = dist_checkpointing.load_common_state_dict(str(checkpoint))
    if common["format"] != FORMAT:
        raise CheckpointError(
            f"{checkpoint}: got format {common['format']}; need {FORMAT}; fix: load it with the version of "
            "rcm_megatron that wrote it"
        )
    return common


# ---- tensors


def _weights(network: str, chunks: Iterable[nn.Module]) -> dict[str, ShardedTensor]:
    """The model's own tensors, `NAME.model.*`, under a key that is unique on this rank."""
    tensors = {}
    for index, chunk in enumerate(chunks):
        module = chunk.module if isinstance(chunk, _BaseDataParallel) else chunk
        for name, sharded in module.sharded_state_dict(prefix=f"{network}.model.").items():
            if not isinstance(sharded, ShardedTensor):
                raise TypeError(
                    f"{name}: got {type(sharded).__name__}; need a ShardedTensor; fix: its sharded_state_dict"
                )
            tensors[f"{index} {name}"] = sharded
    return tensors


def _key(weight: ShardedTensor, kind: str) -> str:
    """The checkpoint's key of another tensor of the same parameter: `NAME.model.*` -> `NAME.<kind>.*`."""
    network, _, name = weight.key.split(".", 2)
    return f"{network}.{kind}.{name}"


def _describe(weight: ShardedTensor, kind: str, tensor: Tensor, *, owner: int) -> ShardedTensor:
    """`tensor` placed in the global tensor as `weight` is. `owner` 0: this rank speaks for it."""
    replica = (*weight.replica_id[:2], owner)
    return replace(weight, key=_key(weight, kind), data=tensor, dtype=tensor.dtype, replica_id=replica)


def _shards_and_states(network: NetworkState) -> list[tuple[OwnedShard, dict[str, Tensor]]]:
    """Each owned shard with its fp32 tensors by kind, in the order of buckets, the same on all ranks of dp*cp."""
    shards = owned_shards(network.optimizer)
    pairs = []
    for index, shard in enumerate(shards):
        state = {"main": shard.main.detach(), **shard.adam_state()}
        if network.ema is not None:
            state["ema"] = network.ema[index]
        pairs.append((shard, state))
    return sorted(pairs, key=lambda pair: pair[0].bucket)


def _weight_of(weights: Mapping[str, ShardedTensor]) -> dict[int, tuple[str, ShardedTensor]]:
    return {id(sharded.data): (key, sharded) for key, sharded in weights.items()}


def _find_weight(weight_of: Mapping[int, tuple[str, ShardedTensor]], shard: OwnedShard) -> tuple[str, ShardedTensor]:
    try:
        return weight_of[id(shard.parameter)]
    except KeyError:
        raise KeyError(
            f"{shard.name}: got no ShardedTensor whose data is the parameter itself; need one; fix: build the module's "
            "sharded_state_dict from named_parameters or state_dict(keep_vars=True)"
        ) from None


def _optimizer_tensors(network: NetworkState, weights: Mapping[str, ShardedTensor]) -> dict[str, ShardedTensor]:
    """What this rank writes: the main parameter, moments and EMA of each parameter that begins in its piece; of a network in pieces also
    the parameter."""
    weight_of, tensors = _weight_of(weights), {}
    for shard, state in _complete(_shards_and_states(network)):
        key, weight = _find_weight(weight_of, shard)
        if network.in_pieces:
            state = state | {"model": state["main"].to(shard.parameter.dtype)}
        for kind, tensor in state.items():
            tensors[f"{key} {kind}"] = _describe(weight, kind, tensor.view(shard.parameter.shape), owner=0)
    return tensors


def _complete(pairs: list[tuple[OwnedShard, dict[str, Tensor]]]) -> list[tuple[OwnedShard, dict[str, Tensor]]]:
    """The parameters whose first owner this rank is, with all their elements: other owners send theirs."""
    mine, messages, arriving = [], [], []
    for shard, state in pairs:
        if shard.whole:
            mine.append((shard, state))
            continue
        stacked = torch.stack(list(state.values()))
        first, *others = shard.owners
        if shard.group.rank() != first:
            messages.append(_message(dist.isend, stacked, first, shard.group))
            continue
        whole = stacked.new_empty(len(state), shard.parameter.numel())
        whole[:, shard.start : shard.stop] = stacked
        for other in others:
            elements = shard.elements_of(other)
            part = stacked.new_empty(len(state), elements.stop - elements.start)
            messages.append(_message(dist.irecv, part, other, shard.group))
            arriving.append((whole[:, elements], part))
        mine.append((shard, dict(zip(state, whole, strict=True))))
    for request in dist.batch_isend_irecv(messages) if messages else ():
        request.wait()
    for place, part in arriving:
        place.copy_(part)
    return mine


def _message(operation, tensor: Tensor, rank_in_group: int, group: dist.ProcessGroup) -> dist.P2POp:
    return dist.P2POp(operation, tensor, dist.get_global_rank(group, rank_in_group), group)


def _load_requests(network: NetworkState, weights: Mapping[str, ShardedTensor]):
    """(key, request, shard, target) for each tensor of each owned shard.

    A whole shard is read in place; of a parameter shared with other ranks all is read, and the shard copied from it."""
    weight_of = _weight_of(weights)
    for shard, state in _shards_and_states(network):
        key, weight = _find_weight(weight_of, shard)
        shape, owner = shard.parameter.shape, shard.group.rank() - shard.owners[0]
        for kind, target in state.items():
            tensor = target.view(shape) if shard.whole else torch.empty(shape, dtype=target.dtype)
            yield f"{key} {kind}", _describe(weight, kind, tensor, owner=owner), shard, target


def _adam_step(optimizer: MegatronOptimizer) -> int:
    return max((int(group.get("step", 0)) for group in optimizer.param_groups), default=0)


# ---- trust


def _require_plain(value: Any, path: str) -> None:
    """`progress` must load with torch.load(weights_only=True), which runs no code: say now what would not."""
    if isinstance(value, dict):
        for key, item in value.items():
            _require_plain(item, f"{path}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _require_plain(item, f"{path}[{index}]")
    elif type(value) not in (bool, int, float, str, bytes, type(None), Tensor):
        raise TypeError(
            f"{path}: got {type(value).__name__}; need plain data (dict, list, tuple, numbers, str, bytes, None, Tensor); "
            "fix: convert it before saving"
        )
