"""Replay a golden file (numbers of NVlabs/rcm) on any parallel layout and compare losses, outputs and raw gradients.

    rcm conformance FILE                                                        # one process
    torchrun --nproc-per-node 4 -m rcm_megatron conformance FILE tp=2 ring=2    # the same on four

The file's format is that of tests/golden/README.md; width, depth, batch and token count are read from it. Prints a line per case
with the largest relative Frobenius error of the loss, of each stored output and of each stored gradient; the exit status is 1 when
one is past its bound (twice the bound of the README when the sums run over more than one rank).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rcm_megatron.conformance.golden import Golden, GoldenCase, ReplayDraws, load_golden, relative_error
from rcm_megatron.errors import InputError
from rcm_megatron.platform.device import init_distributed
from rcm_megatron.platform.megatron import prepare_megatron
from rcm_megatron.requests import ConformanceRequest

prepare_megatron()

from rcm_megatron.checkpoint.models import gather_full  # noqa: E402
from rcm_megatron.checkpoint.translate import from_internal  # noqa: E402
from rcm_megatron.config import (  # noqa: E402
    DistillationConfig,
    LatentConfig,
    ModelConfig,
    ParallelConfig,
    StageConfig,
    TimeDistribution,
)
from rcm_megatron.dual import Dual  # noqa: E402
from rcm_megatron.families.wan.settings import WanModelConfig  # noqa: E402
from rcm_megatron.inputs import NetworkInput  # noqa: E402
from rcm_megatron.networks.build import build_chunks  # noqa: E402
from rcm_megatron.networks.roles import Networks  # noqa: E402
from rcm_megatron.networks.weights import load_weights  # noqa: E402
from rcm_megatron.objectives.plan import Step, plan_step  # noqa: E402
from rcm_megatron.objectives.samples import Samples  # noqa: E402
from rcm_megatron.parallel.groups import ParallelGroups, initialize_parallel  # noqa: E402
from rcm_megatron.parallel.pipeline import (  # noqa: E402
    evaluate,
    reduce_gradients,
)
from rcm_megatron.training.optimizer import gather_main_grads, wrap_ddp  # noqa: E402
from rcm_megatron.training.step import accumulate_step  # noqa: E402

NETWORK_BOUND = 2e-6
"""v and t_v of the bare network; measured 2e-7 on one rank."""


@dataclass(frozen=True)
class Error:
    """One compared quantity."""

    name: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound


def model_config(golden: Golden) -> ModelConfig:
    c = golden.config
    return WanModelConfig(
        num_layers=c["num_layers"],
        hidden_size=c["dim"],
        num_heads=c["num_heads"],
        ffn_hidden_size=c["ffn_dim"],
        in_channels=c["in_dim"],
        out_channels=c["out_dim"],
        patch_size=tuple(c["patch_size"]),
        text_dim=c["text_dim"],
        text_len=golden.cond.shape[1],
        freq_dim=c["freq_dim"],
    )


def case_settings(case: GoldenCase) -> tuple[StageConfig, DistillationConfig, dict[str, Any]]:
    """Our configuration of an official case."""
    c = case.config
    stage = StageConfig(
        name=case.name,
        steps=case.iteration + 1,
        losses=case.loss_weights,
        tangent_warmup=c["tangent_warmup"],
        student_update_freq=c["student_update_freq"],
    )
    distillation = DistillationConfig(
        teacher_guidance=c["teacher_guidance"],
        p_g=TimeDistribution(kind="lognormal", mean=0.7, std=1.6),
        p_d=TimeDistribution(kind="uniform_shift", shift=5.0),
        max_rollout_steps=c["max_simulation_steps_fake"],
        fixed_rollout_times=case.mid_times,
    )
    return stage, distillation, case.settings


def step_of(case: GoldenCase, stage: StageConfig, distillation: DistillationConfig) -> Step:
    """The iteration's plan. The official cases force the objective, so only the counts are the iteration's own."""
    plan = plan_step(stage, case.iteration, max_rollout_steps=distillation.max_rollout_steps)
    return replace(plan, trained=case.trained, objectives=(case.objective,), rollout_steps=case.rollout_steps)


def samples_of(golden: Golden, case: GoldenCase, networks: Networks, *, micro_batch_size: int) -> Samples:
    """This data-parallel rank's share of the file's batch. Raises InputError where it does not divide."""
    groups, layout = networks.layout.groups, networks.layout
    count = len(golden.x0)
    if count % (groups.dp_size * micro_batch_size):
        raise InputError(
            f"a batch of {count} does not divide by dp*micro_batch_size = {groups.dp_size}*{micro_batch_size}"
        )
    share = count // groups.dp_size
    part = slice(groups.dp_rank * share, (groups.dp_rank + 1) * share)
    return Samples(
        layout.shard(golden.x0[part]),
        golden.cond[part].transpose(0, 1).contiguous(),
        golden.uncond[part].transpose(0, 1).contiguous(),
        ReplayDraws(case, part),
        micro_batch_size=micro_batch_size,
    )


def whole_batch(local: Tensor, groups: ParallelGroups) -> Tensor:
    """Values [b, ...] of all data-parallel ranks."""
    if groups.dp_size == 1:
        return local
    gathered = [torch.empty_like(local) for _ in range(groups.dp_size)]
    dist.all_gather(gathered, local.contiguous(), group=groups.dp)
    return torch.cat(gathered)


def whole_output(name: str, value: Tensor, networks: Networks) -> Tensor:
    local = value[0] if "time" in name else networks.layout.gather(value)
    return whole_batch(local, networks.layout.groups)


def df_dt(outputs: Mapping[str, Tensor]) -> Tensor:
    """The official code's diagnostic −cos (F − F_teacher) − sin xt − dF."""
    t, F, F_teacher, xt, dF = (outputs[name] for name in ("time", "F_theta", "F_teacher", "xt", "dF"))
    return -torch.cos(t) * (F - F_teacher) - torch.sin(t) * xt - dF


def replay(golden: Golden, case: GoldenCase, networks: Networks, *, micro_batch_size: int) -> Iterator[Error]:
    """Run one case through the training step itself and compare all that the file holds of it."""
    stage, distillation, objectives = case_settings(case)
    groups = networks.layout.groups
    bounds = case.bounds.scaled(1.0 if dist.get_world_size() == 1 else 2.0)
    samples = samples_of(golden, case, networks, micro_batch_size=micro_batch_size)
    chunks = networks[case.trained]
    for chunk in chunks:
        chunk.zero_grad_buffer()
    step = step_of(case, stage, distillation)
    settings = {"stage": stage, "distillation": distillation, "objectives": objectives}
    result = accumulate_step(step, networks, samples, **settings)[case.objective]
    reduce_gradients(chunks)
    weight = case.loss_weights.get(case.objective, 1.0)
    yield Error("loss", relative_error(weight * whole_batch(result.loss_B, groups), case.loss), bounds.loss)
    if "dF" in result.outputs:  # on the last stage
        result.outputs["df_dt"] = df_dt(result.outputs)
    for name, expected in case.outputs.items():
        if name not in result.outputs:  # the loss's own, on the last stage
            continue
        got = whole_output(name, result.outputs[name], networks)
        yield Error(f"out/{name}", relative_error(got, expected.reshape(got.shape)), bounds.output(name))
    yield from gradient_errors(golden, case, chunks, bounds.gradients, groups=groups)


def gradient_errors(
    golden: Golden, case: GoldenCase, chunks: list, bound: float, *, groups: ParallelGroups
) -> Iterator[Error]:
    """Raw gradients of loss.sum(); ours are of the mean over the batch."""
    gradients = gather_main_grads(chunks)
    full = dict(gather_full(chunks, tp_group=groups.tp, pp_group=groups.pp, getter=gradients.__getitem__))
    if groups.tp_rank == 0 and groups.pp_rank == 0:
        scale = len(golden.x0)
        ours = {name: scale * g for name, g in from_internal(full, model_config(golden), "nvlabs", partial=True)}
        ours = {name.removeprefix("net."): g for name, g in ours.items()}
        total = torch.sqrt(sum(g.double().square().sum() for g in ours.values()))
        yield Error("grad_norm", abs(total.item() / case.grad_norm - 1), bound)
        for name, expected in case.gradients.items():
            yield Error(f"grad/{name}", relative_error(ours[name].reshape(expected.shape), expected), bound)


def network_errors(golden: Golden, networks: Networks) -> Iterator[Error]:
    """The bare network and its tangent on the file's ``net/…``, on the whole batch."""
    net, layout = golden.net, networks.layout
    x = Dual.pack(layout.shard(net["x"]), layout.shard(net["t_x"]))
    timestep = Dual.pack(net["timestep"].T.contiguous(), net["t_timestep"].T.contiguous())
    v = evaluate(networks["student"], NetworkInput(x, timestep, golden.cond.transpose(0, 1).contiguous()))
    yield Error("net/v", relative_error(layout.gather(v.primal), net["v"]), NETWORK_BOUND)
    yield Error("net/t_v", relative_error(layout.gather(v.tangent), net["t_v"]), NETWORK_BOUND)


def build(golden: Golden, parallel: ParallelConfig) -> Networks:
    groups, model = initialize_parallel(parallel), model_config(golden)
    channels, frames, height, width = golden.x0.shape[1:]
    latent = LatentConfig(channels=channels, frames=frames, height=height, width=width)

    def network(name: str, *, trained: bool) -> list:
        chunks = build_chunks(model, latent, parallel, groups=groups, params_dtype=torch.float32)
        load_weights(chunks, golden.weights[name])
        return wrap_ddp(chunks, chunks[0].config) if trained else [chunk.requires_grad_(False) for chunk in chunks]

    student = network("student", trained=True)
    return Networks(
        layout=student[0].module.layout,
        student=student,
        teacher=network("teacher", trained=False),
        fake_score=network("fake_score", trained=True),
    )


def conform(path: str, parallel: ParallelConfig, *, micro_batch_size: int = 1, cases: list[str] | None = None) -> dict:
    """Errors per case name, as this rank sees them (gradients where they are gathered, outputs of losses on the last stage)."""
    golden = load_golden(path)
    init_distributed()
    networks = build(golden, parallel)
    chosen = [case for case in golden.cases if not cases or case.name in cases]
    report = {"network": list(network_errors(golden, networks))}
    for case in chosen:
        report[case.name] = list(replay(golden, case, networks, micro_batch_size=micro_batch_size))
    return report


def summary(errors: list[Error]) -> str:
    """One line: the largest error of each kind with its bound, and what failed."""
    parts = []
    for kind in ("net", "loss", "out", "grad"):
        group = [e for e in errors if e.name.startswith(kind)]
        if group:
            worst = max(group, key=lambda e: e.error / e.bound)
            parts.append(f"{worst.name} {worst.error:.1e} (bound {worst.bound:.0e})")
    failed = [f"{e.name}={e.error:.1e}>{e.bound:.0e}" for e in errors if not e.passed]
    return "; ".join(parts) + ("  FAILED " + ", ".join(failed) if failed else "")


def parse_layout(items: Sequence[str]) -> dict[str, int | tuple[int, ...]]:
    """Degrees of ParallelConfig and micro_batch_size from `KEY=VALUE`. Raises InputError."""
    known = (*(field.name for field in fields(ParallelConfig)), "micro_batch_size")
    found: dict[str, int | tuple[int, ...]] = {}
    for item in items:
        key, _, text = item.partition("=")
        numbers = text.split(",")
        if key not in known or not all(number.isdecimal() for number in numbers):
            raise InputError(
                f"got {item!r}, need one of {', '.join(known)} and numbers; write e.g. tp=2 or chunk_layers=1,3"
            )
        found[key] = tuple(map(int, numbers)) if len(numbers) > 1 else int(text)
    return found


def run_conformance(request: ConformanceRequest) -> int:
    """Print a line for each case on rank 0; exit status 1 where a number is past its bound."""
    layout = parse_layout(request.layout)
    micro_batch_size = layout.pop("micro_batch_size", 1)
    report = conform(
        str(request.file), ParallelConfig(**layout), micro_batch_size=micro_batch_size, cases=list(request.cases)
    )
    reports: list = [None] * dist.get_world_size()
    dist.all_gather_object(reports, report)
    if dist.get_rank() == 0:
        for name in report:
            print(f"{name:24s} {summary([e for errors in reports for e in errors[name]])}", flush=True)
    dist.destroy_process_group()
    return 0 if all(e.passed for r in reports for errors in r.values() for e in errors) else 1
