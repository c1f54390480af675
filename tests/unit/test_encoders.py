"""The quick start's video and text encoders, and the choice of encoders by configuration."""

from pathlib import Path

import pytest
import torch

from rcm_megatron.config import ConfigError, EncodersConfig, load_config, validate
from rcm_megatron.models.encoders import (
    EncoderError,
    PixelVideoEncoder,
    TextEncoder,
    VideoEncoder,
    WordTextEncoder,
    build_text_encoder,
    build_video_encoder,
    check_encoder_files,
)
from tools.quickstart.digits import all_captions

QUICKSTART = Path(__file__).parents[2] / "model_configs" / "quickstart.yaml"


def test_both_satisfy_their_protocols():
    assert isinstance(PixelVideoEncoder(), VideoEncoder)
    assert isinstance(WordTextEncoder(), TextEncoder)


def test_pixel_encoder_round_trip_and_clamp():
    encoder = PixelVideoEncoder()
    video = torch.rand(3, 1, 5, 7, 9, dtype=torch.float64) * 2 - 1
    latent = encoder.encode(video)
    assert latent.dtype == torch.float32
    assert torch.equal(encoder.decode(latent), video.float())
    assert encoder.decode(5 * latent).abs().max() <= 1.0


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (2, 3, 4, 8, 8)])
def test_pixel_encoder_names_a_wrong_shape(shape):
    with pytest.raises(ValueError, match=r"need \[B, 1, T, H, W\]"):
        PixelVideoEncoder().encode(torch.zeros(shape))


def test_embeddings_are_padded_with_zeros_to_text_len():
    embed = WordTextEncoder(text_dim=10, text_len=5).encode(["seven moving left", "two", ""])
    assert embed.shape == (3, 5, 10)
    assert [int((row.abs().sum(-1) > 0).sum()) for row in embed] == [3, 1, 1]
    assert embed[0, 3:].eq(0).all() and embed[1:, 1:].eq(0).all()


def test_embeddings_are_deterministic_and_distinct():
    captions = ["", *all_captions()]
    embed = WordTextEncoder().encode(captions)
    torch.manual_seed(123)
    assert torch.equal(embed, WordTextEncoder().encode(captions))
    assert torch.equal(embed[4:5], WordTextEncoder().encode(captions[4:5]))
    assert not torch.equal(embed, WordTextEncoder(seed=1).encode(captions))
    distances = torch.nn.functional.pdist(embed.flatten(1))
    assert len(captions) == 21
    assert distances.min() > 1.0


def test_the_vectors_of_the_stored_teacher():
    """The stored teacher's weights fit these vectors only."""
    embed = WordTextEncoder().encode(["seven moving left"])
    assert float(embed.double().sum()) == pytest.approx(25.548762, abs=1e-5)


def test_word_order_matters():
    encoder = WordTextEncoder()
    assert not torch.allclose(encoder.encode(["left seven"]).sum(1), encoder.encode(["seven"]).sum(1))
    assert not torch.equal(encoder.encode(["left seven"]), encoder.encode(["seven left"]).flip(1))


def test_the_empty_caption_is_a_vector_of_its_own():
    encoder = WordTextEncoder()
    assert encoder.negative_prompt == ""
    empty = encoder.encode([""])[0, 0]
    assert empty.norm() > 1.0
    for word in ("seven", "moving", "left"):
        assert not torch.allclose(empty, encoder.encode([word])[0, 0])


def test_unknown_words_and_long_captions_are_errors():
    encoder = WordTextEncoder(text_len=3)
    with pytest.raises(ValueError, match="unknown word 'jumping'"):
        encoder.encode(["seven jumping left"])
    with pytest.raises(ValueError, match="has 4 words, text_len=3"):
        encoder.encode(["seven moving left left"])


def test_built_from_a_configuration():
    config = EncodersConfig(video="pixels", text="words", negative_prompt="two")
    check_encoder_files(config, latent_channels=1, text_dim=32)  # needs no files
    assert build_video_encoder(config, channels=3).latent_channels == 3
    encoder = build_text_encoder(config, text_len=4, text_dim=8)
    assert (encoder.text_len, encoder.text_dim, encoder.negative_prompt) == (4, 8, "two")
    with pytest.raises(EncoderError, match="got encoders.text=none"):
        build_text_encoder(EncodersConfig(video="none", text="none"), text_len=4, text_dim=8)
    with pytest.raises(EncoderError, match="got encoders.video=none"):
        build_video_encoder(EncodersConfig(video="none", text="none"), channels=1)


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["encoders.video=wan_vae"], "encoders.folder=null, but encoders.video=wan_vae reads it"),
        (["encoders.text=umt5"], "encoders.folder=null, but encoders.text=umt5 reads it"),
        (
            ["encoders.text=none", "encoders.negative_prompt=ugly"],
            "encoders.negative_prompt='ugly' needs a text encoder",
        ),
        (["encoders.text=t5"], "encoders.folder=null, but encoders.text=t5 reads it"),
        (
            ["encoders.text=umt5", "encoders.folder=wan", "stages=[{name: f, steps: 1, losses: {flow: 1}}]"],
            'set encoders.negative_prompt to ""',
        ),
    ],
)
def test_settings_that_do_not_fit_together(overrides, part):
    with pytest.raises(ConfigError) as caught:
        validate(load_config(QUICKSTART, overrides), 2)
    assert part in str(caught.value)
