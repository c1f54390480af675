"""Moving-digit videos and the measures taken on them."""

import itertools

import numpy as np
import pytest
import torch

from rcm_megatron.evaluation.sets import frechet_distance
from tools.quickstart.digits import (
    DIRECTION_STEPS,
    DIRECTIONS,
    LATENT_SHAPE_CTHW,
    SPEED,
    all_captions,
    digit_images,
    make_sample,
    make_samples,
    parse_caption,
)
from tools.quickstart.judge import (
    NONE_CLASS,
    aligned_statistics,
    caption_diversity,
    captioned_digit_accuracy,
    head_labels,
    spoil_motion,
    train_classifier,
    video_features,
)


@pytest.fixture(scope="module")
def classifier():
    """Trained for a few seconds only: enough to tell real from wrong, not the one results are reported with."""
    return train_classifier(steps=150, batch=32)


def test_sample_depends_on_seed_index_and_split_alone():
    first = make_sample(seed=3, index=41, split="train")
    make_sample(seed=8, index=2, split="heldout")
    again = make_sample(seed=3, index=41, split="train")
    assert first.caption == again.caption
    assert torch.equal(first.latent_CTHW, again.latent_CTHW)
    for seed, index, split in ((4, 41, "train"), (3, 42, "train"), (3, 41, "heldout")):
        assert not torch.equal(first.latent_CTHW, make_sample(seed=seed, index=index, split=split).latent_CTHW)


def test_sample_is_pinned():
    """Stored teachers and results belong to these videos: a change here means training the teacher again."""
    sample = make_sample(seed=0, index=0, split="train")
    assert sample.caption == "four moving left"
    assert float(sample.latent_CTHW.double().sum()) == -722.5


def test_latents_have_the_stated_form():
    for index in range(50):
        sample = make_sample(seed=1, index=index, split="heldout")
        assert sample.latent_CTHW.shape == LATENT_SHAPE_CTHW
        assert sample.latent_CTHW.dtype == torch.float32
        assert sample.latent_CTHW.min() == -1.0
        assert sample.latent_CTHW.max() <= 1.0
        assert parse_caption(sample.caption) == (sample.digit, sample.direction)
        assert sample.digit != sample.other_digit
        assert sample.direction != sample.other_direction


def test_splits_share_no_digit_image():
    train = {image.tobytes() for images in digit_images("train").values() for image in images}
    heldout = {image.tobytes() for images in digit_images("heldout").values() for image in images}
    assert len(heldout) > 250
    assert not train & heldout


def test_unknown_split_and_foreign_caption_are_errors():
    with pytest.raises(ValueError, match="split='test' is unknown"):
        make_sample(seed=0, index=0, split="test")
    with pytest.raises(ValueError, match="not of the form"):
        parse_caption("a cat")


def test_every_caption_occurs():
    samples = make_samples(seed=2, start=0, count=600)[1]
    assert {sample.caption for sample in samples} == set(all_captions())


def test_each_digit_moves_the_way_it_is_said_to():
    """Undoing the captioned motion leaves ink where all frames agree: as much as the digit's own."""
    videos, samples = make_samples(seed=6, start=0, count=40)
    ink_BR = (aligned_statistics(videos)[:, :, 0] + 1.0).sum(dim=(2, 3))
    for row, sample in enumerate(samples):
        for digit, direction in ((sample.digit, sample.direction), (sample.other_digit, sample.other_direction)):
            lightest = min(2.0 * float(image.sum()) for image in digit_images("train")[digit])
            assert float(ink_BR[row, DIRECTIONS.index(direction)]) >= 0.999 * lightest


def test_a_frame_is_the_last_one_rolled_when_only_one_digit_is_inked(monkeypatch):
    blank = {digit: np.zeros_like(images) for digit, images in digit_images("train").items()}
    sample = make_sample(seed=9, index=0)
    inked = {**blank, sample.digit: digit_images("train")[sample.digit]}
    monkeypatch.setattr("tools.quickstart.digits.digit_images", lambda split: inked)
    frames_THW = make_sample(seed=9, index=0).latent_CTHW[0]
    rows, columns = DIRECTION_STEPS[sample.direction]
    for last, frame in itertools.pairwise(frames_THW):
        assert torch.equal(last.roll((rows * SPEED, columns * SPEED), dims=(0, 1)), frame)


def test_head_labels_name_both_digits():
    sample = make_sample(seed=0, index=5)
    (labels_R,) = head_labels([sample]).tolist()
    assert labels_R[DIRECTIONS.index(sample.direction)] == sample.digit
    assert labels_R[DIRECTIONS.index(sample.other_direction)] == sample.other_digit
    assert labels_R.count(NONE_CLASS) == len(DIRECTIONS) - 2


def test_spoiled_motion_is_labelled_none():
    videos, samples = make_samples(seed=0, start=0, count=9)
    labels = head_labels(samples)
    spoiled, spoiled_labels = spoil_motion(videos, labels)
    for row in range(9):
        assert torch.equal(spoiled[row], videos[row]) == (row % 4 > 0)
        assert torch.equal(spoiled_labels[row], labels[row]) == (row % 4 > 0)
    assert spoiled_labels[::4].eq(NONE_CLASS).all()


def test_frechet_distance_of_known_gaussians():
    """Diagonal Gaussians: |mean gap|^2 + sum (sigma_a - sigma_b)^2."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(20_000, 3, generator=generator)
    b = torch.randn(20_000, 3, generator=generator) * torch.tensor([1.0, 2.0, 0.5]) + torch.tensor([3.0, 0.0, 0.0])
    assert frechet_distance(a, b) == pytest.approx(9.0 + 1.0 + 0.25, rel=0.03)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-6)


def test_classifier_tells_real_videos_from_wrong_ones(classifier):
    real, samples = make_samples(seed=5, start=0, count=200, split="heldout")
    captions = [sample.caption for sample in samples]
    accuracy = captioned_digit_accuracy(classifier, real, captions)
    other_way = captioned_digit_accuracy(classifier, real.flip(2), captions)
    standing_still = captioned_digit_accuracy(classifier, real[:, :, :1].expand_as(real), captions)
    assert accuracy > 0.5
    assert other_way < 0.2
    assert standing_still < 0.2


def test_distance_and_diversity_order_real_blurred_and_noise(classifier):
    videos, samples = make_samples(seed=5, start=0, count=400, split="heldout")
    features = video_features(classifier, videos)
    first, second = features[:200], features[200:]
    noise = torch.randn(videos[200:].shape, generator=torch.Generator().manual_seed(0)).clamp(-1.0, 1.0)
    mean_video = videos.mean(0, keepdim=True).expand_as(noise)
    to_real = frechet_distance(first, second)
    assert frechet_distance(first, video_features(classifier, noise)) > 4 * to_real
    assert frechet_distance(first, video_features(classifier, 0.5 * (videos[200:] + mean_video))) > 2 * to_real
    captions = [sample.caption for sample in samples]
    kwargs = {"real_features_MF": first, "real_captions": captions[:200]}
    assert caption_diversity(second, captions[200:], **kwargs) == pytest.approx(1.0, abs=0.15)
    assert caption_diversity(first[:1].expand(9, -1), captions[:1] * 9, **kwargs) == pytest.approx(0.0, abs=1e-4)


def test_measures_refuse_what_they_cannot_judge(classifier):
    videos, samples = make_samples(seed=5, start=0, count=2)
    with pytest.raises(ValueError, match="2 videos and 1 captions"):
        captioned_digit_accuracy(classifier, videos, [samples[0].caption])
    features = video_features(classifier, videos)
    with pytest.raises(ValueError, match="no caption occurs twice"):
        caption_diversity(
            features, ["one moving up", "two moving up"], real_features_MF=features, real_captions=["", ""]
        )


def test_classifier_cache_gives_the_same_network(tmp_path):
    cache = tmp_path / "classifier.safetensors"
    state = torch.get_rng_state()
    trained = train_classifier(steps=2, batch=4, cache=cache)
    read = train_classifier(steps=2, batch=4, cache=cache)
    again = train_classifier(steps=2, batch=4)
    assert torch.equal(state, torch.get_rng_state())
    for name, value in trained.state_dict().items():
        assert torch.equal(value, read.state_dict()[name]), name
        assert torch.equal(value, again.state_dict()[name]), name
