"""`trainer.resume=false` begins anew once: by whom a start was made, and what is set aside."""

import dataclasses

import pytest

from rcm_megatron.checkpoint.resuming import begin_anew, begins_anew, mark_ended
from rcm_megatron.config import RunConfig, build
from tests.distributed.tiny_run import tiny_config

LAUNCH = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")


@pytest.fixture
def run(tmp_path, monkeypatch):
    for name in LAUNCH:
        monkeypatch.delenv(name, raising=False)
    run = build(RunConfig, tiny_config(tmp_path))
    return dataclasses.replace(run, trainer=dataclasses.replace(run.trainer, resume=False))


def launched(monkeypatch, **variables):
    for name in LAUNCH:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_what_was_there_is_set_aside_each_time_and_nothing_of_it_is_left(tmp_path, run):
    out = tmp_path / "out"
    for number in (1, 2):
        (out / "checkpoints" / f"iter_000002{number}").mkdir(parents=True)
        (out / "metrics.jsonl").write_text("old")
        assert begins_anew(run)
        begin_anew(run)
        assert sorted(path.name for path in out.iterdir()) == sorted(
            ["begun.json", *(f"before_{n}" for n in range(1, number + 1))]
        )
        assert (out / f"before_{number}" / "checkpoints" / f"iter_000002{number}").is_dir()
        assert not begins_anew(run)
        mark_ended(run)


def test_the_same_command_goes_on_until_the_run_has_ended(run):
    begin_anew(run)
    assert not begins_anew(run)
    assert begins_anew(dataclasses.replace(run, seed=5)), "another run"
    mark_ended(run)
    assert begins_anew(run)
    assert not begins_anew(dataclasses.replace(run, trainer=dataclasses.replace(run.trainer, resume=True)))


@pytest.mark.parametrize("kind", ["SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"])
def test_a_requeue_and_a_restart_go_on_even_with_other_settings(run, monkeypatch, kind):
    restarts = kind.split("_")[0] + "_RESTART_COUNT"
    launched(monkeypatch, **{kind: "7", restarts: "0"})
    begin_anew(run)
    launched(monkeypatch, **{kind: "7", restarts: "2"})
    assert not begins_anew(dataclasses.replace(run, seed=5)), "the file was edited while the job waited"


def test_another_job_begins_anew(run, monkeypatch):
    """Also one that was requeued before it came to mark its folder: the mark there is the old run's."""
    launched(monkeypatch, SLURM_JOB_ID="7")
    begin_anew(run)
    launched(monkeypatch, SLURM_JOB_ID="8", SLURM_RESTART_COUNT="1")
    assert begins_anew(run)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"launch": 1}'])
def test_a_mark_that_says_nothing_is_none(tmp_path, run, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "begun.json").write_text(text)
    assert begins_anew(run)
