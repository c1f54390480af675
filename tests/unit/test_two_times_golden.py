"""EMD at s = 0 is sCM: the official code's sCM cases, replayed with a student of two times that starts as the file's student."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from rcm_megatron.config import ParallelConfig
from rcm_megatron.conformance.golden import load_golden
from rcm_megatron.platform.device import init_distributed
from rcm_megatron.platform.megatron import prepare_megatron
from tests.helpers import GOLDEN, assert_close


@pytest.fixture(scope="module")
def golden():
    return load_golden(GOLDEN / "nvlabs_rcm_small.safetensors")


@pytest.fixture(scope="module")
def networks(golden):
    prepare_megatron()
    from megatron.core import parallel_state

    from rcm_megatron.checkpoint.second_time import with_second_time
    from rcm_megatron.checkpoint.sources import source_from_tensors
    from rcm_megatron.config import LatentConfig
    from rcm_megatron.conformance.replay import build, model_config
    from rcm_megatron.networks.build import build_chunks
    from rcm_megatron.networks.weights import load_weights
    from rcm_megatron.parallel.groups import initialize_parallel
    from rcm_megatron.training.optimizer import wrap_ddp

    init_distributed()
    built = build(golden, ParallelConfig())
    model = replace(model_config(golden), second_time=True)
    latent = LatentConfig(**dict(zip(("channels", "frames", "height", "width"), golden.x0.shape[1:], strict=True)))
    parallel_state.destroy_model_parallel()
    groups = initialize_parallel(ParallelConfig())
    chunks = build_chunks(model, latent, ParallelConfig(), groups=groups, params_dtype=torch.float32)
    load_weights(chunks, with_second_time(source_from_tensors(golden.weights["student"]), model))
    yield built.replace(student=wrap_ddp(chunks, chunks[0].config))
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["scm", "scm_warmup", "scm_guidance1"])
def test_emd_at_zero_equals_the_official_scm(golden, networks, name):
    from rcm_megatron.checkpoint.models import gather_full
    from rcm_megatron.checkpoint.translate import from_internal
    from rcm_megatron.conformance.replay import case_settings, df_dt, model_config, samples_of, step_of
    from rcm_megatron.objectives.two_times import EulerianSettings
    from rcm_megatron.parallel.pipeline import reduce_gradients
    from rcm_megatron.training.optimizer import gather_main_grads
    from rcm_megatron.training.step import accumulate_step

    case = golden.case(name)
    stage, distillation, _ = case_settings(case)
    step = replace(step_of(case, stage, distillation), objectives=("emd",))
    stage = replace(stage, losses={"emd": stage.losses["scm"]})
    for chunk in networks["student"]:
        chunk.zero_grad_buffer()
    settings = {"emd": EulerianSettings(share_equal=0.0, share_zero=1.0)}
    samples = samples_of(golden, case, networks, micro_batch_size=1)
    result = accumulate_step(step, networks, samples, stage=stage, distillation=distillation, objectives=settings)[
        "emd"
    ]
    reduce_gradients(networks["student"])
    assert_close("loss", case.loss, stage.losses["emd"] * result.loss_B, rel=1e-8)
    expected = case.outputs["df_dt"]
    got = networks.layout.gather(df_dt(result.outputs))
    assert_close("df_dt", expected.reshape(got.shape), got, rel=1e-5)
    gradients, groups = gather_main_grads(networks["student"]), networks.layout.groups
    whole = gather_full(networks["student"], tp_group=groups.tp, pp_group=groups.pp, getter=gradients.__getitem__)
    whole = {key: len(golden.x0) * value for key, value in whole if value is not None}
    assert float(whole["interval_embedding.linear_2.weight"].norm()) > 0
    today = {key: value for key, value in whole.items() if not key.startswith("interval_")}
    ours = {key.removeprefix("net."): value for key, value in from_internal(today, model_config(golden), "nvlabs")}
    for key, value in case.gradients.items():
        assert_close(f"gradient of {key}", value, ours[key].reshape(value.shape), rel=2e-5)
