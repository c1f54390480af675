"""A run that trains LoRAs on one sharded base: resumed on another layout, sampled, exported as a LoRA and merged; diffusers agrees."""

import pytest
import torch
import yaml

from tests.distributed.harness import run_ranks
from tests.distributed.tiny_run import ADAM, command, train, write_tiny_run
from tests.helpers import assert_close

SHORT = ["trainer.checkpoint_every=4"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(run.yaml, its overrides, weights after 8 steps on one rank, the same of a run that went from TP 2 to DP 2 after 4)."""
    folder = tmp_path_factory.mktemp("lora")
    path = write_tiny_run(folder)
    config = yaml.safe_load(path.read_text())
    lora = {"optimizer": ADAM, "lora": {"rank": 4, "alpha": 8.0}, "weights": "sharded"}
    teacher = {**config["networks"]["teacher"], "weights": "sharded"}
    config["networks"] = {"teacher": teacher, "student": {**lora, "ema": {}}, "fake_score": lora}
    path.write_text(yaml.safe_dump(config))
    whole = run_ranks(train, 1, str(path), [*SHORT, "trainer.stop_after=8", f"output_dir={folder / 'one'}"])
    there = [*SHORT, f"output_dir={folder / 'two'}"]
    run_ranks(train, 2, str(path), [*there, "parallel.tp=2", "trainer.stop_after=4"])
    resumed = run_ranks(train, 2, str(path), [*there, "trainer.stop_after=8"])
    return path, there, whole, resumed


def test_resumes_on_another_layout(trained):
    _, _, whole, resumed = trained
    for role in ("student", "fake_score"):
        expected, got = whole[0][1][role], resumed[0][1][role]
        assert expected.keys() == got.keys() and all(".lora." in name for name in expected)
        assert any(float(value.norm()) > 0 for name, value in expected.items() if name.endswith(".B"))
        for name, value in expected.items():
            assert_close(f"{role} {name}", value, got[name], rel=1e-4)


def test_checkpoints_hold_the_adapter_alone(trained):
    from rcm_megatron.checkpoint.torch_dist import read_metadata

    folder = trained[0].parent / "two" / "checkpoints" / "iter_0000008"
    keys = read_metadata(folder).state_dict_metadata
    assert keys and all(".lora." in key for key in keys)


def test_sampled_and_exported(trained, tmp_path):
    """The LoRA's file in WanTransformer3DModel, by peft, is the merged export; both namings."""
    from diffusers import WanTransformer3DModel
    from diffusers.loaders import WanLoraLoaderMixin

    path, overrides, *_ = trained
    outputs = {name: tmp_path / f"{name}.safetensors" for name in ("diffusers", "native")}
    for name, file in outputs.items():
        alone = ["export", str(path), "--lora", "--naming", name, "--output", str(file), *overrides]
        ((status, said),) = run_ranks(command, 1, alone)
        assert status == 0, said
    merged = ["export", str(path), "--merge", "--verify", "--output", str(tmp_path / "merged"), *overrides]
    ((status, said),) = run_ranks(command, 1, merged)
    assert status == 0, said
    ((status, said),) = run_ranks(command, 1, ["export", str(path), "--output", str(tmp_path / "none"), *overrides])
    assert status == 1 and "--merge" in said
    sampled = ["sample", str(path), "--prompt", "two", "--steps", "1", "--output", str(tmp_path / "samples")]
    ((status, said),) = run_ranks(command, 1, [*sampled, *overrides])
    assert status == 0, said
    assert any((tmp_path / "samples").iterdir())
    draw = torch.Generator().manual_seed(0)
    given = {
        "hidden_states": torch.randn(2, 1, 4, 16, 16, generator=draw),
        "timestep": torch.tensor([400.0, 900.0]),
        "encoder_hidden_states": torch.randn(2, 6, 32, generator=draw),
        "return_dict": False,
    }
    with torch.no_grad():
        (expected,) = WanTransformer3DModel.from_pretrained(tmp_path / "merged").eval()(**given)
        base = WanTransformer3DModel.from_pretrained(path.parent / "teacher").eval()
        assert float((base(**given)[0] - expected).norm() / expected.norm()) > 1e-3
        for name, file in outputs.items():
            network = WanTransformer3DModel.from_pretrained(path.parent / "teacher")
            state, metadata = WanLoraLoaderMixin.lora_state_dict(str(file), return_lora_metadata=True)
            WanLoraLoaderMixin.load_lora_into_transformer(state, network, metadata=metadata)
            assert_close(name, expected, network.eval()(**given)[0], rel=1e-5)
