"""The memory policies that need a device of their own: same numbers, less of its memory. One GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.tiny_run import MEASURED

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.timeout(900),
]
OFFLOADED = [
    "networks.student.offload_optimizer=true",
    "networks.fake_score.offload_optimizer=true",
    "memory.free_idle_gradients=true",
]
CASES = {
    "plain": [],
    "offloaded": [*OFFLOADED, "networks.teacher.weights=offloaded"],
    "selective": ["memory.recompute=selective"],
    "none": ["memory.recompute=none"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    from tools.quickstart.build_dataset import write_digits_dataset

    folder = tmp_path_factory.mktemp("digits")
    write_digits_dataset(folder, num_samples=64, seed=0)
    return folder


def train(data: Path, folder: Path, overrides: list[str]) -> list[dict]:
    """Six steps of sCM, DMD and fake score in bf16, saved and resumed in the middle; the metrics without what depends on the machine."""
    scm = {"name": "scm", "steps": 2, "losses": {"scm": 100.0}}
    rcm = {"name": "rcm", "steps": 4, "losses": {"scm": 100.0, "dmd": 1.0}, "student_update_freq": 2}
    fixed = ["parallel.ring=1", "precision.params_dtype=bf16", f"output_dir={folder}", f"data.folder={data}"]
    fixed += ["logging.wandb_mode=disabled", f"stages={json.dumps([scm, rcm])}", "trainer.checkpoint_every=3"]
    for stop in (3, 6):
        command = [sys.executable, "-m", "rcm_megatron", "train", "model_configs/quickstart.yaml", *fixed, *overrides]
        subprocess.run([*command, f"trainer.stop_after={stop}"], cwd=ROOT, check=True)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(MEASURED)} for line in lines]


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    return train(data, tmp_path_factory.mktemp("plain"), CASES["plain"])


@pytest.mark.parametrize("case", [case for case in CASES if case != "plain"])
def test_a_run_is_the_same_under_each_policy(case, data, plain, tmp_path):
    records = train(data, tmp_path, CASES[case])
    assert len(records) == len(plain) == 6
    for expected, got in zip(plain, records, strict=True):
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            # copies are exact; where sums of the backward are made by atomics, two runs differ by their order
            same = got[name] == (pytest.approx(value, rel=1e-2) if isinstance(value, float) else value)
            assert same, f"{case}, iteration {expected['iteration']}, {name}: {got[name]}, without the policy {value}"


@pytest.fixture
def one_rank():
    """A process group of this process alone, ended afterwards."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from rcm_megatron.config import ParallelConfig
    from rcm_megatron.parallel.groups import initialize_parallel
    from rcm_megatron.platform.device import init_distributed
    from rcm_megatron.platform.megatron import prepare_megatron

    prepare_megatron()
    init_distributed()
    yield initialize_parallel(ParallelConfig())
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def test_what_waits_on_the_host_leaves_the_device(one_rank):
    """Teacher in host memory: a pass is bit-equal, and between passes the device holds none of it. Adam's state: 12 bytes a parameter."""
    from rcm_megatron.config import LatentConfig, OptimizerConfig, ParallelConfig
    from rcm_megatron.networks.build import build_chunks
    from rcm_megatron.networks.sharding import shard_weights
    from rcm_megatron.networks.weights import load_weights, seeded_weights
    from rcm_megatron.training.memory import OptimizerOffload
    from rcm_megatron.training.optimizer import build_optimizer, optimizer_step, wrap_ddp, zero_gradients
    from tests.networks import wan

    model = wan(
        num_layers=4,
        hidden_size=512,
        num_heads=8,
        ffn_hidden_size=2048,
        channels=16,
        text_dim=256,
        text_len=64,
        freq_dim=256,
    )
    latent = LatentConfig(channels=16, frames=4, height=32, width=32)

    def network():
        options = {"groups": one_rank, "params_dtype": torch.bfloat16}
        return load_weights(build_chunks(model, latent, ParallelConfig(), **options), seeded_weights(model, seed=0))

    teacher = [chunk.requires_grad_(False) for chunk in network()]
    x = torch.randn(teacher[0].layout.local_tokens, 1, teacher[0].layout.patch_features, device="cuda")
    inputs = (x, torch.full((1, 1), 500.0, device="cuda"), torch.randn(64, 1, 256, device="cuda"))
    with torch.no_grad():
        expected, before = teacher[0](*inputs), torch.cuda.memory_allocated()
        shard_weights(teacher, group=one_rank.dp_cp, offload=True)
        assert torch.equal(teacher[0](*inputs), expected)
    weights = sum(p.numel() * p.element_size() for p in teacher[0].parameters())
    assert before - torch.cuda.memory_allocated() > 0.95 * weights
    assert all(p.to_local().is_pinned() for p in teacher[0].parameters())

    trained = wrap_ddp(network(), teacher[0].config)
    optimizer = build_optimizer(trained, OptimizerConfig(lr=1e-3))
    offload = OptimizerOffload(optimizer)
    before = torch.cuda.memory_allocated()
    offload.put_away()
    narrow = sum(p.numel() for p in trained[0].module.parameters() if p.dtype == torch.bfloat16)
    assert sum(copy.numel() for copy in offload._host) >= 12 * narrow
    assert before - torch.cuda.memory_allocated() >= 4 * narrow  # moments were made by put_away itself
    held = torch.cuda.memory_allocated()
    for _ in range(2):
        zero_gradients(optimizer)
        for parameter in trained[0].module.parameters():
            parameter.main_grad.fill_(1e-3)
        with offload.resident():
            optimizer_step(optimizer, one_rank)
            assert torch.cuda.memory_allocated() - held >= 12 * narrow
        # gradients of the main parameters that Megatron casts may stay; nothing of the state does
        assert torch.cuda.memory_allocated() - held < 4 * narrow
