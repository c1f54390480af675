"""Building the networks of a run: teacher, student and fake score on the ranks of one layout, with their weights."""

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rcm_megatron import platform
from rcm_megatron.checkpoint.convert import load_into
from rcm_megatron.checkpoint.formats import internal_shapes
from rcm_megatron.checkpoint.sources import open_checkpoint
from rcm_megatron.config import LatentConfig, ModelConfig, ParallelConfig, RunConfig
from rcm_megatron.models.tokens import TokenLayout
from rcm_megatron.models.wan import WanModel
from rcm_megatron.parallel.context import ContextParallel
from rcm_megatron.parallel.groups import ParallelGroups
from rcm_megatron.training.objectives import Networks
from rcm_megatron.training.optimizer import wrap_ddp

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_model(
    model: ModelConfig,
    latent: LatentConfig,
    parallel: ParallelConfig,
    *,
    groups: ParallelGroups,
    params_dtype: torch.dtype,
    recompute_blocks: bool = True,
) -> WanModel:
    """One network of this rank, weights not set."""
    config = platform.transformer_config(model, parallel, params_dtype=params_dtype, perform_initialization=False)
    return WanModel(
        model,
        config,
        layout=TokenLayout(latent.shape_CTHW, model.patch_size, groups=groups),
        context=ContextParallel(ring_group=groups.ring, ulysses_group=groups.ulysses),
        recompute_blocks=recompute_blocks,
    ).to(platform.device())


def load_weights(model: WanModel, source: Mapping[str, Tensor]) -> WanModel:
    """Fill ``model`` from an open checkpoint (or tensors in any known naming); every rank reads its own slices."""
    groups = model.layout.groups
    load_into(model, source, model_config=model.model, tp_rank=groups.tp_rank, tp_size=groups.tp_size)
    return model


def seeded_weights(model: ModelConfig, *, seed: int) -> dict[str, Tensor]:
    """Random full weights in internal names that depend on (seed, name) alone: equal on every layout.

    As diffusers initialises Wan: linears uniform in ±1/√fan_in, norms at one, modulation tables normal/√hidden_size.
    """
    weights = {}
    shapes = internal_shapes(model)
    for name, shape in shapes.items():
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        if "norm" in name:
            weights[name] = torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
        elif name.endswith("modulation"):
            weights[name] = torch.randn(shape, generator=generator) / math.sqrt(model.hidden_size)
        else:
            fan_in = shapes[name.rpartition(".")[0] + ".weight"][1]
            weights[name] = (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(fan_in)
    return weights


def build_networks(run: RunConfig, groups: ParallelGroups) -> Networks:
    """The networks that the stages of ``run`` need: student and fake score under Megatron's DDP, the teacher frozen."""
    dtype = DTYPES[run.precision.params_dtype]

    def build(path: str | None, *, trained: bool) -> list[nn.Module]:
        model = build_model(
            run.model,
            run.latent,
            run.parallel,
            groups=groups,
            params_dtype=dtype,
            recompute_blocks=run.trainer.recompute == "full",
        )
        load_weights(model, seeded_weights(run.model, seed=run.seed) if path is None else open_checkpoint(path))
        return wrap_ddp([model], model.config) if trained else [model.requires_grad_(False)]

    init = run.init
    student = build(init.student or init.teacher, trained=True)
    return Networks(
        layout=student[0].module.layout,
        student=student,
        teacher=build(init.teacher, trained=False) if run.needs_teacher else None,
        fake_score=build(init.fake_score or init.teacher, trained=True) if run.needs_fake_score else None,
    )
