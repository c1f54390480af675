"""What a run reports: records that only rise over kills and resumes, and Weights & Biases, which may fail without ending the run."""

import dataclasses
import json
import resource
import signal

import pytest
import wandb

from rcm_megatron.config import ConfigError, RunConfig, build
from rcm_megatron.training import metrics
from rcm_megatron.training.metrics import MetricLogger, read_records
from tests.distributed.tiny_run import tiny_config

RECORD = {"stage": "rcm", "trained": "student", "scm/loss": 1.5}


class FakeRun:
    """What wandb.init returns."""

    def __init__(self):
        self.logged, self.error, self.finished = [], None, False

    def log(self, record, step):
        if self.error is not None:
            raise self.error
        self.logged.append((step, record))

    def finish(self):
        self.finished = True


class FakeWandb:
    """Notes how it was started; refuses the modes in `refused`, and, as the real service does after a failure, an id that it holds."""

    def __init__(self):
        self.starts, self.refused, self.run, self.held = [], (), FakeRun(), set()

    def teardown(self):
        self.held.clear()

    def init(self, **options):
        self.starts.append(options)
        if options["id"] in self.held:
            raise RuntimeError(f"run ID {options['id']} is in use")
        self.held |= {options["id"]} if options["mode"] in self.refused else set()
        if options["mode"] in self.refused:
            raise wandb.errors.CommError("no network")
        return self.run


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setattr(metrics.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(wandb, "init", fake.init)
    monkeypatch.setattr(wandb, "teardown", fake.teardown)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/nowhere")
    return fake


def logger(folder, *, start=0, mode="disabled"):
    run = build(RunConfig, tiny_config(folder))
    run = dataclasses.replace(run, logging=dataclasses.replace(run.logging, wandb_mode=mode))
    return MetricLogger(run, start=start, total=20)


def write(folder, iterations, *, start=0):
    log = logger(folder, start=start)
    for iteration in iterations:
        log.log(iteration, RECORD)
    log.close()


def test_a_killed_run_that_resumes_leaves_each_iteration_once(tmp_path):
    """Killed at 7 in the middle of a line, with its checkpoint at 4; killed again before a record; resumed."""
    path = tmp_path / "out" / "metrics.jsonl"
    write(tmp_path, range(7))
    with path.open("a") as file:
        file.write('{"iteration": 7, "stage": "rc')
    assert [record["iteration"] for record in read_records(path)] == list(range(7)), "a torn line is no record"
    write(tmp_path, [], start=4)
    write(tmp_path, range(4, 9), start=4)
    assert [(r["iteration"], r["restarts"]) for r in read_records(path)] == [
        *((i, 0) for i in range(4)),
        *((i, 1) for i in range(4, 9)),
    ]
    write(tmp_path, [9], start=9)
    assert read_records(path)[-1] == {"iteration": 9, "restarts": 2, **RECORD}


def test_a_run_from_the_start_forgets_the_records_of_the_one_before(tmp_path):
    write(tmp_path, range(3))
    write(tmp_path, range(2))
    assert [(r["iteration"], r["restarts"]) for r in read_records(tmp_path / "out" / "metrics.jsonl")] == [
        (0, 0),
        (1, 0),
    ]


def test_wandb_gets_the_record_of_the_file(tmp_path, fake):
    log = logger(tmp_path, mode="offline")
    log.log(0, RECORD)
    log.close()
    (record,) = read_records(tmp_path / "out" / "metrics.jsonl")
    ((step, logged),) = fake.run.logged
    assert {"iteration": step, **logged} == record and fake.run.finished
    (start,) = fake.starts
    assert (
        start["mode"] == "offline"
        and start["resume"] == "allow"
        and start["config"]["trainer"]["global_batch_size"] == 4
    )
    json.dumps(start["config"])


@pytest.mark.parametrize("found", [None, "", "\n"])
def test_the_run_id_is_on_disk_before_wandb_starts_and_stays(tmp_path, fake, found):
    """An empty file is what a machine that lost its power leaves."""
    identity = tmp_path / "out" / "wandb_run_id"
    if found is not None:
        identity.parent.mkdir()
        identity.write_text(found)
    fake.refused = ("online",)
    with pytest.raises(wandb.Error):
        logger(tmp_path, mode="online")
    assert len(identity.read_text().strip()) == 8
    fake.refused, fake.held = (), set()
    for _ in range(2):
        logger(tmp_path, mode="online").close()
    assert {start["id"] for start in fake.starts} == {identity.read_text().strip()}


def test_without_a_network_auto_works_offline_and_says_so(tmp_path, fake, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    fake.refused = ("online",)
    logger(tmp_path, mode="auto").close()
    assert [start["mode"] for start in fake.starts] == ["online", "offline"]
    assert "works offline: no network" in caplog.text and "wandb sync" in caplog.text


def test_auto_is_offline_without_a_key(tmp_path, fake):
    logger(tmp_path, mode="auto").close()
    assert [start["mode"] for start in fake.starts] == ["offline"]


@pytest.mark.parametrize(
    ("configured", "variable", "modes"),
    [
        ("auto", "dryrun", ["offline"]),
        ("auto", "Disabled", []),
        ("auto", "run", ["online"]),
        ("auto", "", ["online"]),
        ("online", "offline", ["offline"]),
        ("online", "disabled", []),
        ("offline", "online", ["offline"]),
        ("disabled", "online", []),
    ],
)
def test_wandb_mode_of_the_environment_is_obeyed(tmp_path, fake, monkeypatch, configured, variable, modes):
    """With a key, which alone would mean online."""
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_MODE", variable)
    logger(tmp_path, mode=configured).close()
    assert [start["mode"] for start in fake.starts] == modes


def test_a_wandb_mode_that_there_is_not_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "of")
    with pytest.raises(ConfigError, match="got WANDB_MODE=of; need one of online"):
        logger(tmp_path, mode="auto")


@pytest.mark.parametrize(
    ("text", "server", "mode"),
    [
        ("machine api.wandb.ai\n  login user\n  password secret\n", None, "online"),
        ("machine github.com login me password token\n", None, "offline"),
        ("machine wandb.site.org:8080 login user password secret", "http://wandb.site.org:8080", "online"),
        ("machine api.wandb.ai login user password secret", "https://wandb.site.org", "offline"),
        ("machine api.wandb.ai login user password ''\n\x00 {", None, "offline"),
    ],
)
@pytest.mark.parametrize("place", ["NETRC", ".netrc", "_netrc"])
def test_a_login_counts_as_a_key(tmp_path, fake, monkeypatch, text, server, mode, place):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC")
    if server:
        monkeypatch.setenv("WANDB_BASE_URL", server)
    file = tmp_path / (place if place != "NETRC" else "elsewhere")
    file.write_text(text)
    file.chmod(0o600)
    if place == "NETRC":
        monkeypatch.setenv("NETRC", str(file))
    logger(tmp_path, mode="auto").close()
    assert [start["mode"] for start in fake.starts] == [mode]


def test_an_error_of_wandb_does_not_end_the_run(tmp_path, fake, capsys):
    log = logger(tmp_path, mode="offline")
    fake.run.error = BrokenPipeError("service ended")
    for iteration in range(2):
        log.log(iteration, RECORD)
    log.close()
    assert len(read_records(tmp_path / "out" / "metrics.jsonl")) == 2 and not fake.run.finished
    assert capsys.readouterr().out.count("Weights & Biases stopped (BrokenPipeError: service ended)") == 1


def test_a_full_disk_does_not_end_the_run_and_loses_no_record(tmp_path, capsys):
    """Two sizes of RLIMIT_FSIZE are the disk: while it is full, records wait; SIGXFSZ would kill a process that has not ignored it."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    written = logger(tmp_path)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        for iteration in range(3):
            written.log(iteration, RECORD)
        assert "could not be written" in capsys.readouterr().out
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    written.log(3, RECORD)
    written.close()
    assert [record["iteration"] for record in read_records(tmp_path / "out" / "metrics.jsonl")] == [0, 1, 2, 3]


def test_videos_carry_their_captions(tmp_path, fake):
    (tmp_path / "a.mp4").write_bytes(b"film")
    log = logger(tmp_path, mode="offline")
    log.log_videos(3, {"previews/ema_4_steps/0": (tmp_path / "a.mp4", "seven moving left")})
    log.log_videos(4, {})
    log.close()
    ((step, shown),) = fake.run.logged
    assert step == 3 and shown["previews/ema_4_steps/0"]._caption == "seven moving left"


def test_other_ranks_write_nothing(tmp_path, monkeypatch, fake):
    monkeypatch.setattr(metrics.dist, "get_rank", lambda: 1)
    log = logger(tmp_path, mode="offline")
    log.log(0, RECORD)
    log.log_videos(0, {"previews/student_1_steps/0": (tmp_path / "a.mp4", "a")})
    log.close()
    assert not (tmp_path / "out").exists() and not fake.starts
