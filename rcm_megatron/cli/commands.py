"""The commands: what each is asked (`requests.py`), how it reads a run's configuration, and the function that does it.

A command imports what it needs when it runs, so that --help and a refused configuration take no second.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rcm_megatron import requests
from rcm_megatron.config import ConfigError, RunConfig, load_config, to_yaml

_ABSENT = object()
Load = Callable[[str, Sequence[str], Any], RunConfig]
"""(path of the YAML, overrides, request) -> the configuration, checked for the number of processes."""


@dataclass(frozen=True)
class Command:
    """``run(request)``, or with ``load`` ``run(configuration, request)``; what it returns is the exit status (None: 0)."""

    request: type
    run: Callable[..., int | None]
    load: Load | None = None

    @property
    def summary(self) -> str:
        """First sentence of the request's docstring."""
        return " ".join((self.request.__doc__ or "").split())


def world_size() -> int:
    """Processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def load_as_it_is(config: str, overrides: Sequence[str], request: Any) -> RunConfig:
    """For the ranks that are running."""
    return load_config(config, overrides, world_size=world_size())


def load_to_check(
    config: str, overrides: Sequence[str], request: requests.CheckRequest | requests.DryRunRequest
) -> RunConfig:
    """For as many ranks as are asked about. Raises ConfigError for none."""
    if request.world_size < 1:
        raise ConfigError(f"--world-size: got {request.world_size}, need an integer greater than 0")
    return load_config(config, overrides, world_size=request.world_size)


def load_to_plan(config: str, overrides: Sequence[str], request: requests.PlanRequest) -> RunConfig:
    """With whatever layout, which is what is looked for. Raises ConfigError for no GPUs."""
    if request.gpus < 1:
        raise ConfigError(f"--gpus: got {request.gpus}, need an integer greater than 0")
    from rcm_megatron.planner.question import asked

    return load_config(config, [*overrides, *asked(load_config(config, overrides), request)])


def load_for_inference(config: str, overrides: Sequence[str], request: Any) -> RunConfig:
    """One process needs no parallel layout, for checkpoints load on any."""
    alone = ["parallel={}"] if world_size() == 1 else []
    return load_config(config, [*overrides, *alone], world_size=world_size())


def load_to_build(config: str, overrides: Sequence[str], request: requests.BuildRequest) -> RunConfig:
    """For building a dataset: a batch of training does not have to fit the ranks, and each of them encodes whole videos."""
    alone = world_size() == 1 or not isinstance(request, requests.TeacherRequest)
    overrides = [*overrides, *(["parallel={}"] if alone else [])]
    run = load_config(config, overrides)
    replicas = max(1, world_size() // run.parallel.model_parallel_size)
    batch = f"trainer.global_batch_size={run.trainer.micro_batch_size * replicas}"
    return load_config(config, [*overrides, batch], world_size=world_size())


def train(run: RunConfig, request: requests.TrainRequest) -> None:
    from rcm_megatron.training import trainer

    trainer.main(run)


def sample(run: RunConfig, request: requests.SampleRequest) -> None:
    from rcm_megatron.inference.sample import sample

    sample(run, request)


def evaluate_samplers(run: RunConfig, request: requests.EvaluateSamplersRequest) -> None:
    from rcm_megatron.evaluation.samplers import evaluate_samplers

    evaluate_samplers(run, request)


def evaluate_folders(request: requests.EvaluateFoldersRequest) -> None:
    from rcm_megatron.evaluation.compare import evaluate_folders

    evaluate_folders(request)


def vbench_sample(run: RunConfig, request: requests.VBenchSampleRequest) -> None:
    from rcm_megatron.evaluation.samplers import sample_for_vbench

    sample_for_vbench(run, request)


def vbench_scores(request: requests.VBenchScoresRequest) -> None:
    from rcm_megatron.evaluation.scores import print_scores

    print_scores(request)


def export(run: RunConfig, request: requests.ExportRequest) -> None:
    from rcm_megatron.inference.export import export

    export(run, request)


def check(run: RunConfig, request: requests.CheckRequest) -> None:
    if request.field is not None:
        print(_field(run, request.field))
        return
    print(f"# {run.layout_summary(request.world_size)}")
    if request.gpu is not None:
        from rcm_megatron.planner.command import say_memory

        say_memory(run, request.world_size, request.gpu)
    print(to_yaml(run), end="")


def _field(run: RunConfig, key: str) -> object:
    value: object = run
    for part in key.split("."):
        value = value.get(part, _ABSENT) if isinstance(value, Mapping) else getattr(value, part, _ABSENT)
        if value is _ABSENT:
            raise ConfigError(f"--field {key}: the configuration has no such field")
    return value


def dry_run(run: RunConfig, request: requests.DryRunRequest) -> None:
    from rcm_megatron.dryrun.command import dry_run

    dry_run(run, request)


def plan(run: RunConfig, request: requests.PlanRequest) -> int:
    from rcm_megatron.planner.command import plan

    return plan(run, request)


def preflight(run: RunConfig, request: requests.PreflightRequest) -> None:
    from rcm_megatron.checkpoint.resuming import begins_anew, check_resume, newest
    from rcm_megatron.cluster.preflight import preflight

    checkpoint = newest(run)
    if checkpoint is not None and not begins_anew(run):
        check_resume(run, checkpoint)
    status = preflight(run, request)
    sys.stdout.flush(), sys.stderr.flush()
    # a rank that takes its Gloo threads down after others have left may abort, and would look like a bad node
    os._exit(status)


def convert(request: requests.ConvertRequest) -> None:
    from rcm_megatron.checkpoint.convert import convert

    def verifier(*source: Any) -> Callable:
        from rcm_megatron.inference.verify import verify_conversion  # Megatron, for --verify only

        return verify_conversion(*source)

    def companions(run: RunConfig, folder: str) -> tuple[str, dict[str, str]]:
        from rcm_megatron.inference.pipelines import student_companions  # Megatron, for a run's student only

        return student_companions(run, folder)

    convert(request, verifier=verifier, companions=companions)
    dtype = "" if request.dtype is None else f", {request.dtype}"
    print(f"{request.source} written to {request.target} ({request.to}{dtype})")


def extract_lora(request: requests.ExtractLoraRequest) -> None:
    from rcm_megatron.checkpoint.lora.extract import extract_lora

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    extract_lora(request)
    print(
        f"{request.student} - {request.teacher} written to {request.output} ({request.naming} naming, {request.dtype})"
    )


def build_dataset(run: RunConfig, request: requests.BuildRequest) -> None:
    import torch.distributed as dist

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if isinstance(request, requests.TeacherRequest):
        from rcm_megatron.datasets.from_teacher import build_from_teacher as build
    elif isinstance(request, requests.LatentsRequest):
        from rcm_megatron.datasets.from_latents import build_from_latents as build
    else:
        from rcm_megatron.datasets.from_videos import build_from_videos as build
    build(run, request)
    if dist.is_initialized():
        dist.destroy_process_group()


def inspect_dataset(request: requests.InspectDatasetRequest) -> int:
    from rcm_megatron.datasets.contact_sheet import inspect_and_draw

    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    return inspect_and_draw(request)


def plot(request: requests.PlotRequest) -> None:
    from rcm_megatron.reports.plot import plot_runs

    plot_runs(request)


def conformance(request: requests.ConformanceRequest) -> int:
    from rcm_megatron.conformance.replay import run_conformance

    return run_conformance(request)


COMMANDS: Mapping[str, Command | Mapping[str, Command]] = {
    "train": Command(requests.TrainRequest, train, load_as_it_is),
    "sample": Command(requests.SampleRequest, sample, load_for_inference),
    "evaluate": {
        "samplers": Command(requests.EvaluateSamplersRequest, evaluate_samplers, load_for_inference),
        "folders": Command(requests.EvaluateFoldersRequest, evaluate_folders),
        "vbench-sample": Command(requests.VBenchSampleRequest, vbench_sample, load_for_inference),
        "vbench-scores": Command(requests.VBenchScoresRequest, vbench_scores),
    },
    "export": Command(requests.ExportRequest, export, load_for_inference),
    "check": Command(requests.CheckRequest, check, load_to_check),
    "dryrun": Command(requests.DryRunRequest, dry_run, load_to_check),
    "plan": Command(requests.PlanRequest, plan, load_to_plan),
    "preflight": Command(requests.PreflightRequest, preflight, load_as_it_is),
    "convert": Command(requests.ConvertRequest, convert),
    "extract-lora": Command(requests.ExtractLoraRequest, extract_lora),
    "build-dataset": {
        "teacher": Command(requests.TeacherRequest, build_dataset, load_to_build),
        "videos": Command(requests.VideosRequest, build_dataset, load_to_build),
        "latents": Command(requests.LatentsRequest, build_dataset, load_to_build),
    },
    "inspect-dataset": Command(requests.InspectDatasetRequest, inspect_dataset),
    "plot": Command(requests.PlotRequest, plot),
    "conformance": Command(requests.ConformanceRequest, conformance),
}
"""Name -> command, or the commands below it."""
