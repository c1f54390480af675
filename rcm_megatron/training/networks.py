"""Building the networks of a run: teacher, student and fake score on the ranks of one layout, with their weights."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rcm_megatron.checkpoint.convert import load_into
from rcm_megatron.checkpoint.formats import internal_shapes
from rcm_megatron.checkpoint.sources import CheckpointSource, LazyTensor, open_checkpoint
from rcm_megatron.config import LatentConfig, ModelConfig, ParallelConfig, RunConfig
from rcm_megatron.dtypes import DTYPES
from rcm_megatron.models.cosmos import CosmosModel
from rcm_megatron.models.dit import DiffusionTransformer
from rcm_megatron.models.layer_specs import LayerSpec, choose_layer_spec, local_layer_spec
from rcm_megatron.models.tokens import TokenLayout
from rcm_megatron.models.wan import WanModel
from rcm_megatron.parallel.context import ContextParallel
from rcm_megatron.parallel.groups import ParallelGroups
from rcm_megatron.parallel.pipeline_stages import stages_of_rank
from rcm_megatron.parallel.transformer_config import transformer_config
from rcm_megatron.platform.device import this_device
from rcm_megatron.training.footprint import log_footprint
from rcm_megatron.training.kernels import choose_kernels
from rcm_megatron.training.memory import check_memory, shard_weights
from rcm_megatron.training.objectives import Networks
from rcm_megatron.training.optimizer import wrap_ddp

FAMILIES: dict[str, type[DiffusionTransformer]] = {"wan": WanModel, "cosmos": CosmosModel}


def build_chunks(
    model: ModelConfig,
    latent: LatentConfig,
    parallel: ParallelConfig,
    *,
    groups: ParallelGroups,
    params_dtype: torch.dtype,
    recompute: str = "full",
    spec: LayerSpec | None = None,
    token_multiple: int = 1,
) -> list[DiffusionTransformer]:
    """This rank's pieces of one network, weights not set: one chunk, or vpp of them.

    ``spec``: the blocks' linears and their precision (`choose_layer_spec`), by default Megatron-Core's own. ``token_multiple``: of what the
    tokens of a rank are a multiple; the same for all networks of a run (`PrecisionConfig.token_multiple`).
    """
    spec = spec or local_layer_spec()
    config = transformer_config(model, parallel, params_dtype=params_dtype, perform_initialization=False)
    config = spec.adapt(config)
    layout = TokenLayout(latent.shape_CTHW, model.patch_size, groups=groups, multiple_of=token_multiple)
    context = ContextParallel(ring_group=groups.ring, ulysses_group=groups.ulysses)
    stages = stages_of_rank(parallel, model.num_layers, pp_rank=groups.pp_rank)
    chunks = [
        FAMILIES[model.family](
            model, config, layout=layout, context=context, stage=stage, spec=spec, recompute=recompute
        )
        for stage in stages
    ]
    return [chunk.to(this_device()) for chunk in chunks]


def load_weights(chunks: Sequence[DiffusionTransformer], source: Mapping[str, Tensor]) -> list[DiffusionTransformer]:
    """Fill ``chunks`` from an open checkpoint (or tensors in any known naming); every rank reads its own slices."""
    groups, stage = chunks[0].layout.groups, chunks[0].stage
    place = {"tp_rank": groups.tp_rank, "tp_size": groups.tp_size, "partial": stage.count > 1}
    load_into(chunks, source, model_config=chunks[0].model, **place)
    return list(chunks)


def seeded_weights(model: ModelConfig, *, seed: int) -> CheckpointSource:
    """Random full weights in internal names that depend on (seed, name) alone: equal on every layout, made when they are read.

    As diffusers initialises Wan: linears uniform in ±1/√fan_in, norms at one, tables of modulations or positions normal/√hidden_size.
    """
    shapes = internal_shapes(model)
    read = partial(_seeded_tensor, shapes, seed=seed)
    tensors = {name: LazyTensor(shape, partial(read, name)) for name, shape in shapes.items()}
    return CheckpointSource(f"random weights of seed {seed}", tensors)


def _seeded_tensor(shapes: Mapping[str, tuple[int, ...]], name: str, index: tuple[slice, ...], *, seed: int) -> Tensor:
    """Rows ``index`` of one random tensor; it is drawn whole."""
    shape = shapes[name]
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    if "norm" in name:
        return (torch.ones(shape) if name.endswith("weight") else torch.zeros(shape))[index]
    if name.endswith("modulation") or "positions" in name:
        return (torch.randn(shape, generator=generator) / math.sqrt(shape[-1]))[index]
    fan_in = shapes[name.rpartition(".")[0] + ".weight"][1]
    return ((2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(fan_in))[index]


def build_networks(run: RunConfig, groups: ParallelGroups) -> Networks:
    """The networks that the stages of ``run`` need: student and fake score under Megatron's DDP, the teacher frozen."""
    check_memory(run, has_cuda=torch.cuda.is_available())
    dtype = DTYPES[run.precision.params_dtype]
    choose_kernels(run.model, run.precision, dtype=dtype)
    # All of them before any weight is read, because a machine without Transformer Engine may refuse.
    specs = {name: choose_layer_spec(run.precision, network=name) for name in ("student", "teacher", "fake_score")}
    specs["teacher_low_noise"] = specs["teacher"]

    def build(name: str, path: str | None, *, trained: bool) -> list[nn.Module]:
        chunks = build_chunks(
            run.model,
            run.latent,
            run.parallel,
            groups=groups,
            params_dtype=dtype,
            recompute=run.memory.recompute,
            spec=specs[name],
            token_multiple=run.precision.token_multiple,
        )
        if name == ("teacher" if run.needs_teacher else "student"):  # the first
            log_footprint(run, chunks, world_size=dist.get_world_size(), shards=groups.dp_cp.size())
        load_weights(chunks, seeded_weights(run.model, seed=run.seed) if path is None else open_checkpoint(path))
        return wrap_ddp(chunks, chunks[0].config) if trained else [chunk.requires_grad_(False) for chunk in chunks]

    def build_teacher(name: str) -> list[nn.Module]:
        chunks = build(name, getattr(run.init, name), trained=False)
        if run.memory.teacher_weights != "resident":
            shard_weights(chunks, group=groups.dp_cp, offload=run.memory.teacher_weights == "offloaded")
        return chunks

    init, teachers = run.init, {}
    if run.needs_teacher:  # first: what is whole for a moment before it is sharded finds the device empty
        names = ["teacher", *(["teacher_low_noise"] if init.teacher_low_noise is not None else [])]
        teachers = {name: build_teacher(name) for name in names}
    student = build("student", init.student or init.teacher, trained=True)
    return Networks(
        layout=student[0].module.layout,
        student=student,
        **teachers,
        fake_score=build("fake_score", init.fake_score or init.teacher, trained=True) if run.needs_fake_score else None,
    )
