"""The networks of a run, and one update of one of them: what the trainer, the benchmarks and the tests have in common."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from rcm_megatron.checkpoint.dist import NetworkState, load_checkpoint
from rcm_megatron.checkpoint.resuming import saved_averages
from rcm_megatron.config import RunConfig, StageConfig
from rcm_megatron.config.roles import first_of, parts_of
from rcm_megatron.dtypes import DTYPES
from rcm_megatron.models.layer_specs import LayerSpec, choose_layer_spec
from rcm_megatron.networks.adapters import Bases, check_targets
from rcm_megatron.networks.build import build_network, frozen
from rcm_megatron.networks.kernels import choose_kernels
from rcm_megatron.networks.roles import Networks
from rcm_megatron.networks.sharding import shard_weights
from rcm_megatron.networks.weights import Fill, fill_with_initial_weights
from rcm_megatron.objectives.plan import Step, optimizer_resets
from rcm_megatron.objectives.samples import Samples
from rcm_megatron.objectives.work import ObjectiveResult
from rcm_megatron.parallel.groups import ParallelGroups
from rcm_megatron.parallel.pipeline import reduce_gradients, unwrapped
from rcm_megatron.platform.device import has_gpu
from rcm_megatron.registries import OBJECTIVES
from rcm_megatron.runtime.timers import Timers, attach
from rcm_megatron.training.footprint import log_footprint
from rcm_megatron.training.memory import Residency, check_memory
from rcm_megatron.training.metrics import reduce_objectives
from rcm_megatron.training.optimizer import cut_in_pieces, wrap_ddp
from rcm_megatron.training.step import accumulate_step
from rcm_megatron.training.trained import TrainedNetwork, UpdateCounters


@dataclass(frozen=True, eq=False)
class Updated:
    """What one update did."""

    objectives: dict[str, ObjectiveResult]
    """This rank's, by name."""
    metrics: dict[str, float]
    """Over the global batch, the same on every rank."""
    updated: bool
    """False: it was refused, for non-finite gradients, or because a loss is none (all samples were dropped)."""
    gradient_norm: float
    learning_rate: float


class TrainState:
    """The networks of ``run`` on this rank (`build_networks`); `trained` are those that a stage trains, by role."""

    def __init__(self, run: RunConfig, networks: Networks, *, timers: Timers | None = None) -> None:
        self.run, self.networks, self.groups, self.timers = (
            run,
            networks,
            networks.layout.groups,
            timers or timers_of(run),
        )
        self.trained = {role: TrainedNetwork(role, networks[role], run.networks[role]) for role in run.trained_roles}
        attach(self.timers, list(networks.values()), [network.optimizer for network in self.trained.values()])
        self.residency = Residency(
            self.trained,
            offload=[role for role, network in self.trained.items() if network.settings.offload_optimizer],
            free_idle_gradients=run.memory.free_idle_gradients,
        )

    def update(self, step: Step, samples: Samples, *, stage: StageConfig) -> Updated:
        """One update of the network that ``step`` trains, from this rank's samples; call it on all ranks."""
        network = self.trained[step.trained]
        self.residency.begin_step(step.trained)
        network.zero_gradients()
        settings = {"distillation": self.run.distillation, "objectives": self.run.objectives}
        results = accumulate_step(step, self.networks, samples, stage=stage, **settings)
        reduce_gradients(network.chunks)
        peak_lr = stage.lr.get(step.trained, stage.lr.get(first_of(step.trained)))
        metrics = reduce_objectives(results, self.groups)
        counts = all(math.isfinite(metrics[f"{name}/loss"]) for name in results)
        with self.timers.phase("optimizer"), self.residency.state(step.trained):
            outcome = network.update(self.groups, peak_lr=peak_lr, refused=not counts)
        return Updated(
            objectives=results,
            metrics=metrics,
            updated=outcome.updated,
            gradient_norm=outcome.gradient_norm,
            learning_rate=network.learning_rate,
        )

    def begin_stage(self, index: int) -> tuple[str, ...]:
        """Before the first update of stage ``index``, on all ranks: the roles whose optimizer begins anew with it."""
        roles = parts_of(optimizer_resets(self.run.stages, index), self.trained)
        for role in roles:
            with self.residency.state(role):
                self.trained[role].reset_optimizer()
        return roles

    @property
    def counters(self) -> dict[str, dict[str, int]]:
        """Role -> counters, plain."""
        return {role: asdict(network.counters) for role, network in self.trained.items()}

    @property
    def refused_updates(self) -> int:
        """Of all networks."""
        return sum(network.counters.refused_updates for network in self.trained.values())

    @contextmanager
    def states(self) -> Iterator[Mapping[str, NetworkState]]:
        """What of each trained network a checkpoint holds, on the device inside."""
        with self.residency.state():
            yield {role: network.state for role, network in self.trained.items()}

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Take up what a checkpoint holds of the networks, on any layout; returns the run's plain state in it."""
        with self.states() as states:
            saved = load_checkpoint(checkpoint, networks=states)
            averages = saved_averages(checkpoint)
            for role, network in self.trained.items():
                if role in saved["networks"]:
                    network.counters = UpdateCounters(**saved["networks"][role])
                    if network.ema is not None and role not in averages:
                        network.ema.restart()
        return saved


def timers_of(run: RunConfig) -> Timers:
    """Timers with the phases of the objectives of ``run``."""
    return Timers(phase for name in run.objectives_used for phase in OBJECTIVES[name].phases)


def build_networks(run: RunConfig, groups: ParallelGroups, *, fill: Fill = fill_with_initial_weights) -> Networks:
    """The networks that the stages of ``run`` need, with the weights of ``fill``.

    Trained ones are under Megatron's DDP or in pieces, the others frozen.
    """
    check_memory(run, has_gpu=has_gpu())
    choose_kernels(run, run.roles, dtype=DTYPES[run.precision.params_dtype])
    # All of them before any weight is read, because a machine without Transformer Engine may refuse.
    specs = {
        role: choose_layer_spec(run.precision, fp8_role=role if run.networks[role].fp8 else None) for role in run.roles
    }
    check_targets(run)
    log_footprint(run, groups, world_size=dist.get_world_size())
    bases = Bases(run, lambda role: _build_frozen(run, role, groups, specs[role], fill))
    chunks = {role: _build(run, role, groups, specs[role], fill, bases) for role in run.roles}
    return Networks(layout=unwrapped(next(iter(chunks.values()))[0]).layout, **chunks)


def _build(
    run: RunConfig, role: str, groups: ParallelGroups, spec: LayerSpec, fill: Fill, bases: Bases
) -> list[nn.Module]:
    """This rank's pieces of one network."""
    if role not in run.trained_roles:
        return bases.network(role)
    if run.trains_lora(role):
        chunks = bases.network(role)
        return wrap_ddp(chunks, chunks[0].config)
    build = partial(build_network, run, role, groups, spec=spec, recompute=run.memory.recompute)
    if run.networks[role].is_in_pieces and groups.dp_cp.size() > 1:
        pieces = cut_in_pieces(build, group=groups.dp_cp)
        fill(run, role, pieces)
        return pieces
    chunks = build()
    fill(run, role, chunks)
    return wrap_ddp(chunks, chunks[0].config)


def _build_frozen(run: RunConfig, role: str, groups: ParallelGroups, spec: LayerSpec, fill: Fill) -> list[nn.Module]:
    """This rank's pieces of a network whose weights stay as they are."""
    chunks = build_network(run, role, groups, spec=spec, recompute=run.memory.recompute)
    fill(run, role, chunks)
    weights = run.networks[role].weights
    if weights != "resident":
        shard_weights(frozen(chunks), group=groups.dp_cp, offload=weights == "offloaded")
    return frozen(chunks)
