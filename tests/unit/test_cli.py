"""The command line: what is refused and how fast, options derived from request dataclasses, one message and status for each error."""

import os
import re
import resource
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest

from rcm_megatron import requests
from rcm_megatron.cli import commands
from rcm_megatron.cli.main import main, report
from rcm_megatron.cli.options import add_options, field_docstrings, to_request
from rcm_megatron.config import ConfigError, load_config
from rcm_megatron.errors import InputError, UserError
from rcm_megatron.requests import ConformanceRequest, ConvertRequest, Option, SampleRequest, VideosRequest

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "model_configs" / "quickstart.yaml"


def run_cli(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", "-m", "rcm_megatron", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | (environment or {}), capture_output=True, text=True)


def test_cli_reports_one_clean_message_and_imports_no_torch():
    result = run_cli("check", str(QUICKSTART), "parallel.tp=8", "parallel.ring=1", "--world-size", "8")
    assert result.returncode == 2
    assert "num_heads=4 must divide by parallel.tp=8" in result.stderr
    assert "Traceback" not in result.stderr
    assert "| torch" not in result.stderr


REFUSED_AT_ONCE = {
    "more_pieces_than_layers": (["parallel.ring=1", "parallel.pp=4", "parallel.vpp=4"], 4, "num_layers=4 cannot give"),
    "heads": (["parallel.tp=8", "parallel.ring=1"], 8, "num_heads=4 must divide by parallel.tp=8"),
    "world": (["parallel.pp=2"], 3, "processes: got 3, need a multiple of"),
    "rounds": (["parallel.pp=4", "parallel.vpp=1", "parallel.chunk_layers=[1, 1, 2]"], 8, "must hold 4 counts"),
}


@pytest.mark.parametrize("command", ["check", "train", "sample", "export"])
@pytest.mark.parametrize("name", REFUSED_AT_ONCE)
def test_cli_refuses_an_illegal_layout_in_less_than_a_second(name, command, tmp_path):
    """CPU time of the whole process, for others may use the machine; no torch, so no weight is read."""
    overrides, world_size, message = REFUSED_AT_ONCE[name]
    arguments = [command, str(QUICKSTART), *overrides, f"networks.teacher.init={tmp_path}/absent"]
    arguments += {"check": ["--world-size", str(world_size)], "train": []}.get(command, ["--output", f"{tmp_path}/out"])
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = run_cli(*arguments, environment={"WORLD_SIZE": str(world_size)})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 2 and message in result.stderr, result.stderr[-2000:]
    assert "Traceback" not in result.stderr and "| torch" not in result.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_cli_check_prints_the_complete_configuration(tmp_path):
    result = run_cli("check", str(QUICKSTART), "--world-size", "2")
    assert result.returncode == 0
    (tmp_path / "printed.yaml").write_text(result.stdout)
    assert load_config(tmp_path / "printed.yaml") == load_config(QUICKSTART)


def test_cli_takes_overrides_after_options_and_refuses_what_is_none():
    result = run_cli("check", str(QUICKSTART), "--world-size", "4", "parallel.ring=4")
    assert result.stdout.startswith("# 4 processes: tp=1 cp=4 pp=1 vpp=1 dp=1")
    result = run_cli("check", str(QUICKSTART), "--world-size", "4", "--bogus")
    assert result.returncode == 2
    assert "unrecognized arguments: --bogus" in result.stderr


FOUR = ["trainer.log_evry=2", "data.prefetch=abc", "model.num_heads=3", "sampling.fps=-1"]


def test_cli_names_every_mistake_with_path_got_and_need():
    result = run_cli("check", str(QUICKSTART), "--world-size", "1", *FOUR)
    assert result.returncode == 2
    for message in (
        "trainer.log_evry: unknown key; did you mean trainer.log_every?",
        "data.prefetch: got 'abc' (text), need an integer greater than 0",
        "model.hidden_size=128 must divide by model.num_heads=3",
        "sampling.fps: got -1, need an integer greater than 0",
    ):
        assert message in result.stderr, result.stderr[-2000:]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        *(
            [*name.split(), "--help"]
            for name in ("train", "convert", "build-dataset", "build-dataset videos", "evaluate samplers")
        ),
    ],
    ids=" ".join,
)
def test_help_takes_less_than_a_second_and_no_torch(arguments):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = run_cli(*arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0 and "usage: python -m rcm_megatron" in result.stdout
    assert "| torch" not in result.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_the_console_script_is_this_command_line():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["rcm"].partition(":")
    assert getattr(sys.modules[module], name) is main


@pytest.fixture
def asked(monkeypatch):
    """Requests (and configurations) that commands were run with; nothing else happens."""
    seen = []

    def record(command):
        if isinstance(command, dict):
            return {name: record(inner) for name, inner in command.items()}
        return commands.Command(command.request, lambda *given: seen.append(given), command.load)

    monkeypatch.setattr("rcm_megatron.cli.main.COMMANDS", {name: record(c) for name, c in commands.COMMANDS.items()})
    return seen


def test_every_option_of_sample(asked):
    line = "sample YAML trainer.seed_unused=1 --weights teacher --steps 3 --prompt one --prompt two --prompts p.txt"
    line += " --embedding a.pt --embedding b.pt --image i.png --image-latent l.pt --image-embed e.pt"
    line += " --conditional-latent c.pt --conditional-frames 2 --copies 4 --checkpoint ck --output out parallel.tp=1"
    words = line.replace("YAML trainer.seed_unused=1", f"{QUICKSTART} seed=7").split()
    assert main(words) == 0
    ((run, request),) = asked
    assert (run.seed, run.parallel.tp) == (7, 1)
    assert request == SampleRequest(
        weights="teacher",
        steps=3,
        prompts=("one", "two"),
        prompts_file=Path("p.txt"),
        embeddings=(Path("a.pt"), Path("b.pt")),
        image=Path("i.png"),
        image_latent=Path("l.pt"),
        image_embed=Path("e.pt"),
        conditional_latent=Path("c.pt"),
        conditional_frames=2,
        copies=4,
        checkpoint=Path("ck"),
        output=Path("out"),
    )
    main(["sample", str(QUICKSTART), "--output", "out"])
    assert asked[1][1] == SampleRequest(output=Path("out"))


def test_sizes_scales_and_formats_of_convert(asked):
    line = "convert a b --to wan --max-shard-size 1.5GB --rope-scale 1 2 2.5 --verify --force"
    main(line.split())
    expected = ConvertRequest(
        source="a",
        target="b",
        to="wan",
        max_shard_size=1_500_000_000,
        rope_scale=(1.0, 2.0, 2.5),
        verify=True,
        force=True,
    )
    assert asked == [(expected,)]
    for size, number in (("5GB", 5 * 10**9), ("20kB", 20_000), ("500mb", 5 * 10**8), ("77", 77)):
        assert requests.parse_bytes(size) == number


def test_a_dataset_is_built_on_as_many_ranks_as_there_are(asked, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    words = ["--videos", "clips", "--output", "data", "--size", "48x83", "--on-error", "raise"]
    assert main(["build-dataset", "videos", str(QUICKSTART), *words, "seed=3"]) == 0
    ((run, request),) = asked
    assert request == VideosRequest(videos=Path("clips"), output=Path("data"), size=(48, 83), on_error="raise")
    assert run.seed == 3 and run.parallel.model_parallel_size == 1
    assert run.trainer.global_batch_size == 6 * run.trainer.micro_batch_size


def test_degrees_may_stand_around_the_options_of_conformance(asked):
    main(["conformance", "f.safetensors", "tp=2", "--case", "scm", "--case", "dmd", "ring=2"])
    assert asked == [(ConformanceRequest(file=Path("f.safetensors"), layout=("tp=2", "ring=2"), cases=("scm", "dmd")),)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("convert a b --to wann", "argument --to: invalid choice: 'wann'"),
        ("convert a b", "the following arguments are required: --to"),
        ("convert a b --to wan --max-shard-size huge", "got 'huge'; need a size such as 5GB"),
        ("convert a b --to wan x=1", "unrecognized arguments: x=1"),
        ("build-dataset videos c.yaml --videos v --output o --size 48", "got '48', need HxW, e.g. 480x832"),
        ("plot", "the following arguments are required: RUN_FOLDER"),
        ("sample c.yaml --output o --steps few", "argument --steps: invalid int value: 'few'"),
    ],
)
def test_a_wrong_option_is_named_with_status_2(line, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_paths_of_options_are_expanded(asked, monkeypatch):
    monkeypatch.setenv("SHARDS", "/data/shards")
    main(["inspect-dataset", "$SHARDS/wan", "--output=~/sheet.png"])
    (request,) = asked[0]
    assert (request.folder, request.output) == (Path("/data/shards/wan"), Path.home() / "sheet.png")


@dataclass(frozen=True, kw_only=True)
class Toy:
    """A request."""

    name: Annotated[str, Option(positional=True)]
    """of it"""
    more: Annotated[Sequence[int], Option(positional=True)] = ()
    often: Sequence[float] = ()
    kind: Literal["a", "b"] = "a"
    """which, 100% of them"""
    deep: bool = False


def test_options_follow_from_types_and_docstrings():
    import argparse

    parser = argparse.ArgumentParser()
    add_options(parser, Toy)
    parsed = to_request(
        Toy, parser.parse_args(["x", "1", "2", "--often", "0.5", "--often", "2", "--kind", "b", "--deep"])
    )
    assert parsed == Toy(name="x", more=(1, 2), often=(0.5, 2.0), kind="b", deep=True)
    assert to_request(Toy, parser.parse_args(["x"])) == Toy(name="x")
    assert "which, 100% of them; default: a" in parser.format_help()


def test_every_option_says_what_it_is():
    """But for those whose name says it."""
    for command in commands.COMMANDS.values():
        for leaf in command.values() if isinstance(command, dict) else [command]:
            silent = set(leaf.request.__dataclass_fields__) - field_docstrings(leaf.request).keys()
            assert silent <= {"samples_per_shard", "member_format", "samples_per_prompt", "seed"}, leaf.request


class Torn(UserError):
    status = 9


@pytest.mark.parametrize(
    ("error", "rank", "names_rank", "status", "said"),
    [
        (Torn("a file"), "3", True, 9, "rcm x: rank 3: a file"),
        (Torn("a file"), "0", False, 9, "rcm x: a file"),
        (InputError("a word"), "1", True, 1, "rcm x: rank 1: a word"),
        (ConfigError("a key"), "0", True, 2, "rcm x: a key"),
        (ConfigError("a key"), "1", True, 2, ""),
    ],
)
def test_an_error_is_one_message_and_a_status(error, rank, names_rank, status, said, capsys, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    assert report(error, "rcm x", names_rank=names_rank) == status
    assert capsys.readouterr().err.strip() == said


def test_what_a_user_can_cause_has_one_base_class():
    """Every exception class of the package is a UserError, but for the engine's own signal."""
    for path in (ROOT / "rcm_megatron").rglob("*.py"):
        for name, bases in re.findall(r"^class (\w+)\((.*)\):", path.read_text(), flags=re.M):
            if re.search(r"\b(Exception|\w*Error)\b", bases) and (path.name, name) != ("declare.py", "Refused"):
                first = bases.split(",")[0]
                assert first == "Exception" if name == "UserError" else re.fullmatch(r"\w+Error", first), (path, name)
                assert first not in ("ValueError", "RuntimeError", "OSError"), (path, name)
