"""Lines of a sweep: read as a shell and YAML mean them, or refused before anything is submitted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rcm_megatron.cluster.sweep import read_sweep, split_line
from rcm_megatron.config import ConfigError, load_config

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "model_configs" / "quickstart.yaml"
VARIABLES = {"SCRATCH": "/scratch/a b", "NAME": 'the "best" one', "HOME": "/home/me"}


def bash_words(line):
    """The oracle: what bash makes of the line."""
    script = f"set -f; words() {{ printf '%s\\0' \"$@\"; }}; words {line}\n"
    done = subprocess.run(["bash", "-c", script], env=VARIABLES, capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize(
    "line",
    [
        "seed=1 output_dir=runs/a",
        "\tseed=1   output_dir='runs/with space'\t",
        "name=\"it's\" encoders.negative_prompt='say \"no\"' # a comment with 'a quote",
        "name=run#2 output_dir=runs/#3 #4",
        r"name=a\ b output_dir=runs/back\\slash encoders.negative_prompt=\"quoted\"",
        'output_dir="${SCRATCH}/x" name="$NAME" encoders.negative_prompt=\'$NAME\' seed=\\$1',
        "name='a'\"b\"c",
        "sampling.student_times='[1.5, 1.4]'",
        'name="a|b;c&d>e" seed=1',
        "name='`date` $(date)'",
    ],
)
def test_words_are_those_of_bash(line):
    assert split_line(line, VARIABLES) == bash_words(line)


def test_a_variable_is_one_word_as_where_a_shell_assigns():
    assert split_line("output_dir=$SCRATCH/x", VARIABLES) == ["output_dir=/scratch/a b/x"]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("sampling.student_times=[1.5, 1.4, 1.0]", "'1.4,'"),
        ("name='never closed seed=1", "quot"),
        ("name=$(date)", "$"),
        ('name="`date`"', "`"),
        ("seed=1; rm -rf x", "';'"),
        ("seed=1 > log", "'>'"),
        ("name=$UNSET", "$UNSET"),
        ("--array=3 seed=1", "'--array=3'"),
        ("seed=1 \\", "escape"),
    ],
)
def test_what_only_a_shell_could_do_is_refused(line, named):
    with pytest.raises(ConfigError, match="fix: ") as refused:
        split_line(line, VARIABLES)
    assert named in str(refused.value)


def sweep(tmp_path, text, *overrides):
    (tmp_path / "lines.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_sweep(tmp_path / "lines.txt", CONFIG, overrides)


def test_each_line_of_the_copy_gives_its_values_when_split_at_white_space(tmp_path):
    """As train.sbatch splits it; words with spaces, quotes and other scripts, one with a list, one of two lines of Windows."""
    text = (
        b"\xef\xbb\xbf# learning rates\r\noutput_dir=runs/a encoders.negative_prompt='blurry,  \"low\" quality \\\\ \xc3\xa9'  # first\r\n"
        b"\r\n   output_dir='runs/b c' 'sampling.student_times=[1.5, 1.25, 1.0]' seed=7\r\n"
    )
    first, second = sweep(tmp_path, text)
    run = load_config(CONFIG, first.split())
    assert (run.output_dir, run.encoders.negative_prompt) == ("runs/a", 'blurry,  "low" quality \\\\ é')
    run = load_config(CONFIG, second.split())
    assert (run.output_dir, run.sampling.student_times, run.seed) == ("runs/b c", (1.5, 1.25, 1.0), 7)


@pytest.mark.parametrize(
    "folders",
    [
        ("runs/a", "runs/a/"),
        ("runs/a", "./runs//a"),
        ("runs/a", "runs/b/../a"),
        ("runs/link", "runs/real"),
        (None, None),
    ],
)
def test_two_spellings_of_one_folder_are_one(tmp_path, monkeypatch, folders):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "real").mkdir(parents=True)
    (tmp_path / "runs" / "link").symlink_to("real")
    lines = [f"seed={i}" + (f" output_dir={folder}" if folder else "") for i, folder in enumerate(folders)]
    with pytest.raises(ConfigError, match=r"line 2: output_dir \S+ is also that of line 1"):
        sweep(tmp_path, "\n".join(lines))


def test_every_line_that_cannot_run_is_named(tmp_path):
    with pytest.raises(ConfigError) as refused:
        sweep(
            tmp_path,
            "output_dir=a trainer.lr=1\n# fine\noutput_dir=b\noutput_dir=c seed=x\noutput_dir=d parallel.tp=3\n",
        )
    lines = [line for line in str(refused.value).splitlines() if "line " in line]
    assert [line.split("line ")[1][0] for line in lines] == ["1", "4", "5"]
    with pytest.raises(ConfigError, match="got no lines"):
        sweep(tmp_path, "# nothing\n\n")
    with pytest.raises(ConfigError, match="UTF-8"):
        sweep(tmp_path, "output_dir=a".encode("utf-16"))


def submit(tmp_path, text, umask="022"):
    """sweep.sh in a copy of what it needs, with a stand-in for sbatch that prints the file of lines it was given."""
    for part in ("launch", "rcm_megatron", "model_configs"):
        (tmp_path / "repo").mkdir(exist_ok=True)
        (tmp_path / "repo" / part).symlink_to(ROOT / part)
    (tmp_path / "sbatch").write_text('#!/bin/bash\nstat -c %a "$SWEEP"; cat "$SWEEP"; printf "%s\\n" "$@"\n')
    (tmp_path / "sbatch").chmod(0o755)
    (tmp_path / "lines.txt").write_text(text)
    environment = os.environ | {"PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    arguments = f"{tmp_path}/lines.txt --nodes=1 --array-limit=2 -- model_configs/quickstart.yaml trainer.log_every=5"
    script = f"umask {umask}; cd {tmp_path}/repo && cp -r launch/. ../launched && rm launch && mv ../launched launch"
    script += f" && bash launch/slurm/sweep.sh {arguments}"
    return subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)


def test_the_script_submits_checked_lines_readable_by_the_umask(tmp_path):
    done = submit(tmp_path, "seed=1 output_dir=a # one\n\nseed=2 'output_dir=b c'\n", umask="027")
    assert done.returncode == 0, done.stderr
    mode, *rest = done.stdout.splitlines()
    assert mode == "640" and rest[:2] == ["seed=1 output_dir=a", 'seed=2 output_dir="b\\u0020c"']
    assert "--array=1-2%2" in rest and rest[-2:] == ["model_configs/quickstart.yaml", "trainer.log_every=5"]


def test_the_script_refuses_before_it_submits(tmp_path):
    done = submit(tmp_path, "seed=1 output_dir=a\nseed=2 output_dir=a/\n")
    assert done.returncode == 2 and not done.stdout and "is also that of line 1" in done.stderr
    assert not (tmp_path / "repo" / "runs").exists()
