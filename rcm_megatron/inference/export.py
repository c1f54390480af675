"""`python -m rcm_megatron export`: a trained network as a diffusers folder, and proof that diffusers agrees with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from rcm_megatron import __version__
from rcm_megatron.checkpoint.formats.base import WriteOptions
from rcm_megatron.checkpoint.lora.naming import LoraNaming, naming_to_write
from rcm_megatron.checkpoint.lora.write import check_lora_path, write_lora
from rcm_megatron.checkpoint.model_card import folder_texts
from rcm_megatron.checkpoint.models import gather_full, write_checkpoint
from rcm_megatron.checkpoint.writers import check_target
from rcm_megatron.config import ModelConfig, RunConfig
from rcm_megatron.config.roles import low_noise_weights
from rcm_megatron.dtypes import DTYPES
from rcm_megatron.errors import CheckpointError
from rcm_megatron.inference.networks import (
    init_parallel,
    load_network,
    resolve_checkpoint,
    stored_in,
)
from rcm_megatron.inference.pipelines import student_companions
from rcm_megatron.inference.verify import (
    network_forward,
    random_input,
    relative_error,
    require_bound,
)
from rcm_megatron.models.dit import DiffusionTransformer
from rcm_megatron.models.lora import merge_adapters
from rcm_megatron.networks.lora_factors import whole_factors
from rcm_megatron.parallel.groups import ParallelGroups
from rcm_megatron.platform.device import this_device
from rcm_megatron.registries import FORMATS, family_of
from rcm_megatron.requests import ExportRequest

_FORMAT = "diffusers"


def export(run: RunConfig, request: ExportRequest) -> None:
    """Write the diffusers folder with a README; call on all ranks of any layout. Weights come from fp32 values.

    A role of two networks becomes the two folders of diffusers' pipelines, OUTPUT/transformer and OUTPUT/transformer_2.
    """
    second = low_noise_weights(request.weights, run.networks)
    requests = [request]
    if second is not None:
        names = {request.weights: "transformer", second: "transformer_2"}
        end = ".safetensors" if request.lora else ""
        requests = [replace(request, weights=w, output=request.output / f"{name}{end}") for w, name in names.items()]
    for part in requests:
        _check(run, part)
    groups = init_parallel(run)
    for part in requests:
        _export(run, part, groups, folder=request.output)
    dist.destroy_process_group()


def _check(run: RunConfig, request: ExportRequest) -> None:
    role, _ = stored_in(run, request.weights)
    trains_lora = run.trains_lora(role)
    if not trains_lora and (request.lora or request.merge):
        flag = "--lora" if request.lora else "--merge"
        raise CheckpointError(f"{flag}: networks.{role}.lora=null, the {role} is a whole network; leave {flag} out")
    if trains_lora and request.lora == request.merge:
        got = "both" if request.lora else "neither"
        raise CheckpointError(
            f"the {role} trains a LoRA: got {got} of --lora and --merge, need one: its file alone, or the whole network"
        )
    if not request.lora:
        check_target(request.output, force=request.force)
        FORMATS[_FORMAT].naming_of(run.model_of(role))
        return
    naming = naming_to_write(request.naming, run.model_of(role))
    check_lora_path(request.output, force=request.force)
    for internal in _unheld(run, role, naming):
        raise CheckpointError(
            f"--naming {naming.name}: no LoRA of {internal!r} in it; need --naming diffusers, or --merge"
        )
    if request.verify:
        raise CheckpointError("--verify compares whole networks; need --merge with it")


def _unheld(run: RunConfig, role: str, naming: LoraNaming) -> Iterator[str]:
    """Linears that the role's LoRA may change and the naming's readers do not take."""
    takes = run.networks[role].lora.takes
    for internal, entry in naming.entries(run.model_of(role)).items():
        is_linear = internal.endswith(".weight") and len(entry.internal_shape) == 2
        if is_linear and takes(internal.removesuffix(".weight")) and not naming.holds(internal, entry):
            yield internal


def _export_lora(run: RunConfig, request: ExportRequest, network: Sequence[DiffusionTransformer], facts: dict) -> None:
    """The adapter alone; call it on the ranks of one replica."""
    role, _ = stored_in(run, request.weights)
    model, settings = run.model_of(role), run.networks[role].lora
    factors = whole_factors(network, model, scale=settings.scale)
    if dist.get_rank() == 0:
        naming = naming_to_write(request.naming, model)
        about = {"metadata": {**facts, "base": str(run.init_of(role))}, "force": request.force}
        write_lora(request.output, factors, model, naming, dtype=DTYPES[request.dtype], **about)


def _export(run: RunConfig, request: ExportRequest, groups: ParallelGroups, *, folder: Path) -> None:
    """One network. ``folder``: what the command was asked to write."""
    role, kind = stored_in(run, request.weights)
    model = run.model_of(role)
    checkpoint = None if kind is None else resolve_checkpoint(run, request.checkpoint)
    network = load_network(run, groups, weights=request.weights, checkpoint=checkpoint, dtype=torch.float32)
    if request.merge:
        merge_adapters(network)
    dtype = DTYPES[request.dtype]
    facts = _facts(run, request, str(checkpoint or run.networks[role].init))
    comparison = _Comparison(run, model, network, dtype) if request.verify else None
    if request.lora and groups.cp_rank == 0 and groups.dp_rank == 0:
        _export_lora(run, request, network, facts)
    elif groups.cp_rank == 0 and groups.dp_rank == 0:
        about = {"title": f"{run.name}: {request.weights}", "facts": facts, "target_format": _FORMAT}
        paths = {"path": str(request.output), "pipeline_folder": str(folder)}
        texts = folder_texts(model, **about, **paths, run=run, companions=student_companions)
        options = WriteOptions(dtype=dtype, force=request.force, metadata=facts, texts=texts, check=comparison)
        whole = gather_full(network, tp_group=groups.tp, pp_group=groups.pp)
        write_checkpoint(whole, model, request.output, options, format=_FORMAT, is_writer=dist.get_rank() == 0)
    if comparison is not None and dist.get_rank() > 0:
        comparison.wait()
    if dist.get_rank() == 0:
        kind = f"a LoRA, {request.naming} naming" if request.lora else f"{_FORMAT} format"
        print(f"{request.weights} of {facts['source']} written to {request.output} ({request.dtype}, {kind})")
    dist.barrier()


class _Comparison:
    """The trained network's velocity on its layout against diffusers' on the folder that was written; all ranks fail together."""

    def __init__(
        self, run: RunConfig, model: ModelConfig, network: Sequence[DiffusionTransformer], dtype: torch.dtype
    ) -> None:
        self._model = model
        self._input = random_input(model, run.latent, seed=run.seed, text_len=model.text_len)
        self._expected_BCTHW = network_forward(network, self._input, dtype=dtype)
        self._ranks = network[0].layout.groups.token_shards

    def __call__(self, folder: Path) -> None:
        """Compare, on rank 0."""
        got_BCTHW = FORMATS[_FORMAT].forward(self._model, folder, self._input, dtype=None)
        self._conclude(relative_error(self._expected_BCTHW, got_BCTHW))

    def wait(self) -> None:
        """Learn what rank 0 found, on the others."""
        self._conclude(0.0)

    def _conclude(self, error: float) -> None:
        found = torch.tensor([error], dtype=torch.float64, device=this_device())
        dist.broadcast(found, src=0)
        what = f"what was exported, in {family_of(self._model).diffusers_class},"
        require_bound(float(found), what=what, reference=f"the trained network on {self._ranks} rank(s)")


def _facts(run: RunConfig, request: ExportRequest, source: str) -> dict[str, str]:
    facts = {"run": run.name, "weights": request.weights, "source": source, "dtype": request.dtype}
    return {**facts, "rcm_megatron": __version__}
