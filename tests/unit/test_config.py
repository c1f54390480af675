"""The configuration: what is accepted, and that each mistake is named with its full path, before anything is loaded."""

import dataclasses
import time
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from rcm_megatron.config import ConfigError, RunConfig, as_dict, build, load_config, to_yaml, validate
from rcm_megatron.registries import FAMILIES

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "model_configs"
WORLD_SIZES = {
    "quickstart": (2,),
    "quickstart_flow_map": (2,),
    "wan2.1_t2v_1.3b_480p": (8, 32, 256),
    "wan2.1_t2v_14b_480p": (8, 64, 128),
    "wan2.1_t2v_14b_480p_lora": (8, 64),
    "cosmos_predict2_2b_text2image": (8, 32, 256),
    "cosmos_predict2_14b_text2image": (8, 64, 512),
    "cosmos_predict2_2b_video2world": (8, 64, 512),
    "cosmos_predict2_14b_video2world": (8, 64, 512),
    "wan2.1_i2v_14b_480p": (8, 64, 128),
    "wan2.2_t2v_a14b_480p": (8, 64, 512),
    "wan2.2_i2v_a14b": (8, 64, 512),
    "wan2.2_ti2v_5b": (8, 64, 512),
}
QUICKSTART = CONFIGS / "quickstart.yaml"
SIX_HEADS = ("model.hidden_size=192", "model.num_heads=6")
"""Overrides for a network whose heads some layouts do not divide."""


def error_of(*overrides: str, path: Path = QUICKSTART, world_size: int = 2) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, world_size=world_size)
    return str(caught.value)


def dataclasses_of(hint: Any, seen: set[type]) -> set[type]:
    """`hint`, if it is one, and those among the types of its fields."""
    for inner in typing.get_args(hint):
        dataclasses_of(inner, seen)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and hint not in seen:
        seen.add(hint)
        for of_field in typing.get_type_hints(hint).values():
            dataclasses_of(of_field, seen)
    return seen


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_is_valid_complete_and_says_what_it_costs(path):
    config = load_config(path)
    for world_size in WORLD_SIZES[path.stem]:
        validate(config, world_size)
    header = path.read_text().partition("\nname:")[0]
    assert all(f"# {label}:" in header for label in ("GPUs", "cost", "command"))
    given = yaml.safe_load(path.read_text())
    for section in (
        "model",
        "latent",
        "parallel",
        "precision",
        "data",
        "memory",
        "sampling",
        "logging",
    ):
        missing = as_dict(config)[section].keys() - given[section].keys() - {"cosmos", "wan"}  # null but where given
        assert not missing, f"{section} leaves {missing} to defaults"


def test_the_configs_hold_the_published_hyperparameters():
    small = load_config(CONFIGS / "wan2.1_t2v_1.3b_480p.yaml")
    large = load_config(CONFIGS / "wan2.1_t2v_14b_480p.yaml")
    for config, lr, fake_score_lr, freq, warmup, mean, sigma_max, frames, batch in (
        (small, 2e-6, 4e-7, 5, 1000, 0.7, 80.0, 20, 256),
        (large, 1e-6, 1e-7, 10, 0, 1.5, 200.0, 21, 64),
    ):
        (stage,) = config.stages
        student, fake_score = (config.networks[role] for role in ("student", "fake_score"))
        assert (student.optimizer.lr, fake_score.optimizer.lr) == (lr, fake_score_lr)
        assert (stage.student_update_freq, stage.tangent_warmup) == (freq, warmup)
        assert stage.losses == {"scm": 100.0, "dmd": 1.0}
        assert (config.distillation.p_g.mean, config.distillation.p_g.std) == (mean, 1.6)
        assert config.distillation.p_d.shift == config.distillation.teacher_guidance == 5.0
        assert (config.sampling.sigma_max, config.latent.frames) == (sigma_max, frames)
        assert config.trainer.global_batch_size == batch
        for optimizer in (student.optimizer, fake_score.optimizer):
            assert (optimizer.betas, optimizer.weight_decay, optimizer.clip_grad) == ((0.0, 0.999), 0.01, 0.0)
        assert (student.ema.relative_width, config.model.head_dim) == (0.1, 128)
    assert small.latent.num_tokens(small.model.patch_size) == 31_200
    assert large.latent.num_tokens(large.model.patch_size) == 32_760


def test_yaml_round_trip_keeps_every_value(tmp_path):
    config = load_config(
        QUICKSTART, ["distillation.fixed_rollout_times=[1.5, 1.4, 1]", "networks.student.optimizer.eps=1e-4"]
    )
    (tmp_path / "saved.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "saved.yaml") == config
    assert build(RunConfig, as_dict(config)) == config


def test_no_class_has_more_than_25_fields_and_all_are_frozen():
    classes = dataclasses_of(RunConfig, set()) | {family.settings for family in FAMILIES.values()}
    assert len(classes) >= 15
    for cls in classes:
        assert len(dataclasses.fields(cls)) <= 25, cls
        assert cls.__dataclass_params__.frozen, cls
        assert all(field.kw_only for field in dataclasses.fields(cls)), cls


def test_overrides():
    overrides = ["parallel.tp=2", "stages.0.steps=7", "stages.1.losses.dmd=0.5", "networks.student.init=some/folder"]
    config = load_config(
        QUICKSTART, [*overrides, "networks.student.optimizer.lr=2e-5", "objectives.flow.caption_dropout=0"]
    )
    assert config.parallel.tp == 2
    assert (config.stages[0].steps, config.stages[1].losses["dmd"]) == (7, 0.5)
    assert config.networks["student"].init == "some/folder"
    assert [config.networks[role].optimizer.lr for role in config.trained_roles] == [2e-5, 3e-4]
    assert config.objectives["flow"].caption_dropout == 0.0


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("paralel.tp=2", ["paralel: unknown key", "did you mean parallel?"]),
        ("parallel.rign=2", ["parallel.rign: unknown key", "did you mean parallel.ring?"]),
        ("ulysses=2", ["ulysses: unknown key", "did you mean parallel.ulysses?"]),
        ("stages.1.losses.scmm=2", ["stages.1.losses.scmm: unknown key", "did you mean stages.1.losses.scm?"]),
        ("parallel.zzz=2", ["parallel.zzz: unknown key", "tp, ring, ulysses"]),
        ("trainer.log_every=1.5", ["trainer.log_every: got 1.5", "need an integer"]),
        ("trainer.log_every=true", ["trainer.log_every: got True", "need an integer"]),
        ("trainer.resume=1", ["trainer.resume: got 1", "need true or false"]),
        ("networks.student.optimizer.lr=fast", ["networks.student.optimizer.lr: got 'fast'", "need a finite number"]),
        ("networks.student.optimizer.lr=.nan", ["networks.student.optimizer.lr: got nan", "need a finite number"]),
        ("networks.student.optimizer.betas=[0.9]", ["networks.student.optimizer.betas: got 1 values", "a list of 2"]),
        ("model.patch_size=[1, 4, x]", ["model.patch_size.2: got 'x'", "need an integer"]),
        (
            "precision.params_dtype=bf61",
            ["precision.params_dtype: got 'bf61'", "one of bf16, fp32", "did you mean bf16?"],
        ),
        (
            "distillation.fixed_rollout_times=1.5",
            ["fixed_rollout_times: got 1.5", "need a list, each a finite number, or null"],
        ),
        ("name=2024", ["name: got 2024", "'2024'"]),
        ("model=null", ["model: got null", "a mapping with family, num_layers"]),
        ("trainer=[]", ["trainer: got []", "a mapping"]),
        ("networks.student.init={", ["networks.student.init={", "not valid YAML"]),
        ("trainer.log_every", ["is not key=value"]),
        ("trainer.log_every.x=1", ["trainer.log_every is 1", "no keys"]),
        ("stages.7.steps=1", ["got index '7'", "a list of 2"]),
    ],
)
def test_a_wrong_key_or_type_is_named(override, parts):
    message = error_of(override)
    for part in parts:
        assert part in message


def test_missing_keys_are_named(tmp_path):
    data = yaml.safe_load(QUICKSTART.read_text())
    del data["model"]["num_heads"], data["model"]["text_dim"]
    with pytest.raises(
        ConfigError,
        match=r"model.num_heads: got nothing, need an integer greater than 0; add it(.|\n)*model.text_dim: got nothing",
    ):
        build(RunConfig, data)


def test_a_file_that_is_no_configuration(tmp_path):
    for text, part in (("a: 1\na: 2", "'a' is given twice"), ("- 1", "need a mapping"), ("a: [", "not valid YAML")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match=part):
            load_config(tmp_path / "bad.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "bad.yaml").write_bytes("name: été\n".encode("utf-16"))
    with pytest.raises(ConfigError, match="got UTF-16, need UTF-8"):
        load_config(tmp_path / "bad.yaml")


def test_a_shipped_configuration_is_found_by_words_of_its_name(tmp_path, monkeypatch):
    assert load_config("wan2.1-T2V-14b").name == load_config("wan2.1_t2v_14b_480p").name == "wan2.1_t2v_14b_480p"
    assert load_config("quickstart").name == "quickstart"
    with pytest.raises(ConfigError, match="which may be wan2.1_i2v_14b_480p or wan2.1_t2v_14b_480p; need one"):
        load_config("wan2.1-14b")
    with pytest.raises(ConfigError, match="quickstrat cannot be read.*the name of one of model_configs/"):
        load_config("quickstrat")
    # a file of that name comes first
    monkeypatch.chdir(tmp_path)
    Path("quickstart").write_text("name: [")
    with pytest.raises(ConfigError, match="^quickstart: "):
        load_config("quickstart")


def test_a_byte_order_mark_is_no_part_of_a_configuration(tmp_path):
    plain = Path(__file__).parents[2] / "model_configs" / "quickstart.yaml"
    (tmp_path / "marked.yaml").write_bytes(b"\xef\xbb\xbf" + plain.read_bytes().replace(b"\n", b"\r\n"))
    assert load_config(tmp_path / "marked.yaml") == load_config(plain)


@pytest.mark.parametrize(
    ("overrides", "world_size", "parts"),
    [
        (
            ["parallel.tp=4", "trainer.micro_batch_size=2"],
            8,
            ["num_heads=6 must divide by parallel.tp=4", "set parallel.tp to 1 or 2"],
        ),
        (
            ["parallel.ulysses=4", "trainer.micro_batch_size=2"],
            8,
            ["num_heads=6 must divide by parallel.ulysses*tp=4", "set parallel.ulysses to 1 or 2"],
        ),
        (
            ["parallel.tp=2", "parallel.ulysses=2", "trainer.micro_batch_size=2"],
            8,
            ["num_heads=6 must divide by parallel.ulysses*tp=4", "set parallel.ulysses to 1"],
        ),
        (["parallel.tp=2", "model.ffn_hidden_size=577"], 4, ["ffn_hidden_size=577 must divide by parallel.tp=2"]),
        (["parallel.tp=0"], 2, ["parallel.tp: got 0, need an integer greater than 0"]),
        (["parallel.pp=8"], 16, ["num_layers=4 cannot give each of parallel.pp*vpp = 8*1 = 8 pieces a block"]),
        (
            ["parallel.pp=2", "parallel.vpp=3"],
            4,
            ["num_layers=4 cannot give each of parallel.pp*vpp = 2*3 = 6 pieces", "set parallel.vpp to 1"],
        ),
        (["parallel.vpp=2"], 2, ["parallel.vpp=2 interleaves", "got parallel.pp=1; set parallel.vpp to 1"]),
        (["parallel.vpp=0"], 2, ["parallel.vpp: got 0, need an integer greater than 0"]),
        (["parallel.pp=2"], 6, ["processes: got 6, need", "tp*ring*ulysses*pp = 1*2*1*2 = 4", "start 4 processes"]),
        (
            ["parallel.pp=2", "parallel.chunk_layers=[1, 2]"],
            4,
            [
                "chunk_layers=[1, 2] must hold 2 counts",
                "sum is model.num_layers=4",
                "set parallel.chunk_layers to [2, 2], or set parallel.chunk_layers to null",
            ],
        ),
        (["parallel.pp=2", "parallel.chunk_layers=[4]"], 4, ["chunk_layers=[4] must hold 2 counts"]),
        (
            ["parallel.pp=2", "parallel.chunk_layers=[0, 4]"],
            4,
            ["chunk_layers.0: got 0, need an integer greater than 0"],
        ),
        (["parallel.pp=2", "parallel.chunk_layers=[]"], 4, ["chunk_layers=[] must hold 2 counts"]),
        (
            ["parallel.pp=2", "parallel.vpp=2", "parallel.chunk_layers=[1, 3]"],
            4,
            ["chunk_layers=[1, 3] must hold 4 counts", "pp*vpp = 2*2 = 4", "to [1, 1, 1, 1]"],
        ),
        (
            ["parallel.pp=2", "parallel.vpp=2", "trainer.micro_batch_size=4", "trainer.global_batch_size=12"],
            4,
            [
                "global_batch_size=12 makes 3 micro-batches",
                "divides by parallel.pp=2",
                "set trainer.global_batch_size to 16, or set parallel.vpp to 1",
            ],
        ),
        (
            ["parallel.pp=4", "parallel.ring=1", "parallel.vpp=2", "model.num_layers=9", "trainer.micro_batch_size=2"],
            16,
            ["makes 2 micro-batches", "set trainer.global_batch_size to 32, or set parallel.vpp to 1"],
        ),
        ([], 3, ["processes: got 3", "1*2*1*1 = 2", "start 2 processes"]),
        (
            ["trainer.micro_batch_size=3"],
            2,
            [
                "global_batch_size=16",
                "3*1 = 3",
                "set trainer.global_batch_size to 18, or set trainer.micro_batch_size to 2",
            ],
        ),
        (["trainer.micro_batch_size=1", "trainer.global_batch_size=5"], 8, ["1*4 = 4", "dp = 8 processes / 2"]),
        (
            ["model.hidden_size=190"],
            2,
            [
                "hidden_size=190 must divide by model.num_heads=6",
                "set model.hidden_size to 192, or set model.num_heads to 5",
            ],
        ),
        (["model.hidden_size=198"], 2, ["= 33 must be even", "set model.hidden_size to 192"]),
        (["latent.width=18"], 2, ["latent.width=18 must divide by 4", "16 or 20"]),
        (["latent.channels=2"], 2, ["latent.channels=2 must equal model.in_channels=1"]),
        (["model.out_channels=2"], 2, ["model.out_channels=2 must equal model.in_channels=1"]),
        (["model.rope_max_seq_len=3"], 2, ["more than model.rope_max_seq_len=3", "set model.rope_max_seq_len to"]),
        (["networks.teacher.init=null"], 2, ["networks.teacher.init=null"]),
        (["networks.fake_score.optimizer=null"], 2, ["networks.fake_score.optimizer=null"]),
        (["encoders.text=none"], 2, ["data.negative_embedding=null"]),
        (["distillation.p_g.mean=null"], 2, ["p_g.mean is required when distillation.p_g.kind=lognormal"]),
        (["distillation.p_d.std=1"], 2, ["p_d.std=1.0 has no meaning"]),
        (["distillation.fixed_rollout_times=[1.0, 1.4, 1.5]"], 2, ["fixed_rollout_times", "must fall"]),
        (["distillation.fixed_rollout_times=[1.5]"], 2, ["got 1 times, need at least 3 for 4 steps"]),
        (["sampling.student_steps=[8]"], 2, ["sampling.student_times", "need at least 7 for 8 steps"]),
        (["stages.0.losses={}"], 2, ["stages.0 (scm).losses: got none, need an objective"]),
        (["stages.0.losses.flow=1"], 2, ["stages.0 (scm).losses: flow=1.0", "stage of its own"]),
        (["stages.1.student_update_freq=1"], 2, ["never trains fake_score, which dmd needs"]),
        (
            ["stages.0.student_update_freq=5"],
            2,
            ["stages.0 (scm).student_update_freq=5 leaves iterations to no network"],
        ),
        (
            ["stages.1.losses={dmd: 1}", "stages.1.tangent_warmup=5"],
            2,
            ["tangent_warmup=5 needs a loss with a tangent (scm or emd"],
        ),
        (["stages.1.name=scm"], 2, ["'scm' is used twice"]),
        (["stages=[]"], 2, ["stages: got [], need at least one with name"]),
        (["trainer.keep_every=150"], 2, ["trainer.keep_every=150 must be a multiple of trainer.checkpoint_every=100"]),
        (["trainer.keep_every=-100"], 2, ["trainer.keep_every: got -100, need an integer at least 0 (0: none)"]),
        (
            ["networks.student.optimizer.betas=[0, 1]"],
            2,
            ["betas.1: got 1, need a finite number at least 0 and less than 1"],
        ),
    ],
)
def test_a_run_that_cannot_work_is_refused_at_once(overrides, world_size, parts):
    start = time.perf_counter()
    message = error_of(*SIX_HEADS, *overrides, world_size=world_size)
    assert time.perf_counter() - start < 1.0
    for part in parts:
        assert part in message


def test_every_problem_is_named_with_its_path_whatever_else_is_broken():
    """Unknown key, wrong type, a rule within a section, a bound, a missing key, rules between sections: one message each."""
    overrides = (
        "trainer.log_evry=2",
        "data.prefetch=abc",
        "model.num_heads=3",
        "sampling.fps=-1",
        "latent.width=18",
        "what",
    )
    lines = error_of(*overrides, world_size=1).splitlines()
    for part in (
        "override 'what' is not key=value",
        "trainer.log_evry: unknown key; did you mean trainer.log_every?",
        "data.prefetch: got 'abc' (text), need an integer greater than 0",
        "model.hidden_size=128 must divide by model.num_heads=3; set model.hidden_size to 126",
        "sampling.fps: got -1, need an integer greater than 0",
        "latent.width=18 must divide by 4",
        "processes: got 1, need a multiple of",
    ):
        assert sum(line.startswith(part) for line in lines) == 1, (part, lines)
    assert len(lines) == len(overrides) + 1


def test_a_rule_says_nothing_about_a_value_that_was_refused():
    assert error_of("model.num_heads=many", "parallel.tp=4", world_size=8).splitlines() == [
        "model.num_heads: got 'many' (text), need an integer greater than 0"
    ]


def test_all_problems_are_reported_together():
    message = error_of(*SIX_HEADS, "parallel.tp=4", "latent.width=18", "networks.teacher.init=null")
    assert len(message.splitlines()) >= 3


@pytest.mark.parametrize(
    "stages",
    [
        "[{name: dcm, steps: 500, losses: {dcm: 1}}, {name: scm, steps: 2000, losses: {scm: 100}, tangent_warmup: 1000},"
        " {name: rcm, steps: 8000, losses: {scm: 100, dmd: 1}, student_update_freq: 5}]",
        "[{name: pure_scm, steps: 10, losses: {scm: 100}}]",
        "[{name: pure_dmd, steps: 10, losses: {dmd: 1}, student_update_freq: 5, lr: {student: 1e-6}}]",
        "[{name: flow, steps: 10, losses: {flow: 1}}]",
    ],
    ids=["staged", "pure_scm", "pure_dmd", "flow"],
)
def test_recipes_that_can_be_expressed(stages):
    validate(load_config(QUICKSTART, [f"stages={stages}"]), 2)


def test_flow_matching_needs_no_teacher_and_no_fake_score():
    overrides = ["stages=[{name: f, steps: 10, losses: {flow: 1}}]", "networks={student: {optimizer: {lr: 1}}}"]
    config = load_config(QUICKSTART, overrides)
    validate(config, 2)
    assert config.roles == config.trained_roles == ("student",)
