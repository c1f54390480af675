"""`python -m rcm_megatron export`: a trained network as a diffusers folder, and proof that diffusers agrees with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from rcm_megatron import __version__
from rcm_megatron.checkpoint.formats.base import WriteOptions
from rcm_megatron.checkpoint.model_card import folder_texts
from rcm_megatron.checkpoint.models import gather_full, write_checkpoint
from rcm_megatron.checkpoint.writers import check_target
from rcm_megatron.config import ModelConfig, RunConfig
from rcm_megatron.config.roles import low_noise_weights
from rcm_megatron.dtypes import DTYPES
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
        requests = [replace(request, weights=w, output=request.output / name) for w, name in names.items()]
    for part in requests:
        check_target(part.output, force=part.force)
        role, _ = stored_in(run, part.weights)
        FORMATS[_FORMAT].naming_of(run.model_of(role))
    groups = init_parallel(run)
    for part in requests:
        _export(run, part, groups, folder=request.output)
    dist.destroy_process_group()


def _export(run: RunConfig, request: ExportRequest, groups: ParallelGroups, *, folder: Path) -> None:
    """One network. ``folder``: what the command was asked to write."""
    role, kind = stored_in(run, request.weights)
    model = run.model_of(role)
    checkpoint = None if kind is None else resolve_checkpoint(run, request.checkpoint)
    network = load_network(run, groups, weights=request.weights, checkpoint=checkpoint, dtype=torch.float32)
    dtype = DTYPES[request.dtype]
    facts = _facts(run, request, str(checkpoint or run.networks[role].init))
    comparison = _Comparison(run, model, network, dtype) if request.verify else None
    if groups.cp_rank == 0 and groups.dp_rank == 0:
        about = {"title": f"{run.name}: {request.weights}", "facts": facts, "target_format": _FORMAT}
        paths = {"path": str(request.output), "pipeline_folder": str(folder)}
        texts = folder_texts(model, **about, **paths, run=run, companions=student_companions)
        options = WriteOptions(dtype=dtype, force=request.force, metadata=facts, texts=texts, check=comparison)
        whole = gather_full(network, tp_group=groups.tp, pp_group=groups.pp)
        write_checkpoint(whole, model, request.output, options, format=_FORMAT, is_writer=dist.get_rank() == 0)
    if comparison is not None and dist.get_rank() > 0:
        comparison.wait()
    if dist.get_rank() == 0:
        print(f"{request.weights} of {facts['source']} written to {request.output} ({request.dtype}, {_FORMAT} format)")
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
