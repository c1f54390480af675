"""The planner's arithmetic against what is built: parameters of each rank; its peaks against dry runs; the command."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rcm_megatron.config import LatentConfig, load_config
from rcm_megatron.planner.memory import peak_on
from rcm_megatron.planner.shapes import Shapes, held_of
from tests import networks
from tests.distributed.harness import run_ranks
from tests.dryrun.worlds import Case, run_of, simulated

ROOT = Path(__file__).parents[2]
LAYOUTS = {"tp2": ({"tp": 2}, 2), "pp2": ({"pp": 2}, 2), "tp2_pp2_vpp2": ({"tp": 2, "pp": 2, "vpp": 2}, 4)}
WIDE = {"hidden_size": 1024, "num_heads": 8, "ffn_hidden_size": 2816, "in_channels": 16, "out_channels": 16}
LATENT = {"channels": 16, "frames": 8, "height": 64, "width": 64}
PEAKS = {
    "tp2_ulysses2": Case(4, {"tp": 2, "ulysses": 2}, layers=4),
    "selective": Case(1, changes={"memory": {"recompute": "selective"}}, layers=4),
    "ring2_attention": Case(2, {"ring": 2}, changes={"memory": {"recompute": "attention"}}, layers=4),
}


def small_run(family, parallel):
    run, model = run_of(Case(1, parallel, layers=4)), getattr(networks, family)(num_layers=4)
    latent = LatentConfig(channels=model.in_channels, frames=3, height=6, width=10)
    return replace(run, model=model, latent=latent)


def built(family, parallel, rank, world):
    """{role: what a rank holds}, of networks that are built."""
    from rcm_megatron.dryrun.world import become
    from rcm_megatron.parallel.groups import initialize_parallel
    from rcm_megatron.training.footprint import held_on_rank

    alone()
    become(rank, world_size=world, kind="gpu")
    run = small_run(family, parallel)
    return held_on_rank(run, initialize_parallel(run.parallel))


def inventory(run):
    from rcm_megatron.planner.inventory import read_inventory

    alone()
    found = read_inventory(run, "student")
    alone()
    return found


def alone():
    import torch.distributed as dist

    dist.destroy_process_group()


@pytest.mark.parametrize("family", ["wan", "cosmos"])
def test_a_rank_holds_what_the_inventory_says(family):
    read = run_ranks(inventory, 1, small_run(family, {}))[0]
    for parallel, world in LAYOUTS.values():
        run = small_run(family, parallel)
        for stage in range(run.parallel.pp):
            rank = stage * (world // run.parallel.pp)
            said = held_of(Shapes(run, world), dict.fromkeys(run.roles, read), stage=stage)
            assert said == run_ranks(built, 1, family, parallel, rank, world)[0], (parallel, stage)
            assert said["student"].elements > said["student"].narrow >= 0


@pytest.mark.parametrize("name", PEAKS)
def test_the_peak_is_near_that_of_a_dry_run(name):
    """Of networks that are wide enough for hidden states to count, and far from those that the formula was fitted to."""
    case = PEAKS[name]
    sections = {"model": WIDE | {"patch_size": [1, 2, 2]}, "latent": LATENT, "precision": {"params_dtype": "bf16"}}
    case = replace(case, changes=case.changes | sections)
    run = run_of(case)
    found = run_ranks(simulated, 1, case, 0, "gpu", True)[0]
    said = peak_on(Shapes(run, case.world), dict.fromkeys(run.roles, run_ranks(inventory, 1, run)[0]), stage=0)
    standing, peak = (
        sum(found["standing"].values()),
        max(sum(owners.values()) for update in found["updates"].values() for owners in update["held"].values()),
    )
    assert sum(said.standing.values()) == pytest.approx(standing, rel=2e-3)
    assert said.working == pytest.approx(peak - standing, rel=0.15)


def rcm(*arguments):
    command = [sys.executable, "-m", "rcm_megatron", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_command_writes_a_configuration_that_runs(tmp_path):
    config = "model_configs/wan2.1_t2v_1.3b_480p.yaml"
    files = [
        f"--write={tmp_path / 'best.yaml'}",
        f"--json={tmp_path / 'plan.json'}",
        f"--picture={tmp_path / 'plan.png'}",
    ]
    done = rcm("plan", config, "--gpus=16", "--top=3", *files)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "plan.json").read_text())
    first, *others = report["options"]
    assert "simulated" in done.stdout and report["simulated"] and len(others) == 2
    assert all(other["seconds_per_iteration"] >= first["seconds_per_iteration"] for other in others)
    assert f"sbatch --nodes=2 launch/slurm/train.sbatch {tmp_path / 'best.yaml'}" in done.stdout
    written = load_config(tmp_path / "best.yaml", world_size=16)
    assert {name: getattr(written.parallel, name) for name in ("tp", "ulysses", "ring", "pp", "vpp")} == {
        name: degree for name, degree in first["layout"].items() if name != "dp"
    }
    assert load_config(ROOT / config, first["overrides"], world_size=16).parallel == written.parallel
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_check_says_what_a_layout_takes_and_warns():
    config = "model_configs/wan2.1_t2v_14b_480p.yaml"
    fits, not_here = (rcm("check", config, "--world-size=64", f"--gpu={gpu}") for gpu in ("h100-80g", "no-gpu"))
    assert fits.returncode == 0 and "58." in fits.stdout.splitlines()[1] and "warning" not in fits.stderr
    assert not_here.returncode == 2 and "one of a100-80g" in not_here.stderr
    full = rcm("check", config, "--world-size=8", "--gpu=h100-80g")
    assert full.returncode == 0 and "warning: got 111." in full.stderr and "rcm plan CONFIG --gpus 8" in full.stderr


def test_a_number_of_gpus_without_a_legal_layout_is_refused():
    done = rcm("plan", "model_configs/wan2.1_t2v_14b_480p.yaml", "--gpus=7")
    assert done.returncode == 2 and "trainer.global_batch_size=64 must divide by micro_batch_size*dp" in done.stderr


def test_what_fits_nowhere_is_said_with_what_would_do():
    done = rcm("plan", "model_configs/wan2.1_t2v_14b_480p.yaml", "--gpus=2")
    assert done.returncode == 3 and "too many" in done.stdout and "of them would do" in done.stdout
