"""Peak bytes and seconds of a student rCM step (sCM and DMD) under each memory policy; writes docs/memory.json and docs/memory.md.

    .venv/bin/python tools/benchmark_memory.py

It starts its own ranks (two: data parallel, or `--ring`), each with one thread. {none, selective, full} recomputation x {resident, sharded}
teacher run alternately on the same networks, batch and noise; times are medians over the repeats. Peaks are counted by PyTorch's
dispatcher in a step of their own: what operations allocate beyond weights, gradients and optimizer state, which are counted exactly.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rcm_megatron.platform.device import init_distributed
from rcm_megatron.platform.megatron import prepare_megatron

prepare_megatron()

from rcm_megatron.config import (  # noqa: E402
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    StageConfig,
)
from rcm_megatron.networks.build import build_network, frozen  # noqa: E402
from rcm_megatron.networks.sharding import shard_weights  # noqa: E402
from rcm_megatron.networks.weights import initial_weights, load_weights  # noqa: E402
from rcm_megatron.objectives.plan import plan_step  # noqa: E402
from rcm_megatron.parallel.groups import initialize_parallel  # noqa: E402
from rcm_megatron.parallel.optimizer_shards import owned_shards  # noqa: E402
from rcm_megatron.parallel.pipeline import unwrapped  # noqa: E402
from rcm_megatron.training.batches import random_samples  # noqa: E402
from rcm_megatron.training.state import TrainState, build_networks  # noqa: E402
from tools.measuring import (  # noqa: E402
    ROOT,
    TOKENS_OF_FRAME,
    PeakBytes,
    check_sizes,
    provenance,
    random_networks,
    wan_model,
    wan_run,
)

POLICIES = tuple(product(("none", "selective", "attention", "full"), ("resident", "sharded")))
"""(memory.recompute, networks.teacher.weights)."""


def run_config(args: argparse.Namespace) -> RunConfig:
    """Random weights, one sample a data-parallel rank, sCM and DMD."""
    parallel = ParallelConfig(ring=args.ranks) if args.ring else ParallelConfig()
    return wan_run(
        "benchmark_memory",
        wan_model(layers=args.layers, hidden=args.hidden, head_dim=args.head_dim),
        frames=args.tokens // TOKENS_OF_FRAME,
        batch=parallel.dp(args.ranks),
        guidance=5.0,
        parallel=parallel,
        precision=PrecisionConfig(params_dtype=args.dtype, linear_layers="local"),
        stages=(StageConfig(name="rcm", steps=2, losses={"scm": 100.0, "dmd": 1.0}, student_update_freq=2),),
        networks=random_networks("student", "fake_score"),
    )


class Rank:
    """This rank's networks, one teacher whole and one in shards, and the step on them."""

    def __init__(self, run: RunConfig) -> None:
        self.run, self.groups = run, initialize_parallel(run.parallel)
        self.state = TrainState(run, build_networks(run, self.groups))
        resident = self.state.networks
        second = frozen(build_network(run, "teacher", self.groups, recompute=run.memory.recompute))
        load_weights(second, initial_weights(run, "teacher"))
        sharded = shard_weights(second, group=self.groups.dp_cp)
        self.networks = {"resident": resident, "sharded": resident.replace(teacher=sharded)}
        self.student = resident["student"]
        self.samples = random_samples(run, resident.layout, self.groups)

    def step(self, recompute: str, teacher: str) -> None:
        for chunk in self.student:
            unwrapped(chunk).recompute = recompute
        self.state.networks = self.networks[teacher]
        stage = self.run.stages[0]
        self.state.update(plan_step(stage, 0, max_rollout_steps=1), self.samples, stage=stage)

    def seconds(self, recompute: str, teacher: str) -> float:
        dist.barrier()
        start = time.perf_counter()
        self.step(recompute, teacher)
        dist.barrier()
        return time.perf_counter() - start

    def peak(self, recompute: str, teacher: str) -> int:
        with PeakBytes() as tracked:
            self.step(recompute, teacher)
        return tracked.peak

    def standing(self) -> dict[str, int]:
        """Bytes that stay from step to step, by what they are."""
        found = {f"weights of the {name} teacher": weight_bytes(n["teacher"]) for name, n in self.networks.items()}
        for role, network in self.state.trained.items():
            name, shards = role.replace("_", " "), owned_shards(network.optimizer)
            found[f"weights of the {name}"] = weight_bytes(network.chunks)
            found[f"gradients of the {name}"] = sum(
                tensor_bytes(b.grad_data) for c in network.chunks for b in c.buffers
            )
            found[f"main parameters and moments of the {name}"] = sum(map(shard_bytes, shards))
            if network.ema is not None:
                found[f"EMA of the {name}"] = sum(map(tensor_bytes, network.ema.shards))
        return found


def tensor_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def weight_bytes(chunks: list[nn.Module]) -> int:
    """This rank's part of all parameters."""
    parameters = [parameter for chunk in chunks for parameter in unwrapped(chunk).parameters()]
    return sum(tensor_bytes(p.to_local() if hasattr(p, "to_local") else p) for p in parameters)


def shard_bytes(shard) -> int:
    """Adam's moments, and the main parameter where it is no view of the weights."""
    is_view = shard.main.untyped_storage().data_ptr() == shard.parameter.untyped_storage().data_ptr()
    moments = sum(tensor_bytes(moment) for moment in shard.adam_state().values())
    return moments + (0 if is_view else tensor_bytes(shard.main))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The JSON; call it on all ranks. Peaks are the largest of the ranks'."""
    rank = Rank(run_config(args))
    peaks = {policy: rank.peak(*policy) for policy in POLICIES}  # the first step of each, too
    seconds: dict[tuple[str, str], list[float]] = {policy: [] for policy in POLICIES}
    for repeat in range(args.repeats):
        for policy in POLICIES:
            seconds[policy].append(rank.seconds(*policy))
            if dist.get_rank() == 0:
                print(f"{repeat + 1}/{args.repeats} {' '.join(policy)}: {seconds[policy][-1]:.1f} s", flush=True)
    largest = torch.tensor(list(peaks.values()))
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    rows = [
        {
            "recompute": recompute,
            "teacher_weights": teacher,
            "peak_bytes": peak,
            "median_seconds": statistics.median(seconds[recompute, teacher]),
            "seconds": seconds[recompute, teacher],
        }
        for (recompute, teacher), peak in zip(POLICIES, largest.tolist(), strict=True)
    ]
    shape = {key: vars(args)[key] for key in ("hidden", "head_dim", "layers", "tokens", "dtype", "ranks", "ring")}
    parameters = sum(parameter.numel() for chunk in rank.student for parameter in chunk.module.parameters())
    return {"shape": shape, "parameters": parameters, "standing_bytes": rank.standing(), "policies": rows}


def mib(value: float) -> str:
    return f"{value / 2**20:,.0f}"


def markdown(result: dict[str, Any]) -> str:
    """docs/memory.md."""
    shape, standing, source = result["shape"], result["standing_bytes"], result["provenance"]
    best = next(row["median_seconds"] for row in result["policies"] if row["recompute"] == "none")
    return _DOCUMENT.format(
        source=source,
        commit=source["commit"] + (" with uncommitted changes" if source["uncommitted_changes"] else ""),
        shape=shape,
        layout=f"{'ring' if shape['ring'] else 'dp'}={shape['ranks']}",
        parameters=result["parameters"] / 1e6,
        repeats=len(result["policies"][0]["seconds"]),
        rows="\n".join(_row(row, standing, best) for row in result["policies"]),
        kept="\n".join(f"| {name} | {mib(value)} |" for name, value in standing.items()),
    )


def _row(policy: dict[str, Any], standing: dict[str, int], best: float) -> str:
    weights = sum(v for k, v in standing.items() if "teacher" not in k)
    weights += standing[f"weights of the {policy['teacher_weights']} teacher"]
    peak, seconds = policy["peak_bytes"], policy["median_seconds"]
    cells = [policy["recompute"], policy["teacher_weights"], mib(peak), mib(weights), mib(peak + weights)]
    return "| " + " | ".join([*cells, f"{seconds:.1f}", f"{seconds / best:.2f}"]) + " |"


_DOCUMENT = """# Memory policies, measured

What each policy of `memory:` (rcm_megatron/config/run.py) holds and costs. This file is written by

    {source[command]}

on {source[date]}: {source[cpu]}, {source[cores]} cores, {source[memory_gib]} GiB, {source[threads]} thread a rank;
torch {source[torch]}, Megatron-Core {source[megatron_core]}; commit {commit};
when it started, `uptime` said `{source[uptime]}`. All figures: docs/memory.json.

A student step of rCM (sCM and DMD, rollout of one step, guided teacher, update) of a network of {parameters:.1f} M parameters:
{shape[layers]} blocks, hidden size {shape[hidden]}, {shape[tokens]} tokens a sample, {shape[dtype]}, {layout}.
MiB of one rank; medians of {repeats} steps. *Step*: the peak of what the step allocates (activations, messages, gathered weights).
*Standing*: weights, gradients, optimizer state and EMA.

| recompute | teacher | step | standing | together | seconds | of none, resident |
| --- | --- | ---: | ---: | ---: | ---: | ---: |
{rows}

`memory.recompute` decides on DMD's pass here, and on those of the fake score, dCM and flow matching. The dual pass of sCM recomputes its
blocks under every policy, of all but `full` without their self-attention. On a GPU `sharded` gathers a block while the one before
computes; on Gloo, here, it waits.

What stands on a rank:

| | MiB |
| --- | ---: |
{kept}

`memory.free_idle_gradients` removes the gradients of the network that a step does not train. `networks.ROLE.offload_optimizer` removes
the main parameters and moments of a network outside its updates (CUDA only, as is `weights: offloaded`: not measured here).
In bf16 a parameter takes 2 bytes of weights, 4 of gradients and 12/(dp*cp) of main parameter and moments; in fp32 the main
parameter is the weight itself, so 8/(dp*cp).
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024, help="a multiple of the head dim")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=768, help="of a sample; a multiple of 256")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--ring", action="store_true", help="the ranks share a sample instead of having one each")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "memory", help="without suffix: .json and .md")
    args = parser.parse_args()
    check_sizes(hidden=args.hidden, head_dim=args.head_dim, tokens=args.tokens)
    if "RANK" not in os.environ:
        sys.exit(start_ranks(args.ranks))
    torch.set_num_threads(1)
    source = provenance() | {"date": time.strftime("%Y-%m-%d")}
    init_distributed()
    result = {"provenance": source, **measure(args)}
    if dist.get_rank() == 0:
        args.output.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
        args.output.with_suffix(".md").write_text(markdown(result))
        print(markdown(result))
    dist.destroy_process_group()


def start_ranks(count: int) -> int:
    """This command again on ``count`` ranks of this machine; its exit status."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    return subprocess.run([*launcher, *sys.argv], env=environment, check=False).returncode


if __name__ == "__main__":
    main()
