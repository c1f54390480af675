"""From which checkpoint a run goes on, and whether it can: answered before a network is built, and by the pre-flight.

`trainer.resume=false` begins anew once: what is in output_dir goes to output_dir/before_N, and `begun.json` says that it was done, so that
the run itself goes on from its own checkpoints after a crash, a requeue or a signal.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException

from rcm_megatron.checkpoint.dist import FORMAT
from rcm_megatron.checkpoint.folders import checkpoint_folder
from rcm_megatron.checkpoint.torch_dist import read_metadata
from rcm_megatron.config import ConfigError, RunConfig, as_dict
from rcm_megatron.files import write_atomically

log = logging.getLogger(__name__)

BEGUN = "begun.json"
_OF_A_RUN = (BEGUN, "checkpoints", "metrics.jsonl", "previews", "wandb_run_id", "config.yaml", "stacks")
"""What a run leaves in output_dir, the mark first: a crash in the midst of moving leaves no mark of a run whose checkpoints are gone."""


class ResumeError(ConfigError):
    """The run cannot go on from its newest checkpoint; starting it again changes nothing."""


@dataclass(frozen=True)
class Resumable:
    """What a checkpoint has for a run."""

    path: Path
    notes: tuple[str, ...]
    """What is different from the run that wrote it, and what comes of it; one line each."""


def begins_anew(run: RunConfig) -> bool:
    """Whether this start sets aside what is in output_dir: `trainer.resume=false`, and it has not been done for this run.

    It has been done if the mark is of this job of SLURM's, or, outside of SLURM, of the same configuration and not ended."""
    if run.trainer.resume:
        return False
    try:
        mark = json.loads((Path(run.output_dir) / BEGUN).read_text())
        launch, configuration, ended = mark["launch"], mark["configuration"], mark["ended"]
    except (OSError, ValueError, KeyError, TypeError):
        return True
    restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0) + int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)
    if launch is not None and launch == _launch() and restarts:
        return False
    if launch != _launch() and any((one or "").startswith("slurm") for one in (launch, _launch())):
        return True
    return ended or configuration != _digest(run)


def begin_anew(run: RunConfig) -> None:
    """Set aside what is in output_dir, and leave the mark; call on one rank, when `begins_anew`."""
    folder = Path(run.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    present = [folder / name for name in _OF_A_RUN if (folder / name).exists()]
    if present:
        aside = next(path for path in (folder / f"before_{n}" for n in range(1, 10**6)) if not path.exists())
        aside.mkdir()
        for path in present:
            path.rename(aside / path.name)
        log.warning("trainer.resume=false: the run begins anew; what was in %s is now in %s", folder, aside)
    _mark(run, ended=False)


def mark_ended(run: RunConfig) -> None:
    """The run has ended: the next start with `trainer.resume=false` begins anew again. Call on one rank."""
    if (Path(run.output_dir) / BEGUN).exists():
        _mark(run, ended=True)


def _mark(run: RunConfig, *, ended: bool) -> None:
    mark = json.dumps({"launch": _launch(), "configuration": _digest(run), "ended": ended}) + "\n"
    write_atomically(Path(run.output_dir) / BEGUN, mark.encode())


def _launch() -> str | None:
    """Who started this process, the same after a requeue or a restart."""
    job, torchrun = os.environ.get("SLURM_JOB_ID"), os.environ.get("TORCHELASTIC_RUN_ID")
    return f"slurm {job}" if job else f"torchrun {torchrun}" if torchrun else None


def _digest(run: RunConfig) -> str:
    return hashlib.blake2b(json.dumps(as_dict(run), sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def newest(run: RunConfig) -> Path | None:
    """The checkpoint that `latest` names, unread; for the pre-flight, which has no process group."""
    root = checkpoint_folder(run)
    try:
        found = root / (root / "latest").read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return found if found != root and found.is_dir() else None


def check_resume(run: RunConfig, checkpoint: Path) -> Resumable:
    """Whether ``run`` can go on from ``checkpoint``, and what changes. Raises ResumeError with every reason why not."""
    common = read_common(checkpoint)
    progress = common["progress"]
    problems = list(_architecture_problems(run, progress.get("architectures", {})))
    known = [role for role in run.trained_roles if role in common["adam_steps"]]
    if not known:
        problems.append(
            f"got the trained networks {sorted(common['adam_steps'])}, need one of {sorted(run.trained_roles)}; fix: its stages"
        )
    if problems:
        raise ResumeError(
            f"cannot go on from {checkpoint}: {'; '.join(problems)}; or begin anew with trainer.resume=false or another output_dir"
        )
    return Resumable(checkpoint, tuple(_notes(run, common, saved_averages(checkpoint))))


def read_common(checkpoint: Path) -> dict[str, Any]:
    """The run's plain state in a checkpoint. Raises ResumeError if it is of another format."""
    try:
        read_metadata(checkpoint)  # PyTorch would unpickle anything
        common = dist_checkpointing.load_common_state_dict(str(checkpoint))
    except (CheckpointingException, OSError, KeyError) as error:
        raise ResumeError(f"{checkpoint} cannot be read: {error}; fix: restore it, or delete it") from error
    if common.get("format") != FORMAT:
        raise ResumeError(
            f"{checkpoint}: got format {common.get('format')}, need {FORMAT}; fix: use the version of rcm_megatron that wrote it, or "
            "begin anew with trainer.resume=false or another output_dir"
        )
    return common


def saved_averages(checkpoint: Path) -> set[str]:
    """Roles whose EMA is in the checkpoint."""
    keys = read_metadata(checkpoint).state_dict_metadata
    return {key.split(".")[0] for key in keys if ".ema." in key}


def architectures(run: RunConfig) -> dict[str, dict[str, Any]]:
    """What a checkpoint remembers of each trained network's model, plain."""
    return {role: as_dict(run.model_of(role)) | _lora_of(run, role) for role in run.trained_roles}


def _lora_of(run: RunConfig, role: str) -> dict[str, Any]:
    """A LoRA's rank, scale and targets are a part of the network that trains."""
    settings = run.networks[role].lora
    return {"lora": None if settings is None else as_dict(settings)}


def _architecture_problems(run: RunConfig, saved: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for role, now in architectures(run).items():
        for name, value in now.items() if role in saved else ():
            # runs before there were LoRAs trained all weights
            was = saved[role].get(name, None if name == "lora" else value)
            if was != value and name == "lora":
                yield f"got networks.{role}.lora={value}, need {was}, which the {role} was trained with; fix: set it back"
            elif was != value:
                yield f"got {run.model_path(role)}.{name}={value}, need {was}, which the {role} was trained with; fix: set it back"


def _notes(run: RunConfig, common: Mapping[str, Any], averages: set[str]) -> Iterator[str]:
    saved = common["adam_steps"]
    for role in run.trained_roles:
        if role not in saved:
            yield f"networks.{role} is not in the checkpoint: it begins with its initial weights"
        elif run.networks[role].ema is not None and role not in averages:
            yield f"networks.{role}.ema is not in the checkpoint: the average begins with the weights of now"
        elif run.networks[role].ema is None and role in averages:
            yield f"networks.{role}.ema=null: the average in the checkpoint is left behind"
    for role in saved:
        if role not in run.trained_roles:
            yield f"{role}, which no stage trains now, is left behind"
    before = common["progress"]["data"].get("seed")
    if before != run.seed:
        yield f"seed was {before} and is {run.seed}: order of samples, noise and times follow the new one from here on"
