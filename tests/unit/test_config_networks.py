"""`networks:` of different sizes: what is taken from `model`, and what must agree is refused pair by pair before a weight is read."""

from dataclasses import replace

import pytest

from rcm_megatron.config import as_dict, build, load_config, to_yaml, validate
from rcm_megatron.config.run import RunConfig
from tests.unit.test_config import CONFIGS, QUICKSTART, error_of
from tools.scaling_points import make_points

LARGE = "networks.teacher.model={num_layers: 40, hidden_size: 5120, num_heads: 40, ffn_hidden_size: 13824}"
SMALL = CONFIGS / "wan2.1_t2v_1.3b_480p.yaml"
OWN = ("networks.student.init=ckpt/1.3b", "networks.fake_score.init=ckpt/1.3b")


def test_a_large_teacher_of_a_small_student(tmp_path):
    """What differs is enough; everything else of the teacher is `model`'s, and the saved configuration is the same run."""
    run = load_config(SMALL, [LARGE, *OWN], world_size=32)
    teacher = run.model_of("teacher")
    assert (teacher.num_layers, teacher.head_dim, teacher.text_len) == (40, 128, run.model.text_len)
    assert replace(teacher, num_layers=30, hidden_size=1536, num_heads=12, ffn_hidden_size=8960) == run.model
    assert run.model_of("student") is run.model_of("fake_score") is run.model
    (tmp_path / "saved.yaml").write_text(to_yaml(run))
    assert load_config(tmp_path / "saved.yaml", world_size=32) == run == build(RunConfig, as_dict(run))


def test_pieces_of_a_pipeline_are_each_networks_own():
    pieces = ["parallel.pp=2", "parallel.chunk_layers=[10, 20]", "networks.teacher.chunk_layers=[25, 15]"]
    run = load_config(SMALL, [LARGE, *OWN, *pieces], world_size=32)
    cuts = {role: run.parallel_of(role).layer_ranges(run.model_of(role).num_layers) for role in run.roles}
    assert cuts["teacher"] == (range(25), range(25, 40))
    assert cuts["student"] == cuts["fake_score"] == (range(10), range(10, 30))
    even = load_config(SMALL, [LARGE, *OWN, *pieces[:2]], world_size=32)
    assert even.parallel_of("teacher").layer_ranges(40) == (range(20), range(20, 40)), "[10, 20] is not of 40 blocks"


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            [LARGE, OWN[0]],
            "networks.fake_score.init=null starts as the teacher, but model.num_layers=30 and networks.teacher.model.num_layers=40; "
            "set networks.fake_score.init to ckpt/1.3b",
        ),
        (
            [LARGE, *OWN, "networks.teacher.model.text_len=256"],
            "networks.teacher.model.text_len=256 must equal model.text_len=512: all networks of a run see the same latents, texts and "
            "images; set networks.teacher.model.text_len to 512",
        ),
        (
            [*OWN, "networks.fake_score.model.patch_size=[1, 1, 1]"],
            "networks.fake_score.model.patch_size=[1, 1, 1] must equal model.patch_size=[1, 2, 2]: all networks of a run see the same "
            "latents, texts and images; set networks.fake_score.model.patch_size to [1, 2, 2]",
        ),
        (
            [LARGE, *OWN, "parallel.tp=4", "networks.teacher.model.num_heads=10"],
            "networks.teacher.model.num_heads=10 must divide by parallel.tp=4; set parallel.tp to 1 or 2",
        ),
        (
            [LARGE, *OWN, "parallel.pp=2", "networks.teacher.chunk_layers=[10, 20]"],
            "networks.teacher.chunk_layers=[10, 20] must hold 2 counts (pp*vpp = 2*1 = 2) whose sum is "
            "networks.teacher.model.num_layers=40; set networks.teacher.chunk_layers to [20, 20], "
            "or set networks.teacher.chunk_layers to null",
        ),
        (
            ["networks.student.weights=offloaded"],
            "networks.student.weights=offloaded, but a stage trains it, need resident or sharded, "
            "or a LoRA; set networks.student.weights to sharded",
        ),
        (["networks.teachr={}"], "did you mean networks.teacher?"),
        (
            ["networks.teacher.offload_optimizer=true"],
            "networks.teacher.offload_optimizer=true, but networks.teacher.optimizer=null; set it to false",
        ),
    ],
)
def test_networks_that_do_not_go_together_are_refused(overrides, line):
    (message,) = error_of(*overrides, path=SMALL, world_size=32).splitlines()
    assert message == line or message.endswith(line)


def test_missing_networks_are_all_named():
    lines = error_of("networks={student: {}}").splitlines()
    assert [line.split(":")[0].split("=")[0] for line in lines] == [
        "networks.teacher",
        "networks.student.optimizer",
        "networks.fake_score",
    ]


def test_the_scaling_benchmark_times_both_teachers():
    """None of them is read from a file."""
    from tools.scaling_rank import with_random_weights

    run = load_config(CONFIGS / "wan2.2_t2v_a14b_480p.yaml")
    (point,) = make_points(run, {"strong": ["dp=2,tp=4"]}, steps=["student"], rollout_steps=1)
    random = with_random_weights(point.run)
    both = [(role, f"{role}_low_noise") for role in ("teacher", "student", "fake_score")]
    assert random.roles == tuple(part for pair in both for part in pair)
    assert random.distillation.expert_boundary == 0.875
    assert {random.init_of(role) for role in random.roles} == {None}


TWO_STUDENTS = (
    "distillation.expert_boundary=0.875",
    "networks.teacher_low_noise={init: low}",
    "networks.student_low_noise={init: null, optimizer: {lr: 1e-6}, ema: {}}",
    "networks.fake_score_low_noise={init: null, optimizer: {lr: 1e-6}}",
)


def test_the_second_networks_of_trained_roles_are_trained_and_start_as_their_teacher():
    run = load_config(SMALL, TWO_STUDENTS, world_size=8)
    assert run.trained_roles == ("student", "student_low_noise", "fake_score", "fake_score_low_noise")
    assert run.init_of("student_low_noise") == run.init_of("fake_score_low_noise") == "low"
    assert run.init_of("student") == run.init_of("teacher") != "low"
    assert run.sides == {
        "student": {"high": (1, 2, 3, 4), "low": (2, 3, 4)},
        "fake_score": {"high": (1, 2, 3, 4), "low": (1, 2, 3, 4)},
    }
    fixed = load_config(SMALL, [*TWO_STUDENTS, "distillation.fixed_rollout_times=[1.5, 1.4, 1.0]"], world_size=8)
    assert fixed.sides["student"] == {"high": (1, 2), "low": (3, 4)}


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["distillation.expert_boundary=null"], "distillation.expert_boundary=null, but networks.teacher_low_noise"),
        (
            ["networks.student_low_noise.optimizer=null"],
            "networks.student_low_noise.optimizer=null, but a stage trains it",
        ),
        (
            ["networks.student_low_noise.ema=null"],
            "networks.student_low_noise.ema and networks.student.ema: got one, need both",
        ),
        (["distillation.max_rollout_steps=1"], "max_rollout_steps=1 is never on the low-noise side, need at least 2"),
        (["distillation.fixed_rollout_times=[1.5, 1.49, 1.48]"], "in 4 steps is never on the low-noise side of"),
        (["networks.studnt_low_noise={}"], "did you mean networks.student_low_noise?"),
        (["stages.0.lr={teacher_low_noise: 1e-5}"], "lr.teacher_low_noise: the stage trains no such network"),
    ],
)
def test_two_students_that_cannot_be_trained_are_refused(overrides, part):
    assert part in error_of(*TWO_STUDENTS, *overrides, path=SMALL, world_size=8)


def test_a_network_that_no_stage_needs_is_not_built():
    run = load_config(QUICKSTART, ["stages=[{name: scm, steps: 10, losses: {scm: 1}}]"])
    validate(run, 2)
    assert "fake_score" in run.networks and run.roles == ("teacher", "student")


COSMOS = CONFIGS / "cosmos_predict2_2b_video2world.yaml"


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["model.condition_channels=-1"], "model.condition_channels: got -1, need an integer at least 0"),
        (["model.image_dim=0"], "model.image_dim: got 0, need an integer greater than 0, or null"),
        (["model.image_dim=null", "model.image_positions=514"], "image_dim=null has none; set it (1280)"),
        (["model.conditional_frames=true"], "distillation.conditional_frames is required with conditional_frames"),
        (
            ["model.conditional_frames=true", "model.patch_size=[2, 2, 2]"],
            "must begin with 1 with conditional_frames",
        ),
        (["networks.teacher.fp8=true"], "which the 257 CLIP tokens of image_dim are not"),
        (["model.family=cosmos"], "model.freq_dim: unknown key"),
    ],
)
def test_a_wan_network_that_cannot_be_is_refused(overrides, part):
    assert part in error_of(*overrides, path=CONFIGS / "wan2.1_i2v_14b_480p.yaml", world_size=8)


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (
            ["networks.teacher_low_noise.init=null"],
            "networks.teacher_low_noise.init=null; name the network of low noise",
        ),
        (
            ["distillation.expert_boundary=null"],
            "distillation.expert_boundary=null, but networks.teacher_low_noise is given; give both",
        ),
        (
            ["distillation.expert_boundary=875"],
            "distillation.expert_boundary: got 875, need a finite number greater than 0 and less than 1",
        ),
        (["networks.teacher.init=null"], "networks.teacher.init=null, but a stage needs it"),
    ],
)
def test_a_teacher_of_two_networks_that_cannot_be_is_refused(overrides, part):
    assert part in error_of(*overrides, path=CONFIGS / "wan2.2_t2v_a14b_480p.yaml", world_size=8)


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["model.family=wan"], "model.rope_scale: unknown key"),
        (["model.family=cosmo"], "model.family: got 'cosmo' (text), need one of wan, cosmos; did you mean cosmos?"),
        (["model.freq_dim=256"], "model.freq_dim: unknown key"),
        (["model.num_heads=256"], "must be at least 12 to stretch RoPE"),
        (["model.adaln_lora_dim=0"], "model.adaln_lora_dim: got 0, need an integer greater than 0"),
        (["model.rope_scale=[1, 0, 1]"], "model.rope_scale.1: got 0, need"),
        (["model.rope_fps=0"], "model.rope_fps: got 0, need"),
        (["model.conditional_frames=false"], "the network takes none"),
        (["model.patch_size=[2, 2, 2]"], "must begin with 1 with conditional_frames"),
        (["model.learnable_positions=true", "model.max_size=[8, 88, 160]"], "latent.frames=24 exceeds"),
        (["distillation.conditional_frames=null"], "distillation.conditional_frames is required"),
        (["distillation.conditional_frames=[24]"], "must hold numbers from 0 to 23"),
    ],
)
def test_a_cosmos_network_that_cannot_be_is_refused(overrides, part):
    assert part in error_of(*overrides, path=COSMOS, world_size=8)
