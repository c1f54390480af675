"""`build-dataset` as a function of a rank, killed or not."""

import contextlib
import io
import os
import random
import signal
import threading
from pathlib import Path

import pytest
from diffusers import AutoencoderKLWan  # noqa: F401  here, because ranks are forked with what this module imports
from transformers import CLIPVisionModel, UMT5EncoderModel  # noqa: F401

from rcm_megatron.cli.main import main
from tests.distributed.harness import RankError, run_ranks

INTERRUPTIONS = 5


def build(argv, victim=None, operation=None, seconds=0.0):
    """The command on this rank: (exit status, stderr, number of file operations).

    The rank `victim` kills itself with SIGKILL so many seconds (0: at once) after it comes to its so-manieth rename or deletion.
    """
    import torch.distributed as dist

    operations, stderr = [0], io.StringIO()
    limit = operation if dist.get_rank() == victim else None
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(stderr):
        for name in ("rename", "unlink"):
            patch.setattr(Path, name, _counted(getattr(Path, name), operations, limit, seconds))
        status = main(["build-dataset", *argv])
    return status, stderr.getvalue(), operations[0]


def _counted(function, operations, limit, seconds):
    def counted(*args, **kwargs):
        operations[0] += 1
        if operations[0] == limit and not seconds:
            os.kill(os.getpid(), signal.SIGKILL)
        elif operations[0] == limit:
            threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        return function(*args, **kwargs)

    return counted


def run(ranks, argv):
    results = run_ranks(build, ranks, argv)
    assert all(status == 0 for status, *_ in results), results
    return results


def interrupted(argv, *, seed, operations):
    """Build on two ranks, killed `INTERRUPTIONS` times: every other time before a file operation, else within the work after it."""
    generator = random.Random(seed)
    for kill in range(INTERRUPTIONS):
        moment = generator.randint(1, max(1, operations // 20))
        seconds = generator.uniform(0.001, 0.03) if kill % 2 else 0.0
        with pytest.raises(RankError, match=f"exit code {-signal.SIGKILL}"):
            run_ranks(build, 2, argv, generator.randrange(2), moment, seconds)
    assert not (Path(argv[-1])).exists()
    run(2, argv)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def assert_same(reference, folder):
    assert sorted(contents(reference)) == sorted(contents(folder))
    for name, data in contents(reference).items():
        assert contents(folder)[name] == data, f"{name} differs"
    assert not folder.with_name(f"{folder.name}.partial").exists()
