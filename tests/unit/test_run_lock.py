"""Two runs never share an output folder."""

import errno
import fcntl
import threading
import time

import pytest

from rcm_megatron.errors import InputError
from rcm_megatron.runtime.run_lock import LOCK_FILE, run_lock


def test_a_second_run_is_refused_and_told_who_holds_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    refused = pytest.raises(InputError, match=r"in which SLURM job 4711 \(process \d+ of .*is training")
    with run_lock(tmp_path), refused, run_lock(tmp_path, patience=0.2):
        pass
    with run_lock(tmp_path, patience=0.2):
        pass


def test_it_waits_for_the_run_before_to_end(tmp_path):
    before = run_lock(tmp_path)
    before.__enter__()
    timer = threading.Timer(0.3, before.__exit__, (None, None, None))
    start = time.monotonic()
    timer.start()
    with run_lock(tmp_path, patience=20):
        assert time.monotonic() - start >= 0.3
    timer.join()


def test_a_run_that_fails_leaves_no_lock(tmp_path):
    with pytest.raises(ZeroDivisionError), run_lock(tmp_path):
        raise ZeroDivisionError
    with run_lock(tmp_path, patience=0):
        assert (tmp_path / LOCK_FILE).read_text().startswith("process ")


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with run_lock(tmp_path):
        assert "run.lock cannot be locked (No locks available)" in caplog.text
