"""What samples are given: conditions from tensors, and files that a network takes, lacks or cannot read."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from rcm_megatron.config import ConfigError, load_config
from rcm_megatron.errors import InputError
from rcm_megatron.inference.conditioning import (
    Conditioning,
    check_conditioning,
    image_shapes,
    load_conditioning,
)
from rcm_megatron.models.encoders import EncoderError
from rcm_megatron.models.tokens import TokenLayout
from rcm_megatron.registries import FAMILIES
from rcm_megatron.requests import ConditioningFiles
from tests.networks import wan

MODEL = wan(condition_channels=20)
LATENT = (16, 3, 4, 4)
SMALL = ["latent.frames=3", "latent.height=4", "latent.width=4"]
CPU = torch.device("cpu")


def run(name, *overrides):
    return load_config(f"model_configs/{name}.yaml", [*SMALL, *overrides])


I2V, I2V_22, TI2V, T2V = "wan2.1_i2v_14b_480p", "wan2.2_i2v_a14b", "wan2.2_ti2v_5b", "wan2.1_t2v_1.3b_480p"


def file(folder, name, *shape):
    """A safetensors file of a random tensor."""
    path = folder / f"{name}.safetensors"
    save_file({"x": torch.randn(shape, generator=torch.Generator().manual_seed(len(name)))}, path)
    return path


def test_condition_channels_are_the_mask_and_the_images_latent():
    """diffusers' own mask is in tests/interop/test_image_encoder.py; here the shards of two ranks."""
    latents = torch.randn(2, *LATENT)
    whole = FAMILIES["wan"].image_channels(latents)
    assert whole.shape == (2, 20, 3, 4, 4)
    assert bool((whole[:, :4, 0] == 1).all()) and not whole[:, :4, 1:].any() and torch.equal(whole[:, 4:], latents)
    given = Conditioning(image_latent_BCTHW=latents, image_LBD=torch.randn(257, 1, 6))
    shards = []
    for rank in range(2):
        layout = TokenLayout(LATENT, (1, 2, 2), groups=SimpleNamespace(token_shards=2, token_shard=rank))
        condition = given.condition(MODEL, layout, 2, CPU)
        assert condition.x0_SBP is None and condition.frames_B is None
        assert condition.image_LBD.shape == (257, 2, 6)
        shards.append(condition.channels_SBE)
    tokens = torch.cat(shards)
    assert tokens.shape == (12, 2, 80)
    assert torch.equal(tokens[5, 1].view(20, 1, 2, 2), whole[1, :, 1:2, 0:2, 2:4]), "token 5: frame 1, row 0, column 1"
    with pytest.raises(ValueError, match=r"do not have the layout's shape \(16, 3, 4, 4\)"):
        layout.shard(whole)


def test_one_video_is_given_to_every_sample():
    layout = TokenLayout(LATENT, (1, 2, 2), groups=SimpleNamespace(token_shards=1, token_shard=0))
    assert Conditioning().condition(MODEL, layout, 2, CPU) is None
    condition = Conditioning(latent_BCTHW=torch.randn(1, *LATENT), frames=2).condition(MODEL, layout, 3, CPU)
    assert condition.frames_B.tolist() == [2, 2, 2] and condition.x0_SBP.shape == (12, 3, 64)
    assert torch.equal(condition.x0_SBP[:, 0], condition.x0_SBP[:, 2])


def test_the_loader_is_asked_for_what_the_network_takes():
    assert image_shapes(run(I2V)) == {"image_latent_shape": LATENT, "image_embed_shape": (257, 1280)}
    assert image_shapes(run(I2V_22)) == {"image_latent_shape": LATENT, "image_embed_shape": None}
    for name in (TI2V, T2V, "cosmos_predict2_2b_video2world"):
        assert set(image_shapes(run(name)).values()) == {None}


def test_files_of_what_the_encoders_make(tmp_path):
    latent, embed = file(tmp_path, "latent", 16, 5, 4, 4), file(tmp_path, "embed", 1, 257, 1280)
    files = ConditioningFiles(image_latent=latent, image_embed=embed)
    check_conditioning(run(I2V), files)
    given = load_conditioning(run(I2V), files)
    assert given.image_latent_BCTHW.shape == (1, *LATENT) and given.image_LBD.shape == (257, 1, 1280)
    assert given.latent_BCTHW is None and given.frames == 0
    check_conditioning(run(I2V_22), ConditioningFiles(image_latent=latent))
    first = file(tmp_path, "first", 48, 1, 4, 4)
    given = load_conditioning(run(TI2V), ConditioningFiles(conditional_latent=first))
    assert given.frames == 1 and given.latent_BCTHW.shape == (1, 48, 3, 4, 4) and not given.latent_BCTHW[:, :, 1:].any()
    check_conditioning(run(TI2V), ConditioningFiles())  # it also makes videos of text alone
    check_conditioning(run(T2V), ConditioningFiles())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (T2V, {"image": "picture"}, "got --image .*, but this network takes none; leave it out"),
        (T2V, {"image_latent": "latent"}, "got --image-latent .*, but this network takes none"),
        (
            T2V,
            {"conditional_latent": "latent"},
            r"got --conditional-latent .*distillation.conditional_frames=null\); leave it out",
        ),
        (I2V_22, {"image_latent": "latent", "image_embed": "embed"}, "got --image-embed .* takes none"),
        (I2V, {}, "makes a video of an image: give a picture with --image, or --image-latent"),
        (I2V, {"image_latent": "latent"}, "give a picture with --image, or --image-embed"),
        (I2V, {"image": "picture", "image_embed": "embed"}, "got --image with --image-embed, which says the same"),
        (TI2V, {"image": "picture", "conditional_latent": "latent"}, "got --image with --conditional-latent"),
        (I2V, {"image": "picture"}, "with encoders.video=none; set it to wan_vae and encoders.folder"),
        (I2V, {"image_latent": "embed", "image_embed": "embed"}, r"--image-latent .*: got shape \(257, 1280\), need"),
        (
            I2V,
            {"image_latent": "latent", "image_embed": "latent"},
            r"--image-embed .*: got shape .* need \(257, 1280\)",
        ),
        (
            I2V,
            {"image_latent": "missing", "image_embed": "embed"},
            "--image-latent .*missing.safetensors: .*No such file",
        ),
        (
            "cosmos_predict2_2b_video2world",
            {},
            "give its latent with --conditional-latent, and --conditional-frames, or a picture",
        ),
    ],
)
def test_what_a_network_does_not_take_or_lacks_is_named(tmp_path, name, options, message):
    file(tmp_path, "latent", 16, 3, 4, 4)
    file(tmp_path, "embed", 257, 1280)
    files = ConditioningFiles(**{field: tmp_path / f"{stem}.safetensors" for field, stem in options.items()})
    with pytest.raises(InputError, match=message):
        check_conditioning(run(name), files)


def test_a_picture_needs_clip_where_the_network_sees_it_and_is_read_at_once(tmp_path):
    overrides = ["encoders.video=wan_vae", "encoders.folder=/nowhere"]
    (tmp_path / "bad.png").write_text("no picture")
    Image.new("RGB", (9, 9)).save(tmp_path / "good.png")
    with pytest.raises(InputError, match="with encoders.image=none; set it to clip"):
        check_conditioning(run(I2V, *overrides), ConditioningFiles(image=tmp_path / "good.png"))
    for name, more in ((I2V, ["encoders.image=clip"]), (I2V_22, []), (TI2V, [])):
        check_conditioning(run(name, *overrides, *more), ConditioningFiles(image=tmp_path / "good.png"))
        with pytest.raises(EncoderError, match=r"bad\.png cannot be used"):
            check_conditioning(run(name, *overrides, *more), ConditioningFiles(image=tmp_path / "bad.png"))


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        (
            I2V,
            "model.condition_channels=16",
            "condition_channels=16 must be 20: a mask of 4 channels and an image's latent",
        ),
        (I2V, "encoders.image=clip", "encoders.folder=null, but encoders.image=clip reads it"),
        (I2V_22, "encoders.image=clip", "the network attends to no image .*; set encoders.image to none"),
    ],
)
def test_configurations_that_do_not_fit(name, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(f"model_configs/{name}.yaml", [*SMALL, override], world_size=8)
