"""`python -m rcm_megatron export`: a trained network as a diffusers folder, and proof that diffusers agrees with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from rcm_megatron import __version__, platform
from rcm_megatron.checkpoint.convert import DTYPES, export_diffusers, gather_full
from rcm_megatron.checkpoint.errors import CheckpointError
from rcm_megatron.checkpoint.writers import check_target
from rcm_megatron.config import RunConfig, to_yaml
from rcm_megatron.diffusion.noise import SeededDraws
from rcm_megatron.models.dit import DiffusionTransformer
from rcm_megatron.parallel.groups import ParallelGroups
from rcm_megatron.parallel.pipeline import NetworkInput, evaluate
from rcm_megatron.training.inference import Weights, join, load_network, resolve_checkpoint
from rcm_megatron.training.pipelines import pipeline_usage, scheduler_files

VERIFY_BOUND = 1e-5
"""Largest relative error of diffusers' forward against ours, both fp32 on the exported values."""
_VERIFY_TIMES = (937.5, 250.0)


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What to export, and how."""

    weights: Weights
    output: Path
    checkpoint: Path | None = None
    """A checkpoint, or a folder of them; None: the run's latest."""
    dtype: str = "fp32"
    force: bool = False
    """Replace a checkpoint folder that is there."""
    verify: bool = False
    """Load the folder with diffusers and compare; CheckpointError past VERIFY_BOUND."""


def export(run: RunConfig, request: ExportRequest) -> None:
    """Write the diffusers folder with a README; call on all ranks of any layout. Weights come from fp32 values."""
    check_target(request.output, force=request.force)
    groups = join(run)
    checkpoint = None if request.weights == "teacher" else resolve_checkpoint(run, request.checkpoint)
    network = load_network(run, groups, weights=request.weights, checkpoint=checkpoint, dtype=torch.float32)
    dtype = DTYPES[request.dtype]
    facts = _facts(run, request, str(checkpoint or run.init.teacher))
    if groups.cp_rank == 0 and groups.dp_rank == 0:
        export_diffusers(
            gather_full(network, tp_group=groups.tp, pp_group=groups.pp),
            run.model,
            request.output,
            dtype=dtype,
            force=request.force,
            metadata=facts,
            texts={
                "README.md": _model_card(run, request, facts),
                **(scheduler_files(run) if _few_steps(request) else {}),
            },
            is_writer=dist.get_rank() == 0,
        )
    if dist.get_rank() == 0:
        print(f"{request.weights} of {facts['source']} written to {request.output} ({request.dtype}, diffusers format)")
    if request.verify:
        _verify(run, network, groups, request)
    dist.barrier()
    dist.destroy_process_group()


def _verify(
    run: RunConfig, network: Sequence[DiffusionTransformer], groups: ParallelGroups, request: ExportRequest
) -> None:
    """Compare on rank 0; all ranks learn the error, so that all fail together."""
    error = torch.zeros(1, dtype=torch.float64)
    x_BCTHW, timestep_B, text_BLD = _random_input(run)
    ours_BCTHW = _our_forward(network, x_BCTHW, timestep_B, text_BLD, dtype=DTYPES[request.dtype])
    if dist.get_rank() == 0:
        theirs_BCTHW = _diffusers_forward(run, request.output, x_BCTHW, timestep_B, text_BLD)
        error[0] = (theirs_BCTHW - ours_BCTHW).norm() / ours_BCTHW.norm()
    error = error.to(platform.device())
    dist.broadcast(error, src=0)
    if not float(error) <= VERIFY_BOUND:
        raise CheckpointError(
            f"{request.output}: diffusers' forward differs from the trained network's by {float(error):.1e}, need at most "
            f"{VERIFY_BOUND:.0e}; do not use it"
        )
    if dist.get_rank() == 0:
        print(
            f"{_diffusers_class(run)}.from_pretrained loads it; relative error of its velocity against the trained network "
            f"on {groups.token_shards} rank(s): {float(error):.1e} (at most {VERIFY_BOUND:.0e})"
        )


def _random_input(run: RunConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Latents [B, C, T, H, W], timesteps [B] and text [B, L, D], equal on all ranks."""
    draws = SeededDraws(run.seed, 0, range(len(_VERIFY_TIMES)))
    text_BLD = draws.normal("verify_text", (run.model.text_len, run.model.text_dim))
    return draws.normal("verify_latent", run.latent.shape_CTHW), torch.tensor(_VERIFY_TIMES), text_BLD


@torch.no_grad()
def _our_forward(
    network: Sequence[DiffusionTransformer],
    x_BCTHW: Tensor,
    timestep_B: Tensor,
    text_BLD: Tensor,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """Velocity [B, C, T, H, W], fp64 on the CPU, of the network with its weights rounded to `dtype` as they were written."""
    for chunk in network:
        for parameter in chunk.parameters():
            parameter.copy_(parameter.to(dtype))
    device, layout = platform.device(), network[0].layout
    x_SBP = layout.shard(x_BCTHW.to(device))
    network_input = NetworkInput(x_SBP, timestep_B[None].to(device), text_BLD.transpose(0, 1).to(device))
    (v_SBP,) = evaluate(network, [network_input])
    return layout.gather(v_SBP).double().cpu()


@torch.no_grad()
def _diffusers_forward(run: RunConfig, folder: Path, x_BCTHW: Tensor, timestep_B: Tensor, text_BLD: Tensor) -> Tensor:
    import diffusers

    model = getattr(diffusers, _diffusers_class(run)).from_pretrained(folder, torch_dtype=torch.float32).eval()
    given = {}
    if run.model.family == "cosmos":  # no frames given, a whole picture, and time in [0, 1]
        _check_torchvision()
        timestep_B, given["fps"] = timestep_B / 1000, run.model.cosmos.rope_fps
        given["padding_mask"] = x_BCTHW.new_zeros(1, 1, *x_BCTHW.shape[-2:])
        given["condition_mask"] = torch.zeros_like(x_BCTHW[:, :1]) if run.model.cosmos.condition_frames else None
    (v_BCTHW,) = model(x_BCTHW, timestep=timestep_B, encoder_hidden_states=text_BLD, return_dict=False, **given)
    return v_BCTHW.double()


def _check_torchvision() -> None:
    """diffusers resizes Cosmos' padding mask with it, and without it fails with a NameError."""
    from diffusers.models.transformers import transformer_cosmos

    if not hasattr(transformer_cosmos, "transforms"):
        raise CheckpointError(
            "got no torchvision; need it to verify a Cosmos export, because diffusers' class calls it; fix: install the torchvision "
            "that goes with this torch (0.28.0 with 2.13.0), or export without --verify"
        )


def _diffusers_class(run: RunConfig) -> str:
    return {"wan": "WanTransformer3DModel", "cosmos": "CosmosTransformer3DModel"}[run.model.family]


def _few_steps(request: ExportRequest) -> bool:
    """Whether the weights are the student's."""
    return request.weights in ("student", "ema")


def _facts(run: RunConfig, request: ExportRequest, source: str) -> dict[str, str]:
    facts = {"run": run.name, "weights": request.weights, "source": source, "dtype": request.dtype}
    return {**facts, "rcm_megatron": __version__}


def _model_card(run: RunConfig, request: ExportRequest, facts: dict[str, str]) -> str:
    table = "\n".join(f"| {name} | `{value}` |" for name, value in facts.items())
    if _few_steps(request):
        times = ", ".join(str(time) for time in run.sampling.student_times)
        usage = (
            f"A few-step generator: start at TrigFlow time atan({run.sampling.sigma_max:g}), denoise, re-noise to the next of "
            f"{times}, 1 to {len(run.sampling.student_times) + 1} network evaluations, no guidance. The network predicts the "
            "rectified-flow velocity, as its teacher does. With diffusers' pipelines:\n\n"
            f"```python\n{pipeline_usage(run, str(request.output))}```"
        )
    else:
        usage = "Predicts the rectified-flow velocity, as its teacher does."
    return (
        f"# {run.name}: {request.weights}\n\nWan2.1-architecture text-to-video transformer in diffusers' format, "
        f"distilled with rCM by rcm_megatron.\n\n{usage}\n\n| | |\n| --- | --- |\n{table}\n\n"
        f"```python\n{_diffusers_class(run)}.from_pretrained({str(request.output)!r})\n```\n\n"
        f"## Configuration of the run\n\n```yaml\n{to_yaml(run)}```\n"
    )
