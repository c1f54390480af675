"""Megatron torch_dist: a run's checkpoint of any layout as a source without process groups, and a target that any layout reads."""

import json
import shutil

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor

from rcm_megatron.checkpoint import folders
from rcm_megatron.checkpoint.sources import open_checkpoint
from rcm_megatron.checkpoint.translate import internal_shapes, to_internal
from rcm_megatron.config import load_config, to_yaml
from rcm_megatron.errors import CheckpointError
from tests.distributed.harness import run_ranks
from tests.distributed.tiny_run import command, train, write_tiny_run
from tests.interop.conversion import convert
from tests.interop.wan_networks import CONFIG, assert_same_tensors

LAYOUTS = {"tp2": ["parallel.tp=2"], "pp2": ["parallel.pp=2"]}
WEIGHTS = ("student", "ema", "fake_score")


@pytest.fixture(scope="module", params=LAYOUTS)
def trained(request, tmp_path_factory):
    """run.yaml of six iterations on two ranks, and its output folder with config.yaml, as the train command leaves it."""
    folder = tmp_path_factory.mktemp(request.param)
    config = write_tiny_run(folder)
    overrides = [*LAYOUTS[request.param], "trainer.stop_after=7", "trainer.checkpoint_every=4"]
    run_ranks(train, 2, str(config), overrides)
    (folder / "out" / "config.yaml").write_text(to_yaml(load_config(config, overrides)))
    return config, folder / "out"


def test_a_run_converts_to_what_export_writes(trained, tmp_path):
    config, output = trained
    exported = {}
    for weights in WEIGHTS:
        argv = ["export", str(config), "--weights", weights, "--output", str(tmp_path / f"{weights}_export")]
        for status, stderr in run_ranks(command, 1, argv):
            assert status == 0, stderr
        argv = ["convert", str(output), str(tmp_path / weights), "--to", "diffusers", "--weights", weights]
        for status, stderr in run_ranks(command, 1, argv):
            assert status == 0, stderr
        exported[weights] = dict(open_checkpoint(tmp_path / f"{weights}_export"))
        assert_same_tensors(exported[weights], dict(open_checkpoint(tmp_path / weights)))
        card = (tmp_path / weights / "README.md").read_text()
        assert f"| weights | `{weights}` |" in card
        assert "| step | `7` |" in card
        assert "networks:" in card
        for name in ("rcm_scheduler.py", "scheduler_config.json"):  # what a few-step generator is sampled with
            files = [tmp_path / folder / name for folder in (weights, f"{weights}_export")]
            assert [file.is_file() for file in files] == [weights != "fake_score"] * 2
            assert weights == "fake_score" or files[0].read_bytes() == files[1].read_bytes()
        assert ("RCMScheduler.from_pretrained(folder)" in card) == (weights != "fake_score")
    assert not torch.equal(*(exported[name]["proj_out.weight"] for name in ("student", "ema")))
    assert not torch.equal(*(exported[name]["proj_out.weight"] for name in ("student", "fake_score")))


def test_any_slice_is_read(trained):
    """The file has two pieces of what tensor parallelism splits; a reader may ask for other ones."""
    source = open_checkpoint(trained[1], weights="student")
    for name in ("blocks.1.self_attn.linear_qkv.weight", "blocks.0.mlp.linear_fc2.weight", "norm", "head.linear.bias"):
        for key in (key for key in source if key.startswith(name)):
            whole = source[key]
            for dim in range(whole.ndim):
                rows = whole.shape[dim]
                for start, stop in ((0, rows), (rows // 3, rows // 3 + 1), (rows // 4, rows - 1)):
                    part = source.read(key, dim=dim, start=start, stop=stop)
                    assert torch.equal(part, whole.narrow(dim, start, stop - start)), (key, dim, start, stop)


def test_which_checkpoint_and_which_weights(trained, tmp_path):
    _, output = trained
    with pytest.raises(CheckpointError, match="several networks: student, ema, fake_score; choose one: `convert"):
        open_checkpoint(output)
    with pytest.raises(CheckpointError, match="no weights 'teacher'.* need one of student, ema, fake_score"):
        open_checkpoint(output, weights="teacher")
    assert open_checkpoint(output, weights="student").where.endswith("[student.main.]"), "fp32 where it is there"
    for path in (output, output / "checkpoints", output / "checkpoints" / "iter_0000007"):
        assert open_checkpoint(path, weights="ema").facts["step"] == "7", path
    assert open_checkpoint(output / "checkpoints" / "iter_0000004", weights="ema").facts["step"] == "4"
    alone = shutil.copytree(output / "checkpoints" / "iter_0000007", tmp_path / "moved" / "iter_0000007")
    with pytest.raises(CheckpointError, match="does not say what network it holds.* fix: pass it with --config"):
        open_checkpoint(alone, weights="ema")
    source = open_checkpoint(alone, weights="ema", run_config=output / "config.yaml")
    assert_same_tensors(dict(open_checkpoint(output, weights="ema")), dict(source))
    (output / "checkpoints" / "iter_0000009").mkdir()
    assert open_checkpoint(output, weights="ema").facts["step"] == "7", "an unfinished checkpoint does not count"


# ---- as a target


@pytest.fixture
def target(tiny, tmp_path):
    convert(tiny[0], tmp_path / "weights", "torch_dist", max_shard_size=40_000)
    return tmp_path / "weights"


def test_there_and_back_is_bit_exact(tiny, target, tmp_path):
    assert len(list(target.glob("*.distcp"))) > 2
    assert convert(target, tmp_path / "back", "diffusers") == CONFIG
    assert_same_tensors(tiny[1], dict(open_checkpoint(tmp_path / "back")))
    convert(tiny[0], tmp_path / "bf16", "torch_dist", dtype="bf16")
    assert {tensor.dtype for tensor in open_checkpoint(tmp_path / "bf16").values()} == {torch.bfloat16}
    convert(tiny[0], target, "torch_dist", force=True)
    assert [path.name for path in target.glob("*.distcp")] == ["__0_0.distcp"]


def load_with_megatron(folder):
    """What Megatron's own reader gives, whole."""
    requests = {}
    for name, shape in internal_shapes(CONFIG).items():
        empty = torch.full(shape, float("nan"))
        requests[name] = ShardedTensor.from_rank_offsets(f"network.model.{name}", empty)
    return dist_checkpointing.load(requests, folder)


def test_megatrons_own_reader_loads_it(tiny, target):
    (loaded,) = run_ranks(load_with_megatron, 1, str(target))
    loaded = {name: loaded[name] for name in internal_shapes(CONFIG)}
    assert_same_tensors(dict(to_internal(open_checkpoint(tiny[0]), CONFIG)), loaded)


@pytest.mark.parametrize("parallel", [["parallel.tp=2"], ["parallel.pp=2"]], ids=LAYOUTS)
def test_a_run_starts_from_it_on_any_layout(tmp_path, parallel):
    """The teacher in torch_dist trains as the teacher in diffusers' format does, to the bit."""
    config = write_tiny_run(tmp_path)
    convert(tmp_path / "teacher", tmp_path / "teacher_dist", "torch_dist", max_shard_size=30_000)
    results = []
    for name in ("teacher", "teacher_dist"):
        overrides = [*parallel, "trainer.stop_after=2", f"networks.teacher.init={tmp_path / name}"]
        overrides += [f"output_dir={tmp_path / f'out_{name}'}", "trainer.checkpoint_every=100"]
        results.append(run_ranks(train, 2, str(config), overrides))
    for (counters, weights, _), (same_counters, same_weights, _) in zip(*results, strict=True):
        assert counters == same_counters
        for network, tensors in weights.items():
            for name, value in tensors.items():
                assert value is None or torch.equal(value, same_weights[network][name]), f"{network}.{name}"


def test_what_does_not_fit_is_named(target, tmp_path):
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "ffn_hidden_size": 48}))
    with pytest.raises(CheckpointError, match=r"mlp.linear_fc1.bias': got shape \[40\], need \[48\]"):
        convert(target, tmp_path / "out", "diffusers")
    (target / "config.json").write_text(json.dumps({**config, "num_layers": 3}))
    with pytest.raises(CheckpointError, match=r"missing \(21\): 'blocks.2.cross_attn.k_norm.weight'"):
        convert(target, tmp_path / "out", "diffusers")
    assert folders.find_latest(tmp_path) is None
    (tmp_path / "empty" / "iter_0000003").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"(?s)got 1 damaged checkpoints .*iter_0000003: files.json: missing"):
        open_checkpoint(tmp_path / "empty")
