"""The planner's parts that need no network: hardware tables, candidates, schedule, seconds."""

import json
from dataclasses import replace

import pytest

from rcm_megatron.config import ConfigError, load_config
from rcm_megatron.config.validate import is_valid
from rcm_megatron.planner.candidates import POLICIES, layouts_of
from rcm_megatron.planner.cost import Schedule, cost_of, is_inside
from rcm_megatron.planner.hardware import HARDWARE, hardware_of
from rcm_megatron.planner.inventory import Inventory, Weight
from rcm_megatron.planner.memory import GIB, peak_of
from rcm_megatron.planner.question import asked
from rcm_megatron.planner.search import search, smallest_world
from rcm_megatron.planner.shapes import Shapes
from rcm_megatron.requests import PlanRequest
from tools import simulate_scaling as scaling

H100 = HARDWARE["h100-80g"]
HIDDEN, FFN = 5120, 13824


@pytest.fixture(scope="module")
def run():
    whole = [f"networks.{role}.weights=resident" for role in ("student", "fake_score")]
    layout = ["parallel={tp: 4, ulysses: 2}", "memory.recompute=full"]
    return load_config("model_configs/wan2.1_t2v_14b_480p.yaml", [*layout, *whole])


@pytest.fixture(scope="module")
def inventories(run):
    """The large linears of Wan2.1 14B, bf16, all cut by tensor parallelism."""
    shapes = {
        "self_attn.linear_qkv": (3 * HIDDEN, HIDDEN, "tokens"),
        "self_attn.linear_proj": (HIDDEN, HIDDEN, "tokens"),
        "cross_attn.linear_q": (HIDDEN, HIDDEN, "tokens"),
        "cross_attn.linear_kv": (2 * HIDDEN, HIDDEN, "text"),
        "cross_attn.linear_proj": (HIDDEN, HIDDEN, "tokens"),
        "mlp.linear_fc1": (FFN, HIDDEN, "tokens"),
        "mlp.linear_fc2": (HIDDEN, FFN, "tokens"),
    }
    weights = Inventory(
        Weight(name=f"{name}.weight", place="block", shape=(out, into), width=2, is_split=True, rows=rows)
        for name, (out, into, rows) in shapes.items()
    )
    return dict.fromkeys(run.roles, weights)


# ---- what is asked


def test_a_larger_teacher_and_other_videos_are_overrides(run):
    """5 s of 81 frames are 21 latent frames; the student begins as the small teacher, whose place the large one takes."""
    small = load_config("wan2.1-t2v-1.3b")
    request = PlanRequest(gpus=64, teacher="wan2.1-t2v-14b", resolution=(720, 1280), seconds=5.0)
    overrides = list(asked(small, request))
    asked_for = load_config("wan2.1-t2v-1.3b", overrides)
    assert asked_for.latent.shape_CTHW == (16, 21, 90, 160)
    assert asked_for.model_of("teacher") == asked_for.model_of("fake_score") == run.model
    assert asked_for.model_of("student") == small.model and asked_for.init_of("student") == small.init_of("teacher")
    assert asked_for.init_of("teacher") == asked_for.init_of("fake_score") == run.init_of("teacher")
    assert list(asked(asked_for, request)) == overrides


def test_the_vae_of_48_channels_makes_16_pixels_one():
    wide = load_config("wan2.2-ti2v-5b")
    assert list(asked(wide, PlanRequest(gpus=8, resolution=(704, 1280)))) == ["latent.height=44", "latent.width=80"]
    with pytest.raises(ConfigError, match="got height 728, need a multiple of 16.*720 is one"):
        list(asked(wide, PlanRequest(gpus=8, resolution=(728, 1280))))
    with pytest.raises(ConfigError, match="--seconds: got -1, need"):
        list(asked(wide, PlanRequest(gpus=8, seconds=-1.0)))


# ---- hardware


def test_a_file_may_change_a_known_table(tmp_path):
    path = tmp_path / "ours.json"
    path.write_text(json.dumps({"like": "h100-80g", "between_gbs": 25, "efficiency": {"linear": 0.5}}))
    ours = hardware_of(str(path))
    expected = replace(H100, name="ours", between_gbs=25.0, efficiency=replace(H100.efficiency, linear=0.5))
    assert ours == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "need a JSON file"),
        ("[1]", "need an object"),
        ('{"like": "h100"}', "like: got 'h100'; need one of"),
        ('{"like": "h100-80g", "peek_tflops": 3}', "peek_tflops"),
        ('{"like": "h100-80g", "peak_tflops": -3}', "peak_tflops"),
        ('{"like": "h100-80g", "efficiency": {"linear": 1.5}}', "efficiency.linear"),
        ('{"peak_tflops": 3}', "memory_gib"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path, text, says):
    path = tmp_path / "ours.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="ours.json") as caught:
        hardware_of(str(path))
    assert says in str(caught.value)


def test_unknown_hardware_is_refused_with_the_known():
    with pytest.raises(ConfigError, match="h100; need one of a100-80g, h100-80g"):
        hardware_of("h100")
    with pytest.raises(ConfigError, match="nowhere.json"):
        hardware_of("nowhere.json")


# ---- candidates


def test_every_candidate_is_legal_and_the_shipped_layout_is_one(run):
    found = list(layouts_of(run, 64, gpus_per_node=8))
    assert all(is_valid(candidate, 64) for candidate in found)
    assert run.parallel in [candidate.parallel for candidate in found]
    assert len({str(candidate.parallel) for candidate in found}) == len(found) > 100
    assert max(candidate.parallel.tp for candidate in found) == 8
    assert {candidate.parallel.vpp for candidate in found} == {1, 2}


def test_policies_reach_the_networks_that_they_are_of(run):
    cheapest, dearest = POLICIES[0].applied_to(run), POLICIES[-1].applied_to(run)
    assert cheapest.networks["teacher"].weights == "resident" and cheapest.memory.recompute == "none"
    assert dearest.networks["teacher"].weights == "offloaded" and dearest.networks["student"].weights == "sharded"
    assert cheapest.networks["student"].weights == "resident"
    assert dearest.networks["student"].offload_optimizer and dearest.networks["fake_score"].offload_optimizer
    assert is_valid(dearest, 64) and len(set(POLICIES)) == len(POLICIES) == 96


# ---- time


def test_a_schedule_is_the_mean_of_a_run(run):
    """One iteration in ten is of the student, rollouts of one to four steps are as frequent."""
    steps = Schedule.of(run).steps
    assert sum(share for share, *_ in steps) == pytest.approx(1.0)
    student = {step.rollout_steps: share for share, step, _ in steps if step.trained == "student"}
    assert student == pytest.approx(dict.fromkeys(range(1, 5), 0.025))


def test_seconds_by_hand(run, inventories):
    """tp=1, one node of eight, dp=8, one micro-batch, fake score's iterations alone: FLOPs over peak and share."""
    stage = replace(run.stages[0], losses={"dmd": 1.0}, student_update_freq=10**6, steps=10**6)
    stages = (replace(stage, steps=2),)  # the first two iterations: a student's, a fake score's
    alone = replace(run, stages=stages, parallel=replace(run.parallel, tp=1, ulysses=1))
    alone = replace(alone, trainer=replace(run.trainer, global_batch_size=8))
    alone = replace(alone, distillation=replace(run.distillation, max_rollout_steps=1))
    shapes, schedule = Shapes(alone, 8), Schedule.of(alone)
    ((share, *rest),) = [kind for kind in schedule.steps if kind[1].trained == "fake_score"]
    only = replace(schedule, steps=[(1.0, *rest)])
    cost = cost_of(shapes, inventories, H100, only)
    tokens = 32760
    own, cross = (4.0 * tokens * HIDDEN * 40 * keys for keys in (tokens, 512))
    linears = 2.0 * 40 * (tokens * (6 * HIDDEN * HIDDEN + 2 * HIDDEN * FFN) + 512 * 2 * HIDDEN * HIDDEN)
    peak = 989e12
    # the rollout, the fake score's forward, and again in its backward; gradients of both factors
    assert share == 0.5
    assert cost.seconds["linear"] == pytest.approx((3 + 2) * linears / (peak * 0.7))
    assert cost.seconds["attention"] == pytest.approx(3 * (own + cross) / (peak * 0.6))
    assert cost.seconds["attention backward"] == pytest.approx(2.5 * (own + cross) / (peak * 0.5))
    assert cost.seconds["tensor parallel"] == cost.seconds["pipeline fills and drains"] == 0.0
    assert "attention jvp" not in cost.seconds


def test_a_pipeline_waits_for_its_fill(run, inventories):
    deep = replace(run, parallel=replace(run.parallel, tp=1, ulysses=1, pp=4))
    deep = replace(deep, trainer=replace(run.trainer, global_batch_size=32))
    interleaved = replace(deep, parallel=replace(deep.parallel, vpp=2))
    waits = []
    for laid_out in (deep, interleaved):
        seconds = cost_of(Shapes(laid_out, 16), inventories, H100, Schedule.of(laid_out)).seconds
        once = ("pipeline fills and drains", "sharded weights", "gradients and weights", "optimizer and offload")
        busy = sum(value for name, value in seconds.items() if name not in once)
        waits.append(seconds["pipeline fills and drains"] / busy)
    assert waits == pytest.approx([3 / 8, 3 / 16])


@pytest.mark.parametrize(
    ("world", "group", "inside"),
    [(64, "tp", True), (64, "ulysses", True), (64, "dp_cp", False), (8, "dp_cp", True), (64, "pp", False)],
)
def test_links_of_groups(run, world, group, inside):
    assert is_inside(Shapes(run, world), group, 8) is inside


# ---- the search


def test_less_memory_asks_for_dearer_policies(run, inventories):
    """Options fit, the fastest first; with less memory none is faster, and in the end nothing fits, but on more GPUs."""
    found = [search(run, 64, inventories, replace(H100, memory_gib=size)) for size in (140.0, 40.0, 10.0)]
    assert len(found[0].fitting) > len(found[1].fitting) > len(found[2].fitting) == 0
    for one, size in zip(found, (140.0, 40.0, 10.0), strict=True):
        seconds = [option.cost.step for option in one.fitting]
        assert seconds == sorted(seconds)
        assert all(option.peak.total <= (size - 5.5) * GIB for option in one.fitting)
        assert all(option.peak.total > (size - 5.5) * GIB for option in one.refused)
    assert found[1].fitting[0].cost.step > found[0].fitting[0].cost.step


def test_the_next_number_of_gpus_that_would_do(run, inventories):
    more = smallest_world(run, 2, inventories, H100)
    assert more is not None and more[0] in (4, 8) and not search(run, 2, inventories, H100).fitting
    assert peak_of(Shapes(more[1].run, more[0]), inventories).total <= H100.usable_gib * GIB


# ---- tables


def test_tables_compare_what_they_say(run, inventories):
    """Each row's layout is of its kind; rings and Ulysses of one degree; more GPUs take less time."""
    planner = scaling.Planner(run, inventories, H100)
    found = {row[0]: row[1] for row in scaling.kinds(planner, 64)}
    assert "pp" not in found["no cp, no pp"] and "tp" in found["tp and cp, no pp"]
    assert {"tp", "pp"} <= set(found["tp, cp and pp"].split()) and "tp" not in found["cp and pp, no tp"]
    ways = [row[:2] for row in scaling.context(planner, 64, 8)]
    assert [way for way, _ in ways] == ["ulysses 1 ring 8", "ulysses 2 ring 4", "ulysses 4 ring 2", "ulysses 8 ring 1"]
    assert all(part in layout for (way, layout) in ways for part in way.replace("ulysses 1 ", "").split(" ring 1"))
    longer = planner.with_video(720, 10)
    assert longer.run.latent.shape_CTHW == (16, 41, 90, 160)
    assert longer.fastest(256).cost.step > 2 * planner.fastest(256).cost.step > 2 * planner.fastest(512).cost.step
