"""The built Megatron network: filled from a diffusers folder under tp=2, same velocity as diffusers, exported bit-exactly."""

import pytest
import torch
import torch.distributed as dist

from rcm_megatron.checkpoint.models import gather_full, load_into, write_checkpoint
from rcm_megatron.checkpoint.sources import open_checkpoint
from rcm_megatron.config import LatentConfig, ParallelConfig
from tests.distributed.harness import run_ranks
from tests.helpers import assert_close
from tests.interop.wan_networks import CONFIG, assert_same_tensors

SHAPE_CTHW = (3, 3, 4, 6)
TIMES = (17.0, 803.0)


def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, *SHAPE_CTHW, generator=generator), torch.randn(2, 5, CONFIG.text_dim, generator=generator)


def forward_and_export(folder, target):
    from rcm_megatron.networks.build import build_chunks
    from rcm_megatron.parallel.groups import initialize_parallel

    parallel = ParallelConfig(tp=dist.get_world_size())
    groups = initialize_parallel(parallel)
    latent = LatentConfig(**dict(zip(("channels", "frames", "height", "width"), SHAPE_CTHW, strict=True)))
    (model,) = build_chunks(CONFIG, latent, parallel, groups=groups, params_dtype=torch.float32)
    source = open_checkpoint(folder)
    load_into(model, source, model_config=CONFIG, tp_rank=groups.tp_rank, tp_size=groups.tp_size)
    x_BCTHW, text_BLD = inputs()
    with torch.no_grad():
        v_SBP = model(model.layout.shard(x_BCTHW), torch.tensor([TIMES]), text_BLD.transpose(0, 1).contiguous())
        v_BCTHW = model.layout.gather(v_SBP)
    write_checkpoint(gather_full(model, tp_group=groups.tp), CONFIG, target, is_writer=groups.tp_rank == 0)
    return v_BCTHW


@pytest.mark.parametrize("tp_size", [1, 2])
def test_network_agrees_with_diffusers_and_exports_bit_exactly(tiny, tmp_path, tp_size):
    from diffusers import WanTransformer3DModel

    folder, state = tiny
    velocities = run_ranks(forward_and_export, tp_size, str(folder), str(tmp_path / "out"))
    x_BCTHW, text_BLD = inputs()
    with torch.no_grad():
        reference = WanTransformer3DModel.from_pretrained(folder)(x_BCTHW, torch.tensor(TIMES), text_BLD).sample
    for rank, velocity in enumerate(velocities):
        assert_close(f"velocity on rank {rank}", reference, velocity, rel=1e-5)
    assert_same_tensors(state, dict(open_checkpoint(tmp_path / "out")))
