"""`~` and `$NAME` in every path of a configuration and of a command line: expanded, or refused with a message."""

import argparse
import dataclasses
import pwd
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest

from rcm_megatron.config import ConfigError, RunConfig, load_config, to_yaml
from rcm_megatron.config.declare import FilePath
from rcm_megatron.paths import PathError, expanded, path_argument

CONFIG = Path(__file__).parents[2] / "model_configs" / "quickstart.yaml"


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/a b")
    monkeypatch.setenv("JOB", "17")
    monkeypatch.delenv("UNSET", raising=False)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("~/runs/a", "/home/me/runs/a"),
        ("~", "/home/me"),
        ("$SCRATCH/run_${JOB}b", "/scratch/a b/run_17b"),
        ("a/~/b$", "a/~/b$"),
        ("./~", "./~"),
        ("price $ 5", "price $ 5"),
        ("plain", "plain"),
    ],
)
def test_expansion(text, path):
    assert expanded(text) == path and path_argument(text) == Path(path)


def test_another_users_home():
    user = pwd.getpwuid(0)
    assert expanded(f"~{user.pw_name}/x") == f"{user.pw_dir.rstrip('/')}/x"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("$UNSET/a", "$UNSET is not set"),
        ("runs/${UNSET}", "$UNSET is not set"),
        ("~nobody_of_this_name/a", "~nobody_of_this_name"),
        ("", "need a path"),
        ("  ", "need a path"),
        ("a\0b", "code 0"),
        ("caf\udce9", "UTF-8"),
    ],
)
def test_refusals(text, named):
    with pytest.raises(PathError, match="need|write") as refused:
        expanded(text)
    assert named in str(refused.value)
    with pytest.raises(argparse.ArgumentTypeError):
        path_argument(text)


def test_settings_are_expanded_and_every_problem_is_named(tmp_path):
    run = load_config(CONFIG, ["output_dir=~/a", "data.folder=${SCRATCH}/d", "encoders.folder=$JOB", "name=$JOB"])
    assert (run.output_dir, run.data.folder, run.encoders.folder) == ("/home/me/a", "/scratch/a b/d", "17")
    assert run.name == "$JOB", "a name is no path"
    (tmp_path / "again.yaml").write_text(to_yaml(run))
    assert load_config(tmp_path / "again.yaml") == run
    with pytest.raises(ConfigError) as refused:
        load_config(CONFIG, ["output_dir=$UNSET/a", "data.folder=", "data.negative_embedding=$UNSET"])
    paths = [line.split(":")[0] for line in str(refused.value).splitlines()]
    assert sorted(paths) == ["data.folder", "data.negative_embedding", "output_dir"]


PATH_LIKE = ("folder", "output_dir", "init", "teacher", "path", "file", "negative_embedding")


def text_fields(cls, path=""):
    """(dotted path, declared type) of every field of a configuration that takes free text."""
    for name, hint in get_type_hints(cls, include_extras=True).items():
        options = [hint] if get_origin(hint) is Annotated else [hint, *get_args(hint)]
        for option in options:
            if dataclasses.is_dataclass(option):
                yield from text_fields(option, f"{path}{name}.")
        plain = [option for option in options if option is str or option == FilePath]
        if plain:
            yield f"{path}{name}", plain[0]


def test_every_setting_that_is_a_path_is_declared_as_one():
    found = dict(text_fields(RunConfig))
    assert len(found) >= 6, found
    wrong = [name for name, hint in found.items() if name.rsplit(".", 1)[-1] in PATH_LIKE and hint != FilePath]
    assert not wrong, wrong
