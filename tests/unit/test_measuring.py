"""Sizes that make no network end a benchmark with one line, before it starts ranks."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools.measuring import check_sizes

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("hidden", "tokens", "message"),
    [
        (64, 256, "got --hidden 64; need a multiple of --head-dim 128; fix: --hidden 128"),
        (300, 256, "got --hidden 300; need a multiple of --head-dim 128; fix: --hidden 256"),
        (0, 256, "got --hidden 0; need a multiple of --head-dim 128; fix: --hidden 128"),
        (256, 100, "got --tokens 100; need whole latent frames of 256; fix: --tokens 256"),
        (256, 700, "got --tokens 700; need whole latent frames of 256; fix: --tokens 768"),
    ],
)
def test_sizes_that_do_not_divide(hidden, tokens, message):
    with pytest.raises(SystemExit) as ended:
        check_sizes(hidden=hidden, head_dim=128, tokens=tokens)
    assert str(ended.value) == message


def test_sizes_that_do():
    check_sizes(hidden=256, head_dim=128, tokens=512)


def test_the_memory_benchmark_says_so_instead_of_starting_ranks():
    command = [sys.executable, "tools/benchmark_memory.py", "--hidden", "64"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert (
        done.stderr.strip().splitlines()[-1] == "got --hidden 64; need a multiple of --head-dim 128; fix: --hidden 128"
    )
