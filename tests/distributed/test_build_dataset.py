"""`build-dataset` on ranks that are killed: the same bytes as without, on any number of data-parallel ranks."""

import shutil
from pathlib import Path

import pytest
import torch

from rcm_megatron.data.manifest import load_manifest
from rcm_megatron.data.samples import SampleSource
from tests.distributed.builds import assert_same, build, interrupted, run
from tests.distributed.harness import run_ranks
from tests.distributed.tiny_run import write_tiny_run
from tests.helpers import assert_close

PROMPTS = ("seven moving left", "two moving right", "nine moving left", "two moving right", "one moving left")
SHAPE = {"latent_shape": (1, 4, 16, 16), "text_len": 6, "text_dim": 32}
COPIES = 8
SIZES = ["--samples-per-prompt", str(COPIES), "--samples-per-shard", "6", "--batch-size", "2"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(arguments of a build, folder of it undisturbed on one rank, its file operations)."""
    folder = tmp_path_factory.mktemp("build")
    config = write_tiny_run(folder)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    argv = ["teacher", str(config), "--prompts", str(folder / "prompts.txt"), "--steps", "12", "--seed", "7", *SIZES]
    ((_, _, operations),) = run(1, [*argv, "--output", str(folder / "one")])
    return argv, folder / "one", operations


def test_a_teachers_samples_are_those_of_sample(tiny, tmp_path):
    """The dataset holds what `sample` draws with the same recipe, in bf16, under the prompts."""
    argv, folder, *_ = tiny
    manifest = load_manifest(folder, on_error="raise")
    assert [shard.num_samples for shard in manifest.shards] == [6, 6, 6, 6, 6, 6, 4]
    assert all(shard.sha256 for shard in manifest.shards)
    build_facts = manifest.description["build"]
    assert build_facts["recipe"]["prompts"]["count"] == 40 and build_facts["recipe"]["prompts"]["distinct"] == 4
    assert (build_facts["recipe"]["shift"], build_facts["recipe"]["guidance"]) == (3.0, 5.0)
    (samples,) = run_ranks(sampled, 1, argv[1])
    source = SampleSource(manifest, seed=0, on_error="raise", **SHAPE)
    loaded = {source[index].row: source[index] for index in range(len(manifest))}
    for row, latent_CTHW in enumerate(samples):
        assert loaded[row].prompt == PROMPTS[row // COPIES]
        assert len(loaded[row].embed_LD) == 3, "zeros after the prompt are not stored"
        assert_close(f"sample {row}", latent_CTHW, torch.from_numpy(loaded[row].latent_CTHW), rel=3e-3)
    mean = torch.stack(list(samples)).double().mean()
    assert manifest.description["statistics"]["latent_mean"][0] == pytest.approx(float(mean), abs=2e-3)


def sampled(config):
    """The same by the program's own sampling of batches."""
    from rcm_megatron.config import load_config
    from rcm_megatron.inference.encoding import encode_captions, load_null_text
    from rcm_megatron.inference.networks import SampleBatches, init_parallel, load_network, teacher_sampling

    overrides = ["sampling.teacher_sampler=euler", "sampling.teacher_shift=3.0", "sampling.guidance=5.0"]
    run_config = load_config(config, overrides)
    groups = init_parallel(run_config)
    text_LBD = encode_captions(run_config, PROMPTS).repeat_interleave(COPIES, dim=1)
    batches = SampleBatches(text_LBD, load_null_text(run_config), 7, 5)
    network = load_network(run_config, groups, weights="teacher")
    with torch.no_grad():
        return batches.all(network, teacher_sampling(run_config, steps=12))


def test_a_teachers_build_killed_five_times_gives_the_same_bytes(tiny, tmp_path):
    argv, reference, operations = tiny
    argv = [*argv, "--output", str(tmp_path / "killed")]
    interrupted(argv, seed=1, operations=operations)
    assert_same(reference, tmp_path / "killed")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "killed").iterdir()}
    run(1, argv)
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "killed").iterdir()}


def test_more_ranks_than_work_and_other_layouts(tiny, tmp_path):
    argv, reference, *_ = tiny
    few = [*argv, "--samples-per-prompt", "1", "--batch-size", "3"]
    run(1, [*few, "--output", str(tmp_path / "one")])
    run(3, [*few, "--output", str(tmp_path / "three")])
    assert_same(tmp_path / "one", tmp_path / "three")
    run(2, [*few, "--output", str(tmp_path / "ring"), "parallel.ring=2"])
    ring, one = (
        SampleSource(load_manifest(tmp_path / name, on_error="raise"), seed=0, on_error="raise", **SHAPE)
        for name in ("ring", "one")
    )
    for index in range(5):
        reference, other = (torch.from_numpy(source[index].latent_CTHW) for source in (one, ring))
        assert_close(f"sample {index}", reference, other, rel=5e-3)


def test_another_recipe_does_not_go_on_in_the_folder(tiny, tmp_path):
    argv, reference, *_ = tiny
    for changed, message in ((["--seed", "8"], "got {'seed': 7}, need {'seed': 8}"), (["--dtype", "fp32"], "dtype")):
        ((status, stderr, *_),) = run_ranks(build, 1, [*argv, "--output", str(reference), *changed])
        assert status == 1 and "is another build" in stderr and message in stderr
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    results = run_ranks(build, 2, [*argv, "--output", str(tmp_path / "full")])
    assert all(status == 1 and "holds files, but no manifest.json" in stderr for status, stderr, *_ in results)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["encoders.text=none", "data.negative_embedding=x.pt"], "got encoders.text=none"),
        (["--steps", "0"], "got --steps 0"),
        (["--prompts", "/nowhere.txt"], "cannot be read"),
        (["--samples-per-shard", "0"], "got samples_per_shard=0"),
    ],
)
def test_bad_requests_are_refused_in_one_line(tiny, tmp_path, changes, message):
    argv, *_ = tiny
    ((status, stderr, *_),) = run_ranks(build, 1, [*argv, "--output", str(tmp_path / "new"), *changes])
    assert status == 1 and message in stderr and "Traceback" not in stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("value", "named"), [(float("nan"), "'proj_out.bias' holds nan"), (3e38, "sample 0 ('seven moving left'): latent")]
)
def test_a_teacher_that_is_not_finite_writes_no_dataset(tiny, tmp_path, value, named):
    """Its weights are, or what it makes of finite ones is."""
    from safetensors.torch import load_file, save_file

    argv, *_ = tiny
    shutil.copytree(Path(argv[1]).parent / "teacher", tmp_path / "teacher")
    (weights,) = (tmp_path / "teacher").glob("*.safetensors")
    tensors = load_file(weights)
    tensors["proj_out.bias"][3] = value
    save_file(tensors, weights, metadata={"format": "pt"})
    changed = [*argv, "--output", str(tmp_path / "new"), f"networks.teacher.init={tmp_path / 'teacher'}"]
    ((status, stderr, *_),) = run_ranks(build, 1, changed)
    assert status == 1 and named in stderr and "Traceback" not in stderr, stderr
    assert not (tmp_path / "new").exists()
