"""bf16 training through pipeline stages: dtypes of messages, gradients and main parameters, losses near those of fp32, replicas equal.

Blocks, patch embedding, text embedding and head are bf16; norms, modulation tables and the time path fp32 in the same network, so the
distributed optimizer holds buffers of both kinds. Stages have 2 and 1 blocks.
"""

import pytest
import torch
import torch.distributed as dist

from rcm_megatron.config import OptimizerConfig, ParallelConfig
from tests.distributed.faults import EMBEDDERS
from tests.distributed.harness import run_ranks
from tests.distributed.layouts import MICRO_BATCH
from tests.distributed.test_parity import build, run_of, samples_of, whole_batch
from tests.helpers import assert_close

LOSS_BOUND = 5e-3  # measured 1.5e-3 at most, for DMD
CHANGE_BOUND = 0.2  # of four Adam steps; measured 0.137
STEPS = 4  # of one stage with sCM and DMD, the odd ones train the fake score
OPTIMIZER = OptimizerConfig(lr=1e-3, betas=(0.0, 0.999), eps=1e-4, weight_decay=0.01, lr_warmup_steps=0)
LAYOUTS = {
    "pp2_dp2": (4, {"pp": 2, "chunk_layers": (2, 1)}),
    "tp2_pp2": (4, {"tp": 2, "pp": 2, "chunk_layers": (1, 2)}),
}
WIDE = ("norm", "modulation", "time_embedding.", "time_projection.")
"""What stays fp32 in a bf16 network."""


def train(parallel, dtype):
    """STEPS updates; every finding that the tests ask for, of this rank."""
    from rcm_megatron.objectives.plan import plan_step
    from rcm_megatron.parallel.pipeline import unwrapped
    from rcm_megatron.training.state import TrainState

    networks = build(ParallelConfig(**parallel), dtype, num_layers=3)
    run = run_of(ParallelConfig(**parallel), {"scm": 100.0, "dmd": 0.3}, optimizer=OPTIMIZER, num_layers=3)
    layout, stage, state, messages = networks.layout, run.stages[0], TrainState(run, networks), set()
    for chunks in networks.values():
        record_messages(unwrapped(chunks[0]), messages)
    losses, updated = {}, []
    for iteration in range(STEPS):
        step = plan_step(stage, iteration, max_rollout_steps=run.distillation.max_rollout_steps)
        done = state.update(step, samples_of(networks, iteration, MICRO_BATCH), stage=stage)
        updated.append(done.updated)
        for name, result in done.objectives.items():
            losses[f"{iteration}/{name}"] = whole_batch(layout.groups, result.loss_B, MICRO_BATCH)
        if "scm" in done.objectives:  # its loss is near 1 whatever the tangent: g is normalised
            norm_B = done.objectives["scm"].quantities["tangent_norm"]
            losses[f"{iteration}/tangent_norm"] = whole_batch(layout.groups, norm_B, MICRO_BATCH)
    student = unwrapped(networks["student"][0])
    return {
        "losses": losses,
        "updated": updated,
        "messages": messages,
        "parameters": {name: p.dtype for name, p in student.named_parameters()},
        "main_grads": {p.main_grad.dtype for p in student.parameters()},
        "optimizer": main_dtypes(state.trained["student"].optimizer),
        "drifting": drifting_replicas(networks, layout.groups),
        "weights": whole_weights(networks["student"], layout.groups),
    }


def record_messages(network, seen):
    """Add the dtype of each hidden state that ``network`` receives from the stage before to ``seen``."""
    receive = network.set_input_tensor

    def recording(input_tensor):
        seen.update(tensor.dtype for tensor in input_tensor if tensor is not None)
        receive(input_tensor)

    network.set_input_tensor = recording


def main_dtypes(optimizer):
    """dtypes of what Adam works on: the main shards and their two moments."""
    return {
        tensor.dtype
        for part in optimizer.chained_optimizers
        for group in part.optimizer.param_groups
        for parameter in group["params"]
        for tensor in (parameter, *(part.optimizer.state[parameter][m] for m in ("exp_avg", "exp_avg_sq")))
    }


def drifting_replicas(networks, groups):
    """Names of parameters whose replicas differ by a single bit: embedders over the stages, all parameters over dp."""
    drifting = []
    for network in ("student", "fake_score"):
        for name, parameter in networks[network][0].module.named_parameters():
            over = (groups.dp_cp, groups.pp) if name.startswith(EMBEDDERS) else (groups.dp_cp,)
            for group in over:
                replicas = [torch.empty_like(parameter) for _ in range(group.size())]
                dist.all_gather(replicas, parameter.detach().contiguous(), group=group)
                drifting += [f"{network}.{name}" for replica in replicas if not torch.equal(replica, parameter)]
    return drifting


def whole_weights(chunks, groups):
    """{parameter: whole tensor} on the first rank."""
    from rcm_megatron.checkpoint.models import gather_full

    gathered = gather_full(chunks, tp_group=groups.tp, pp_group=groups.pp)
    return {name: value.float().clone() for name, value in gathered if value is not None}


def initial_weights():
    networks = build(ParallelConfig(), torch.float32, num_layers=3)
    return whole_weights(networks["student"], networks.layout.groups)


def flat_change(weights, initial):
    """All parameters' change, as one vector."""
    return torch.cat([(weights[name] - initial[name]).flatten() for name in sorted(initial)])


@pytest.fixture(scope="module")
def initial():
    return run_ranks(initial_weights, 1)[0]


@pytest.fixture(scope="module")
def fp32(initial):
    (result,) = run_ranks(train, 1, {}, torch.float32)
    for name, weight in result["weights"].items():
        assert not torch.equal(initial[name], weight), f"{name} does not move"
    return result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bf16_training_through_stages(initial, fp32, layout):
    ranks, parallel = LAYOUTS[layout]
    results = run_ranks(train, ranks, parallel, torch.bfloat16)
    for rank, result in enumerate(results):
        assert result["updated"] == [True] * STEPS
        assert (
            result["losses"].keys()
            == fp32["losses"].keys()
            > {"0/scm", "0/dmd", "1/fake_score", "2/scm", "2/dmd", "3/fake_score"}
        )
        for name, loss in result["losses"].items():
            assert_close(f"rank {rank} {name}", fp32["losses"][name], loss, rel=LOSS_BOUND)
        assert result["main_grads"] == {torch.float32}
        assert result["optimizer"] == {torch.float32}
        assert result["drifting"] == []
        for name, dtype in result["parameters"].items():
            assert dtype == (torch.float32 if any(part in name for part in WIDE) else torch.bfloat16), name
    assert set().union(*(result["messages"] for result in results)) == {torch.bfloat16}
    changes = [flat_change(weights, initial) for weights in (fp32["weights"], results[0]["weights"])]
    assert_close("change of the weights", *changes, rel=CHANGE_BOUND)
