"""The same run of 20 steps on several layouts; resumed on the same and on another; with a rank killed; with NaNs."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.faults import RCM_ITERATION, SCM_ITERATION
from tests.distributed.harness import RankError
from tests.distributed.run_checks import LOSS_BOUND, Runs, assert_same_change, assert_same_curves
from tests.distributed.tiny_run import GLOBAL_BATCH, STEPS, initial_weights, records

LAYOUTS = {
    "one": (1, []),
    "tp2": (2, ["parallel.tp=2"]),
    "ring2": (2, ["parallel.ring=2"]),
    "dp2": (2, []),
    "tp2_ring2": (4, ["parallel.tp=2", "parallel.ring=2"]),
    "pp2": (2, ["parallel.pp=2"]),
    "pp2_dp2": (4, ["parallel.pp=2"]),
}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("tiny"), LAYOUTS)


def test_the_reference_run_trains_both_networks_on_all_objectives(runs):
    results, lines = runs.undisturbed("one")
    assert len(lines) == STEPS
    assert all(math.isfinite(v) for line in lines for v in line.values() if isinstance(v, float))
    both = [line["iteration"] for line in lines if "scm/loss" in line and "dmd/loss" in line]
    fake_score = [line["iteration"] for line in lines if "fake_score/loss" in line]
    assert RCM_ITERATION in both and len(both) >= 7 and len(fake_score) >= 7, (both, fake_score)
    assert [line["warmup_ratio"] for line in lines[:5]] == pytest.approx([0, 1 / 3, 2 / 3, 1, 1])
    counters = results[0][0]
    assert counters["updates/student"] + counters["updates/fake_score"] == STEPS and counters["refused_updates"] == 0
    initial = initial_weights()
    for network, weights in results[0][1].items():
        unmoved = [name for name in initial if torch.equal(weights[name], initial[name])]
        assert not unmoved, f"{network}: {unmoved} did not move"


@pytest.mark.parametrize("layout", ["tp2", "ring2", "dp2", "tp2_ring2", "pp2"])
def test_layout_gives_the_same_run(runs, layout):
    expected, lines = runs.undisturbed("one")
    got, their_lines = runs.undisturbed(layout)
    assert_same_curves(lines, their_lines, rel=LOSS_BOUND)
    assert_same_change(runs.initial, expected, got)


@pytest.mark.parametrize("layout", ["tp2", "dp2"])
def test_resume_on_the_same_layout_is_identical(runs, layout):
    expected, lines = runs.undisturbed(layout)
    runs.copy_until_step_10(layout, f"{layout}_again")
    got, their_lines = runs.start(layout, f"{layout}_again")
    assert their_lines == lines
    for (counters, weights, _), (their_counters, their_weights, _) in zip(expected, got, strict=True):
        assert counters == their_counters
        for network, tensors in weights.items():
            different = [
                n for n, w in tensors.items() if w is not None and not torch.equal(w, their_weights[network][n])
            ]
            assert not different, f"{network}: {different}"


@pytest.mark.parametrize(("before", "after"), [("tp2", "ring2"), ("dp2", "tp2_ring2")])
def test_resume_on_another_layout_gives_the_same_run(runs, before, after):
    expected, lines = runs.undisturbed("one")
    name = f"{before}_then_{after}"
    runs.copy_until_step_10(before, name)
    got, their_lines = runs.start(after, name)
    assert_same_curves(lines, their_lines, rel=LOSS_BOUND)
    assert_same_change(runs.initial, expected, got)


def data_by_iteration(results):
    """{iteration: {global sample index: row}} of all ranks; ranks of one replica must agree."""
    merged = {}
    for _, _, noted in results:
        for iteration, pairs in noted["data"].items():
            for index, row in pairs:
                assert merged.setdefault(iteration, {}).setdefault(index, row) == row, (iteration, index)
    return merged


@pytest.fixture(scope="module")
def data_of_one(runs):
    results, _ = runs.start("one", "data_of_one", "trainer.stop_after=7", fault="data_of_each_update")
    return data_by_iteration(results)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("tp2_ring2", []), ("pp2_dp2", [])),
        (("dp2", ["trainer.micro_batch_size=1"]), ("one", ["trainer.micro_batch_size=4"])),
    ],
)
def test_a_change_of_layout_reads_the_data_on_in_the_same_order(runs, data_of_one, before, after):
    """Over both halves each update takes the samples that one rank without a break takes: none twice in an epoch, none left out."""
    name, found = f"data_{before[0]}", {}
    for (layout, changes), end in ((before, 3), (after, 7)):
        results, _ = runs.start(layout, name, *changes, f"trainer.stop_after={end}", fault="data_of_each_update")
        half = data_by_iteration(results)
        assert not found.keys() & half.keys(), "the second half begins where the first ended"
        found |= half
    assert found == data_of_one and sorted(found) == list(range(7))
    order = [row for iteration in range(7) for _, row in sorted(found[iteration].items())]
    assert [index for i in range(7) for index in sorted(found[i])] == list(range(28))
    assert sorted(order[:13]) == sorted(order[13:26]) == list(range(13)), "two epochs of 13 samples, each of them once"


def test_ranks_of_a_replica_that_read_other_rows_are_an_error_that_names_them(runs):
    with pytest.raises(RankError, match=r"on other ranks of one model replica: rank 0: \[\d+, .*; rank 1: \[\d+, "):
        runs.start("tp2", "rows", "data.on_error=skip", fault="other_rows_on_the_last_rank")
    runs.start("tp2", "rows_again", "data.on_error=skip", "trainer.stop_after=2")


def test_a_save_that_fails_is_made_up_for_by_the_next(runs):
    ending = ["trainer.checkpoint_every=3", "trainer.stop_after=6"]
    _, lines = runs.start("dp2", "full_at_3", *ending, fault="disk_full_at_3")
    assert len(lines) == 6
    assert sorted(path.name for path in (runs.folder / "full_at_3" / "checkpoints").iterdir()) == [
        "iter_0000006",
        "latest",
    ]


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_last_save_that_fails_fails_the_run(runs, background):
    ending = ["trainer.checkpoint_every=3", "trainer.stop_after=6", f"trainer.async_checkpoint={background}"]
    name = f"full_at_6_{background}"
    with pytest.raises(RankError, match=r"iter_0000006 WAS NOT SAVED: rank 1: OSError\(28"):
        runs.start("dp2", name, *ending, fault="disk_full_at_the_end")
    assert sorted(path.name for path in (runs.folder / name / "checkpoints").iterdir()) == ["iter_0000003", "latest"]


def test_a_killed_rank_and_a_restart_leave_the_curve_as_it_was(runs):
    """Real processes under torchrun: SIGKILL of rank 1 in iteration 13 while rank 0 waits for it; torchrun starts both again."""
    _, lines = runs.undisturbed("ring2")
    out = runs.folder / "killed"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command += ["-m", "tests.distributed.faults", "train", str(runs.config), "parallel.ring=2", f"output_dir={out}"]
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Signal 9" in done.stderr or "exitcode: -9" in done.stderr, done.stderr[-3000:]
    assert "resuming at iteration 10" in done.stdout
    assert_same_curves(lines, records(out), rel=0.0)


@pytest.mark.parametrize(
    ("fault", "objective", "iteration"),
    [("nan_from_teacher", "scm", SCM_ITERATION), ("nan_from_fake_score", "dmd", RCM_ITERATION)],
)
def test_a_nan_sample_is_masked_and_counted_in_every_layout(runs, fault, objective, iteration):
    """A NaN in one token on one rank takes that sample out of the loss on all ranks, and nothing else."""
    end = f"trainer.stop_after={iteration + 2}"
    expected, lines = runs.start("one", f"{fault}_one", end, fault=fault)
    assert [line.get(f"{objective}/nan_samples") for line in lines].count(1.0) == 1
    hit = lines[iteration]
    assert hit[f"{objective}/nan_samples"] == 1 and hit["updated"] and hit["refused_updates"] == 0
    assert all(math.isfinite(v) for line in lines for v in line.values() if isinstance(v, float))
    assert lines[-1]["nan_samples"] == expected[0][0]["nan_samples"] == 1
    undisturbed = runs.undisturbed("one")[1]
    assert (
        lines[:iteration] == undisturbed[:iteration] and hit["gradient_norm"] != undisturbed[iteration]["gradient_norm"]
    )
    for layout in ("ring2", "pp2"):
        got, their_lines = runs.start(layout, f"{fault}_{layout}", end, fault=fault)
        assert_same_curves(lines, their_lines, rel=LOSS_BOUND)
        assert_same_change(runs.initial, expected, got, networks=["student"])


def test_a_nan_latent_costs_its_sample_and_no_update(runs):
    _, lines = runs.start("one", "one_nan_latent", f"trainer.stop_after={SCM_ITERATION + 2}", fault="one_nan_latent")
    hit = lines[SCM_ITERATION]
    assert hit["scm/nan_samples"] == 1 and hit["updated"] and math.isfinite(hit["gradient_norm"])
    assert lines[-1]["nan_samples"] == 1 and lines[-1]["refused_updates"] == 0


@pytest.mark.parametrize(
    ("layout", "fault", "iteration"),
    [(layout, "nan_in_backward", RCM_ITERATION) for layout in ("one", "tp2", "dp2", "pp2")]
    + [("dp2", "only_nan_latents", SCM_ITERATION)],
)
def test_a_step_without_a_gradient_of_use_is_refused_and_counted(runs, layout, fault, iteration):
    """One that is not finite, or one of no sample: weights, moments and EMA stay as they were, to the bit, on every rank."""
    results, lines = runs.start(layout, f"{fault}_{layout}", f"trainer.stop_after={iteration + 3}", fault=fault)
    hit, dropped = lines[iteration], 0 if fault == "nan_in_backward" else GLOBAL_BATCH
    assert not hit["updated"] and hit["refused_updates"] == 1
    assert math.isfinite(hit["gradient_norm"]) == math.isnan(hit["scm/loss"]) == (dropped > 0)
    assert hit["updates/student"] == lines[iteration - 1]["updates/student"]
    for rank, (counters, weights, noted) in enumerate(results):
        assert counters["refused_updates"] == 1 and counters["nan_samples"] == dropped
        before, after = noted["before"], noted["after"]
        for name, tensor in before["weights"].items():
            assert tensor is None or torch.equal(tensor, after["weights"][name]), f"rank {rank}: {name} changed"
        for kind in ("moments", "ema"):
            assert len(before[kind]) > 0
            assert all(torch.equal(a, b) for a, b in zip(before[kind], after[kind], strict=True)), (
                f"rank {rank}: {kind}"
            )
        finite = [bool(torch.isfinite(w).all()) for w in weights["student"].values() if w is not None]
        assert all(finite)
    assert all(line["updated"] for line in lines if line["iteration"] != iteration)
