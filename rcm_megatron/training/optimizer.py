"""Megatron's DDP and distributed AdamW around a network, the update itself, and gradients made comparable across layouts.

One update, once the backward passes are done and the gradients finalized:

    zero_gradients(optimizer) ... forward, backward, finalize_model_grads ...
    set_learning_rate(optimizer, warmup_learning_rate(update, peak=..., warmup_updates=...))
    result = optimizer_step(optimizer, groups)          # result.updated is False for non-finite gradients
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import optimizer as megatron_optimizer
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.optimizer import FP32Optimizer
from torch import Tensor, nn

from rcm_megatron.parallel.optimizer_shards import owned_shards
from rcm_megatron.parallel.sharded import CutBlocks, ShardedDataParallel
from rcm_megatron.platform.device import this_device
from rcm_megatron.platform.megatron import use_adam

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

    from rcm_megatron.config import OptimizerConfig
    from rcm_megatron.parallel.groups import ParallelGroups


class FusedAdam(torch.optim.Optimizer):
    """AdamW with Apex's contract, on torch's fused kernel: `step` is one integer in the parameter group.

    Stands in for Apex's and Transformer Engine's where neither is installed. torch's own AdamW counts steps in a tensor for
    each parameter, which Megatron's loading merges into one shared tensor: the resumed run counts each step many times.
    Raises ValueError for capturable=True.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if capturable:
            raise ValueError("got capturable=True; need False: this Adam counts steps on the host; fix: install Apex")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._kernel = torch._fused_adamw_ if adam_w_mode else torch._fused_adam_

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._update(group, parameters)

    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            for moment in ("exp_avg", "exp_avg_sq"):
                if moment not in state:
                    state[moment] = torch.zeros_like(parameter, requires_grad=False)
        steps = torch.tensor(float(group["step"]), device=parameters[0].device)
        self._kernel(
            [parameter.detach() for parameter in parameters],
            [parameter.grad for parameter in parameters],
            [self.state[parameter]["exp_avg"] for parameter in parameters],
            [self.state[parameter]["exp_avg_sq"] for parameter in parameters],
            [],
            [steps] * len(parameters),
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


# ---- building


def wrap_ddp(model_chunks: Sequence[nn.Module], transformer_config: TransformerConfig) -> list[DistributedDataParallel]:
    """Megatron's DDP around each model chunk: fp32 gradients, reduce-scattered over dp*cp once an update.

    The reduction starts bucket by bucket during the last backward of the update and ends when gradients are finalized (a run whose
    passes all stay under `no_sync` must not finalize). Parameters may be bf16 and fp32 in one model. DDP averages over dp*cp; the
    schedules multiply each loss by cp."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
        overlap_param_gather=False,
        check_for_nan_in_grad=False,  # it ends the run; optimizer_step skips the update
    )
    return [DistributedDataParallel(transformer_config, ddp_config, chunk) for chunk in model_chunks]


def cut_in_pieces(build: Callable[[], Sequence[nn.Module]], *, group: dist.ProcessGroup) -> list[ShardedDataParallel]:
    """The chunks that ``build`` makes, in pieces over ``group`` (dp*cp), their weights to be set.

    What is outside of the blocks is whole for a moment, and one block after the other."""
    with CutBlocks(group=group) as cut:
        chunks = build()
    return [ShardedDataParallel(chunk.config, chunk, cut=cut) for chunk in chunks]


class PiecesOptimizer(FP32Optimizer):
    """AdamW on a network in pieces: they are its weights, so there is nothing to copy or to gather after a step."""

    def __init__(self, chunks: Sequence[ShardedDataParallel], config: MegatronOptimizerConfig) -> None:
        self.model_chunks = list(chunks)
        mains = []
        for flat in (flat for chunk in chunks for flat in chunk.flats):
            for place in flat.held:
                place.main.main_grad = place.gradient
                mains.append(place.main)
        betas = (config.adam_beta1, config.adam_beta2)
        settings = {"lr": config.lr, "betas": betas, "eps": config.adam_eps, "weight_decay": config.weight_decay}
        super().__init__(megatron_optimizer.Adam(mains, **settings), config, init_state_fn=lambda *_: None)

    @property
    def chained_optimizers(self) -> list[MegatronOptimizer]:
        """Itself: one Adam."""
        return [self]

    def _copy_main_params_to_model_params(self) -> None:
        """They are the weights."""


def build_optimizer(ddp_chunks: list[_BaseDataParallel], config: OptimizerConfig) -> MegatronOptimizer:
    """Distributed AdamW over `ddp_chunks`: fp32 main parameters and moments, each rank of dp*cp holding its share.

    Weight decay acts on every parameter: Megatron's scheduler, not used here, exempts biases and one-dimensional ones
    through groups of their own, so the optimizer is told to make none."""
    use_adam(FusedAdam)
    dtypes = {parameter.dtype for chunk in ddp_chunks for parameter in chunk.module.parameters()}
    megatron_config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_eps=config.eps,
        weight_decay=config.weight_decay,
        decoupled_weight_decay=True,
        clip_grad=0.0,  # optimizer_step clips, by a norm that does not depend on the layout
        bf16=torch.bfloat16 in dtypes,
        params_dtype=torch.bfloat16 if torch.bfloat16 in dtypes else torch.float32,
        use_distributed_optimizer=True,
    )
    if isinstance(ddp_chunks[0], ShardedDataParallel):
        return PiecesOptimizer(ddp_chunks, megatron_config)
    no_exemptions: dict[Any, Any] = {}
    return get_megatron_optimizer(
        megatron_config, ddp_chunks, config_overrides=no_exemptions, use_gloo_process_groups=False
    )


# ---- updating


@dataclass(frozen=True)
class StepResult:
    """What `optimizer_step` did: `updated` is False when it refused the gradients."""

    updated: bool
    gradient_norm: float


def warmup_learning_rate(update: int, *, peak: float, warmup_updates: int) -> float:
    """Linear warm-up: `peak * (update + 1) / warmup_updates` for the update of index `update` (from 0), then `peak`."""
    return peak if update >= warmup_updates else peak * (update + 1) / warmup_updates


def set_learning_rate(optimizer: MegatronOptimizer, lr: float) -> None:
    """Use `lr` from the next update on, for every parameter."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def zero_gradients(optimizer: MegatronOptimizer) -> None:
    """Clear the gradient buffers before the first backward of a step."""
    for chunk in optimizer.model_chunks:
        chunk.zero_grad_buffer()


def optimizer_step(
    optimizer: MegatronOptimizer, groups: ParallelGroups, *, clip_grad: float = 0.0, refused: bool = False
) -> StepResult:
    """Update the parameters from finalized gradients, on all ranks or, for a non-finite gradient anywhere, on none.

    `clip_grad` > 0 scales the gradients down to that global norm. A refused update changes no state at all; `refused` makes it one."""
    norm = global_gradient_norm(optimizer, groups)
    if refused or not math.isfinite(norm):
        return StepResult(updated=False, gradient_norm=norm)
    if 0.0 < clip_grad < norm:
        for chunk in optimizer.model_chunks:
            chunk.scale_gradients(clip_grad / norm)
    optimizer.prepare_grads()
    optimizer.step_with_ready_grads()
    return StepResult(updated=True, gradient_norm=norm)


def sync_model_parameters(optimizer: MegatronOptimizer) -> None:
    """Round the fp32 main shards into the model's parameters and gather those over dp*cp."""
    for part in optimizer.chained_optimizers:
        part._copy_main_params_to_model_params()
    for chunk in optimizer.model_chunks:
        chunk.start_param_sync()


# ---- gradients that can be compared across layouts


@torch.no_grad()
def global_gradient_norm(optimizer: MegatronOptimizer, groups: ParallelGroups) -> float:
    """Euclidean norm of the finalized gradient, in fp64, every element of every parameter counted once in any layout.

    Parameters replicated over tp count on tp rank 0; those replicated over stages (marked `pipeline_parallel`) count in the
    first stage's first chunk. Non-finite if and only if some gradient is."""
    total = torch.zeros((), dtype=torch.float64, device=this_device())
    counted_replicas: set[tuple[str, int]] = set()
    for shard in owned_shards(optimizer):
        parameter = shard.parameter
        if not getattr(parameter, "tensor_model_parallel", False) and groups.tp.rank() > 0:
            continue
        if getattr(parameter, "pipeline_parallel", False):
            if groups.pp.rank() > 0 or (shard.name, shard.start) in counted_replicas:
                continue
            counted_replicas.add((shard.name, shard.start))
        total += torch.linalg.vector_norm(shard.gradient, dtype=torch.float64).square()
    dist.all_reduce(total)
    return total.sqrt().item()


def gather_main_grads(ddp_chunks: Sequence[_BaseDataParallel]) -> dict[nn.Parameter, Tensor]:
    """The whole finalized gradient, fp32, of each parameter of this rank: for tests and conformance checks.

    After the reduce-scatter a rank's `main_grad` is valid on its own shard only; this gathers the shards over dp*cp.
    Tensor-parallel slices stay slices."""
    gradients = {}
    for chunk in ddp_chunks:
        if isinstance(chunk, ShardedDataParallel):
            for flat in chunk.flats:
                gradients.update(flat.gathered_gradient())
            continue
        for buffer in chunk.buffers:
            buckets = [_gathered(bucket.grad_data, group=buffer.data_parallel_group) for bucket in buffer.buckets]
            for parameter, (start, stop, bucket) in buffer.param_index_map.items():
                offset = buffer.buckets[bucket].offset
                gradients[parameter] = buckets[bucket][start - offset : stop - offset].view(parameter.shape)
    return gradients


def _gathered(flat: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    """`flat` with every rank's piece taken from the rank that owns it."""
    piece = flat.view(group.size(), -1)[group.rank()].clone()
    whole = torch.empty_like(flat)
    dist.all_gather_into_tensor(whole, piece, group=group)
    return whole
