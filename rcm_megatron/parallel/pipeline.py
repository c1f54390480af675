"""Passes of a network over all micro-batches through Megatron-Core's schedules.

One convention for the scale of losses: a loss function returns (sum over this rank's tokens) / micro_batch_size. The schedule
multiplies it by cp and divides it by the number of micro-batches, DDP divides gradients by dp*cp: together the gradient of the
mean over the global batch of each sample's summed loss. No finalize function is given to the schedules: a step may run several
passes and reduces its gradients once, with :func:`reduce_gradients`.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor, nn

from rcm_megatron.dual import BATCH_DIM, Dual, shape_of


@dataclass(frozen=True, eq=False)
class NetworkInput:
    """What a network sees of one micro-batch: tokens [S, B, P], timestep [1, B], text [L, B, D]; Duals for a JVP."""

    x_SBP: Tensor | Dual
    timestep_1B: Tensor | Dual
    text_LBD: Tensor


LossFunction = Callable[[Tensor | Dual], tuple[Tensor, dict[str, Tensor]]]


def evaluate(chunks: Sequence[nn.Module], inputs: Sequence[NetworkInput]) -> list[Tensor | Dual]:
    """Network outputs of every micro-batch, without gradient."""
    with torch.no_grad():
        return _run(chunks, inputs, [None] * len(inputs), forward_only=True)


def accumulate_gradients(
    chunks: Sequence[nn.Module], inputs: Sequence[NetworkInput], losses: Sequence[LossFunction]
) -> list[dict[str, Tensor]]:
    """Forward and backward of every micro-batch; gradients add up in ``main_grad``, unreduced. Returns what the losses report."""
    with ExitStack() as stack:
        for chunk in chunks:
            if isinstance(chunk, DistributedDataParallel):
                stack.enter_context(chunk.no_sync())
        return _run(chunks, inputs, losses, forward_only=False)


def _run(chunks, inputs, losses, *, forward_only: bool) -> list:
    def forward_step(iterator, model: nn.Module):
        network_input, loss = next(iterator)
        return model(network_input.x_SBP, network_input.timestep_1B, network_input.text_LBD), loss

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(list(zip(inputs, losses, strict=True))),
        model=list(chunks),
        num_microbatches=len(inputs),
        seq_length=shape_of(inputs[0].x_SBP)[0],
        micro_batch_size=shape_of(inputs[0].x_SBP)[BATCH_DIM],
        forward_only=forward_only,
    )


def reduce_gradients(chunks: Sequence[DistributedDataParallel]) -> None:
    """Reduce what the passes of one step accumulated: over dp*cp, and over tp where token shards left partial gradients."""
    finalize_model_grads(list(chunks))
