"""diffusers' Cosmos2 pipelines around an exported network give what our samplers give: time, guidance, given frames, few steps.

An Euler step in EDM's x0 + sigma noise is an Euler step in rectified flow, so the two can be compared at the pipeline's own noise levels.
The pipelines' guidance is cond + g (cond - uncond), ours uncond + w (cond - uncond): w = g + 1. A student's steps go through RCMScheduler.
"""

from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from diffusers import (
    Cosmos2TextToImagePipeline,
    Cosmos2VideoToWorldPipeline,
    CosmosTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
)

from rcm_megatron.checkpoint.models import write_checkpoint
from rcm_megatron.config import ParallelConfig
from rcm_megatron.diffusion.rcm_scheduler import RCMScheduler
from rcm_megatron.inputs import Condition
from rcm_megatron.models.encoders import T5TextEncoder, WanVideoEncoder
from rcm_megatron.platform.device import init_distributed
from rcm_megatron.platform.megatron import prepare_megatron
from tests.helpers import assert_close
from tests.interop.pipelines import SamplersNoise
from tests.unit.test_cosmos_model import VIDEO, Case, network_config, without_torchvision
from tests.wan_encoders import write_text_encoder, write_tokenizer, write_vae

STEPS, GUIDANCE, SIZE = 5, 3.0, (64, 48)
"""Network evaluations, the pipelines' guidance_scale, and height and width of the picture: 8 times the latent's."""
IMAGE = Case(network_config(), frames=1, height=8, width=6, batch=2, text=7)
VIDEO2WORLD = Case(network_config(**VIDEO), frames=3, height=8, width=6, batch=2, text=7, given=(1, 1))


class NoChecker(torch.nn.Module):
    """In place of the guardrail, which the pipelines insist on; it is given no prompt and no picture here."""

    device = torch.device("cpu")


class KnownVideo(torch.nn.Module):
    """In place of the VAE: every video has the same latent, whose statistics leave it as it is."""

    dtype, device, temperal_downsample = torch.float32, torch.device("cpu"), (False, True, True)

    def __init__(self, latent_CTHW):
        super().__init__()
        self.latent_CTHW, channels = latent_CTHW, len(latent_CTHW)
        self.config = SimpleNamespace(z_dim=channels, latents_mean=[0.0] * channels, latents_std=[1.0] * channels)

    def encode(self, video):
        return SimpleNamespace(latents=self.latent_CTHW[None])


@pytest.fixture(scope="module")
def groups():
    prepare_megatron()
    from megatron.core import parallel_state

    from rcm_megatron.parallel.groups import initialize_parallel

    init_distributed()
    yield initialize_parallel(ParallelConfig())
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def exported(case, groups, folder):
    """Our network, and diffusers' class loaded from its export."""
    from rcm_megatron.networks.build import build_chunks
    from rcm_megatron.networks.weights import load_weights, seeded_weights

    without_torchvision()
    chunks = build_chunks(case.model, case.latent, ParallelConfig(), groups=groups, params_dtype=torch.float32)
    load_weights(chunks, seeded_weights(case.model, seed=2))
    write_checkpoint(seeded_weights(case.model, seed=2).items(), case.model, folder)
    return chunks, CosmosTransformer3DModel.from_pretrained(folder)


def inputs(case):
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(case.batch, *case.latent.shape_CTHW, generator=generator)
    text, null = torch.randn(2, case.batch, case.text, case.model.text_dim, generator=generator)
    return noise, text, null


def ours(chunks, case, sigmas, condition=None):
    """Euler in rectified flow at s = sigma / (1 + sigma) with our sampler's guided velocity; x0 + sigma noise at the end."""
    from rcm_megatron.inference.sampler import Sampler

    noise, text, null = inputs(case)
    layout = chunks[0].layout
    text_LBD, null_LBD = (value.transpose(0, 1).contiguous() for value in (text, null))
    sampler = Sampler(chunks, layout, text_LBD, null_LBD, 0, range(case.batch), condition)
    times = [float(sigma / (1 + sigma)) for sigma in sigmas.double()]
    x = (1 - times[0]) * float(sigmas[0]) * layout.shard(noise).double()
    for s, after in pairwise(times):
        x = x + (after - s) * sampler._guided_velocity(x, s, guidance=GUIDANCE + 1)
    return layout.unpatchify(x) / (1 - times[-1])


def our_student(chunks, case, *, steps, sigma_max, condition=None):
    """Our sampler's few steps."""
    from rcm_megatron.inference.sampler import Sampler

    text_LBD = inputs(case)[1].transpose(0, 1).contiguous()
    sampler = Sampler(chunks, chunks[0].layout, text_LBD, None, 0, range(case.batch), condition)
    return sampler.student(steps=steps, mid_times=(1.5, 1.4, 1.0), sigma_max=sigma_max)


def their_student(case, *, steps, sigma_max):
    """Options of `call` for the same with diffusers' pipelines."""
    scheduler, noise = RCMScheduler(space="edm", sigma_max=sigma_max), SamplersNoise(case.latent.shape_CTHW, samples=2)
    options = {"student": scheduler, "latents": noise.first, "callback_on_step_end": noise.into(scheduler)}
    return options | {"num_inference_steps": steps, "guidance_scale": 1.0}


def call(pipeline_class, case, transformer, vae, *, student=None, **given):
    """The pipeline's latents, and the noise levels that it went through; `student`: an RCMScheduler in place of its own."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    parts = {"text_encoder": None, "tokenizer": None, "vae": vae, "safety_checker": NoChecker()}
    pipeline = pipeline_class(transformer=transformer, scheduler=scheduler, **parts)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = pipeline.scheduler if student is None else student
    noise, text, null = inputs(case)
    options = {"latents": noise, "prompt_embeds": text, "negative_prompt_embeds": null, "output_type": "latent"}
    options |= {"height": SIZE[0], "width": SIZE[1], "num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    (latents,) = pipeline(return_dict=False, **(options | given))
    return latents, pipeline.scheduler.sigmas


def test_text2image(groups, tmp_path):
    chunks, transformer = exported(IMAGE, groups, tmp_path / "net")
    theirs, sigmas = call(Cosmos2TextToImagePipeline, IMAGE, transformer, None)
    assert float(sigmas[0]) == pytest.approx(80.0)
    assert_close("latents", theirs[:, :, None] if theirs.ndim == 4 else theirs, ours(chunks, IMAGE, sigmas), rel=1e-5)


@pytest.mark.parametrize(("steps", "sigma_max"), [(1, 80.0), (4, 200.0)])
def test_text2image_of_a_student(groups, tmp_path, steps, sigma_max):
    chunks, transformer = exported(IMAGE, groups, tmp_path / "net")
    options = their_student(IMAGE, steps=steps, sigma_max=sigma_max)
    theirs, _ = call(Cosmos2TextToImagePipeline, IMAGE, transformer, None, **options)
    assert_close("latents", our_student(chunks, IMAGE, steps=steps, sigma_max=sigma_max)[:, :, 0], theirs, rel=1e-5)


@pytest.mark.parametrize("case", [IMAGE, VIDEO2WORLD], ids=["text2image", "video2world"])
def test_a_saved_pipeline_keeps_the_students_noise_level(groups, tmp_path, case):
    """Made with the scheduler, saved and loaded: the pipelines write 80 over other schedulers' sigma_max."""
    cls = Cosmos2TextToImagePipeline if case is IMAGE else Cosmos2VideoToWorldPipeline
    _, transformer = exported(case, groups, tmp_path / "net")
    scheduler = RCMScheduler(space="edm", sigma_max=800.0, mid_times=(1.3, 1.1))
    parts = {"text_encoder": None, "tokenizer": None, "vae": None, "safety_checker": NoChecker()}
    pipeline = cls(transformer=transformer, scheduler=scheduler, **parts)
    assert pipeline.scheduler.config.sigma_max == 800.0
    pipeline.register_modules(safety_checker=None)
    pipeline.save_pretrained(tmp_path / "pipeline")
    loaded = cls.from_pretrained(tmp_path / "pipeline", trust_remote_code=True, **parts)
    assert (loaded.scheduler.config.sigma_max, loaded.scheduler.config.mid_times) == (800.0, [1.3, 1.1])
    assert loaded.scheduler.init_noise_sigma == pytest.approx(800.0)


class PassingChecker(NoChecker):
    """A guardrail that lets everything pass."""

    def check_text_safety(self, prompt):
        return True

    def check_video_safety(self, frames):
        return frames


def test_text2image_of_a_student_from_caption_to_picture(groups, tmp_path):
    """All of the pipeline's components, tiny and random, from one folder each, against our encoders around our sampler."""
    from diffusers import AutoencoderKLWan
    from transformers import PreTrainedTokenizerFast, T5EncoderModel

    write_text_encoder(tmp_path / "text_encoder", kind="T5")
    write_tokenizer(tmp_path / "tokenizer")
    write_vae(tmp_path / "vae")
    case = replace(IMAGE, model=network_config(channels=16, text_dim=16), batch=1)
    chunks, transformer = exported(case, groups, tmp_path / "net")
    pipeline = Cosmos2TextToImagePipeline(
        text_encoder=T5EncoderModel.from_pretrained(tmp_path / "text_encoder").eval(),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer"),
        vae=AutoencoderKLWan.from_pretrained(tmp_path / "vae").eval(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        safety_checker=PassingChecker(),
    )
    pipeline.set_progress_bar_config(disable=True)
    noise = SamplersNoise(case.latent.shape_CTHW, samples=1)
    pipeline.scheduler = scheduler = RCMScheduler(space="edm", sigma_max=80.0)
    theirs = pipeline(
        prompt="a cat baking a cake",
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=2,
        guidance_scale=1.0,
        latents=noise.first,
        callback_on_step_end=noise.into(scheduler),
        output_type="pt",
    ).images
    with closing(T5TextEncoder(tmp_path, dtype=torch.float32)) as encoder:
        text_LBD = encoder.encode(["a cat baking a cake"]).transpose(0, 1).contiguous()
    from rcm_megatron.inference.sampler import Sampler

    latent = Sampler(chunks, chunks[0].layout, text_LBD, None, 0, range(1)).student(
        steps=2, mid_times=(1.5, 1.4, 1.0), sigma_max=80.0
    )
    with closing(WanVideoEncoder(tmp_path / "vae")) as encoder:
        picture = encoder.decode(latent)[:, :, 0] / 2 + 0.5
    assert picture.shape == theirs.shape == (1, 3, *SIZE)
    assert float(theirs.std()) > 0.01
    assert float((picture - theirs).abs().max()) < 1.5 / 255, "the pipeline rounds to bytes for its guardrail"


def known_video(chunks, *, fps=16):
    """A clean latent, the condition that gives its first frame, and the same as the pipeline's arguments."""
    known = torch.randn(VIDEO2WORLD.latent.shape_CTHW, generator=torch.Generator().manual_seed(9))
    x0_SBP = chunks[0].layout.shard(known.expand(VIDEO2WORLD.batch, -1, -1, -1, -1))
    picture = torch.rand(VIDEO2WORLD.batch, 3, *SIZE)
    condition = Condition(x0_SBP, torch.tensor(VIDEO2WORLD.given))
    return known, condition, {"image": picture, "num_frames": 9, "fps": fps}


@pytest.mark.parametrize(("rope_fps", "fps"), [(16.0, 16), (None, 24)], ids=["modulated", "as released"])
def test_video2world_of_a_student(groups, tmp_path, rope_fps, fps):
    """NVIDIA's release has no modulation by the frame rate: diffusers' pipeline is told 24 then, which changes nothing."""
    case = replace(VIDEO2WORLD, model=replace(VIDEO2WORLD.model, rope_fps=rope_fps))
    chunks, transformer = exported(case, groups, tmp_path / "net")
    known, condition, given = known_video(chunks, fps=fps)
    given |= their_student(case, steps=3, sigma_max=80.0)
    theirs, _ = call(Cosmos2VideoToWorldPipeline, case, transformer, KnownVideo(known), **given)
    expected = our_student(chunks, case, steps=3, sigma_max=80.0, condition=condition)
    assert_close("latents", expected, theirs, rel=1e-5)


def test_video2world(groups, tmp_path):
    chunks, transformer = exported(VIDEO2WORLD, groups, tmp_path / "net")
    known, condition, given = known_video(chunks)
    theirs, sigmas = call(Cosmos2VideoToWorldPipeline, VIDEO2WORLD, transformer, KnownVideo(known), **given)
    v = ours(chunks, VIDEO2WORLD, sigmas, condition)
    assert_close("latents", theirs, v, rel=1e-5)
    # sigma ends at 0.002
    assert_close("the given frame", known[:, :1].expand(2, -1, -1, -1, -1), v[:, :, :1], rel=1e-2)
