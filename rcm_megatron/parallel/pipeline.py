"""Passes of a network over a batch, a micro-batch at a time, through Megatron-Core's schedules: one stage, 1F1B, or interleaved.

One convention for the scale of losses: a loss function returns (sum over this rank's tokens) / micro_batch_size. The schedule
multiplies it by cp and divides it by the number of micro-batches, DDP divides gradients by dp*cp: together the gradient of the
mean over the global batch of each sample's summed loss. No finalize function is given to the schedules: a step may run several
passes and reduces its gradients once, with :func:`reduce_gradients`.

The last stage alone sees network outputs. They are latents, a small part of one hop's hidden state, so it sends them to
every stage: the first needs them as the next pass's input, and all stages then compute the same numbers from them.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from rcm_megatron.dual import BATCH_DIM, Dual
from rcm_megatron.inputs import NetworkInput, take

LossFunction = Callable[..., tuple[Tensor, dict[str, Tensor]]]
"""(Output of the network, the targets' samples by keyword) -> (scalar loss, what it reports: tensors with the samples in dimension 1).
Called on the last stage only, for one micro-batch at a time."""


def evaluate(
    chunks: Sequence[nn.Module],
    given: NetworkInput,
    *,
    micro_batch_size: int | None = None,
    phase: str | None = None,
) -> Tensor | Dual:
    """Network outputs of all samples, on every stage, without gradient; timed as ``phase``.

    ``micro_batch_size`` samples pass at a time, by default all; a last micro-batch, and a last round of the interleaved schedule, are
    filled up with repeats.
    """
    network, size = unwrapped(chunks[-1]), micro_batch_size or given.batch
    rounds = network.layout.groups.pp.size() if len(chunks) > 1 else 1
    count = math.ceil(given.batch / (size * rounds)) * rounds
    with torch.no_grad(), timed(chunks, phase):
        outputs = _run(chunks, given, size=size, count=count, forward_only=True)
        with timed(chunks, "stages"):
            return _from_last_stage(outputs, given, network.new_output, network.layout.groups.pp)


def accumulate_gradients(
    chunks: Sequence[nn.Module],
    given: NetworkInput,
    loss: LossFunction,
    targets: Mapping[str, Tensor],
    *,
    micro_batch_size: int,
    is_last: bool,
    phase: str | None = None,
) -> dict[str, Tensor]:
    """Forward and backward of all samples, ``micro_batch_size`` at a time; gradients add up in ``main_grad``.

    ``targets``, with the samples in dimension 1, come to ``loss`` as keywords, cut to the micro-batch. ``is_last``: no other pass adds to
    these gradients before :func:`reduce_gradients`, so that their reduction over dp*cp may start while the last micro-batch's backward
    runs. The forward is timed as ``phase``. Returns what the losses report of all samples, on the last stage; elsewhere nothing. Raises
    ValueError when the samples do not divide into micro-batches.
    """
    if given.batch % micro_batch_size:
        raise ValueError(f"got {given.batch} samples, need a multiple of micro_batch_size={micro_batch_size}")
    config, count = unwrapped(chunks[0]).config, given.batch // micro_batch_size

    def loss_of(number: int) -> LossFunction:
        rows = slice(number * micro_batch_size, (number + 1) * micro_batch_size)
        return partial(loss, **{name: take(value, rows) for name, value in targets.items()})

    with ExitStack() as stack:
        stack.enter_context(timed(chunks, phase))
        if is_last:
            config.no_sync_func = lambda: _no_sync(chunks)
            stack.callback(setattr, config, "no_sync_func", None)
        else:
            stack.enter_context(_no_sync(chunks))
        reports = _run(chunks, given, loss_of, size=micro_batch_size, count=count, forward_only=False)
    return {name: torch.cat([report[name] for report in reports], BATCH_DIM) for name in (reports or [{}])[0]}


def reduce_gradients(chunks: Sequence[_BaseDataParallel]) -> None:
    """Reduce what the passes of one step accumulated: over dp*cp, over tp where token shards left partial gradients, and over
    the stages for the embedders that each of them holds."""
    with timed(chunks, "reduce"):
        finalize_model_grads(list(chunks))


def timed(chunks: Sequence[nn.Module], phase: str | None) -> AbstractContextManager[None]:
    """A phase of the timers that a training run hangs on its networks' configs (rcm_megatron.runtime.timers); without them, nothing."""
    timers = unwrapped(chunks[0]).config.timers
    return nullcontext() if timers is None or phase is None else timers.phase(phase)


def unwrapped(chunk: nn.Module) -> nn.Module:
    """The network inside Megatron's DDP, or inside its pieces."""
    return chunk.module if isinstance(chunk, _BaseDataParallel) else chunk


def share_from_last_stage(tensor: Tensor, *, group: ProcessGroup) -> Tensor:
    """``tensor`` of the last stage on every stage; elsewhere it gives shape and dtype, and is overwritten."""
    if group.size() > 1:
        dist.broadcast(tensor, group_src=group.size() - 1, group=group)
    return tensor


@contextmanager
def _no_sync(chunks: Sequence[nn.Module]) -> Iterator[None]:
    with ExitStack() as stack:
        for chunk in chunks:
            if isinstance(chunk, _BaseDataParallel):
                stack.enter_context(chunk.no_sync())
        yield


def _run(
    chunks: Sequence[nn.Module],
    given: NetworkInput,
    loss_of: Callable[[int], LossFunction] | None = None,
    *,
    size: int,
    count: int,
    forward_only: bool,
) -> list:
    """``count`` micro-batches of ``size`` samples, each cut out when a stage comes to it."""

    def micro_batches() -> Iterator[tuple[NetworkInput, LossFunction | None]]:
        for number in range(count):
            yield given.micro_batch(number, size), loss_of and loss_of(number)

    def forward_step(iterator, model: nn.Module):
        part, loss = next(iterator)
        further = {"condition": part.condition, "interval_1B": part.interval_1B}
        further = {name: value for name, value in further.items() if value is not None}
        return model(part.x_SBP, part.timestep_1B, part.text_LBD, **further), loss

    iterators = [micro_batches() for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks),
        num_microbatches=count,
        seq_length=unwrapped(chunks[0]).layout.padded_tokens,  # schedules divide it by cp, and by tp
        micro_batch_size=size * (2 if isinstance(given.x_SBP, Dual) else 1),
        forward_only=forward_only,
    )


def _from_last_stage(
    outputs: list[Any], given: NetworkInput, new_output: Callable[[int], Tensor], group: ProcessGroup
) -> Tensor | Dual:
    """Outputs of all micro-batches in one message, and as one value."""
    whole, dual = slice(given.batch), isinstance(given.x_SBP, Dual)
    halves = ([o.primal for o in outputs], [o.tangent for o in outputs]) if dual else (outputs,)
    stacked = [take(torch.cat(half, BATCH_DIM), whole) for half in halves if half]
    rows = given.batch * (2 if dual else 1)
    joined = torch.cat(stacked, BATCH_DIM) if stacked else new_output(rows)
    joined = share_from_last_stage(joined, group=group)
    return Dual(joined) if dual else joined
