"""What people type and what YAML 1.1 makes of it: refused with what was typed and what to write, never a silent other value."""

import shlex

import pytest
import yaml

from rcm_megatron.config import ConfigError, apply_overrides, load_config
from rcm_megatron.config.yaml_text import Dumper, parse, parse_override
from tests.unit.test_paths import CONFIG


def refusal(*overrides):
    with pytest.raises(ConfigError) as refused:
        load_config(CONFIG, overrides)
    return str(refused.value)


@pytest.mark.parametrize(
    "typed",
    ["008", "017", "0x1F", "5_000", "23:59", "1.50", "2e4", "Yes", "off", "TRUE", "+3", "-0.0", ".5", "3", "1:30.5"],
)
def test_text_that_yaml_reads_as_something_else_and_the_advice_works(tmp_path, typed):
    """The advice for a command line is run through a shell's quoting; that for a file is put into a file."""
    text = refusal(f"name={typed}")
    assert f"got {typed} (" in text.replace("got True", f"got {typed}"), text
    (word,) = shlex.split(text.split("for the shell: ")[1])
    assert load_config(CONFIG, [word]).name == typed
    base = CONFIG.read_text()
    (tmp_path / "a.yaml").write_text(base.replace("name: quickstart", f"name: {typed}", 1))
    with pytest.raises(ConfigError) as refused:
        load_config(tmp_path / "a.yaml")
    advice = str(refused.value).split("put it in quotes: ")[1]
    (tmp_path / "a.yaml").write_text(base.replace("name: quickstart", f"name: {advice}", 1))
    assert load_config(tmp_path / "a.yaml").name == typed


@pytest.mark.parametrize(
    ("override", "write"),
    [
        ("seed=0012", "write 12"),
        ("seed=08", "write 8"),
        ("trainer.log_every='12'", "write 12"),
        ("trainer.stop_after=010", "write 10"),
        ("sampling.student_steps=[1, 02]", "write 2"),
        ("trainer.checkpoint_every=2e1", "write 20"),
        ("trainer.resume='off'", "write false"),
        ("trainer.hang_timeout='1_800.5'", "write 1800.5"),
        ("seed=1:00", "got 1:00 (in YAML 60"),
    ],
)
def test_numbers_and_truth_values(override, write):
    assert write in refusal(override)


def test_what_is_plain_in_either_way_is_taken():
    run = load_config(CONFIG, ["seed=4_000", "trainer.resume=no", "name=2026-11-30", "trainer.hang_timeout=1e3"])
    assert (run.seed, run.trainer.resume, run.name, run.trainer.hang_timeout) == (4000, False, "2026-11-30", 1000.0)
    assert type(run.seed) is int and type(run.trainer.resume) is bool and type(run.trainer.hang_timeout) is float


@pytest.mark.parametrize(
    "value", ["scm: 1 # one", "a: {b: 2} # x", "5 # five", "# all of it", "#", "[1, 2] #", "null # none", "'a' # b"]
)
def test_a_comment_in_an_override_is_refused(value):
    with pytest.raises(ConfigError, match="which YAML reads as a comment"):
        apply_overrides({}, [f"a={value}"])


@pytest.mark.parametrize("value", ["watermark #2, text", "blurry,  logo # 1", "a #"])
def test_text_with_a_hash_sign_is_text(value):
    """The shell has taken comments out already."""
    assert parse_override(value) == value


@pytest.mark.parametrize("value", ["a#b", "'x # y'", '"# z"', "[a, 'b # c']", "", "{a: 1}"])
def test_what_only_looks_like_one_is_not(value):
    assert parse_override(value) == yaml.safe_load(value)


@pytest.mark.parametrize(
    "text", ["1e3", "007", "1_000", "12:30", "no", "1.10", "~", "null", "2026-11-30", "a # b", "1e-6"]
)
def test_text_survives_being_written_and_read(text):
    assert parse(yaml.dump({"a": text}, Dumper=Dumper)) == {"a": text}
