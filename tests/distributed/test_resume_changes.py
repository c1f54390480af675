"""Runs that blow up, begin anew, or go on with other settings than the ones that wrote their checkpoint."""

import contextlib
import io
import json

import pytest

from tests.distributed.harness import run_ranks
from tests.distributed.tiny_run import command, records, write_tiny_run

SCM = "stages=[{name: scm, steps: 4, losses: {scm: 100.0}, tangent_warmup: 3}]"
LONGER = SCM.replace("steps: 4", "steps: 6")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_tiny_run(tmp_path_factory.mktemp("changes"))


def saying(argv):
    """(exit status, all that it said) of the command on this rank."""
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        status, stderr = command(argv)
    return status, stdout.getvalue() + stderr


def trained(config, out, *overrides):
    """(status, what was said) of the command on a forked rank, and the names of the checkpoints that it leaves."""
    argv = ["train", str(config), f"output_dir={out}", "trainer.checkpoint_every=2", *overrides]
    ((status, said),) = run_ranks(saying, 1, argv)
    return status, said, sorted(path.name for path in (out / "checkpoints").glob("iter_*"))


def test_a_run_that_blows_up_ends_with_the_last_good_checkpoint_its_latest(config, tmp_path):
    """The update of iteration 5 is the bad one, and a checkpoint is written right after it."""
    out = tmp_path / "out"
    stages = "stages=[{name: scm, steps: 5, losses: {scm: 100.0}}, {name: hot, steps: 20, losses: {scm: 100.0}, lr: {student: 1.0e25}}]"
    status, said, kept = trained(config, out, stages, "trainer.max_refused_updates=4", "trainer.keep_checkpoints=1")
    lines = records(out)
    assert status == 88 and said.count("DIVERGED: the last 4 updates") == 1 and "Traceback" not in said, said
    assert [line["updated"] for line in lines] == [True] * 6 + [False] * 4
    assert kept == ["iter_0000004", "iter_0000006.diverged"]
    assert (out / "checkpoints" / "latest").read_text() == "iter_0000004\n" and "iter_0000004" in said


def test_changes_that_have_a_meaning_are_taken_and_said(config, tmp_path):
    out = tmp_path / "out"
    assert trained(config, out, SCM)[0] == 0
    changed = [LONGER, "seed=4", "networks.student.ema=null"]
    status, said, _ = trained(config, out, *changed)
    assert status == 0, said
    assert "resuming at iteration 4" in said and "seed was 3 and is 4" in said and "ema=null: the average" in said
    appended = LONGER[:-1] + ", {name: rcm, steps: 4, losses: {scm: 100.0, dmd: 1.0}, student_update_freq: 2}]"
    status, said, _ = trained(config, out, appended, "seed=4")
    assert status == 0 and "fake_score is not in the checkpoint" in said and "ema is not in the checkpoint" in said, (
        said
    )
    lines = records(out)
    assert [line["iteration"] for line in lines] == list(range(10)) and all(line["updated"] for line in lines)


def test_another_architecture_is_refused_in_one_line_before_networks_are_built(config, tmp_path):
    out = tmp_path / "out"
    assert trained(config, out, SCM)[0] == 0
    status, said, _ = trained(config, out, LONGER, "model.ffn_hidden_size=64")
    assert status == 2 and "ffn_hidden_size=64, need 72" in said and "Traceback" not in said, said
    preflight = ["preflight", str(config), "--nodes", "a", f"output_dir={out}", LONGER, "model.ffn_hidden_size=64"]
    ((status, said),) = run_ranks(saying, 1, preflight)
    assert status == 2 and "ffn_hidden_size=64, need 72" in said and "Traceback" not in said, said


def test_begun_anew_once_the_run_goes_on_from_its_own_checkpoints(config, tmp_path):
    """The old run has come further; the new one is stopped, and started again by the same command."""
    out = tmp_path / "out"
    assert trained(config, out, LONGER)[0] == 0
    anew = [LONGER, "trainer.resume=false", "trainer.keep_checkpoints=1", "trainer.stop_after=2"]
    status, said, kept = trained(config, out, *anew)
    assert status == 0 and kept == ["iter_0000002"], said
    assert sorted(path.name for path in (out / "before_1" / "checkpoints").glob("iter_*")) == [
        "iter_0000004",
        "iter_0000006",
    ]
    status, said, kept = trained(config, out, *anew[:3])
    assert json.loads((out / "begun.json").read_text())["ended"]
    assert status == 0 and (out / "before_2").exists(), "another command: another beginning"
    assert kept[-1] == "iter_0000006" and "resuming" not in said
