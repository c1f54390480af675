"""CLIP features and image latents against diffusers' WanImageToVideoPipeline on tiny random components; files that cannot be used."""

import contextlib
import gc
import json
import shutil
import weakref

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from rcm_megatron.config import ConfigError, EncodersConfig
from rcm_megatron.models.encoders import (
    CLIPImageEncoder,
    EncoderError,
    WanVideoEncoder,
    build_image_encoder,
    check_encoder_files,
    image_latent,
    image_pixels,
    images,
    load_image,
)
from rcm_megatron.registries import FAMILIES
from tests.helpers import assert_close
from tests.networks import wan
from tests.wan_encoders import write_encoders, write_image_encoder

WAN = wan(condition_channels=20, image_dim=24).image


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = write_encoders(tmp_path_factory.mktemp("wan"))
    write_image_encoder(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(checkpoint):
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline
    from transformers import CLIPImageProcessorPil, CLIPVisionModel

    return WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=AutoencoderKLWan.from_pretrained(checkpoint / "vae").eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        image_encoder=CLIPVisionModel.from_pretrained(checkpoint / "image_encoder").eval(),
        image_processor=CLIPImageProcessorPil.from_pretrained(checkpoint / "image_processor"),
    )


def picture(seed, size=(71, 50)):
    pixels = torch.rand(5, 6, 3, generator=torch.Generator().manual_seed(seed)).mul(255).byte()
    return Image.fromarray(pixels.numpy()).resize(size, Image.Resampling.BICUBIC)


def test_features_equal_the_pipelines(checkpoint, pipeline):
    encoder = CLIPImageEncoder(checkpoint)
    pictures = [picture(0), picture(1, size=(40, 90))]
    features = encoder.encode(pictures)
    assert features.shape == (2, encoder.image_len, encoder.image_dim) == (2, 257, 24)
    assert features.dtype == torch.float32 and not features.requires_grad
    for index, each in enumerate(pictures):
        with torch.no_grad():
            assert_close(f"picture {index}", pipeline.encode_image(each)[0], features[index], rel=1e-6)
    assert encoder.encode([]).shape == (0, 257, 24)


@pytest.mark.parametrize("expand_timesteps", [False, True], ids=["condition channels", "first frame"])
def test_latents_equal_the_pipelines(checkpoint, pipeline, expand_timesteps):
    """Stretched as the pipeline does, VAE-encoded with grey after it, and the mask; or alone."""
    pipeline.register_to_config(expand_timesteps=expand_timesteps)
    pixels = image_pixels(picture(2), height=16, width=32)
    expected_pixels = pipeline.video_processor.preprocess(picture(2), height=16, width=32)
    assert torch.equal(pixels[None], expected_pixels)
    size = (2, 16, 16, 32, 9, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        _, condition, *_ = pipeline.prepare_latents(expected_pixels, *size)
    latent = image_latent(WanVideoEncoder(checkpoint / "vae"), pixels, frames=1 if expand_timesteps else 3)
    ours = latent[None] if expand_timesteps else FAMILIES["wan"].image_channels(latent[None])
    assert ours.shape == ((1, 16, 1, 2, 4) if expand_timesteps else (1, 20, 3, 2, 4))
    assert_close("condition", condition[:1], ours, rel=1e-6)
    whole = image_latent(WanVideoEncoder(checkpoint / "vae"), pixels, frames=3)
    assert_close("the first latent frame is the picture's alone", latent[:, :1], whole[:, :1], rel=1e-5)


def test_the_encoder_is_freed(checkpoint):
    with contextlib.closing(CLIPImageEncoder(checkpoint)) as encoder:
        alive = weakref.ref(next(encoder._model.parameters()))
        encoder.encode([picture(0)])
    gc.collect()
    assert alive() is None
    with pytest.raises(RuntimeError, match=r"after close\(\)"):
        encoder.encode([picture(0)])


def config(folder, **fields):
    return EncodersConfig(**({"video": "none", "text": "none", "image": "clip", "folder": str(folder)} | fields))


def test_names_of_the_release_load(checkpoint, tmp_path):
    """Wan's files have transformers' older names, and position ids beside the weights."""
    copy = shutil.copytree(checkpoint / "image_encoder", tmp_path / "image_encoder").parent
    shutil.copytree(checkpoint / "image_processor", tmp_path / "image_processor")
    path = copy / "image_encoder" / "model.safetensors"
    tensors = {f"vision_model.{name}": tensor.clone() for name, tensor in load_file(path).items()}
    tensors["vision_model.embeddings.position_ids"] = torch.arange(257)[None]
    save_file(tensors, path, metadata={"format": "pt"})
    expected = CLIPImageEncoder(checkpoint).encode([picture(0)])
    assert torch.equal(build_image_encoder(config(copy), WAN).encode([picture(0)]), expected)
    del tensors["vision_model.encoder.layers.0.mlp.fc1.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(EncoderError, match=r"missing_keys, e.g. .*layers.0.mlp.fc1.weight"):
        CLIPImageEncoder(copy)
    (copy / "image_processor" / "preprocessor_config.json").write_text("{")
    with pytest.raises(EncoderError, match="holds no usable image processor"):
        CLIPImageEncoder(copy)


def test_missing_and_unfit_files_are_named_before_anything_is_loaded(checkpoint, tmp_path):
    def problems(folder):
        with pytest.raises(ConfigError) as caught:
            check_encoder_files(config(folder), latent_channels=16, text_dim=16, image_dim=24)
        return str(caught.value)

    check_encoder_files(config(checkpoint), latent_channels=16, text_dim=16, image_dim=24)
    assert "/nowhere/image_encoder is no folder" in problems("/nowhere")
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    (copy / "image_processor" / "preprocessor_config.json").unlink()
    fields = json.loads((copy / "image_encoder" / "config.json").read_text())
    (copy / "image_encoder" / "config.json").write_text(json.dumps(fields | {"hidden_size": 1280}))
    text = problems(copy)
    for part in ("got hidden_size=1280, need 24", "preprocessor_config.json is missing", "and image_processor/"):
        assert part in text
    with pytest.raises(EncoderError, match="preprocessor_config.json is missing; take the image_processor/ folder"):
        CLIPImageEncoder(copy)
    with pytest.raises(EncoderError, match=r"features \(257, 24\) of an image in \[L, D\], need \(257, 32\)"):
        build_image_encoder(config(checkpoint), wan(image_dim=32).image)
    with pytest.raises(EncoderError, match="got encoders.image=none"):
        build_image_encoder(config(checkpoint, image="none"), WAN)


def test_pictures_are_turned_upright_and_made_rgb(tmp_path):
    upright = picture(3)
    exif = Image.Exif()
    exif[0x0112] = 6  # as a phone says it: turn by 90 degrees to see it
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    assert load_image(tmp_path / "turned.png").tobytes() == upright.tobytes()
    upright.convert("RGBA").save(tmp_path / "rgba.webp", lossless=True)
    assert load_image(tmp_path / "rgba.webp").tobytes() == upright.tobytes()
    upright.convert("L").save(tmp_path / "grey.jpg")
    assert load_image(tmp_path / "grey.jpg").mode == "RGB"


def test_hostile_pictures_are_refused(tmp_path, monkeypatch):
    picture(3).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("not a picture")
    picture(3).save(tmp_path / "picture.tiff")
    huge = bytearray(data)
    huge[16:24] = (60_000).to_bytes(4, "big") * 2  # what its header says: 3.6 gigapixels
    (tmp_path / "huge.png").write_bytes(huge)
    for name in ("cut.png", "text.png", "picture.tiff", "huge.png", "missing.png"):
        with pytest.raises(EncoderError, match=f"image .*{name} cannot be used: .*; need a whole PNG, JPEG, WEBP file"):
            load_image(tmp_path / name)
    monkeypatch.setattr(images, "MAX_PIXELS", 71 * 50 - 1)
    with pytest.raises(EncoderError, match="it has 71 x 50 pixels, need at most 3549"):
        load_image(tmp_path / "whole.png")
