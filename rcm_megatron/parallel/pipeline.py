"""Passes of a network over all micro-batches through Megatron-Core's schedules: one stage, 1F1B, or interleaved.

One convention for the scale of losses: a loss function returns (sum over this rank's tokens) / micro_batch_size. The schedule
multiplies it by cp and divides it by the number of micro-batches, DDP divides gradients by dp*cp: together the gradient of the
mean over the global batch of each sample's summed loss. No finalize function is given to the schedules: a step may run several
passes and reduces its gradients once, with :func:`reduce_gradients`.

The last stage alone sees network outputs. They are latents, a small part of one hop's hidden state, so it sends them to
every stage: the first needs them as the next pass's input, and all stages then compute the same numbers from them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from rcm_megatron.dual import BATCH_DIM, Dual, shape_of
from rcm_megatron.inputs import NetworkInput

LossFunction = Callable[[Tensor | Dual], tuple[Tensor, dict[str, Tensor]]]
"""Output of the network -> (scalar loss, what it reports). Called on the last stage only."""


def evaluate(
    chunks: Sequence[nn.Module], inputs: Sequence[NetworkInput], *, phase: str | None = None
) -> list[Tensor | Dual]:
    """Network outputs of every micro-batch, on every stage, without gradient; timed as ``phase``."""
    network = unwrapped(chunks[-1])
    with torch.no_grad(), timed(chunks, phase):
        outputs = _run(chunks, _whole_rounds(chunks, inputs), forward_only=True)[: len(inputs)]
        with timed(chunks, "stages"):
            return _from_last_stage(outputs, inputs, network.new_output, network.layout.groups.pp)


def accumulate_gradients(
    chunks: Sequence[nn.Module],
    inputs: Sequence[NetworkInput],
    losses: Sequence[LossFunction],
    *,
    is_last: bool,
    phase: str | None = None,
) -> list[dict[str, Tensor]]:
    """Forward and backward of every micro-batch; gradients add up in ``main_grad``.

    ``is_last``: no other pass adds to these gradients before :func:`reduce_gradients`, so that their reduction over dp*cp may start while
    the last micro-batch's backward runs. The forward is timed as ``phase``. Returns what the losses report, on the last stage; elsewhere
    an empty list.
    """
    config = unwrapped(chunks[0]).config
    with ExitStack() as stack:
        stack.enter_context(timed(chunks, phase))
        if is_last:
            config.no_sync_func = lambda: _no_sync(chunks)
            stack.callback(setattr, config, "no_sync_func", None)
        else:
            stack.enter_context(_no_sync(chunks))
        return _run(chunks, inputs, losses, forward_only=False)


def reduce_gradients(chunks: Sequence[DistributedDataParallel]) -> None:
    """Reduce what the passes of one step accumulated: over dp*cp, over tp where token shards left partial gradients, and over
    the stages for the embedders that each of them holds."""
    with timed(chunks, "reduce"):
        finalize_model_grads(list(chunks))


def timed(chunks: Sequence[nn.Module], phase: str | None) -> AbstractContextManager[None]:
    """A phase of the timers that a training run hangs on its networks' configs (rcm_megatron.runtime.timers); without them, nothing."""
    timers = unwrapped(chunks[0]).config.timers
    return nullcontext() if timers is None or phase is None else timers.phase(phase)


def unwrapped(chunk: nn.Module) -> nn.Module:
    """The network inside Megatron's DDP."""
    return chunk.module if isinstance(chunk, DistributedDataParallel) else chunk


def share_from_last_stage(tensor: Tensor, *, group: ProcessGroup) -> Tensor:
    """``tensor`` of the last stage on every stage; elsewhere it gives shape and dtype, and is overwritten."""
    if group.size() > 1:
        dist.broadcast(tensor, group_src=group.size() - 1, group=group)
    return tensor


@contextmanager
def _no_sync(chunks: Sequence[nn.Module]) -> Iterator[None]:
    with ExitStack() as stack:
        for chunk in chunks:
            if isinstance(chunk, DistributedDataParallel):
                stack.enter_context(chunk.no_sync())
        yield


def _run(
    chunks: Sequence[nn.Module],
    inputs: Sequence[NetworkInput],
    losses: Sequence[LossFunction] | None = None,
    *,
    forward_only: bool,
) -> list:
    def forward_step(iterator, model: nn.Module):
        network_input, loss = next(iterator)
        given = () if network_input.condition is None else (network_input.condition,)
        return model(network_input.x_SBP, network_input.timestep_1B, network_input.text_LBD, *given), loss

    micro_batches = list(zip(inputs, losses or [None] * len(inputs), strict=True))
    iterators = [iter(micro_batches) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks),
        num_microbatches=len(inputs),
        seq_length=unwrapped(chunks[0]).layout.padded_tokens,  # schedules divide it by cp, and by tp
        micro_batch_size=shape_of(inputs[0].x_SBP)[BATCH_DIM],
        forward_only=forward_only,
    )


def _whole_rounds(chunks: Sequence[nn.Module], inputs: Sequence[NetworkInput]) -> list[NetworkInput]:
    """``inputs``, the last one repeated until the interleaved schedule accepts their number: a multiple of pp."""
    rounds = unwrapped(chunks[0]).layout.groups.pp.size() if len(chunks) > 1 else 1
    return [*inputs, *[inputs[-1]] * (-len(inputs) % rounds)]


def _from_last_stage(
    outputs: list[Any], inputs: Sequence[NetworkInput], new_output: Callable[[int], Tensor], group: ProcessGroup
) -> list[Tensor | Dual]:
    """Outputs of all micro-batches in one message."""
    if group.size() == 1:
        return outputs
    batches = [shape_of(item.x_SBP)[BATCH_DIM] for item in inputs]
    stacks = [o.stacked if isinstance(o, Dual) else o for o in outputs]
    joined = torch.cat(stacks, dim=BATCH_DIM) if stacks else new_output(sum(batches))
    parts = share_from_last_stage(joined, group=group).split(batches, dim=BATCH_DIM)
    return [Dual(p) if isinstance(i.x_SBP, Dual) else p for p, i in zip(parts, inputs, strict=True)]
