"""`rcm evaluate samplers` and `vbench-sample` on a run's checkpoint: one rank, two, killed and started again."""

import json
import os
import signal

import numpy as np
import pytest
from safetensors.torch import load_file

from rcm_megatron.evaluation.store import open_root
from tests.distributed.harness import RankError, run_ranks
from tests.distributed.tiny_run import command, train, write_tiny_run
from tests.helpers import assert_close

CAPTIONS = ("seven moving left", "two moving right", "nine moving left")
SAMPLERS = [
    "teacher_4_steps_guidance_3",
    "teacher_2_steps_unguided",
    "teacher_1_step_guidance_3",
    "student.ema_2_steps",
]


def killed(argv, videos):
    """The command on this rank, killed by SIGKILL in the middle of writing video number `videos`."""
    from rcm_megatron.evaluation import store

    whole, written = store.write_mp4, []

    def write_mp4(path, frames_THWC, *, fps):
        whole(path, frames_THWC, fps=fps)
        written.append(path)
        if len(written) == videos:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    store.write_mp4 = write_mp4
    return command(argv)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Words of the command: a run of two iterations, its prompts."""
    folder = tmp_path_factory.mktemp("evaluated")
    config = write_tiny_run(folder)
    run_ranks(train, 1, str(config), ["trainer.stop_after=2"])
    (folder / "prompts.txt").write_text("\n".join(CAPTIONS) + "\n")
    return [str(config), "sampling.teacher_steps=4", "sampling.guidance=3.0", "--prompts", str(folder / "prompts.txt")]


def samplers(prepared, output, *more):
    return [
        "evaluate",
        "samplers",
        *prepared,
        "--steps",
        "2",
        "--samples",
        "2",
        "--k",
        "2",
        "--output",
        str(output),
        *more,
    ]


@pytest.fixture(scope="module")
def one(prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "out"
    ((status, stderr),) = run_ranks(command, 1, samplers(prepared, folder))
    assert status == 0, stderr
    return folder


def files(folder):
    """{name: bytes} of the videos and what was measured of them."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for part in ("videos", "measured")
        for path in (folder / part).rglob("*-?.*")
    }


def test_samplers_side_by_side(one):
    names = sorted(f"{caption}-{index}.mp4" for caption in CAPTIONS for index in range(2))
    for sampler in SAMPLERS:
        assert sorted(path.name for path in (one / "videos" / sampler).iterdir()) == names
    record = json.loads((one / "report.json").read_text())
    assert [(row["evaluations"], row["videos"]) for row in record["rows"]] == [(8, 6), (2, 6), (2, 6), (2, 6)]
    assert record["rows"][0]["compared"] is None and record["rows"][3]["compared"]["frechet"] > 0
    assert record["rows"][0]["diversity"]["value"] == 1.0 and record["rows"][3]["prompts"] == 3
    assert not (one / "partial").exists() and not (one / "text").exists()
    for name in ("report.md", "figures.png", "sheet.png", "seeds.png"):
        assert (one / name).is_file(), name


def test_two_replicas_write_the_same_files(prepared, one, tmp_path):
    """To the bit, for batches are cut alike; and over two ranks a sample to rounding."""
    for status, stderr in run_ranks(command, 2, samplers(prepared, tmp_path / "dp")):
        assert status == 0, stderr
    assert files(tmp_path / "dp") == files(one)
    report, expected = (json.loads((folder / "report.json").read_text()) for folder in (tmp_path / "dp", one))
    assert report["rows"] == expected["rows"]
    for status, stderr in run_ranks(command, 2, samplers(prepared, tmp_path / "ring", "parallel.ring=2")):
        assert status == 0, stderr
    for path in (one / "measured").rglob("*.safetensors"):
        reference, got = (load_file(folder / path.relative_to(one))["features"] for folder in (one, tmp_path / "ring"))
        assert_close(path.name, reference, got, rel=1e-4)


def test_killed_while_a_video_is_written_and_started_again(prepared, one, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(RankError):
        run_ranks(killed, 1, samplers(prepared, output), 10)
    left = files(output)
    assert len(list((output / "partial").iterdir())) == 1, "the torn one"
    assert len([name for name in left if name.endswith(".mp4")]) == 9 and left.items() <= files(one).items()
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.mp4") if path.parent.name != "partial"}
    for status, stderr in run_ranks(command, 2, samplers(prepared, output)):
        assert status == 0, stderr
    assert files(output) == files(one)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items()), "finished ones stay"
    ((status, stderr),) = run_ranks(command, 1, samplers(prepared, output, "sampling.seed=5"))
    assert (
        status == 1
        and "holds videos of another recipe: sampling is" in stderr
        and "fix: choose another --output" in stderr
    )
    assert files(output) == files(one)


def test_the_folder_for_vbench(prepared, tmp_path):
    """Slashes, long prompts for the network and short ones in names, 3 samples of one prompt; started again it has nothing to do."""
    short = ["AC/DC 24/7", "a cat", "a dog", "a cat"]
    lists = {
        "short": short,
        "long": ["seven moving left", "two moving right", "nine moving left", "six moving up"],
        "flicker": ["a dog"],
    }
    for name, lines in lists.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(lines) + "\n")
    output, options = (
        tmp_path / "out",
        [*prepared[:3], "--prompts", str(tmp_path / "short.txt"), "--long-prompts", str(tmp_path / "long.txt")],
    )
    options += [
        "--flickering",
        str(tmp_path / "flicker.txt"),
        "--samples",
        "2",
        "--flickering-samples",
        "3",
        "--output",
        str(output),
    ]
    argv = ["evaluate", "vbench-sample", *options]
    for status, stderr in run_ranks(command, 2, argv):
        assert status == 0, stderr
    names = ["AC-DC 24-7-0", "AC-DC 24-7-1", "a cat-0", "a cat-1", "a dog-0", "a dog-1", "a dog-2"]
    assert sorted(path.name for path in (output / "videos").iterdir()) == [f"{name}.mp4" for name in names], (
        "nothing else"
    )
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["videos"]["a cat-1.mp4"] == {"prompt": "a cat", "given": "two moving right", "noise": 1001}
    assert (manifest["seed"], manifest["evaluations"], manifest["sampler"]) == (0, 4, "ema, 4 steps")
    first = files(output)
    ((status, stderr),) = run_ranks(command, 1, argv)
    assert status == 0 and files(output) == first, stderr


REFUSED = {
    "steps": (["--steps", "9"], "got --steps 9, need 1 to 4 for student.ema; sampling.student_times"),
    "encoder": (["encoders.video=none"], "got encoders.video=none, need one to evaluate videos of prompts; set it to"),
    "few": (
        ["--samples", "1", "--k", "5"],
        "got 3 videos of each sampler and --k 5, need k >= 1 and k + 1 videos; fix",
    ),
    "role": (["--weights", "tutor"], "got --weights tutor; this run has"),
    "reference": (["--reference", "/nowhere"], "got --reference /nowhere, which is not there; need"),
    "weights": (["--feature-weights", "/nowhere"], "got --feature-weights /nowhere, which is no file; need"),
    "batch": (["--batch-size", "0"], "got --batch-size 0, need at least 1"),
    "few real": (["--reference", "FEW"], "got 2 videos in FEW, need at least k + 1 = 3 for k=2 neighbours; fix"),
}


def refusals(cases, argv):
    """Each case on this rank, one after the other: none gets as far as a process group of its own."""
    return {name: command([*argv, *words]) for name, (words, _) in cases.items()}


def test_what_is_refused_before_anything_is_sampled(prepared, tmp_path):
    few = tmp_path / "few.npy"
    np.save(few, np.eye(2))
    cases = {
        name: ([w.replace("FEW", str(few)) for w in words], said.replace("FEW", str(few)))
        for name, (words, said) in REFUSED.items()
    }
    (found,) = run_ranks(refusals, 1, cases, samplers(prepared, tmp_path / "out"))
    for name, (status, stderr) in found.items():
        assert status in (1, 2) and cases[name][1] in stderr, (name, stderr)
    # nothing was made, so that the folder is not that of the refused recipe
    open_root(tmp_path / "out", {"features": "others"})
    assert not list((tmp_path / "out").rglob("*.mp4"))


def test_an_unknown_word_is_an_error_on_all_ranks(prepared, tmp_path):
    (tmp_path / "prompts.txt").write_text("seven moving left\na cat\ntwo moving left\n")
    argv = [*samplers(prepared, tmp_path / "out"), "--prompts", str(tmp_path / "prompts.txt")]
    for status, stderr in run_ranks(command, 2, argv):
        assert status == 1 and "unknown word 'a' in caption 'a cat'" in stderr
    assert not list((tmp_path / "out").rglob("*.mp4"))
