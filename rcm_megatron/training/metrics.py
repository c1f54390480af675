"""What a run reports: JSON lines, Weights & Biases, a progress bar; all from rank 0."""

import json
import os
import resource
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from rcm_megatron.config import RunConfig, as_dict
from rcm_megatron.parallel.groups import ParallelGroups
from rcm_megatron.training.objectives import ObjectiveResult


def reduce_objectives(results: Mapping[str, ObjectiveResult], groups: ParallelGroups) -> dict[str, float]:
    """Means over the global batch, the same in every layout: losses, tangent norm; counts of masked samples.

    Samples masked for a NaN count 0 in the sums and are left out of the means.
    """
    sums: dict[str, torch.Tensor] = {}
    for name, result in results.items():
        masked = torch.cat(result.nan_B)
        kept = (~masked).double()
        sums[f"{name}/count"] = kept.sum()
        sums[f"{name}/nan_samples"] = masked.double().sum()
        sums[f"{name}/loss"] = torch.where(masked, 0.0, torch.cat(result.loss_B).double()).sum()
        if name == "scm":
            norm = torch.cat(result.tangent_norm_B)
            sums[f"{name}/tangent_norm"] = torch.where(masked, 0.0, norm).sum()
    total = torch.stack(list(sums.values()))
    dist.all_reduce(total, group=groups.dp)
    values = dict(zip(sums, total.tolist(), strict=True))
    return {name: _mean(name, value, values) for name, value in values.items() if not name.endswith("/count")}


def _mean(name: str, value: float, values: Mapping[str, float]) -> float:
    if name.endswith("/nan_samples"):
        return value
    count = values[name.split("/")[0] + "/count"]
    return value / count if count else float("nan")


def peak_memory_gib() -> float:
    """Largest memory of this process so far, GiB: the device's allocator, or the resident set on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class MetricLogger:
    """Writes one record an iteration to ``metrics.jsonl`` and to Weights & Biases; does nothing on other ranks.

    A resumed run drops the records past its checkpoint, which it will write again, and goes on in the same W&B run.
    """

    def __init__(self, run: RunConfig, *, start: int, total: int) -> None:
        self.active = dist.get_rank() == 0
        if not self.active:
            return
        folder = Path(run.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        _drop_records_from(self.path, iteration=start)
        self._file = self.path.open("a")
        self._wandb = _start_wandb(run, folder)
        self._bar = tqdm(
            total=total,
            initial=start,
            desc=run.name,
            disable=not run.logging.progress_bar,
            mininterval=1.0 if sys.stderr.isatty() else 10.0,
            dynamic_ncols=True,
        )

    def log(self, iteration: int, record: Mapping[str, Any]) -> None:
        """Write the record of ``iteration`` (0-based, over all stages)."""
        if not self.active:
            return
        self._file.write(json.dumps({"iteration": iteration, **record}) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log(dict(record), step=iteration)
        losses = {key.removesuffix("/loss"): f"{value:.4g}" for key, value in record.items() if key.endswith("/loss")}
        self._bar.set_postfix({"stage": record["stage"], **losses}, refresh=False)
        self._bar.update(1)

    def log_videos(self, iteration: int, videos: Mapping[str, Path], *, fps: int) -> None:
        """Show sample videos (MP4 files) in Weights & Biases."""
        if self.active and self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Video(str(path), fps) for name, path in videos.items()}, step=iteration)

    def message(self, text: str) -> None:
        """Print a line without tearing the progress bar."""
        if self.active:
            tqdm.write(text)

    def close(self) -> None:
        if not self.active:
            return
        self._bar.close()
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def _drop_records_from(path: Path, *, iteration: int) -> None:
    """Keep the records before ``iteration``; a torn last line (a killed process) goes as well."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record["iteration"] < iteration:
            kept.append(line + "\n")
    rewritten = path.with_suffix(".tmp")
    rewritten.write_text("".join(kept))
    rewritten.rename(path)


def _start_wandb(run: RunConfig, folder: Path):
    mode = run.logging.wandb_mode
    if mode == "auto":
        mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
    if mode == "disabled":
        return None
    import wandb

    identity = folder / "wandb_run_id"
    if not identity.exists():
        identity.write_text(uuid.uuid4().hex[:8] + "\n")
    os.environ.setdefault("WANDB_SILENT", "true")
    return wandb.init(
        project=run.logging.wandb_project,
        name=run.name,
        id=identity.read_text().strip(),
        resume="allow",
        mode=mode,
        dir=str(folder),
        config=as_dict(run),
    )
