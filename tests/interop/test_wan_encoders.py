"""Wan's text encoder and VAE against diffusers' pipelines on the same (tiny, random) components."""

import contextlib
import gc
import json
import shutil
import weakref
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from rcm_megatron.config import ConfigError, EncodersConfig
from rcm_megatron.models.encoders import (
    COSMOS_NEGATIVE_PROMPT,
    WAN_NEGATIVE_PROMPT,
    EncoderError,
    T5TextEncoder,
    TextEncoder,
    UMT5TextEncoder,
    VideoEncoder,
    WanVideoEncoder,
    build_text_encoder,
    build_video_encoder,
    check_encoder_files,
    clean_prompt,
)
from tests.helpers import assert_close
from tests.wan_encoders import WAN22_VAE, write_encoders, write_text_encoder, write_tokenizer, write_vae

TEXT_LEN = 24
PROMPTS = [
    "a cat and dog baking a cake together in the kitchen.",
    "  A   dog &amp;amp; a “cat’s”\n cake\t",
    "cafÃ© 静态，字幕",  # mojibake, and a full-width comma
    "",
    " ".join(["a cat baking a cake"] * 9),  # 46 tokens
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_encoders(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def text_encoder(checkpoint):
    return UMT5TextEncoder(checkpoint, text_len=TEXT_LEN, dtype=torch.float32)


@pytest.fixture(scope="module")
def pipeline(checkpoint):
    """WanPipeline of the same components, with a tiny transformer; the tokenizer is the file's, see the test below."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

    torch.manual_seed(3)
    transformer = WanTransformer3DModel(
        num_layers=1, num_attention_heads=2, attention_head_dim=8, ffn_dim=16, text_dim=16, freq_dim=16, in_channels=16
    )
    pipeline = WanPipeline(
        tokenizer=PreTrainedTokenizerFast.from_pretrained(checkpoint / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(checkpoint / "text_encoder").eval(),
        vae=AutoencoderKLWan.from_pretrained(checkpoint / "vae").eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=transformer.eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_embeddings_equal_the_pipelines(text_encoder, pipeline):
    assert isinstance(text_encoder, TextEncoder)
    with torch.no_grad():
        expected_BLD, negative_BLD = pipeline.encode_prompt(
            PROMPTS, [WAN_NEGATIVE_PROMPT] * len(PROMPTS), max_sequence_length=TEXT_LEN
        )
    embed_BLD = text_encoder.encode(PROMPTS)
    assert_close("prompts", expected_BLD, embed_BLD, rel=1e-6)
    lengths = [int((row.abs().sum(-1) > 0).sum()) for row in embed_BLD]
    assert lengths == [int((row.abs().sum(-1) > 0).sum()) for row in expected_BLD]
    assert lengths[3] == 1 and lengths[4] == TEXT_LEN and 1 < lengths[0] < TEXT_LEN
    assert text_encoder.negative_prompt == WAN_NEGATIVE_PROMPT
    assert_close("negative", negative_BLD[0], text_encoder.encode([WAN_NEGATIVE_PROMPT])[0], rel=1e-6)
    assert not embed_BLD.requires_grad and not embed_BLD.is_inference()


def test_bf16_embeddings_equal_the_pipelines(checkpoint, pipeline):
    encoder = UMT5TextEncoder(checkpoint, text_len=TEXT_LEN, dtype=torch.bfloat16)
    pipeline.text_encoder.to(torch.bfloat16)
    with torch.no_grad():
        expected_BLD, _ = pipeline.encode_prompt(PROMPTS, PROMPTS, max_sequence_length=TEXT_LEN)
    embed_BLD = encoder.encode(PROMPTS)
    assert embed_BLD.dtype == torch.bfloat16
    assert_close("prompts", expected_BLD, embed_BLD, rel=5e-3)


def test_cosmos_embeddings_equal_the_pipelines(tmp_path):
    """No cleaning of captions; a negative prompt of its own."""
    from diffusers.pipelines.cosmos import pipeline_cosmos2_text2image as cosmos
    from transformers import PreTrainedTokenizerFast, T5EncoderModel

    write_text_encoder(tmp_path / "text_encoder", kind="T5")
    write_tokenizer(tmp_path / "tokenizer")
    pipeline = SimpleNamespace(
        tokenizer=PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer"),
        text_encoder=T5EncoderModel.from_pretrained(tmp_path / "text_encoder").eval(),
    )
    with torch.no_grad():
        expected_BLD = cosmos.Cosmos2TextToImagePipeline._get_t5_prompt_embeds(
            pipeline, PROMPTS, TEXT_LEN, torch.device("cpu")
        )
    encoder = T5TextEncoder(tmp_path, text_len=TEXT_LEN, dtype=torch.float32)
    assert_close("prompts", expected_BLD, encoder.encode(PROMPTS), rel=1e-6)
    assert encoder.negative_prompt == COSMOS_NEGATIVE_PROMPT == cosmos.DEFAULT_NEGATIVE_PROMPT
    encoder = build_text_encoder(config(tmp_path, text="t5"), text_len=TEXT_LEN, text_dim=16)
    assert isinstance(encoder, T5TextEncoder)
    with pytest.raises(EncoderError, match="does not hold|cannot be loaded"):
        build_text_encoder(config(tmp_path, text="umt5"), text_len=TEXT_LEN, text_dim=16)


def test_prompts_are_cleaned_as_diffusers_does():
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    for prompt in (*PROMPTS, WAN_NEGATIVE_PROMPT, "a\u2003b\x1c\x0bc &lt;b&gt; \u200b"):
        assert clean_prompt(prompt) == prompt_clean(prompt)
    assert clean_prompt(PROMPTS[1]) == 'A dog & a "cat\'s" cake'
    assert clean_prompt(PROMPTS[2]) == "café 静态,字幕"


def test_an_embedding_does_not_depend_on_its_batch(text_encoder):
    together = text_encoder.encode(PROMPTS)
    assert torch.equal(together[1:3], text_encoder.encode(PROMPTS[1:3]))
    assert text_encoder.encode([]).shape == (0, TEXT_LEN, 16)


def test_a_long_caption_is_cut_and_named(text_encoder, caplog):
    embed_BLD = text_encoder.encode([PROMPTS[4], PROMPTS[4] + " and a dog"])
    assert torch.equal(embed_BLD[0], embed_BLD[1]) and embed_BLD[0].abs().sum(-1).min() > 0
    assert f"46 tokens is cut to {TEXT_LEN}: a cat baking" in caplog.text


def test_the_tokenizer_is_the_files_and_not_a_rebuilt_one(checkpoint, text_encoder):
    """transformers 5 rebuilds a T5Tokenizer: unknown pieces become number 2, UMT5's <s>."""
    from transformers import AutoTokenizer

    rebuilt = AutoTokenizer.from_pretrained(checkpoint / "tokenizer")
    assert rebuilt("狗").input_ids != text_encoder._tokenizer("狗").input_ids == [4, 3, 1]
    assert rebuilt("a cat").input_ids == text_encoder._tokenizer("a cat").input_ids


def test_text_encoder_is_freed(checkpoint):
    with contextlib.closing(UMT5TextEncoder(checkpoint, text_len=8)) as encoder:
        alive = weakref.ref(encoder._model.shared.weight)
        encoder.encode(["a cat"])
    assert alive() is None
    with pytest.raises(RuntimeError, match=r"after close\(\)"):
        encoder.encode(["a cat"])


@pytest.mark.parametrize("both", [False, True], ids=["shared", "shared and embed_tokens"])
def test_either_name_of_the_token_embedding_loads(checkpoint, text_encoder, tmp_path, both):
    """Wan's folders hold one or both; in some transformers releases the encoder's stayed random."""
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    tensors = merged(copy / "text_encoder")
    assert "encoder.embed_tokens.weight" not in tensors
    if both:
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
    save_file(tensors, copy / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    edit_config(copy / "text_encoder", tie_word_embeddings=False)
    embed_BLD = UMT5TextEncoder(copy, text_len=TEXT_LEN, dtype=torch.float32).encode(PROMPTS[:1])
    assert torch.equal(embed_BLD, text_encoder.encode(PROMPTS[:1]))


def merged(folder):
    """All tensors of a sharded folder, which loses its index and shards."""
    tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= {name: tensor.clone() for name, tensor in load_file(shard).items()}
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink()
    return tensors


def edit_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def test_decoding_equals_the_pipelines(checkpoint, pipeline):
    encoder = WanVideoEncoder(checkpoint / "vae")
    assert isinstance(encoder, VideoEncoder)
    text = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))

    def run(output_type):
        return pipeline(
            prompt_embeds=text,
            height=16,
            width=32,
            num_frames=5,
            num_inference_steps=2,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(4),
            output_type=output_type,
        ).frames

    latent_BCTHW = run("latent")
    assert latent_BCTHW.shape == (2, *encoder.latent_shape(5, 16, 32)) == (2, 16, 2, 2, 4)
    video_BCTHW = encoder.decode(latent_BCTHW)
    assert video_BCTHW.shape == (2, 3, 5, 16, 32) and video_BCTHW.dtype == torch.float32
    assert_close("video", run("pt").transpose(1, 2) * 2 - 1, video_BCTHW, rel=1e-5)


@pytest.mark.parametrize("fields", [{}, WAN22_VAE], ids=["wan2.1", "wan2.2"])
def test_latents_are_normalised_both_ways(tmp_path, fields):
    """Encoding equals the image-to-video pipeline's; decoding takes the normalisation back."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline

    write_vae(tmp_path, **fields)
    encoder, vae = WanVideoEncoder(tmp_path), AutoencoderKLWan.from_pretrained(tmp_path).eval()
    channels, factor = (48, 16) if fields else (16, 8)
    assert (encoder.latent_channels, encoder.spatial_factor, encoder.temporal_factor) == (channels, factor, 4)
    height, width = 2 * factor, 3 * factor
    pipeline = WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(), transformer=None
    )
    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(5)) * 2 - 1
    with torch.no_grad():
        _, condition = pipeline.prepare_latents(
            image, 1, channels, height, width, 9, torch.float32, torch.device("cpu"), None, None, None
        )
    video_BCTHW = torch.cat([image[:, :, None], torch.zeros(1, 3, 8, height, width)], dim=2)
    latent_BCTHW = encoder.encode(video_BCTHW.double())
    assert latent_BCTHW.shape == (1, channels, 3, 2, 3) and latent_BCTHW.dtype == torch.float32
    assert torch.equal(latent_BCTHW, condition[:, 4:])
    with torch.no_grad():
        expected = vae.decode(vae.encode(video_BCTHW).latent_dist.mode()).sample
    assert_close("video", expected, encoder.decode(latent_BCTHW), rel=1e-5)
    assert torch.equal(encoder.encode(video_BCTHW.repeat(2, 1, 1, 1, 1))[1], latent_BCTHW[0])


def test_tiles_and_bf16_are_close_to_the_whole_in_fp32(checkpoint):
    whole = WanVideoEncoder(checkpoint / "vae")
    video = torch.rand(1, 3, 1, 16, 296, generator=torch.Generator().manual_seed(6)) * 2 - 1
    latent = whole.encode(video)
    tiled = WanVideoEncoder(checkpoint / "vae", tiling=True)
    assert not torch.equal(tiled.encode(video), latent)
    assert_close("tiled latents", latent, tiled.encode(video), rel=0.3)
    assert tiled.decode(latent).shape == video.shape
    low = WanVideoEncoder(checkpoint / "vae", dtype=torch.bfloat16)
    assert_close("bf16 latents", latent, low.encode(video), rel=0.1)
    assert low.decode(latent).dtype == torch.float32


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 4, 16, 16), "got 4 frames, need 4k+1; cut to 1 or give 5"),
        ((1, 3, 82, 16, 16), "got 82 frames, need 4k+1; cut to 81 or give 85"),
        ((1, 3, 5, 20, 16), "got height 20, need a multiple of 8; resize or crop to 16 or 24"),
        ((1, 3, 5, 16, 4), "got width 4, need a multiple of 8; resize or crop to 8 or 8"),
        ((1, 1, 5, 16, 16), "got pixel shape (1, 1, 5, 16, 16), need [B, 3, T, H, W]"),
        ((3, 5, 16, 16), "got pixel shape (3, 5, 16, 16), need [B, 3, T, H, W]"),
    ],
)
def test_sizes_that_the_vae_would_cut_are_refused(checkpoint, shape, message):
    encoder = WanVideoEncoder(checkpoint / "vae")
    with pytest.raises(EncoderError) as caught:
        encoder.encode(torch.zeros(shape))
    assert message in str(caught.value)
    with pytest.raises(EncoderError, match=r"need \[B, 16, T, H, W\]"):
        encoder.decode(torch.zeros(1, 15, 1, 2, 2))


def test_video_encoder_is_freed(checkpoint):
    with contextlib.closing(WanVideoEncoder(checkpoint / "vae")) as encoder:
        alive = weakref.ref(next(encoder._vae.parameters()))
        encoder.decode(torch.zeros(1, 16, 2, 2, 2))
    gc.collect()
    assert alive() is None
    with pytest.raises(RuntimeError, match=r"after close\(\)"):
        encoder.decode(torch.zeros(1, 16, 2, 2, 2))


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def config(folder, **fields):
    return EncodersConfig(**({"video": "wan_vae", "text": "umt5", "folder": str(folder)} | fields))


def problems(folder):
    with pytest.raises(ConfigError) as caught:
        check_encoder_files(config(folder), latent_channels=16, text_dim=16)
    return str(caught.value)


def test_missing_and_unfit_files_are_named_before_anything_is_loaded(copy):
    check_encoder_files(config(copy), latent_channels=16, text_dim=16)
    with pytest.raises(ConfigError, match=r"got z_dim=16, need 48; need a diffusers checkpoint"):
        check_encoder_files(config(copy), latent_channels=48, text_dim=16)
    shard = sorted((copy / "text_encoder").glob("*.safetensors"))[1]
    shard.unlink()
    assert f"{shard} is missing" in problems(copy)
    edit_config(copy / "text_encoder", d_model=4096)
    (copy / "vae" / "diffusion_pytorch_model.safetensors").rename(copy / "vae" / "diffusion_pytorch_model.bin")
    (copy / "tokenizer" / "tokenizer.json").unlink()
    text = problems(copy)
    assert len(text.splitlines()) == 4
    for part in ("got d_model=4096, need 16", "model.safetensors is missing", "tokenizer.json is missing", str(shard)):
        assert part in text
    assert "/nowhere/vae is no folder" in problems("/nowhere")


def test_weights_that_are_not_whole_are_refused(copy):
    path = copy / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    removed = tensors.pop("decoder.conv_out.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(EncoderError, match=r"1 missing_keys, e.g. decoder.conv_out.weight"):
        build_video_encoder(config(copy), channels=16)
    save_file(tensors | {"decoder.conv_out.weight": removed, "extra": removed.clone()}, path, metadata={"format": "pt"})
    with pytest.raises(EncoderError, match=r"1 unexpected_keys, e.g. extra"):
        build_video_encoder(config(copy), channels=16)
    with open(path, "r+b") as file:
        file.truncate(5000)
    with pytest.raises(EncoderError, match=r"cannot be loaded as AutoencoderKLWan"):
        build_video_encoder(config(copy), channels=16)
    tensors = merged(copy / "text_encoder")
    del tensors["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(tensors, copy / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EncoderError, match=r"missing_keys, e.g. encoder.block.1.layer.0.SelfAttention.q.weight"):
        build_text_encoder(config(copy), text_len=8, text_dim=16)
    (copy / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(EncoderError, match=r"holds no usable tokenizer"):
        build_text_encoder(config(copy), text_len=8, text_dim=16)


def test_built_from_a_configuration(checkpoint):
    encoder = build_text_encoder(config(checkpoint, negative_prompt="a dog"), text_len=8, text_dim=16)
    assert encoder.negative_prompt == "a dog" and encoder.encode(["a"]).dtype == torch.float32  # auto, on the CPU
    encoder = build_text_encoder(config(checkpoint, negative_prompt="", text_dtype="bf16"), text_len=8, text_dim=16)
    assert encoder.negative_prompt == "" and encoder.encode(["a"]).dtype == torch.bfloat16
    video = build_video_encoder(config(checkpoint, vae_tiling=True, vae_dtype="bf16"), channels=16)
    assert video._vae.use_tiling and video._vae.dtype == torch.bfloat16
    with pytest.raises(EncoderError, match=r"latents of 16 channels, need 48"):
        build_video_encoder(config(checkpoint), channels=48)


@pytest.mark.gpu
def test_on_a_gpu_both_equal_the_cpu_and_give_their_memory_back(checkpoint, text_encoder):
    before = torch.cuda.memory_allocated()
    with contextlib.closing(
        UMT5TextEncoder(checkpoint, text_len=TEXT_LEN, dtype=torch.float32, device="cuda")
    ) as encoder:
        assert torch.cuda.memory_allocated() > before
        assert_close("prompts", text_encoder.encode(PROMPTS), encoder.encode(PROMPTS), rel=1e-3)
    latent = torch.randn(1, 16, 2, 2, 3, generator=torch.Generator().manual_seed(7))
    with contextlib.closing(WanVideoEncoder(checkpoint / "vae", device="cuda")) as encoder:
        video = encoder.decode(latent)
    assert_close("video", WanVideoEncoder(checkpoint / "vae").decode(latent), video, rel=1e-2)
    assert torch.cuda.memory_allocated() == before
