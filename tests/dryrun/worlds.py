"""The same runs twice: on real Gloo ranks and as ranks that are not there, both under a meter; functions of a rank for the harness."""

import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from rcm_megatron.config import RunConfig, build
from tests.distributed.tiny_run import tiny_config


@dataclass(frozen=True)
class Case:
    """A layout and policies of the tiny run."""

    world: int
    parallel: dict = field(default_factory=dict)
    changes: dict = field(default_factory=dict)
    """Sections to merge."""
    layers: int = 2
    batch: int = 2
    """Samples, two of which are a micro-batch."""
    rollout: int = 1


NONE, SELECTIVE = {"memory": {"recompute": "none"}}, {"memory": {"recompute": "selective"}}
ATTENTION = {"memory": {"recompute": "attention"}}
FREED = {"memory": {"free_idle_gradients": True}}
SELECTIVE_FREED = {"memory": SELECTIVE["memory"] | FREED["memory"]}
SHARDED = {"networks": {"teacher": {"weights": "sharded"}}}
IN_PIECES = {"networks": {"student": {"weights": "sharded"}, "fake_score": {"weights": "sharded"}}}
BF16 = {"precision": {"params_dtype": "bf16"}}
CASES = {
    "one": Case(1),
    "one_none": Case(1, changes=NONE),
    "one_selective": Case(1, changes=SELECTIVE),
    "one_bf16_freed": Case(1, changes=BF16 | FREED),
    "dp2_sharded": Case(2, changes=SHARDED, batch=4),
    "dp2_in_pieces": Case(2, changes=IN_PIECES, batch=4),
    "ring2_in_pieces_bf16": Case(2, {"ring": 2}, changes=IN_PIECES | BF16 | NONE),
    "pp2_dp2_in_pieces": Case(4, {"pp": 2}, changes=IN_PIECES | SELECTIVE_FREED, batch=4),
    "tp2": Case(2, {"tp": 2}),
    "ring2": Case(2, {"ring": 2}),
    "ring2_attention": Case(2, {"ring": 2}, changes=ATTENTION),
    "ring2_selective": Case(2, {"ring": 2}, changes=SELECTIVE),
    "ulysses2": Case(2, {"ulysses": 2}),
    "pp2": Case(2, {"pp": 2}, batch=4),
    "pp2_vpp2": Case(2, {"pp": 2, "vpp": 2}, layers=4, batch=4),
    "tp2_ring2_pp2": Case(8, {"tp": 2, "ring": 2, "pp": 2}, batch=4),
}


def run_of(case: Case) -> RunConfig:
    """Two kinds of update: sCM with DMD, and the fake score, with one stage of two iterations a round."""
    given = tiny_config(Path("nowhere"), num_layers=case.layers)
    given["networks"]["teacher"]["init"] = None
    given["parallel"] = dict(case.parallel)
    given["stages"] = [{"name": "rcm", "steps": 8, "losses": {"scm": 1.0, "dmd": 1.0}, "student_update_freq": 2}]
    given["distillation"]["max_rollout_steps"] = case.rollout
    given["trainer"]["global_batch_size"] = case.batch
    for section, fields in case.changes.items():
        for name, value in fields.items():
            inner = given.setdefault(section, {})
            inner[name] = inner[name] | value if isinstance(value, dict) else value
    return build(RunConfig, given)


def real(names: list[str]) -> dict:
    """{case: what `measure` says of this rank of a real run}. The ranks' groups are made anew for each case."""
    from megatron.core import parallel_state

    from rcm_megatron.dryrun.surroundings import no_files
    from rcm_megatron.parallel.groups import initialize_parallel
    from rcm_megatron.platform.megatron import prepare_megatron

    prepare_megatron()
    found = {}
    for name in names:
        run = run_of(CASES[name])
        found[name] = _measured(run, initialize_parallel(run.parallel), no_files(has_memory=True))
        parallel_state.destroy_model_parallel()
    return found


def _measured(run, groups, meets):
    from rcm_megatron.dryrun.counts import Groups
    from rcm_megatron.dryrun.driver import measure

    meter = _gloo_meter()(Groups(groups, gpus_per_node=2), device_type="cpu")
    with meter:
        return measure(run, groups, meter, meets=meets)


@cache
def _gloo_meter():
    import torch

    from rcm_megatron.dryrun.meter import Meter

    class GlooMeter(Meter):
        """Knows what Gloo does, and no other backend: its reduce-scatter is an all-reduce in a buffer of its own, of which it splits this
        rank's part off; and its threads let go of a message a moment after the end of the wait for it."""

        sent = False

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if self.sent and func.namespace != "c10d":
                time.sleep(1e-3)
            self.sent = func.namespace == "c10d"
            if func is torch.ops.aten.split.Tensor and not self.device.knows(args[0].untyped_storage()):
                return func(*args, **(kwargs or {}))
            return super().__torch_dispatch__(func, types, args, kwargs)

    return GlooMeter


def dry(names: list[str], rank: int, world: int) -> dict:
    """{case: what `measure` says of ``rank`` of a world that is not there}."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from rcm_megatron.dryrun.surroundings import no_files
    from rcm_megatron.dryrun.world import become, without_memory
    from rcm_megatron.parallel.groups import initialize_parallel

    dist.destroy_process_group()
    become(rank, world_size=world, kind="cpu")
    found = {}
    for name in names:
        run = run_of(CASES[name])
        groups = initialize_parallel(run.parallel)
        with without_memory(lambda launch: None, kind="cpu"):
            found[name] = _measured(run, groups, no_files())
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return found


def simulated(case: Case, rank: int, kind: str, whole: bool) -> dict:
    """`simulate`, in a process of its own."""
    import torch.distributed as dist

    from rcm_megatron.dryrun.rank import simulate

    dist.destroy_process_group()
    found = simulate(run_of(case), rank=rank, world_size=case.world, kind=kind, gpus_per_node=2, whole=whole)
    dist.destroy_process_group()
    return found


def inventory(dtype: str):
    """`read_inventory` of the tiny run's student."""
    import torch.distributed as dist

    from rcm_megatron.planner.inventory import read_inventory

    dist.destroy_process_group()
    found = read_inventory(run_of(Case(1, changes={"precision": {"params_dtype": dtype}})), "student")
    dist.destroy_process_group()
    return found
