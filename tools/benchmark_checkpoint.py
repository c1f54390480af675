"""How long a step waits for a checkpoint, written in the background or not, and what checking one costs at resume; prints JSON.

    python tools/benchmark_checkpoint.py
    torchrun --standalone --nproc-per-node=2 tools/benchmark_checkpoint.py

A network of 62 M parameters with fp32 optimizer state and EMA, training by flow matching. Saves of both kinds take turns in one run; times
are medians over the repeats, on rank 0, of barriers' distance where ranks wait for each other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rcm_megatron.platform.device import init_distributed, this_device
from rcm_megatron.platform.megatron import prepare_megatron

prepare_megatron()

from rcm_megatron.checkpoint.folders import find_latest  # noqa: E402
from rcm_megatron.checkpoint.saver import CheckpointSaver  # noqa: E402
from rcm_megatron.config import PrecisionConfig, RunConfig, StageConfig  # noqa: E402
from rcm_megatron.objectives.plan import plan_step  # noqa: E402
from rcm_megatron.parallel.groups import initialize_parallel  # noqa: E402
from rcm_megatron.training.batches import random_samples  # noqa: E402
from rcm_megatron.training.state import TrainState, build_networks  # noqa: E402
from tools.measuring import provenance, random_networks, wan_model, wan_run  # noqa: E402


def run_config(args: argparse.Namespace) -> RunConfig:
    """Random weights, one sample a data-parallel rank, flow matching."""
    return wan_run(
        "benchmark_checkpoint",
        wan_model(layers=args.layers, hidden=args.hidden, head_dim=128),
        frames=1,
        batch=dist.get_world_size(),
        guidance=1.0,
        precision=PrecisionConfig(params_dtype="fp32", linear_layers="local"),
        networks=random_networks("student", teacher=False),
        stages=(StageConfig(name="flow", steps=2, losses={"flow": 1.0}),),
    )


class Training:
    """A network that trains, and what of it a checkpoint holds."""

    def __init__(self, run: RunConfig) -> None:
        self.run, groups = run, initialize_parallel(run.parallel)
        self.state = TrainState(run, build_networks(run, groups))
        self.samples = random_samples(run, self.state.networks.layout, groups)

    def step(self) -> float:
        """Seconds of an update."""
        dist.barrier()
        start = time.perf_counter()
        stage = self.run.stages[0]
        self.state.update(plan_step(stage, 0, max_rollout_steps=1), self.samples, stage=stage)
        dist.barrier()
        return time.perf_counter() - start

    def save(self, saver: CheckpointSaver, iteration: int) -> None:
        """Begin to write a checkpoint."""
        progress = {"iteration": iteration, "networks": self.state.counters}
        with self.state.states() as states:
            saver.save(iteration=iteration, networks=states, progress=progress)


def save(training: Training, saver: CheckpointSaver, iteration: int) -> dict[str, Any]:
    """Save once; seconds that the call took, until the checkpoint was complete, and of the steps meanwhile."""
    dist.barrier()
    start = time.perf_counter()
    training.save(saver, iteration)
    waited, steps = time.perf_counter() - start, []
    while not everywhere(saver.finished):
        steps.append(training.step())
    saved = saver.wait()
    if saved.error is not None:
        raise RuntimeError(saved.error)
    return {"waited": waited, "complete": saved.seconds, "steps": steps}


def everywhere(condition: bool) -> bool:
    """Whether it holds on all ranks."""
    held = torch.tensor(int(condition), device=this_device())
    dist.all_reduce(held, dist.ReduceOp.MIN)
    return bool(held)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The JSON; call it on all ranks."""
    training = Training(run_config(args))
    savers = {
        name: CheckpointSaver(folder, keep=2, background=name == "background") for name in ("background", "waiting")
    }
    saves: dict[str, list[dict[str, Any]]] = {name: [] for name in savers}
    alone = [training.step() for _ in range(args.repeats + 1)][1:]
    for repeat in range(args.repeats):
        for offset, (name, saver) in enumerate(savers.items()):
            saves[name].append(save(training, saver, 2 * repeat + offset + 1))
            alone.append(training.step())
    resume = {}
    for name, act in {
        "compare sizes": lambda: find_latest(folder, checksums=False),
        "compare checksums": lambda: find_latest(folder),
        "load": lambda: training.state.load(find_latest(folder, checksums=False)),
    }.items():
        dist.barrier()
        start = time.perf_counter()
        latest = act()
        dist.barrier()
        resume[name] = time.perf_counter() - start
    latest = find_latest(folder, checksums=False)
    medians = {
        name: {key: statistics.median(s[key] for s in of) for key in ("waited", "complete")}
        for name, of in saves.items()
    }
    meanwhile = [seconds for save in saves["background"] for seconds in save["steps"]]
    return {
        "parameters": sum(p.numel() for chunk in training.state.networks["student"] for p in chunk.module.parameters()),
        "checkpoint_bytes": sum(path.stat().st_size for path in latest.iterdir()),
        "ranks": dist.get_world_size(),
        "seconds": medians,
        "waited_ratio": medians["waiting"]["waited"] / medians["background"]["waited"],
        "step_seconds": {"alone": statistics.median(alone), "while_writing": statistics.median(meanwhile or [0.0])},
        "resume_seconds": resume,
        "saves": saves,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768, help="a multiple of 128")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    source = provenance()
    init_distributed()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        shared = [temporary]
        dist.broadcast_object_list(shared, src=0)
        result = {"provenance": source, **measure(args, Path(shared[0]))}
        dist.barrier()
    if dist.get_rank() == 0:
        print(json.dumps(result, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
