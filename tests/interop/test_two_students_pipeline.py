"""A run of two students, on layouts and resumed; what it samples and exports is what diffusers' pipeline of two transformers makes."""

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel

from rcm_megatron.checkpoint.models import write_checkpoint
from rcm_megatron.cli.main import main
from rcm_megatron.config import load_config, to_yaml
from rcm_megatron.networks.weights import seeded_weights
from tests.distributed.harness import RankError, run_ranks
from tests.distributed.run_checks import assert_same_curves
from tests.distributed.tiny_run import ADAM, records, train
from tests.distributed.wan_run import LATENT, TEXT_LEN, write_wan_run
from tests.helpers import assert_close
from tests.interop.pipelines import SamplersNoise, run_command, sample_files, scheduler_of_export, wan_pipeline
from tests.interop.wan_networks import assert_same_tensors

BOUNDARY = 0.875
"""Between the sampler's times 1.5 (RF 0.934) and 1.4 (0.853)."""
PROMPTS = ("a cat and a dog", "Baking “cake”")
SIZE = {"height": 32, "width": 48, "num_frames": 5, "max_sequence_length": TEXT_LEN}
STEPS = ["stages.0.steps=4", "stages.0.tangent_warmup=2", "stages.1.steps=8", "trainer.checkpoint_every=6"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Folder of run.yaml with both experts as teachers, two students and two fake scores."""
    folder = tmp_path_factory.mktemp("two")
    config = write_wan_run(folder)
    run = load_config(config)
    write_checkpoint(seeded_weights(run.model, seed=6).items(), run.model, folder / "teacher_2")
    return folder


def two(home):
    networks = {
        "teacher_low_noise": {"init": str(home / "teacher_2")},
        "student_low_noise": {"optimizer": ADAM, "ema": {}},
        "fake_score_low_noise": {"optimizer": ADAM},
    }
    return [f"networks.{role}={settings}" for role, settings in networks.items()] + [
        f"distillation.expert_boundary={BOUNDARY}"
    ]


def start(home, name, ranks, *overrides):
    overrides = [*two(home), *STEPS, *overrides, f"output_dir={home / name}"]
    results = run_ranks(train, ranks, str(home / "run.yaml"), overrides)
    return results[0], records(home / name)


@pytest.fixture(scope="module")
def trained(home):
    (counters, weights, _), lines = start(home, "out", 1, "trainer.sample_every=12")
    return counters, weights, lines


def test_both_networks_of_a_role_are_trained_in_turn(home, trained):
    counters, weights, lines = trained
    assert [line["trained"] for line in lines[:4]] == ["student", "student_low_noise"] * 2
    assert counters["updates/student"] == counters["updates/student_low_noise"] == 4
    assert counters["updates/fake_score"] == counters["updates/fake_score_low_noise"] == 2
    teachers = {"": load_of(home / "teacher"), "_low_noise": load_of(home / "teacher_2")}
    for role in ("student", "fake_score"):
        for part, began in teachers.items():
            moved = relative(weights[f"{role}{part}"], began)
            assert 0 < moved < 0.2 < relative(weights[f"{role}{part}"], teachers["" if part else "_low_noise"]), role
    names = {path.name for path in (home / "out" / "previews" / "0000012").iterdir()}
    assert {"student_2_steps.safetensors", "ema_2_steps.safetensors"} <= names


def load_of(folder):
    from rcm_megatron.checkpoint.sources import open_checkpoint
    from rcm_megatron.checkpoint.translate import to_internal

    source = open_checkpoint(folder)
    return dict(to_internal(source, source.model_config()))


def relative(a, b):
    return float(sum((a[k] - b[k]).norm() ** 2 for k in b) / sum(b[k].norm() ** 2 for k in b)) ** 0.5


@pytest.mark.parametrize(
    ("ranks", "layout"), [(2, ["parallel.tp=2"]), (2, ["parallel.pp=2"]), (2, [])], ids=["tp2", "pp2", "dp2"]
)
def test_the_same_run_on_every_layout(home, trained, ranks, layout):
    _, lines = start(home, f"layout_{layout}", ranks, *layout)
    assert_same_curves(trained[2], lines, rel=1e-3)


@pytest.mark.parametrize("role", ["student", "student_low_noise"])
def test_the_optimizers_of_both_begin_anew_with_another_objective(trained, role):
    """The first update of the second stage has the first step of the warm-up of four."""
    rates = {
        stage: [line["learning_rate"] for line in trained[2] if (line["stage"], line["trained"]) == (stage, role)]
        for stage in ("scm", "rcm")
    }
    assert rates["scm"] == pytest.approx([ADAM["lr"] / 4, ADAM["lr"] / 2])
    assert rates["rcm"] == pytest.approx([ADAM["lr"] / 4, ADAM["lr"] / 2])


def test_a_stages_learning_rate_is_of_both_unless_the_second_has_its_own(home):
    """Past the warm-up of four updates there is none of here: lr grows by quarters."""
    _, lines = start(home, "lr", 1, "stages.0.lr={student: 0.004, student_low_noise: 0.008}", "trainer.stop_after=4")
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.001, 0.002, 0.002, 0.004])
    _, lines = start(home, "lr_of_both", 1, "stages.0.lr={student: 0.004}", "trainer.stop_after=4")
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.001, 0.001, 0.002, 0.002])


def test_a_run_resumes_with_both(home, trained):
    start(home, "parts", 2, "parallel.tp=2", "trainer.stop_after=6")
    (counters, *_), lines = start(home, "parts", 1)
    assert counters == trained[0]
    assert_same_curves(trained[2], lines, rel=1e-3)


@pytest.fixture(scope="module")
def exported(home, trained):
    argv = ["export", str(home / "run.yaml"), "--weights", "student", "--verify", "--output", str(home / "student")]
    run_command(argv, *two(home))
    return home / "student"


def test_export_writes_the_two_transformers(home, trained, exported):
    for name, role in (("transformer", "student"), ("transformer_2", "student_low_noise")):
        network = WanTransformer3DModel.from_pretrained(exported / name)
        weights, got = trained[1][role], load_of(exported / name)
        assert sum(p.numel() for p in network.parameters()) == sum(v.numel() for v in weights.values())
        assert got.keys() == weights.keys() and all(torch.equal(got[k], weights[k]) for k in got)
    card = (exported / "transformer" / "README.md").read_text()
    assert f"transformer_2=transformer_2, boundary_ratio={BOUNDARY}" in card and "Wan2.2-T2V-A14B-Diffusers" in card
    with pytest.raises(AssertionError, match="exists; choose another target"):
        run_command(["export", str(home / "run.yaml"), "--weights", "student", "--output", str(exported)], *two(home))


@pytest.fixture(scope="module")
def run_folder(home, trained):
    """With its config.yaml, as the train command leaves it."""
    run = load_config(home / "run.yaml", [*two(home), *STEPS, f"output_dir={home / 'out'}"])
    (home / "out" / "config.yaml").write_text(to_yaml(run))
    return home / "out"


def convert(run_folder, target, form, weights):
    assert main(["convert", str(run_folder), str(target), "--to", form, "--weights", weights]) == 0


@pytest.mark.parametrize("weights", ["student", "ema"])
def test_convert_to_diffusers_writes_the_two_transformers(home, run_folder, tmp_path, weights):
    convert(run_folder, tmp_path / "both", "diffusers", weights)
    argv = ["export", str(home / "run.yaml"), "--weights", weights, "--output", str(tmp_path / "exported")]
    run_command(argv, *two(home))
    cards = []
    for name in ("transformer", "transformer_2"):
        folder, exported = tmp_path / "both" / name, tmp_path / "exported" / name
        assert_same_tensors(load_of(exported), load_of(folder))
        assert {path.name for path in folder.iterdir()} == {path.name for path in exported.iterdir()}
        for path in (folder, exported):
            assert f"WanTransformer3DModel.from_pretrained('{path}')" in (path / "README.md").read_text()
        cards.append((folder / "README.md").read_text())
    assert f"folder = '{tmp_path / 'both' / 'transformer'}'" in cards[0]
    assert f"boundary_ratio={BOUNDARY}" in cards[0] and "RCMScheduler" not in cards[1]


def test_convert_to_another_format_names_the_second_network(trained, run_folder, tmp_path, caplog):
    for weights in ("student", "student_low_noise"):
        caplog.clear()
        convert(run_folder, tmp_path / weights, "internal", weights)
        assert_same_tensors(trained[1][weights], load_of(tmp_path / weights))
        said = (
            f"{tmp_path / weights}: the network of the high noise alone; the other one is --weights student_low_noise"
        )
        assert (said in caplog.messages) == (weights == "student")


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_diffusers_pipeline_of_the_export_makes_what_sample_makes(home, exported, tmp_path, steps):
    """RCMScheduler's steps, each by the transformer that the pipeline chooses for its time."""
    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    latents, _ = sample_files(home, tmp_path, [*prompts, "--weights", "student", "--steps", str(steps)], *two(home))
    scheduler = scheduler_of_export(exported / "transformer")
    noise = SamplersNoise(
        tuple(LATENT.values()), samples=len(PROMPTS), seed=load_config(home / "run.yaml").sampling.seed
    )
    low_noise = WanTransformer3DModel.from_pretrained(exported / "transformer_2").eval()
    options = {"transformer_2": low_noise, "boundary_ratio": BOUNDARY}
    pipeline, calls = wan_pipeline(WanPipeline, home, exported / "transformer", scheduler, **options), []
    low_noise.register_forward_hook(lambda *_: calls.append(1))
    given = {"latents": scheduler.init_noise_sigma * noise.first, "callback_on_step_end": noise.into(scheduler)}
    settings = {"num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "latent"}
    got = pipeline(list(PROMPTS), **given, **settings, **SIZE).frames
    assert_close("latents", latents, got, rel=1e-5)
    assert len(calls) == {1: 0, 2: 0, 4: 2}[steps]


def test_averages_are_sampled_together(home, trained, tmp_path):
    """Of both networks; a run whose second has none is refused by name."""
    argv = ["--prompt", "a cat", "--weights", "ema", "--steps", "4"]
    average, _ = sample_files(home, tmp_path / "ema", argv, *two(home))
    student, _ = sample_files(home, tmp_path / "student", [*argv[:3], "student", *argv[4:]], *two(home))
    assert 0 < float((average - student).norm()) < float(student.norm())
    with pytest.raises((AssertionError, RankError), match="got one, need both or none"):
        sample_files(home, tmp_path / "none", argv, *two(home), "networks.student_low_noise.ema=null")


def test_a_dataset_of_two_teachers_is_sampled_from_both(home, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat and a dog\n")
    argv = [
        "build-dataset",
        "teacher",
        str(home / "run.yaml"),
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--steps",
        "3",
    ]
    made = {}
    for name, boundary in (("both", BOUNDARY), ("high", 1e-3)):
        at = f"distillation.expert_boundary={boundary}"
        run_command([*argv, "--output", str(tmp_path / name)], *two(home)[:-1], at)
        (shard,) = (tmp_path / name).glob("*.tar")
        made[name] = shard.read_bytes()
    alone = tmp_path / "alone"
    run_command([*argv, "--output", str(alone)])
    (shard,) = alone.glob("*.tar")
    assert made["high"] == shard.read_bytes() != made["both"]
