"""Advice of the configuration's rules is followed, value by value: the problem must go, and nothing else may come of it."""

import re
from collections import Counter
from pathlib import Path

import pytest

from rcm_megatron.config import ConfigError, load_config

QUICKSTART = Path(__file__).parents[2] / "model_configs" / "quickstart.yaml"
LIST = r"\[[^\]]*\]|[\w.]+"
CHANGE = re.compile(rf"set ([\w.]+) to ((?:{LIST})(?:, (?:{LIST}))*(?: or (?:{LIST}))?)(?=$|, or|;)")
PROCESSES = re.compile(r"start (\d+)(?: or (\d+))? processes")


def problems(overrides: list[str], world_size: int) -> list[str]:
    try:
        load_config(QUICKSTART, overrides, world_size=world_size)
    except ConfigError as error:
        return str(error).splitlines()
    return []


def paths(found: list[str]) -> Counter[str]:
    return Counter(re.split("[=: ]", problem)[0] for problem in found)


def advice(problem: str) -> list[tuple[str, str]]:
    """(path, value) of every change that the message names."""
    changes = [
        (path, value) for path, values in CHANGE.findall(problem) for value in re.findall(LIST, values) if value != "or"
    ]
    return changes + [("processes", number) for pair in PROCESSES.findall(problem) for number in pair if number]


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [
        (["model.hidden_size=129"], 2),
        (["model.hidden_size=129", "model.num_heads=3"], 2),
        (["model.num_heads=3"], 1),
        (["model.hidden_size=190", "model.num_heads=6"], 2),
        (["model.hidden_size=24", "model.num_heads=12"], 2),
        (["model.freq_dim=255"], 2),
        (["latent.width=18"], 2),
        (["latent.width=3", "latent.height=5"], 2),
        (["latent.channels=2"], 2),
        (["model.rope_max_seq_len=3"], 2),
        (["parallel.tp=3"], 6),
        (["parallel.tp=3", "parallel.ring=1"], 3),
        (["parallel.tp=8", "parallel.ring=1"], 8),
        (["parallel.ulysses=8", "parallel.ring=1"], 8),
        (["parallel.tp=2", "parallel.ring=1", "model.ffn_hidden_size=333"], 2),
        (["parallel.pp=8", "parallel.ring=1"], 8),
        (["parallel.pp=2", "parallel.vpp=3"], 4),
        (["parallel.pp=4", "parallel.vpp=4", "parallel.ring=1"], 4),
        (["parallel.vpp=2"], 2),
        (["parallel.pp=2", "parallel.chunk_layers=[1, 1, 2]"], 4),
        (["parallel.pp=2", "parallel.vpp=2", "parallel.chunk_layers=[1, 3]"], 4),
        ([], 3),
        ([], 1),
        (["parallel.pp=2"], 6),
        (["trainer.micro_batch_size=3"], 2),
        (["trainer.micro_batch_size=1", "trainer.global_batch_size=5"], 8),
        (["parallel.pp=2", "parallel.vpp=2", "trainer.micro_batch_size=4", "trainer.global_batch_size=12"], 4),
        (["parallel.tp=3", "latent.width=18", "model.freq_dim=255"], 7),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else str(value),
)
def test_advice_is_not_itself_refused(overrides, world_size):
    before = problems(overrides, world_size)
    assert before
    followed = 0
    for problem in before:
        for path, value in advice(problem):
            processes = int(value) if path == "processes" else world_size
            change = [] if path == "processes" else [f"{path}={value}"]
            after = problems([*overrides, *change], processes)
            where = re.split("[=: ]", problem)[0]
            assert paths(after) <= paths(before), (problem, path, value, after)
            assert paths(after)[where] < paths(before)[where], (problem, path, value, after)
            followed += 1
    texts = [problem for problem in before if not problem.partition("; ")[2]]
    assert followed or texts == [] or len(before) > 1, before


def test_the_reader_of_advice_sees_all_of_it():
    assert advice("x=1 must; set a.b to 1, 2 or 4, or set c to [1, 2]") == [
        ("a.b", "1"),
        ("a.b", "2"),
        ("a.b", "4"),
        ("c", "[1, 2]"),
    ]
    assert advice("processes: got 3, need; start 2 or 4 processes") == [("processes", "2"), ("processes", "4")]
    assert advice("c=[1]; set c to [2, 2], or set c to null") == [("c", "[2, 2]"), ("c", "null")]
