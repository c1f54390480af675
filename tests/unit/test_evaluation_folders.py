"""Folders of videos from other tools, features in files, what videos look like: by the command, and against values by hand."""

import json
import math
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rcm_megatron.cli.main import main
from rcm_megatron.data.video_statistics import video_statistics
from rcm_megatron.evaluation.features import feature_network, read_features
from tests.videos import write_rotated, write_video

SIZE = (32, 48)


def still(colour, *, frames=5, size=SIZE):
    """uint8 [T, H, W, 3] of one colour."""
    return np.broadcast_to(np.array(colour, np.uint8), (frames, *size, 3)).copy()


def write_set(folder, *, spread, prompts=("a cat", "a dog"), seeds=4, frames=5, size=SIZE):
    """Videos of a grey level for each prompt, `spread` apart from seed to seed; a Mac's dot file beside each."""
    for number, prompt in enumerate(prompts):
        for seed in range(seeds):
            level = 60 + 80 * number + spread * seed
            write_video(folder / f"{prompt}-{seed}.mp4", still([level] * 3, frames=frames, size=size), codec="mpeg4")
            (folder / f"._{prompt}-{seed}.mp4").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    return folder


def evaluate(*arguments, output):
    return main(["evaluate", "folders", *map(str, arguments), "--k", "3", "--output", str(output)])


def test_a_collapsed_folder_beside_its_teacher(tmp_path, capsys):
    teacher, student = write_set(tmp_path / "teacher", spread=16), write_set(tmp_path / "student", spread=4)
    assert evaluate(teacher, student, output=tmp_path / "out") == 0
    text, record = capsys.readouterr().out, json.loads((tmp_path / "out" / "report.json").read_text())
    first, second = record["rows"]
    assert (first["name"], first["videos"], second["videos"], second["prompts"]) == ("teacher", 8, 8, 2)
    assert second["diversity"]["value"] == pytest.approx(0.25, rel=0.05) and "0.25" in text
    # seeds at 0, 16, 32, 48 of 255 and 768 features of [-1, 1]: mean pairwise difference 80/3 levels
    assert first["spread"]["value"] == pytest.approx(80 / 3 / 127.5 * math.sqrt(768), rel=0.03)
    assert second["compared"]["precision"] == 1.0 and second["compared"]["recall"] < 1.0
    assert second["statistics"]["motion"] == 0.0 and second["statistics"]["saturation"] < 0.02
    for name in ("report.md", "figures.png", "sheet.png"):
        assert (tmp_path / "out" / name).stat().st_size > 100, name


def test_two_lengths_and_sizes_are_said_and_can_be_cut_alike(tmp_path, capsys):
    teacher = write_set(tmp_path / "teacher", spread=16)
    other = write_set(tmp_path / "other", spread=16, frames=7, size=(64, 48))
    longer = write_set(tmp_path / "longer", spread=16, frames=7)
    messages = {
        other: r"got videos of 2 sizes: 8 of 32x48 .e.g. .*teacher/a cat-0.mp4.; 8 of 64x48 .e.g. .*other/a cat-0.mp4.; need one",
        longer: r"got videos of 2 lengths: 8 of 5 frames .*; 1 of 7 frames .e.g. .*longer/a cat-0.mp4.; need one",
    }
    for folder, message in messages.items():
        assert evaluate(teacher, folder, output=tmp_path / "out") == 1
        assert re.search(message, said := capsys.readouterr().err) and "--size HxW --frames T --fps RATE" in said, said
    cut = ["--size", "32x48", "--frames", "5", "--fps", "24"]
    assert evaluate(teacher, other, longer, *cut, output=tmp_path / "out") == 0
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    assert record["facts"]["cut_to"] == {"size": [32, 48], "frames": 5, "fps": 24.0} and len(record["rows"]) == 3
    assert record["rows"][2]["compared"]["frechet"] == pytest.approx(0.0, abs=1e-3)
    assert evaluate(teacher, other, "--size", "32x32", output=tmp_path / "out") == 1
    assert "got no --frames and no --fps, need --size, --frames and --fps together; fix" in capsys.readouterr().err


def test_a_phones_video_is_measured_upright(tmp_path, capsys):
    teacher = write_set(tmp_path / "teacher", spread=16)
    write_rotated(tmp_path / "turned.mp4", teacher / "a cat-0.mp4").rename(teacher / "a cat-0.mp4")
    assert evaluate(teacher, teacher, output=tmp_path / "out") == 1
    assert "7 of 32x48" in (said := capsys.readouterr().err) and "1 of 48x32" in said


def test_folders_that_cannot_be_compared(tmp_path, capsys):
    teacher = write_set(tmp_path / "teacher", spread=16)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "._a-0.mp4").write_bytes(b"Mac OS X")
    one = write_set(tmp_path / "one", spread=0, prompts=["a cat"], seeds=1)
    torn = write_set(tmp_path / "torn", spread=3)
    (torn / "a dog-1.mp4").write_bytes((torn / "a dog-1.mp4").read_bytes()[:-200])
    messages = {
        tmp_path / "empty": "got no video in .*/empty, need some .*dot files do not count.*; fix",
        tmp_path / "absent": "got .*/absent, which is no folder; need .* fix",
        one: r"got 1 video in .*/one, need at least k \+ 1 = 4 for k=3 neighbours; fix: give more",
        torn: r"torn/a dog-1.mp4: got no frame, need some; restore or delete it",
        tmp_path / "absent.npy": "which is no file; need features; fix",
    }
    for folder, message in messages.items():
        assert evaluate(teacher, folder, output=tmp_path / "out") == 1, folder
        assert re.search(message, said := capsys.readouterr().err), said
    assert not (tmp_path / "out").exists()


# ---- features


def test_features_in_files(tmp_path, capsys):
    """Without videos there are no statistics and no sheet; prompts may stand in the file."""
    features = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "real.npy", features.numpy())
    prompts = json.dumps(["a", "b", "c"] * 4)
    save_file({"features": features * 0.5}, tmp_path / "ours.safetensors", metadata={"prompts": prompts})
    assert evaluate(tmp_path / "real.npy", tmp_path / "ours.safetensors", output=tmp_path / "out") == 0
    assert "saturation" not in capsys.readouterr().out and not (tmp_path / "out" / "sheet.png").exists()
    _, ours = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert ours["prompts"] == 3 and ours["diversity"] is None and ours["statistics"] is None
    # |mean|^2/4 + tr C/4 of a set halved
    mean, cov = features.double().mean(0), torch.cov(features.double().T)
    assert ours["compared"]["frechet"] == pytest.approx(float(mean.square().sum() / 4 + cov.trace() / 4), rel=1e-5)


def test_features_that_are_none(tmp_path, capsys):
    good = tmp_path / "good.npy"
    np.save(good, np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32))
    arrays = {
        "nan": (np.where(np.eye(9, 4), np.nan, 1.0), r"nan.npy: features holds nan at \[0, 0\], 4 of 36"),
        "whole": (np.ones((9, 4), np.int64), r"got torch.int64 \[9, 4\], need floating-point features \[N, F\]; fix"),
        "flat": (np.ones(9), r"\[9\], need floating-point"),
        "wide": (
            np.random.default_rng(1).normal(size=(9, 5)),
            "got 4 features of good and 5 of wide, need those of one network",
        ),
    }
    for name, (array, message) in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
        assert evaluate(good, tmp_path / f"{name}.npy", output=tmp_path / "out") == 1
        assert re.search(message, said := capsys.readouterr().err), said
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}]), allow_pickle=True)
    assert evaluate(good, tmp_path / "pickled.npy", output=tmp_path / "out") == 1
    assert "without pickled objects" in capsys.readouterr().err
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    assert evaluate(good, tmp_path / "torn.safetensors", output=tmp_path / "out") == 1
    assert "cannot be read as features" in capsys.readouterr().err


def colours(weights, device):
    """A user's network: mean colour."""
    return lambda video_BCTHW: video_BCTHW.mean(dim=(2, 3, 4))


def undefined(weights, device):
    return lambda video_BCTHW: video_BCTHW.mean(dim=(2, 3, 4)) / 0.0 * 0.0


def whole_batch(weights, device):
    return lambda video_BCTHW: video_BCTHW.mean()


def test_a_network_of_the_users(tmp_path, capsys):
    teacher = write_set(tmp_path / "teacher", spread=16)
    argv = [teacher, teacher, "--features"]
    assert evaluate(*argv, f"{__name__}:colours", output=tmp_path / "out") == 0
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert rows[0]["spread"]["value"] == pytest.approx(80 / 3 / 127.5 * math.sqrt(3), rel=0.03)
    assert rows[1]["name"] == str(teacher), "two of one name are told apart"
    capsys.readouterr()
    for name, message in {
        f"{__name__}:undefined": r"a cat-0.mp4: features of .*:undefined holds nan at \[0, 0\]",
        f"{__name__}:whole_batch": r"got \(\) for one video, need \[B, F\], here \[1, F\]; fix",
        f"{__name__}:absent": "cannot be imported .*; need a module on Python's path; fix",
        "no_such_module_at_all:f": "cannot be imported .*fix: install it, or set PYTHONPATH",
        "model.pt": "got --features model.pt, need thumbnails or a function of yours as package.module:function; fix",
    }.items():
        assert evaluate(*argv, name, output=tmp_path / "no") == 1
        assert re.search(message, said := capsys.readouterr().err), said


def test_the_quick_starts_classifier(tmp_path):
    """Grey latents and their RGB videos have the same features; its file holds tensors alone."""
    from tools.quickstart.digits import make_samples
    from tools.quickstart.judge import train_classifier, video_features

    path = tmp_path / "classifier.safetensors"
    classifier = train_classifier(steps=2, batch=4, cache=path)
    videos_NCTHW, _ = make_samples(seed=1, start=0, count=2)
    network = feature_network("tools.quickstart.judge:feature_network", weights=path, device=torch.device("cpu"))
    expected = video_features(classifier, videos_NCTHW)
    for row, video_CTHW in enumerate(videos_NCTHW):
        for shown in (video_CTHW, video_CTHW.expand(3, -1, -1, -1)):
            torch.testing.assert_close(network(shown, what="x"), expected[row], rtol=1e-5, atol=1e-5)
    save_file({"features": expected}, tmp_path / "f.safetensors")
    assert read_features(tmp_path / "f.safetensors").features_NF.equal(expected)


# ---- what videos look like


def test_statistics_by_hand():
    """Left half pure red at full value, right half mid-grey, then 0.2 brighter everywhere it can be."""
    rgb_CTHW = torch.zeros(3, 2, 4, 4)
    rgb_CTHW[0, :, :, :2], rgb_CTHW[:, :, :, 2:] = 1.0, 0.5
    rgb_CTHW[:, 1, :, 2:] = 0.7
    found = video_statistics(2 * rgb_CTHW - 1)
    assert found["saturation"] == pytest.approx(0.5)
    assert found["flicker"] == pytest.approx(0.1)
    assert found["contrast"] == pytest.approx(((0.5 - 0.299) / 2 + (0.7 - 0.299) / 2) / 2, rel=1e-5)
    assert video_statistics(torch.full((1, 3, 4, 4), 0.4)) == {
        "saturation": 0.0,
        "contrast": 0.0,
        "motion": 0.0,
        "flicker": 0.0,
    }


@pytest.mark.parametrize("speed", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("contrast", [1.0, 0.1])
def test_motion_is_the_speed_of_a_wave_whatever_its_contrast(speed, contrast):
    x, time = torch.arange(96.0), torch.arange(6.0)
    wave_TW = contrast * torch.sin(2 * math.pi * (x[None] - speed * time[:, None]) / 48)
    video_CTHW = wave_TW[None, :, None, :].expand(3, 6, 20, 96)
    found = video_statistics(video_CTHW)
    assert found["motion"] == pytest.approx(speed, rel=0.02, abs=1e-4)
    assert found["saturation"] == 0.0 and (found["flicker"] > 0) == (speed > 0)


def test_flicker_is_vbenchs():
    """1 - temporal_flickering: mean absolute difference of bytes over 255, spelt with NumPy."""
    frames_THWC = np.random.default_rng(0).integers(0, 256, size=(4, 9, 7, 3), dtype=np.uint8)
    score = (255.0 - np.mean([np.abs(a.astype(np.float32) - b).mean() for a, b in pairwise(frames_THWC)])) / 255.0
    found = video_statistics(torch.from_numpy(frames_THWC).movedim(-1, 0).float() / 127.5 - 1)
    assert 1 - found["flicker"] == pytest.approx(score, abs=1e-6)
    with pytest.raises(ValueError, match="got 16 channels, need 1"):
        video_statistics(torch.zeros(16, 2, 4, 4))
