"""Samples written while training, on several layouts, and what Weights & Biases keeps offline."""

import av
import pytest
from safetensors.torch import load_file

from rcm_megatron.reports.plot import panels, plot, read_run
from tests.distributed.harness import RankError, run_ranks
from tests.distributed.run_checks import LOSS_BOUND, assert_same_curves
from tests.distributed.tiny_run import records, train, write_tiny_run
from tests.helpers import assert_close

NAMES = [f"{weights}_{steps}_steps" for weights in ("student", "ema") for steps in (1, 2, 4)]
SHORT = ["trainer.stop_after=4", "sampling.num_samples=2"]


def start(config, folder, ranks, *overrides):
    run_ranks(train, ranks, str(config), [*SHORT, f"output_dir={folder}", *overrides])
    return records(folder)


def frames_of(path):
    """(frames, width, height) of a video that decodes."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return len(frames), frames[0].width, frames[0].height


def without_previews(lines):
    """Records without what sample videos look like."""
    return [{key: value for key, value in line.items() if not key.startswith("preview/")} for line in lines]


LAYOUTS = {
    "ring2": ["parallel.ring=2"],
    "pp2": ["parallel.pp=2", "parallel.chunk_layers=[1, 3]"],
    "pp2_vpp2": ["parallel.pp=2", "parallel.vpp=2"],
}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """(run.yaml, folder of a run with previews on one rank)."""
    folder = tmp_path_factory.mktemp("previews")
    config = write_tiny_run(folder, num_layers=4)
    undisturbed = start(config, folder / "none", 1)
    lines = start(config, folder / "one", 1, "trainer.sample_every=2")
    assert without_previews(lines) == undisturbed, "previews leave the run as it was"
    return config, folder / "one"


def test_previews_of_one_rank(one):
    _, folder = one
    for iteration in ("0000002", "0000004"):
        previews = folder / "previews" / iteration
        assert sorted(path.stem for path in previews.glob("*.safetensors")) == sorted(NAMES)
        for name in NAMES:
            assert frames_of(previews / f"{name}_1.mp4") == (4, 128, 128)
    last = folder / "previews" / "0000004"
    student, ema = (load_file(last / f"{name}_1_steps.safetensors")["latents"] for name in ("student", "ema"))
    assert not student.equal(ema)


def test_what_previews_look_like_is_in_the_records_and_in_the_plot(one):
    """Means over the videos of each sampler, as they were decoded; grey videos have no saturation."""
    _, folder = one
    lines = records(folder)
    found = [{key for key in line if key.startswith("preview/")} for line in lines]
    statistics = {f"preview/{name}/{key}" for name in NAMES for key in ("saturation", "contrast", "motion", "flicker")}
    assert found == [set(), statistics, set(), statistics]
    videos = load_file(folder / "previews" / "0000004" / "ema_4_steps.safetensors")["latents"].clamp(-1, 1)
    by_hand = (videos.diff(dim=2).abs().mean() / 2).item()
    assert lines[3]["preview/ema_4_steps/flicker"] == pytest.approx(by_hand, rel=1e-5)
    assert lines[3]["preview/ema_4_steps/saturation"] == 0 and lines[3]["preview/ema_4_steps/contrast"] > 0
    titles = [panel.title for panel in panels([read_run(folder)], {})]
    assert {"saturation of previews", "contrast of previews", "motion of previews, pixels a frame"} <= set(titles)
    plot([read_run(folder)], folder / "run.png")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_previews_are_equal_on_two_ranks(one, tmp_path, layout):
    """Student and EMA; sampling is a single micro-batch, whatever the number of stages."""
    config, folder = one
    lines = start(config, tmp_path, 2, *LAYOUTS[layout], "trainer.sample_every=2")
    assert_same_curves(records(folder), lines, rel=LOSS_BOUND)
    for iteration in ("0000002", "0000004"):
        for name in NAMES:
            file = f"previews/{iteration}/{name}.safetensors"
            reference = load_file(folder / file)["latents"]
            assert reference.shape == (2, 1, 4, 16, 16)
            assert_close(name, reference, load_file(tmp_path / file)["latents"], rel=1e-4)


@pytest.mark.parametrize(
    ("fault", "files"),
    [
        ("told_to_stop_while_sampling", None),
        ("told_to_stop_while_writing_videos", [f"{name}.safetensors" for name in NAMES] + ["student_1_steps_0.mp4"]),
    ],
)
def test_a_signal_ends_a_preview_and_the_run_saves(one, tmp_path, fault, files):
    """Decoding the videos of a large model takes longer than the two minutes that SLURM gives."""
    config, folder = one
    overrides = ["parallel.ring=2", "trainer.sample_every=2", "trainer.stop_after=4", f"output_dir={tmp_path}"]
    with pytest.raises(RankError, match="told to stop; saved after 2 of"):
        run_ranks(train, 2, str(config), overrides, fault)
    assert (tmp_path / "checkpoints" / "latest").read_text() == "iter_0000002\n"
    previews = tmp_path / "previews" / "0000002"
    assert previews.exists() == (files is not None)
    assert files is None or sorted(path.name for path in previews.glob("*.[sm]*")) == sorted(files)
    lines = records(tmp_path)
    assert_same_curves(without_previews(records(folder)[:2]), lines, rel=LOSS_BOUND)
    assert lines == without_previews(lines), "no mean over some of the videos"


def test_wandb_offline_keeps_one_run_id_over_a_resume_and_has_the_videos(tmp_path):
    config, folder = write_tiny_run(tmp_path), tmp_path / "run"
    options = ["logging.wandb_mode=offline", "trainer.sample_every=2"]
    start(config, folder, 1, *options, "trainer.stop_after=2")
    identity = (folder / "wandb_run_id").read_text()
    assert len(start(config, folder, 1, *options)) == 4
    assert (folder / "wandb_run_id").read_text() == identity
    sessions = list((folder / "wandb").glob(f"offline-run-*-{identity.strip()}"))
    assert len(sessions) == 2
    for session in sessions:
        videos = session / "files" / "media" / "videos" / "previews"
        assert sorted(path.name for path in videos.iterdir()) == sorted(NAMES)
        for name in NAMES:
            found = list((videos / name).glob("*.mp4"))
            assert len(found) == 2 and all(frames_of(path) == (4, 128, 128) for path in found)
