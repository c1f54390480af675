"""Samples written while training, on two layouts, and what Weights & Biases keeps offline."""

from safetensors.torch import load_file

from tests.distributed.harness import run_ranks
from tests.distributed.tiny_run import records, train, write_tiny_run
from tests.helpers import assert_close

NAMES = [f"{weights}_{steps}_steps" for weights in ("student", "ema") for steps in (1, 2, 4)]
SHORT = ["trainer.stop_after=4", "sampling.num_samples=2"]


def start(config, folder, ranks, *overrides):
    run_ranks(train, ranks, str(config), [*SHORT, f"output_dir={folder}", *overrides], timeout=200)
    return records(folder)


def test_previews_are_equal_on_two_layouts_and_leave_the_run_as_it_was(tmp_path):
    config = write_tiny_run(tmp_path)
    undisturbed = start(config, tmp_path / "none", 1)
    assert start(config, tmp_path / "one", 1, "trainer.sample_every=2") == undisturbed
    start(config, tmp_path / "ring2", 2, "parallel.ring=2", "trainer.sample_every=2")
    for iteration in ("0000002", "0000004"):
        one, ring = (tmp_path / layout / "previews" / iteration for layout in ("one", "ring2"))
        assert sorted(path.stem for path in one.glob("*.safetensors")) == sorted(NAMES)
        for name in NAMES:
            reference = load_file(one / f"{name}.safetensors")["latents"]
            assert reference.shape == (2, 1, 4, 16, 16)
            assert_close(name, reference, load_file(ring / f"{name}.safetensors")["latents"], rel=1e-4)
            assert (one / f"{name}_1.mp4").stat().st_size > 0
    last = tmp_path / "one" / "previews" / "0000004"
    student, ema = (load_file(last / f"{name}_1_steps.safetensors")["latents"] for name in ("student", "ema"))
    assert not student.equal(ema)


def test_wandb_offline_keeps_one_run_id_over_a_resume(tmp_path):
    config, folder = write_tiny_run(tmp_path), tmp_path / "run"
    start(config, folder, 1, "logging.wandb_mode=offline", "trainer.stop_after=2")
    identity = (folder / "wandb_run_id").read_text()
    assert len(start(config, folder, 1, "logging.wandb_mode=offline")) == 4
    assert (folder / "wandb_run_id").read_text() == identity
    assert len(list((folder / "wandb").glob(f"offline-run-*-{identity.strip()}"))) == 2
