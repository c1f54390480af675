"""What one rank sees of its machine: devices, versions, disk, data. Needs no other rank."""

from __future__ import annotations

import hashlib
import json
import os
import platform as machine
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import torch

from rcm_megatron.config import ModelConfig, RunConfig
from rcm_megatron.platform import MEGATRON_VERSION, released

PACKAGES = ("megatron-core", "triton", "transformer-engine", "flash-attn", "diffusers", "nvidia-dali-cuda130")
"""Installed packages, beside torch, whose versions must be the same everywhere."""

FREE_MEMORY = 0.9
"""Least free part of a GPU's memory: less, and somebody else is on it."""

_ROOT = Path(__file__).parents[2]


@dataclass(kw_only=True)
class Report:
    """One rank's findings. `problems` need no comparison with other ranks; `versions` must be equal on all."""

    rank: int
    node: str
    device: str
    versions: dict[str, str]
    free_memory_gib: float | None
    free_disk_gib: float
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Report:
        return cls(**json.loads(text))


def node_name() -> str:
    """SLURM's name of this node, or the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def look(run: RunConfig, *, rank: int, local_rank: int, token: str) -> Report:
    """This rank's report. `token`: a file that rank 0 has made in output_dir, which every node must see."""
    devices = torch.cuda.device_count()
    smi = _nvidia_smi() if devices else {}
    free_disk = shutil.disk_usage(_existing(Path(run.output_dir))).free / 2**30
    report = Report(
        rank=rank,
        node=node_name(),
        device=f"{devices} x {torch.cuda.get_device_name(0)}" if devices else "CPU",
        versions=_versions() | {name: value for name, value in smi.items() if name == "driver"},
        free_memory_gib=None,
        free_disk_gib=free_disk,
    )
    report.problems += _disk_problems(run, free_disk, token)
    report.problems += _path_problems(run)
    if devices:
        report.free_memory_gib, found = _device_problems(local_rank, smi)
        report.problems += found
    return report


def _versions() -> dict[str, str]:
    found = {"python": machine.python_version(), "torch": torch.__version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    if torch.cuda.is_available():
        found |= {"CUDA": str(torch.version.cuda), "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}
    return found | {"commit": _commit(), "rcm_megatron": _source_digest()}


def _commit() -> str:
    command = ["git", "-C", str(_ROOT), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _source_digest() -> str:
    """Of the program's own files, wherever they were imported from: tells what a commit does not."""
    digest = hashlib.blake2b(digest_size=4)
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return f"source {digest.hexdigest()}"


def _nvidia_smi() -> dict[str, str]:
    """The driver's version, and uncorrected ECC errors since the last reset, one number a GPU."""
    fields = ["driver_version", "ecc.errors.uncorrected.volatile.total"]
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    lines = [line.split(", ") for line in done.stdout.splitlines() if line.count(", ") == 1]
    if done.returncode or not lines:
        return {}
    return {"driver": lines[0][0], "ecc": " ".join(errors for _, errors in lines)}


def _device_problems(local_rank: int, smi: dict[str, str]) -> tuple[float, list[str]]:
    """Free memory of this rank's GPU in GiB, and what is wrong with it."""
    if local_rank >= torch.cuda.device_count():
        return 0.0, [f"got {torch.cuda.device_count()} GPUs, need one for local rank {local_rank}"]
    free, total = torch.cuda.mem_get_info(local_rank)
    problems = []
    if free < FREE_MEMORY * total:
        problems.append(f"GPU {local_rank}: {(total - free) / 2**30:.1f} GiB are in use; need an idle GPU")
    errors = [number for number in smi.get("ecc", "").split() if number.isdigit() and number != "0"]
    if errors and local_rank == 0:
        problems.append(f"uncorrected ECC errors: {smi['ecc']}; drain the node and reset its GPUs")
    return free / 2**30, problems


def _disk_problems(run: RunConfig, free_gib: float, token: str) -> Iterator[str]:
    need = (run.trainer.keep_checkpoints + 1) * checkpoint_gib(run)
    if free_gib < need:
        kept = run.trainer.keep_checkpoints
        yield f"{run.output_dir}: {free_gib:.1f} GiB free, need about {need:.1f} for {kept} checkpoints and one more"
    if not (Path(run.output_dir) / token).exists():
        yield f"{run.output_dir} is not the folder that rank 0 sees; need a file system that all nodes share"


def checkpoint_gib(run: RunConfig) -> float:
    """About what a checkpoint takes: parameter, fp32 main copy and two moments of each trained network, and the EMA."""
    total = 0
    for role in run.trained_roles:
        total += _block_parameters(run.model_of(role)) * (16 if run.networks[role].ema is None else 20)
    return total / 2**30


def _block_parameters(model: ModelConfig) -> int:
    """Of the blocks' matrices, self- and cross-attention and the feed-forward: nearly all of a large network."""
    return model.num_layers * model.hidden_size * (8 * model.hidden_size + 2 * model.ffn_hidden_size)


def _path_problems(run: RunConfig) -> Iterator[str]:
    for role in run.roles:
        path = run.networks[role].init
        if path is not None and not os.access(path, os.R_OK):
            yield f"networks.{role}.init: cannot read {path}"
    shards = sorted(Path(run.data.folder).glob("*.tar"))
    if not shards:
        yield f"data.folder: no *.tar in {run.data.folder}"
        return
    try:
        with shards[0].open("rb") as shard:
            shard.read(4096)
    except OSError as error:
        yield f"data.folder: cannot read {shards[0]}: {error.strerror}"


def _existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)


def megatron_problem(versions: dict[str, str]) -> str | None:
    """Whether the one Megatron that the program works with is there."""
    got = versions["megatron-core"]
    return None if released(got) == MEGATRON_VERSION else f"megatron-core {got}, need {MEGATRON_VERSION}"
