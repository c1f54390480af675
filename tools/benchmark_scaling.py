"""Strong and weak scaling of training steps over a list of layouts, on this machine or one SLURM job per point.

    python tools/benchmark_scaling.py --output docs/scaling                       # what docs/scaling.md shows
    python tools/benchmark_scaling.py --strong dp=1 dp=2 tp=2 pp=2,vpp=2 --weak-tokens dp=1 ring=2 ring=4
    python tools/benchmark_scaling.py --config model_configs/wan2.1_t2v_14b_480p.yaml --weak-batch tp=8 tp=8,dp=2 tp=8,dp=4 \\
        --slurm runs/scaling                                                      # submits; then, when the jobs are done:
    python tools/benchmark_scaling.py --collect runs/scaling --output runs/scaling/all

A layout is a list of degrees (dp tp ring ulysses pp vpp, 1 where left out); the first of a series is what the others are compared with.
Networks, objectives, optimizer and schedule are those of training; weights and data are random. Writes PREFIX.json (every repeat), .csv,
.md and .png. On a CPU all points are alive at once and take turns, so that noise of the machine hits them alike; on GPUs one after another.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from rcm_megatron.config import ConfigError, RunConfig, apply_overrides, build, load_config  # noqa: E402
from tools.scaling_points import PRESETS, SERIES, STEPS, Point, make_points  # noqa: E402
from tools.scaling_report import write_report  # noqa: E402

DEFAULT_SERIES = {
    "strong": ["dp=1", "dp=2", "ring=2", "ulysses=2", "tp=2", "pp=2"],
    "weak_tokens": ["dp=1", "ring=2", "ring=4"],
}


class LocalPoint:
    """The ranks of a point as processes of this machine; `measure` runs one step on all of them."""

    def __init__(self, point: Point, *, threads: int) -> None:
        self.point, self.processes, self.connections = point, [], []
        context = _process_context()
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(point.ranks)}
        for rank in range(point.ranks):
            ours, theirs = context.Pipe()
            environment = address | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = context.Process(target=_serve, args=(theirs, point.as_dict(), environment, threads), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.connections.append(ours)

    def wait_until_ready(self) -> dict[str, Any]:
        return self._replies()

    def measure(self, step: str) -> dict[str, Any]:
        for connection in self.connections:
            connection.send(step)
        return self._replies()

    def _replies(self) -> dict[str, Any]:
        """Rank 0's reply, once all ranks have sent theirs; they are equal."""
        pending = dict(zip(self.connections, range(len(self.connections)), strict=True))
        replies = {}
        while pending:
            for connection in mp.connection.wait(list(pending)):
                rank = pending.pop(connection)
                try:
                    replies[rank] = connection.recv()
                except EOFError:
                    replies[rank] = "it died without a word (killed for memory?)"
                if isinstance(replies[rank], str):
                    raise RuntimeError(f"{self.point.name}: rank {rank} of {self.point.ranks} failed:\n{replies[rank]}")
        return replies[0]

    def close(self) -> None:
        for process, connection in zip(self.processes, self.connections, strict=True):
            connection.close()
            process.kill()
            process.join()


def _serve(*arguments: Any) -> None:
    """A rank's process: imports Megatron there, not here."""
    from tools.scaling_rank import serve

    serve(*arguments)


def measure_here(points: Sequence[Point], *, repeats: int, threads: int) -> list[dict[str, Any]]:
    """Every point's facts and repeats, on this machine."""
    import torch

    if not torch.cuda.is_available():
        return _in_turns(points, repeats=repeats, threads=threads)
    needed, devices = max(point.ranks for point in points), torch.cuda.device_count()
    if needed > devices:
        raise ConfigError(
            f"got {devices} GPUs, need {needed} for the largest layout; leave out layouts of more than {devices} ranks, or --slurm DIR"
        )
    return [result for point in points for result in _in_turns([point], repeats=repeats, threads=threads)]


def _in_turns(points: Sequence[Point], *, repeats: int, threads: int) -> list[dict[str, Any]]:
    with ExitStack() as stack:
        ranks, results = [], []
        for i, point in enumerate(points):  # one at a time: their start is most of the memory's peak, and of the noise
            local = LocalPoint(point, threads=threads)
            stack.callback(local.close)
            results.append(local.wait_until_ready() | {"repeats": {stage.name: [] for stage in point.run.stages}})
            ranks.append(local)
            print(f"{_clock()} {i + 1}/{len(points)} {point.name}: ready, {point.ranks} ranks", flush=True)
        for repeat in range(repeats):
            for local, result in zip(ranks, results, strict=True):
                for name, measured in result["repeats"].items():
                    measured.append(local.measure(name))
                seconds = ", ".join(f"{name} {m[-1]['seconds']:.3f} s" for name, m in result["repeats"].items())
                print(f"{_clock()} repeat {repeat + 1}/{repeats} {local.point.name}: {seconds}", flush=True)
    return results


def _clock() -> str:
    return time.strftime("%H:%M:%S")


def _process_context() -> Any:
    """Forked from a server that has imported Megatron; spawned where there is CUDA, which does not survive a fork."""
    import torch

    if torch.cuda.is_available():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tools.scaling_rank"])
    return context


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def submit(points: Sequence[Point], folder: Path, *, repeats: int, gpus_per_node: int, options: str) -> None:
    """One SLURM job per point. Each reads its point from ``folder`` and writes its result there."""
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "--slurm: got no sbatch on this machine; need a SLURM login node; leave --slurm out to measure here"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (*folder.glob("*.point.json"), *folder.glob("*.result.json")):
        stale.unlink()
    for i, point in enumerate(points):
        path = folder / f"{i:03d}.point.json"
        path.write_text(json.dumps({"command": shlex.join(["python", *sys.argv]), "point": point.as_dict()}) + "\n")
        tasks = min(point.ranks, gpus_per_node)
        if point.ranks % tasks:
            raise ConfigError(
                f"{point.name}: got {point.ranks} ranks, need whole nodes of {gpus_per_node} GPUs; change --gpus-per-node or the layout"
            )
        command = ["sbatch", f"--job-name=scaling-{i:03d}", f"--nodes={point.ranks // tasks}"]
        command += [f"--ntasks-per-node={tasks}", f"--gpus-per-node={tasks}", *shlex.split(options)]
        command += ["launch/slurm/benchmark.sbatch", "--point", str(path.resolve()), "--repeats", str(repeats)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{point.name}: {shlex.join(command)}\n{done.stderr.strip()}")
        print(f"{i + 1}/{len(points)} {point.name}: {done.stdout.strip()}", flush=True)
    print(f"when they are done: python tools/benchmark_scaling.py --collect {folder} --output PREFIX")


def collect(folder: Path) -> dict[str, Any]:
    """The results of ``submit``'s jobs as one, in the order of the points."""
    wanted = sorted(folder.glob("*.point.json"))
    found = [path for path in map(result_path, wanted) if path.exists()]
    if not found:
        raise ConfigError(
            f"{folder}: got {len(wanted)} points and no result; need *.result.json; wait for the jobs, or read slurm-*.out"
        )
    for path in wanted:
        if result_path(path) not in found:
            print(f"missing: {result_path(path)} (its job has not ended, or failed)", file=sys.stderr)
    parts = [json.loads(path.read_text()) for path in found]
    return {"provenance": parts[0]["provenance"], "points": [point for part in parts for point in part["points"]]}


def result_path(point: Path) -> Path:
    return point.with_name(point.name.replace(".point.", ".result."))


def provenance_of(threads: int, command: str | None = None) -> dict[str, Any]:
    """Hardware, versions, commit, command, and how busy the machine was before."""
    from tools.measuring import provenance

    source = provenance()
    return source | {
        "command": command or shlex.join(["python", *sys.argv]),
        "backend": "gloo" if source["device"] == "cpu" else "nccl",
        "threads_per_rank": threads,
        "load_average_before": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
    }


def _base_run(args: argparse.Namespace) -> RunConfig:
    if args.config:
        return load_config(args.config, args.set)
    return build(RunConfig, apply_overrides(PRESETS[args.preset], args.set))


def _points(args: argparse.Namespace) -> list[Point]:
    series = {name: getattr(args, name) for name in SERIES if getattr(args, name)} or DEFAULT_SERIES
    return make_points(_base_run(args), series, steps=args.steps, rollout_steps=args.rollout_steps)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    base = parser.add_mutually_exclusive_group()
    base.add_argument("--config", type=Path, help="run configuration: model, latent, batch, precision, memory, recipe")
    base.add_argument("--preset", choices=sorted(PRESETS), default="small", help="a run for a CPU instead")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of either")
    for name, text in SERIES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", nargs="+", metavar="LAYOUT", help=text)
    parser.add_argument("--steps", nargs="+", choices=sorted(STEPS), default=["student", "fake_score"])
    parser.add_argument(
        "--rollout-steps", type=int, default=2, help="steps of backward simulation; training takes 1 to 4"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a rank")
    parser.add_argument("--output", type=Path, metavar="PREFIX", help="writes PREFIX.json, .csv, .md and .png")
    parser.add_argument("--slurm", type=Path, metavar="DIR", help="submit a job per point instead; results go to DIR")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument(
        "--sbatch", default="", metavar="OPTIONS", help='more options of sbatch, e.g. "--partition=long"'
    )
    parser.add_argument("--collect", type=Path, metavar="DIR", help="merge the results of --slurm DIR")
    parser.add_argument("--report", type=Path, metavar="JSON", help="write tables and plot of an earlier result again")
    parser.add_argument("--point", type=Path, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    args = _parser().parse_args(argv)
    try:
        if args.point:
            from tools.scaling_rank import run_alone

            job = json.loads(args.point.read_text())
            place = {"output": result_path(args.point), "provenance": provenance_of(args.threads, job["command"])}
            return run_alone(job["point"], repeats=args.repeats, **place)
        if args.slurm:
            options = {"gpus_per_node": args.gpus_per_node, "options": args.sbatch}
            return submit(_points(args), args.slurm, repeats=args.repeats, **options)
        result = _result(args)
    except ConfigError as error:
        raise SystemExit(f"benchmark_scaling: {error}") from None
    for line in write_report(result, args.output):
        print(line)
    return result


def _result(args: argparse.Namespace) -> dict[str, Any]:
    if args.report:
        return json.loads(args.report.read_text())
    if args.collect:
        return collect(args.collect)
    points, source = _points(args), provenance_of(args.threads)
    measured = measure_here(points, repeats=args.repeats, threads=args.threads)
    return {"provenance": source | {"load_average_after": os.getloadavg()[0]}, "points": measured}


if __name__ == "__main__":
    main()
