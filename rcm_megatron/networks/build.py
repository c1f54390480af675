"""Building the networks of a run on the ranks of one layout, each role's in its own size; weights are set elsewhere."""

from collections.abc import Sequence

import torch

from rcm_megatron.config import LatentConfig, ModelConfig, ParallelConfig, RunConfig
from rcm_megatron.dtypes import DTYPES
from rcm_megatron.models.dit import DiffusionTransformer
from rcm_megatron.models.layer_specs import LayerSpec, local_layer_spec
from rcm_megatron.models.tokens import TokenLayout
from rcm_megatron.parallel.context import ContextParallel
from rcm_megatron.parallel.groups import ParallelGroups
from rcm_megatron.parallel.pipeline_stages import stages_of_rank
from rcm_megatron.parallel.transformer_config import transformer_config
from rcm_megatron.platform.device import this_device
from rcm_megatron.registries import family_of


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
    tokens of a rank are a multiple; the same for all networks of a run (`RunConfig.token_multiple`).
    """
    spec = spec or local_layer_spec()
    config = transformer_config(model, parallel, params_dtype=params_dtype, perform_initialization=False)
    config = spec.adapt(config)
    layout = TokenLayout(latent.shape_CTHW, model.patch_size, groups=groups, multiple_of=token_multiple)
    context = ContextParallel(ring_group=groups.ring, ulysses_group=groups.ulysses)
    stages = stages_of_rank(parallel, model.num_layers, pp_rank=groups.pp_rank)
    network = family_of(model).network
    with torch.device(this_device()):
        return [
            network(model, config, layout=layout, context=context, stage=stage, spec=spec, recompute=recompute)
            for stage in stages
        ]


def build_network(
    run: RunConfig,
    role: str,
    groups: ParallelGroups,
    *,
    spec: LayerSpec | None = None,
    dtype: torch.dtype | None = None,
    recompute: str = "none",
) -> list[DiffusionTransformer]:
    """This rank's pieces of the network ``role``, weights not set, in ``dtype`` (default: the run's)."""
    return build_chunks(
        run.model_of(role),
        run.latent,
        run.parallel_of(role),
        groups=groups,
        params_dtype=dtype or DTYPES[run.precision.params_dtype],
        recompute=recompute,
        spec=spec,
        token_multiple=run.token_multiple,
    )


def frozen(chunks: Sequence[DiffusionTransformer]) -> list[DiffusionTransformer]:
    """``chunks``, without gradients."""
    return [chunk.requires_grad_(False) for chunk in chunks]
