"""A build that dies before each of its file operations in turn, and goes on: the same bytes. Plans, refusals, statistics."""

import json
import os
from pathlib import Path

import pytest
import torch

from rcm_megatron.data.manifest import DatasetError, load_manifest
from rcm_megatron.datasets.build import BuildPlan, BuiltSample, DatasetBuild, stored
from rcm_megatron.datasets.statistics import Statistics

PLAN = {"num_samples": 11, "samples_per_shard": 4, "unit_size": 3, "member_format": "pt", "recipe": {"seed": 1}}
SKIPPED = {1: "broken", 4: "broken", 5: "broken", 6: "broken", 7: "too short"}
"""All of the second shard's first unit, and of its second: the shard does not exist."""


def plan(**changes):
    return BuildPlan(**(PLAN | changes))


def whole_build(folder, build_plan=None):
    """As the tools go about it, on one rank."""
    build = DatasetBuild(folder, build_plan or plan())
    left = build.prepare()
    for unit in left:
        if not build.has_text(unit):
            build.put_text(unit, torch.full((len(unit.indices), 6, 5), 1.0 + unit.number))
    if left:
        build.put_negative(torch.ones(2, 5))
    for unit in left:
        kept = [index for index in unit.indices if index not in SKIPPED]
        text_BLD = build.text(unit)
        samples = [
            BuiltSample(
                index=index,
                latent_CTHW=torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(index)),
                embed_LD=text_BLD[0],
                prompt=f"sample {index}",
            )
            for index in kept
        ]
        build.write(unit, samples, {index: SKIPPED[index] for index in unit.indices if index in SKIPPED})
        build.join_shards()
    if left:
        build.finish()


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def dies_before(operation, folder):
    """The build in a process that ends, as if killed, before its so-manieth file operation; whether it did."""
    pid = os.fork()
    if pid == 0:
        done = [0]
        for name in ("rename", "unlink", "mkdir"):
            setattr(Path, name, _counted(getattr(Path, name), done, operation))
        os.replace = _counted(os.replace, done, operation)
        status = 1
        try:
            whole_build(folder)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


def _counted(function, done, limit):
    def counted(*args, **kwargs):
        done[0] += 1
        if done[0] == limit:
            os._exit(9)
        return function(*args, **kwargs)

    return counted


def test_death_before_any_file_operation_changes_no_byte(tmp_path):
    whole_build(tmp_path / "undisturbed")
    expected, operation = contents(tmp_path / "undisturbed"), 1
    while dies_before(operation, tmp_path / f"{operation}"):
        whole_build(tmp_path / f"{operation}")
        found = contents(tmp_path / f"{operation}")
        assert found == expected, (
            f"killed before operation {operation}: {[k for k in expected if found.get(k) != expected[k]]}"
        )
        operation += 1
    assert operation > 30, "the build was hardly ever killed"
    assert not list(tmp_path.glob("*.partial"))


def test_death_again_and_again(tmp_path):
    """Every start dies after as many operations, until one comes to the end."""
    whole_build(tmp_path / "undisturbed")
    for step in (23, 31):
        starts = 1
        while dies_before(step, tmp_path / f"{step}"):
            starts += 1
            assert starts < 40, "no progress"
        assert starts > 2
        assert contents(tmp_path / f"{step}") == contents(tmp_path / "undisturbed")


def test_shards_are_cut_by_the_plan_and_skipped_samples_leave_gaps(tmp_path):
    whole_build(tmp_path / "a")
    manifest = load_manifest(tmp_path / "a", on_error="raise")
    keys = [int(manifest.record(row).key) for row in range(len(manifest))]
    assert keys == [0, 2, 3, 8, 9, 10]
    assert [shard.name for shard in manifest.shards] == ["shard_000000.tar", "shard_000002.tar"]
    lines = [json.loads(line) for line in (tmp_path / "a" / "skipped.jsonl").read_text().splitlines()]
    assert {int(line["key"]): line["reason"] for line in lines} == SKIPPED
    assert manifest.description["num_skipped"] == len(SKIPPED)
    assert [list(unit.indices) for unit in plan(num_samples=6).units()] == [[0, 1, 2], [3], [4, 5]]


def test_the_number_of_units_joined_does_not_change_the_bytes_of_a_shard(tmp_path):
    for size in (1, 4):
        whole_build(tmp_path / f"{size}", plan(unit_size=size, num_samples=4))
    first, second = (tmp_path / f"{size}" / "shard_000000.tar" for size in (1, 4))
    assert first.stat().st_size == second.stat().st_size


def test_other_builds_and_other_folders_are_refused(tmp_path):
    whole_build(tmp_path / "a")
    with pytest.raises(DatasetError, match=r"got {'seed': 1}, need {'seed': 2}; choose another folder"):
        DatasetBuild(tmp_path / "a", plan(recipe={"seed": 2})).prepare()
    DatasetBuild(tmp_path / "b", plan()).prepare()
    with pytest.raises(DatasetError, match=r"b.partial is another build: got {'unit_size': 3}, need {'unit_size': 2}"):
        DatasetBuild(tmp_path / "b", plan(unit_size=2)).prepare()
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x").write_text("")
    with pytest.raises(DatasetError, match="holds files, but no manifest.json"):
        DatasetBuild(tmp_path / "c", plan()).prepare()
    for name in ("num_samples", "samples_per_shard", "unit_size"):
        with pytest.raises(DatasetError, match=f"got {name}=0"):
            plan(**{name: 0})


def test_a_build_without_a_sample_says_why(tmp_path):
    build = DatasetBuild(tmp_path / "a", plan(num_samples=2))
    for unit in build.prepare():
        build.write(unit, [], dict.fromkeys(unit.indices, "broken"))
    build.join_shards()
    with pytest.raises(DatasetError, match="all 2 samples were skipped; the first: broken; broken"):
        build.finish()


def test_texts_are_stored_without_the_zeros_after_them(tmp_path):
    embed_LD = torch.zeros(6, 3)
    embed_LD[1] = 1.0
    assert stored(embed_LD, torch.bfloat16).shape == (2, 3)
    assert stored(torch.zeros(6, 3), torch.float32).shape == (1, 3)
    assert torch.equal(stored(embed_LD[:2], torch.float32, length=6), embed_LD)


def test_statistics_of_parts_add_up():
    latents, whole, parts = torch.randn(5, 2, 3, 4, 4), Statistics(), [Statistics(), Statistics()]
    for number, latent_CTHW in enumerate(latents):
        embed_LD = torch.ones(1 + number, 3)
        whole.add(latent_CTHW, embed_LD)
        parts[number // 3].add(latent_CTHW, embed_LD)
    merged = Statistics.from_dict(json.loads(json.dumps(parts[0].as_dict()))).merged(parts[1])
    assert merged.summary() == whole.summary()
    assert whole.summary()["latent_std"] == pytest.approx(
        latents.double().std((0, 2, 3, 4), correction=0).tolist(), rel=1e-5
    )
    assert whole.summary()["text_length"] == {"min": 1, "mean": 3.0, "max": 5}
    with pytest.raises(ValueError, match="need at least one"):
        Statistics().summary()
