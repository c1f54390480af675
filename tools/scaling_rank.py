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

from rcm_megatron.platform.device import init_distributed, this_device
from rcm_megatron.platform.megatron import prepare_megatron

prepare_megatron()

from rcm_megatron.config import InitConfig  # noqa: E402
from rcm_megatron.data.dali import micro_batch_indices  # noqa: E402
from rcm_megatron.diffusion.noise import SeededDraws  # noqa: E402
from rcm_megatron.parallel.groups import initialize_parallel  # noqa: E402
from rcm_megatron.parallel.pipeline import reduce_gradients  # noqa: E402
from rcm_megatron.runtime.timers import Timers, attach  # noqa: E402
from rcm_megatron.training.ema import PowerEMA  # noqa: E402
from rcm_megatron.training.memory import Residency  # noqa: E402
from rcm_megatron.training.metrics import reduce_objectives  # noqa: E402
from rcm_megatron.training.networks import build_networks  # noqa: E402
from rcm_megatron.training.objectives import MicroBatch  # noqa: E402
from rcm_megatron.training.optimizer import build_optimizer, optimizer_step, set_learning_rate, zero_gradients  # noqa: E402
from rcm_megatron.training.step import Step, accumulate_step  # noqa: E402
from tools.measuring import PeakBytes  # noqa: E402
from tools.scaling_points import STEPS, Point, point_from_dict  # noqa: E402


class Rank:
    """This rank's part of a point. Two steps of each kind run when it is built: the first one allocates what the optimizers keep,
    the memory of the second is counted."""

    def __init__(self, point: Point) -> None:
        self.point, self.run = point, replace(point.run, init=InitConfig())
        self.groups = initialize_parallel(point.run.parallel)
        tracker = nullcontext() if torch.cuda.is_available() else PeakBytes()
        with tracker:
            self._build()
            self._warm_up()
            _forget_peak(tracker)
            self._warm_up()
        self.memory = _memory(tracker)

    def _build(self) -> None:
        run = self.run
        self.networks, self.timers = build_networks(run, self.groups), Timers()
        self.optimizers = {"student": build_optimizer(self.networks["student"], run.student_optimizer)}
        if "fake_score" in self.networks:
            self.optimizers["fake_score"] = build_optimizer(self.networks["fake_score"], run.fake_score_optimizer)
        networks = [self.networks["student"], self.networks["teacher"], self.networks["fake_score"]]
        attach(self.timers, networks, list(self.optimizers.values()))
        self.ema = PowerEMA(self.optimizers["student"], run.ema.relative_width) if run.ema.enabled else None
        self.residency = Residency(
            {name: self.networks[name] for name in self.optimizers},
            self.optimizers,
            offload=run.memory.offload_optimizer,
            free_idle_gradients=run.memory.free_idle_gradients,
        )
        trainer = run.trainer
        count = trainer.global_batch_size // (trainer.micro_batch_size * self.groups.dp_size)
        self.batches = [self._micro_batch(index) for index in range(count)]

    def _warm_up(self) -> None:
        for stage in self.run.stages:
            self._step(stage.name)

    def _micro_batch(self, index: int) -> MicroBatch:
        size, model, device = self.run.trainer.micro_batch_size, self.run.model, this_device()
        place = {"micro_batch_size": size, "dp_rank": self.groups.dp_rank, "dp_size": self.groups.dp_size}
        draws = SeededDraws(0, 0, micro_batch_indices(first=0, micro_batch=index, **place))
        latent, *text = (
            draws.normal(f"data/{name}", shape).to(device)
            for name, shape in (
                ("latent", self.run.latent.shape_CTHW),
                ("text", (model.text_len, model.text_dim)),
                ("null_text", (model.text_len, model.text_dim)),
            )
        )
        return MicroBatch(self.networks.layout.shard(latent), *(t.transpose(0, 1).contiguous() for t in text), draws)

    def _step(self, name: str) -> None:
        """What the trainer does in an iteration, without loader, log and checkpoint."""
        trained = "fake_score" if name == "critic" else "student"
        stage = next(stage for stage in self.run.stages if stage.name == name)
        step = Step(trained, 0, self.point.rollout_steps, warmup_ratio=1.0, dmd_active=bool(STEPS[name].dmd))
        optimizer = self.optimizers[trained]
        self.residency.begin_step(trained)
        zero_gradients(optimizer)
        results = accumulate_step(step, self.networks, self.batches, stage=stage, settings=self.run.distillation)
        reduce_gradients(self.networks[trained])
        with self.timers.phase("optimizer"), self.residency.state(trained):
            set_learning_rate(optimizer, 1e-6)
            outcome = optimizer_step(optimizer, self.groups)
            if trained == "student" and self.ema is not None:
                self.ema.update(1)
        reduce_objectives(results, self.groups)
        if not outcome.updated:
            raise RuntimeError(
                f"{name} step: got a non-finite gradient, which the optimizer refuses; its time means nothing"
            )

    def measure(self, name: str) -> dict[str, Any]:
        """Seconds of one step on the slowest rank, and each phase's mean and maximum over ranks."""
        dist.barrier()
        self.timers.restart()
        self._step(name)
        ranks = _of_all_ranks(self.timers.pop())
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
            "tokens": self.networks.layout.num_tokens,
            "token_shards": self.groups.token_shards,
            "global_batch_size": trainer.global_batch_size,
            "micro_batches": len(self.batches),
            "memory": _of_all_ranks(self.memory | {"resident_bytes": _resident_bytes()}),
        }


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
