"""What a run reports: JSON lines, Weights & Biases, a progress bar; all from rank 0."""

import json
import logging
import os
import resource
import sys
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from rcm_megatron.config import RunConfig, as_dict
from rcm_megatron.files import write_atomically
from rcm_megatron.objectives.work import ObjectiveResult
from rcm_megatron.parallel.groups import ParallelGroups
from rcm_megatron.training.wandb_mode import wandb_mode

log = logging.getLogger(__name__)


def reduce_objectives(results: Mapping[str, ObjectiveResult], groups: ParallelGroups) -> dict[str, float]:
    """Means over the global batch, the same in every layout: losses and what else objectives report of a sample; counts of masked samples.

    Samples masked for a NaN count 0 in the sums and are left out of the means.
    """
    sums: dict[str, torch.Tensor] = {}
    for name, result in results.items():
        masked = result.nan_B
        kept = (~masked).double()
        sums[f"{name}/count"] = kept.sum()
        sums[f"{name}/nan_samples"] = masked.double().sum()
        for quantity, value_B in {"loss": result.loss_B, **result.quantities}.items():
            sums[f"{name}/{quantity}"] = torch.where(masked, 0.0, value_B).sum()
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

    A resumed run drops the records past its checkpoint, which it will write again, so iterations in the file only rise; ``restarts`` of a
    record says how often the run had been resumed. It goes on in the same W&B run, which keeps the first record of an iteration: losses
    are the same, seconds may differ. An error of W&B ends W&B, not the run.
    """

    def __init__(self, run: RunConfig, *, start: int, total: int) -> None:
        self.active = dist.get_rank() == 0
        if not self.active:
            return
        folder = Path(run.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        self._restarts = _drop_records_from(self.path, iteration=start)
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
        record = {"restarts": self._restarts, **record}
        self._to_file(lambda: self._file.write(json.dumps({"iteration": iteration, **record}) + "\n"))
        self._to_file(self._file.flush)
        self._to_wandb(lambda: self._wandb.log(record, step=iteration))
        losses = {key.removesuffix("/loss"): f"{value:.4g}" for key, value in record.items() if key.endswith("/loss")}
        self._bar.set_postfix({"stage": record["stage"], **losses}, refresh=False)
        self._bar.update(1)

    def log_videos(self, iteration: int, videos: Mapping[str, tuple[Path, str]]) -> None:
        """Show sample videos in Weights & Biases: {name: (MP4 file, caption)}."""
        if not self.active or self._wandb is None or not videos:
            return
        import wandb

        shown = {name: wandb.Video(path, caption=caption) for name, (path, caption) in videos.items()}
        self._to_wandb(lambda: self._wandb.log(shown, step=iteration))

    def message(self, text: str) -> None:
        """Print a line without tearing the progress bar."""
        if self.active:
            tqdm.write(text)

    def close(self) -> None:
        if not self.active:
            return
        self._bar.close()
        self._to_file(self._file.close)
        self._to_wandb(lambda: self._wandb.finish())

    def _to_file(self, call: Callable[[], Any]) -> None:
        """A full disk ends no run; what could not be written stays in the file's buffer, and is tried again with the next record."""
        try:
            call()
        except OSError as error:
            self.message(f"{self.path} could not be written ({error}); tried again with the next record")

    def _to_wandb(self, call: Callable[[], None]) -> None:
        """Its service is another process, which a signal to the whole job may end before this one has saved."""
        if self._wandb is None:
            return
        try:
            call()
        except Exception as error:
            self.message(f"Weights & Biases stopped ({type(error).__name__}: {error}); metrics.jsonl goes on")
            self._wandb = None


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl in the file's order; a torn line (of a killed process, or of one that is writing) is left out."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def _drop_records_from(path: Path, *, iteration: int) -> int:
    """Keep the records before ``iteration``; how often the run has been resumed, now included, as far as records tell."""
    records = read_records(path) if path.exists() else []
    kept = [record for record in records if record["iteration"] < iteration]
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
    return 1 + max((record.get("restarts", 0) for record in records), default=0) if iteration else 0


def _start_wandb(run: RunConfig, folder: Path):
    mode = wandb_mode(run.logging.wandb_mode)
    if mode == "disabled":
        return None
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    start = partial(
        wandb.init,
        project=run.logging.wandb_project,
        name=run.name,
        id=_wandb_run_id(folder / "wandb_run_id"),
        resume="allow",
        dir=str(folder),
        config=as_dict(run),
    )
    try:
        return start(mode=mode)
    except wandb.Error as error:
        if run.logging.wandb_mode != "auto" or mode == "offline":
            raise
        log.warning(
            "Weights & Biases works offline: %s; `wandb sync %s/wandb/offline-run-*` sends it later", error, folder
        )
        wandb.teardown()  # its service still holds the id
        return start(mode="offline")


def _wandb_run_id(path: Path) -> str:
    """The run's id, on disk before anything is logged under it."""
    if not path.exists() or not path.read_text().strip():
        write_atomically(path, f"{uuid.uuid4().hex[:8]}\n".encode())
    return path.read_text().strip()
