"""A rank of one point of the scaling benchmark: builds the networks of a run with random weights and times their steps."""

from __future__ import annotations

import json
import os
import resource
import traceback
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rcm_megatron.platform.device import init_distributed
from rcm_megatron.platform.megatron import prepare_megatron

prepare_megatron()

from rcm_megatron.config import RunConfig  # noqa: E402
from rcm_megatron.parallel.groups import initialize_parallel  # noqa: E402
from rcm_megatron.training.batches import random_samples  # noqa: E402
from rcm_megatron.training.state import TrainState, build_networks  # noqa: E402
from tools.measuring import PeakBytes  # noqa: E402
from tools.scaling_points import Point, plan_of, point_from_dict  # noqa: E402


class Rank:
    """This rank's part of a point. Two steps of each kind run when it is built: the first one allocates what the optimizers keep,
    the memory of the second is counted."""

    def __init__(self, point: Point) -> None:
        self.point, self.run = point, with_random_weights(point.run)
        self.groups = initialize_parallel(point.run.parallel)
        tracker = nullcontext() if torch.cuda.is_available() else PeakBytes()
        with tracker:
            self._build()
            self._warm_up()
            _forget_peak(tracker)
            self._warm_up()
        self.memory = _memory(tracker)

    def _build(self) -> None:
        self.state = TrainState(self.run, build_networks(self.run, self.groups))
        self.samples = random_samples(self.run, self.state.networks.layout, self.groups)

    def _warm_up(self) -> None:
        for stage in self.run.stages:
            self._step(stage.name)

    def _step(self, name: str) -> None:
        """What the trainer does in an iteration, without loader, log and checkpoint."""
        stage = next(stage for stage in self.run.stages if stage.name == name)
        step = plan_of(stage, rollout_steps=self.point.rollout_steps)
        if not self.state.update(step, self.samples, stage=stage).updated:
            raise RuntimeError(
                f"{name} step: got a non-finite gradient, which the optimizer refuses; its time means nothing"
            )

    def measure(self, name: str) -> dict[str, Any]:
        """Seconds of one step on the slowest rank, and each phase's mean and maximum over ranks."""
        dist.barrier()
        self.state.timers.restart()
        self._step(name)
        ranks = _of_all_ranks(self.state.timers.pop())
        columns = {phase: [seconds[phase] for seconds in ranks] for phase in ranks[0]}
        return {
            "seconds": max(sum(seconds.values()) for seconds in ranks),
            "phases": {phase: sum(values) / len(values) for phase, values in columns.items()},
            "phases_max": {phase: max(values) for phase, values in columns.items()},
        }

    def facts(self) -> dict[str, Any]:
        """What a point reports beside times; memory is a list over ranks."""
        trainer = self.run.trainer
        return {
            "series": self.point.series,
            "layout": self.point.layout,
            "ranks": self.point.ranks,
            "tokens": self.state.networks.layout.num_tokens,
            "token_shards": self.groups.token_shards,
            "global_batch_size": trainer.global_batch_size,
            "micro_batches": self.samples.count // self.samples.at_a_time,
            "memory": _of_all_ranks(self.memory | {"resident_bytes": _resident_bytes()}),
        }


def with_random_weights(run: RunConfig) -> RunConfig:
    """``run``, none of whose networks is read from a file."""
    return replace(run, networks={role: replace(network, init=None) for role, network in run.networks.items()})


def _of_all_ranks(value: Any) -> list[Any]:
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def _forget_peak(tracker: PeakBytes | nullcontext) -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        tracker.peak = tracker.live


def _memory(tracker: PeakBytes | nullcontext) -> dict[str, int]:
    """Bytes of tensors, of the device's allocator or tracked on a CPU: the peak, and what is held between two steps."""
    if torch.cuda.is_available():
        return {"peak_bytes": torch.cuda.max_memory_allocated(), "held_bytes": torch.cuda.memory_allocated()}
    return {"peak_bytes": tracker.peak, "held_bytes": tracker.live}


def _resident_bytes() -> int:
    """Largest resident set of this process, interpreter and libraries included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def serve(connection: Connection, spec: dict[str, Any], environment: dict[str, str], threads: int) -> None:
    """A rank that another process starts: sends its facts, then a measurement for each name of a step that it receives."""
    os.environ.update(environment)
    torch.set_num_threads(threads)
    try:
        init_distributed()
        rank = Rank(point_from_dict(spec))
        connection.send(rank.facts())
        while (name := connection.recv()) is not None:
            connection.send(rank.measure(name))
    except EOFError:
        return
    except BaseException:
        connection.send(traceback.format_exc())
        raise


def run_alone(spec: dict[str, Any], *, repeats: int, output: Path, provenance: dict[str, Any]) -> None:
    """A rank that torchrun or srun starts: measures the point by itself; rank 0 writes ``output``."""
    init_distributed()
    point = point_from_dict(spec)
    rank = Rank(point)
    steps: dict[str, list[dict[str, Any]]] = {stage.name: [] for stage in point.run.stages}
    for repeat in range(repeats):
        for name, measured in steps.items():
            measured.append(rank.measure(name))
            if dist.get_rank() == 0:
                print(f"{point.name} {repeat + 1}/{repeats} {name} {measured[-1]['seconds']:.3f} s", flush=True)
    facts = rank.facts()
    if dist.get_rank() == 0:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({"provenance": provenance, "points": [facts | {"repeats": steps}]}) + "\n")
    dist.destroy_process_group()
