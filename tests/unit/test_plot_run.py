"""The picture of a run: what is read of a metrics.jsonl, and which panels come of it."""

import json
import re

import pytest
from matplotlib import pyplot
from PIL import Image

from rcm_megatron.cli.main import main
from rcm_megatron.reports.plot import Run, panels, plot, points, read_run, smoothed


def record(iteration, **changes):
    """A record as the trainer writes it: two student steps of sCM, then DMD with every second step for the fake score."""
    fake = iteration >= 2 and iteration % 2 == 1
    common = {"iteration": iteration, "restarts": 0, "stage": "scm" if iteration < 2 else "rcm", "gradient_norm": 3.0}
    common |= {
        "trained": "fake_score" if fake else "student",
        "learning_rate": 1e-4,
        "seconds/step": 1.0,
        "nan_samples": 0,
    }
    common |= {"seconds/teacher": 0.4, "seconds/backward": 0.6, "samples_per_second": 4.0, "peak_memory_gib": 0.5}
    losses = {"fake_score/loss": 9.0} if fake else {"scm/loss": 1.0, "scm/tangent_norm": 30.0}
    return common | losses | changes


def write(folder, lines):
    folder.mkdir()
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    return folder


def titles(*runs):
    return [panel.title for panel in panels(runs, {})]


def test_the_last_record_of_an_iteration_counts_and_torn_lines_do_not(tmp_path):
    lines = [record(0), record(1), record(2), record(1, restarts=1), record(2, restarts=1), '{"iteration": 3, "sta']
    run = read_run(write(tmp_path / "run", lines))
    assert [r["iteration"] for r in run.records] == [0, 1, 2] and run.name == "run"
    assert list(run.changes("restarts")) == [(0, 0), (1, 1)]
    assert list(run.changes("stage")) == [(0, "scm"), (2, "rcm")]


def test_networks_and_stages_are_drawn_apart():
    run = Run("run", [record(i) for i in range(6)])
    assert [[r["iteration"] for r in part] for part in run.stretches("student")] == [[0, 1], [2, 4]]
    assert [[r["iteration"] for r in part] for part in run.stretches("fake_score")] == [[3, 5]]


def test_points_leave_out_what_is_no_finite_number():
    values = [1.0, float("nan"), float("inf"), "rcm", True, None, 2]
    records = [{"iteration": i, "x": value} for i, value in enumerate(values)] + [{"iteration": 9}]
    assert points(records, "x") == ([0, 4, 6], [1.0, 1.0, 2.0])


def test_a_smoothed_curve_keeps_the_mean():
    xs, ys = smoothed(range(300), [float(i % 2) for i in range(300)])
    assert len(xs) <= 60 and xs[0] == 2.0 and sum(ys) / len(ys) == pytest.approx(0.5, abs=0.01)


def test_panels_are_those_of_what_was_recorded():
    full = Run("full", [record(i, tflops_per_device=2.0) for i in range(6)])
    expected = [
        "scm loss",
        "fake_score loss",
        "gradient norm",
        "tangent norm (sCM)",
        "learning rate",
        "throughput",
        "arithmetic",
    ]
    expected += ["peak memory, rank 0", "counted since the start", "student step by phase", "fake_score step by phase"]
    assert titles(full) == expected
    with_mfu = titles(Run("gpu", [record(i, tflops_per_device=2.0, mfu=0.4) for i in range(6)]))
    assert "MFU" in with_mfu and "arithmetic" not in with_mfu
    assert titles(Run("old", [{"iteration": 0, "flow/loss": 2.0}])) == ["flow loss"]


def test_objectives_that_this_program_does_not_know_are_drawn(tmp_path):
    """Those of a plugin, plotted elsewhere: their losses, what they report, the network that they train, the phases of their passes."""
    record = {"probe/loss": 3.0, "probe/nan_samples": 0, "probe/slope": 0.5, "scm/loss": 1.0, "trained": "probe"}
    run = Run("run", [{"iteration": i, "seconds/guess": 2.0, "seconds/step": 2.0, **record} for i in range(3)])
    assert titles(run) == ["scm loss", "probe loss", "slope (probe)", "probe step by phase"]
    used = {}
    plot([run], tmp_path / "run.png")
    for panel in panels([run], used):
        panel.draw(pyplot.figure().gca())
    assert used.keys() == {"guess"}


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [-1.0, 5.0, float("nan")], [1e-3, 1e3], [1.0, 1.01]])
def test_any_curve_can_be_drawn(tmp_path, values):
    lines = [{"iteration": i, "gradient_norm": value, "trained": "student"} for i, value in enumerate(values)]
    plot([Run("run", lines)], tmp_path / "run.png")
    with Image.open(tmp_path / "run.png") as image:
        assert image.size[0] > 300


def test_one_run_and_several(tmp_path, capsys):
    """Folders of one name, one with keys that the other lacks."""
    (tmp_path / "a").mkdir()
    first = write(tmp_path / "a" / "run", [record(i, restarts=int(i > 3)) for i in range(6)])
    second = write(tmp_path / "run", [{"iteration": i, "trained": "student", "scm/loss": 2.0} for i in range(150)])
    assert main(["plot", str(first)]) == 0
    assert capsys.readouterr().out.strip() == str(first / "run.png")
    assert main(["plot", str(first), str(second / "metrics.jsonl"), "--output", str(tmp_path / "both.png")]) == 0
    with Image.open(first / "run.png") as one, Image.open(tmp_path / "both.png") as both:
        assert one.size == both.size


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "got no .*metrics.jsonl; need a run's folder or its metrics.jsonl; fix"),
        ([], "got no record in .*; need at least one; fix"),
        ([{"iteration": 0}], "got records without metrics; need those of a training run; fix"),
    ],
)
def test_nothing_to_draw_is_said(tmp_path, capsys, lines, message):
    folder = tmp_path / "run"
    if lines is not None:
        write(folder, lines)
    assert main(["plot", str(folder)]) == 1
    assert re.search(message, capsys.readouterr().err)
