"""Runs the trainer's own iterations under a meter, one of each kind of update, and says in numbers what they took."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from torch import Tensor, nn

from rcm_megatron.config import RunConfig
from rcm_megatron.dryrun.ledger import Ledger
from rcm_megatron.dryrun.meter import Meter
from rcm_megatron.dryrun.updates import Update, updates_of
from rcm_megatron.parallel.groups import ParallelGroups
from rcm_megatron.parallel.optimizer_shards import gradient_buffers, owned_shards
from rcm_megatron.parallel.sharded import ShardedDataParallel
from rcm_megatron.training.surroundings import Surroundings
from rcm_megatron.training.trainer import Trainer

Numbers = dict[str, Any]
"""Dicts in dicts, with numbers at their ends."""
SEPARATOR = " | "
"""Between the parts of a key: (kind, site), or the fields of a `counts.Route`."""


def measure(
    run: RunConfig,
    groups: ParallelGroups,
    meter: Meter,
    *,
    meets: Surroundings,
    progress: Callable[[str], None] = lambda line: None,
) -> Numbers:
    """Call it inside ``meter``, in which nothing was built before. Bytes, FLOPs and counts of this rank:

    standing: kind -> bytes from step to step; updates: name of the update -> its `_numbers`.
    """
    run = replace(run, trainer=replace(run.trainer, sample_every=0))
    with meter.noting_activations():
        trainer = Trainer(run, groups, meets=meets)
        meter.follow(trainer.timers)
        _allocate_moments(trainer)
        _tag_standing(trainer, meter.device)
        found: Numbers = {"standing": meter.device.by_kind(), "updates": {}}
        for update in updates_of(run):
            progress(update.name)
            found["updates"][update.name] = _iterate(trainer, meter, update)
    return found


def _allocate_moments(trainer: Trainer) -> None:
    """As they are after the first update of each network."""
    with trainer.state.residency.state():
        for network in trainer.state.trained.values():
            for shard in owned_shards(network.optimizer):
                shard.adam_state()


def _tag_standing(trainer: Trainer, ledger: Ledger) -> None:
    """Say of what stays from step to step what it is; weights that several roles share are the first one's."""
    known: set[int] = set()
    for role, chunks in trainer.state.networks.items():
        for chunk in chunks:
            for parameter in chunk.parameters():
                if id(parameter) in known:
                    continue
                known.add(id(parameter))
                local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                ledger.tag(local.detach(), f"weights {role}")
            for weights in _weight_buffers(chunk):
                ledger.tag(weights, f"weights {role}")
            for gradients in gradient_buffers(chunk) if isinstance(chunk, _BaseDataParallel) else ():
                ledger.tag(gradients, f"gradients {role}")
    for role, network in trainer.state.trained.items():
        for shard in owned_shards(network.optimizer):
            own = [] if shard.main_is_weight else [shard.main]
            for state in (*own, *shard.adam_state().values()):
                ledger.tag(state, f"optimizer {role}")
        for average in () if network.ema is None else network.ema.shards:
            ledger.tag(average, f"EMA {role}")
    ledger.settle()


def _weight_buffers(chunk: nn.Module) -> list[Tensor]:
    """What holds a chunk's weights beside its parameters."""
    if isinstance(chunk, ShardedDataParallel):
        return [flat.main for flat in chunk.flats]
    buffers = chunk.buffers if isinstance(chunk, DistributedDataParallel) else ()
    return [buffer.param_data for buffer in buffers if buffer.param_data is not None]


def _iterate(trainer: Trainer, meter: Meter, update: Update) -> Numbers:
    gc.collect()  # cycles of what came before, which Python frees when it likes
    meter.device.settle()
    meter.restart()
    trainer.progress.iteration = update.iteration
    trainer.iterate()
    return _numbers(meter)


def _numbers(meter: Meter) -> Numbers:
    """Of one update.

    held: phase -> "kind | site" -> bytes at the phase's peak; host: most bytes of tensors in the host's memory; flops: phase -> operation;
    launches, host_reads: phase; traffic: "phase | group | ranks | operation | link" -> calls, message and sent bytes.
    """
    counts, held = meter.counts, meter.device.held_at_peaks()
    return {
        "held": {phase: {SEPARATOR.join(owner): n for owner, n in owners.items()} for phase, owners in held.items()},
        "host": {"peak": 0 if meter.host is meter.device else meter.host.peak},
        "flops": {phase: dict(of) for phase, of in counts.flops.items()},
        "launches": dict(counts.launches),
        "host_reads": dict(counts.host_reads),
        "traffic": {SEPARATOR.join(map(str, vars(r).values())): dict(vars(t)) for r, t in counts.traffic.items()},
    }
