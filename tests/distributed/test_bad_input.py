"""Bad input, end to end: `python -m rcm_megatron train …` says what is wrong in one message, without a traceback.

Refusals that need no weights are real processes; the others run the same `main` on a forked rank, which has Megatron imported.
"""

import fcntl
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.distributed.harness import run_ranks
from tests.distributed.tiny_run import command, records, train, write_tiny_run

ROOT = Path(__file__).parents[2]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder with a run that works."""
    folder = tmp_path_factory.mktemp("good")
    write_tiny_run(folder)
    return folder


def copy_of(good, target, *parts):
    """Paths of copies of `teacher` or `data` for a test to damage."""
    for part in parts:
        shutil.copytree(good / part, target / part)
    return [target / part for part in parts]


def cpu_seconds():
    """User and system time of all finished children."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def process(good, *overrides, world_size=1):
    """The command in a process of its own: (completed process, CPU seconds, did it import torch)."""
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "WORLD_SIZE": str(world_size),
        "PYTHONPROFILEIMPORTTIME": "1",
    }
    command = [sys.executable, "-m", "rcm_megatron", "train", str(good / "run.yaml"), *overrides]
    start = cpu_seconds()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    seconds = cpu_seconds() - start
    lines = done.stderr.splitlines()
    imported = any(line.startswith("import time:") and line.split("|")[-1].strip() == "torch" for line in lines)
    done.stderr = "\n".join(line for line in lines if not line.startswith("import time:"))
    return done, seconds, imported


LAYOUT_REFUSALS = {
    "unknown_key": (["trainer.global_batchsize=8"], 1, ["trainer.global_batchsize", "global_batch_size"]),
    "unknown_section": (["optimiser.lr=1"], 1, ["optimiser"]),
    "heads_over_tp": (["parallel.tp=3"], 3, ["model.num_heads=4", "parallel.tp=3", "it divides by 1, 2, 4"]),
    "heads_over_ulysses": (["parallel.tp=2", "parallel.ulysses=4"], 8, ["model.num_heads=4", "parallel.ulysses*tp=8"]),
    "world_size": (["parallel.ring=2"], 3, ["processes: got 3", "multiple of", "start 2 or 4 processes"]),
    "layers_over_stages": (
        ["parallel.pp=2", "parallel.vpp=2"],
        2,
        ["model.num_layers=2", "pp*vpp = 2*2 = 4", "vpp to 1"],
    ),
    "batch_over_dp": ([], 4, ["trainer.global_batch_size=4", "micro_batch_size*dp", "8"]),
}


@pytest.mark.parametrize("name", LAYOUT_REFUSALS)
def test_configuration_and_layout_are_refused_at_once(good, name):
    """Exit status 2, one message, before torch is imported and so before any weight is read."""
    overrides, world_size, words = LAYOUT_REFUSALS[name]
    done, seconds, imported_torch = process(good, *overrides, world_size=world_size)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert all(word in done.stderr for word in words), done.stderr
    assert not imported_torch
    assert seconds < 1.0, "an interpreter and YAML: 0.1 s on an idle core"


def test_every_problem_is_named_in_one_start(good):
    done, _, _ = process(good, "parallel.tp=3", "latent.width=18", "stages.0.steps=0", world_size=3)
    assert done.returncode == 2
    for word in ("parallel.tp=3", "latent.width=18", "steps"):
        assert word in done.stderr, done.stderr


def run_command(good, tmp_path, *overrides):
    argv = ["train", str(good / "run.yaml"), f"output_dir={tmp_path / 'out'}", "trainer.stop_after=1", *overrides]
    ((status, stderr),) = run_ranks(command, 1, argv)
    return status, stderr


def test_a_good_run_ends_with_status_0(good, tmp_path):
    """In a process of its own: the refusals below mean something."""
    done, _, imported_torch = process(good, f"output_dir={tmp_path / 'out'}", "trainer.stop_after=1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert imported_torch and len(records(tmp_path / "out")) == 1


def second_run(argv):
    """`command` that soon loses its patience."""
    from rcm_megatron.runtime import run_lock as lock

    lock.PATIENCE = 0.5
    return command(argv)


def test_a_second_run_of_an_output_folder_is_refused_on_all_ranks(good, tmp_path):
    argv = ["train", str(good / "run.yaml"), f"output_dir={tmp_path}", "trainer.stop_after=1", "parallel.ring=2"]
    with (tmp_path / "run.lock").open("w") as held:
        held.write("SLURM job 4711")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        for status, stderr in run_ranks(second_run, 2, argv):
            assert status == 1 and "in which SLURM job 4711 is training" in stderr and "Traceback" not in stderr
        assert os.listdir(tmp_path) == ["run.lock"]
    for status, stderr in run_ranks(second_run, 2, argv):
        assert status == 0, stderr
    assert len(records(tmp_path)) == 1


def without(name):
    return lambda weights: {key: value for key, value in weights.items() if key != name}


def with_shape(name, shape):
    return lambda weights: weights | {name: torch.zeros(shape)}


BROKEN_WEIGHTS = {
    "missing_weight": (without("blocks.1.attn1.to_k.weight"), ["missing", "blocks.1.attn1.to_k.weight"]),
    "unknown_weight": (lambda weights: weights | {"blocks.7.extra": torch.zeros(1)}, ["unknown", "blocks.7.extra"]),
    "wrong_shape": (
        with_shape("blocks.0.ffn.net.2.weight", (48, 71)),
        ["blocks.0.ffn.net.2.weight", "[48, 71]", "[48, 72]"],
    ),
}


@pytest.mark.parametrize("name", BROKEN_WEIGHTS)
def test_a_teacher_that_does_not_fit_is_named(good, tmp_path, name):
    damage, words = BROKEN_WEIGHTS[name]
    (teacher,) = copy_of(good, tmp_path, "teacher")
    save_file(damage(load_file(teacher / WEIGHTS)), teacher / WEIGHTS)
    status, stderr = run_command(good, tmp_path, f"networks.teacher.init={teacher}")
    assert status == 1 and str(teacher) in stderr and "Traceback" not in stderr
    assert all(word in stderr for word in words), stderr


def test_a_truncated_teacher_and_one_of_another_size_are_named(good, tmp_path):
    (teacher,) = copy_of(good, tmp_path, "teacher")
    blob = (teacher / WEIGHTS).read_bytes()
    (teacher / WEIGHTS).write_bytes(blob[: len(blob) // 2])
    status, stderr = run_command(good, tmp_path, f"networks.teacher.init={teacher}")
    assert status == 1 and WEIGHTS in stderr and "truncated" in stderr
    (teacher / WEIGHTS).write_bytes(blob)
    fields = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(fields | {"num_layers": 3}))
    status, stderr = run_command(good, tmp_path, f"networks.teacher.init={teacher}")
    assert status == 1 and "num_layers" in stderr and "3" in stderr


def test_a_missing_teacher_and_an_empty_data_folder_are_named(good, tmp_path):
    status, stderr = run_command(good, tmp_path, f"networks.teacher.init={tmp_path / 'absent'}")
    assert status == 1 and str(tmp_path / "absent") in stderr
    (tmp_path / "empty").mkdir()
    status, stderr = run_command(good, tmp_path, f"data.folder={tmp_path / 'empty'}")
    assert status == 1 and str(tmp_path / "empty") in stderr


def truncate_a_shard(data):
    """Cut the middle shard within a member, and have the folder indexed anew: (file name, samples that are left whole)."""
    for index in [*data.glob("manifest*")]:
        index.unlink()
    shard = sorted(data.glob("*.tar"))[1]
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size * 2 // 5])
    return shard.name


def poison_a_latent(data):
    """NaN in one latent of the first shard, as a writer leaves it: the manifest is made of what is there."""
    import tarfile

    shard = sorted(data.glob("*.tar"))[0]
    with tarfile.open(shard) as tar:
        member = next(m for m in tar.getmembers() if m.name.endswith(".latent.pt"))
        latent = torch.load(io.BytesIO(tar.extractfile(member).read()), weights_only=True)
    blob = shard.read_bytes()
    stored = latent.contiguous().view(torch.uint8).numpy().tobytes()
    start = blob.index(stored, member.offset_data)
    nan = torch.full_like(latent.flatten()[:1], float("nan")).view(torch.uint8).numpy().tobytes()
    shard.write_bytes(blob[:start] + nan + blob[start + len(nan) :])
    (data / "manifest.json").unlink()
    return member.name.split(".")[0]


@pytest.mark.parametrize("damage", [truncate_a_shard, poison_a_latent])
def test_damaged_data_is_an_error_that_names_it(good, tmp_path, damage):
    (data,) = copy_of(good, tmp_path, "data")
    name = damage(data)
    status, stderr = run_command(good, tmp_path, f"data.folder={data}", "data.on_error=raise", "trainer.stop_after=6")
    assert status == 1 and name in stderr and "Traceback" not in stderr, stderr
    if damage is poison_a_latent:
        assert "NaN" in stderr or "finite" in stderr


@pytest.mark.parametrize("damage", [truncate_a_shard, poison_a_latent])
def test_damaged_data_is_skipped_and_counted_by_configuration(good, tmp_path, damage):
    """Six steps of four samples: an epoch and a half of the 13 samples, so a bad one comes up at least once."""
    (data,) = copy_of(good, tmp_path, "data")
    damage(data)
    overrides = [f"output_dir={tmp_path / 'out'}", f"data.folder={data}", "data.on_error=skip", "trainer.stop_after=6"]
    ((counters, _, _),) = run_ranks(train, 1, str(good / "run.yaml"), overrides)
    lines = records(tmp_path / "out")
    assert len(lines) == 6 and counters["refused_updates"] == counters["nan_samples"] == 0
    if damage is poison_a_latent:
        assert counters["skipped_samples"] >= 1 and lines[-1]["skipped_samples"] == counters["skipped_samples"]


def test_an_unknown_key_in_the_file_is_named_with_the_nearest(good, tmp_path):
    config = yaml.safe_load((good / "run.yaml").read_text())
    config["networks"]["student"]["optimizer"] = config["networks"]["student"]["optimizer"] | {"learning_rate": 1e-4}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    done, _, imported_torch = process(tmp_path)
    assert done.returncode == 2 and "networks.student.optimizer.learning_rate" in done.stderr and not imported_torch
