"""One network that a run trains: its weights under Megatron's DDP or in pieces, its optimizer, the average of its weights, its counters."""

from dataclasses import dataclass

from megatron.core.distributed.data_parallel_base import _BaseDataParallel

from rcm_megatron.checkpoint.dist import NetworkState
from rcm_megatron.config import NetworkConfig
from rcm_megatron.parallel.groups import ParallelGroups
from rcm_megatron.parallel.optimizer_shards import owned_shards
from rcm_megatron.training.ema import PowerEMA
from rcm_megatron.training.optimizer import (
    StepResult,
    build_optimizer,
    optimizer_step,
    set_learning_rate,
    warmup_learning_rate,
    zero_gradients,
)


@dataclass
class UpdateCounters:
    """Over the whole run, but for the second."""

    updates: int = 0
    updates_since_reset: int = 0
    """Since the optimizer last began anew: what the warm-up of lr counts."""
    refused_updates: int = 0
    """Steps whose gradients were not finite, or of which no sample was left."""


class TrainedNetwork:
    """The network ``role`` of a run. Build it when ``chunks`` hold the weights that training starts from."""

    def __init__(self, role: str, chunks: list[_BaseDataParallel], settings: NetworkConfig) -> None:
        self.role, self.chunks, self.settings, self.counters = role, chunks, settings, UpdateCounters()
        self.optimizer = build_optimizer(chunks, settings.optimizer)
        self.learning_rate = 0.0
        """Of the newest update."""
        self.ema = None if settings.ema is None else PowerEMA(self.optimizer, settings.ema.relative_width)

    def zero_gradients(self) -> None:
        """Clear the gradient buffers before the first backward of a step."""
        zero_gradients(self.optimizer)

    def reset_optimizer(self) -> None:
        """Zero moments, Adam's step count at 0, lr warmed up anew: for gradients of another kind. Weights and EMA stay."""
        for shard in owned_shards(self.optimizer):
            for moment in shard.adam_state().values():
                moment.zero_()
        for group in self.optimizer.param_groups:
            group["step"] = 0
        self.counters.updates_since_reset = 0

    def update(self, groups: ParallelGroups, *, peak_lr: float | None = None, refused: bool = False) -> StepResult:
        """Optimizer and EMA, from reduced gradients. Non-finite gradients leave every weight as it was, and are counted.

        ``peak_lr``: the learning rate after the warm-up, by default the optimizer's own. ``refused``: the gradients are of no use though
        they are finite."""
        adam = self.settings.optimizer
        peak, warmup = adam.lr if peak_lr is None else peak_lr, adam.lr_warmup_steps
        self.learning_rate = warmup_learning_rate(self.counters.updates_since_reset, peak=peak, warmup_updates=warmup)
        set_learning_rate(self.optimizer, self.learning_rate)
        result = optimizer_step(self.optimizer, groups, clip_grad=adam.clip_grad, refused=refused)
        if not result.updated:
            self.counters.refused_updates += 1
            return result
        self.counters.updates += 1
        self.counters.updates_since_reset += 1
        if self.ema is not None:
            self.ema.update(self.counters.updates)
        return result

    @property
    def state(self) -> NetworkState:
        """What of it a checkpoint holds, beside the counters."""
        ema = None if self.ema is None else self.ema.shards
        return NetworkState(chunks=self.chunks, optimizer=self.optimizer, ema=ema)
