"""A network that trains, each rank of dp*cp holding its piece of every block: ZeRO stage 3 (arXiv 1910.02054, Sec. 5.3).

A unit is a block, or all that is outside of the blocks (embedders, head). Its parameters of one dtype lie end to end in a flat tensor, cut
into equal pieces as Megatron's distributed optimizer cuts a bucket, so EMA, gradient norm and checkpoints walk over both alike
(rcm_megatron.parallel.optimizer_shards). A rank keeps the fp32 piece, which is the weight, and the fp32 piece of its gradient. A pass
gathers a unit in the parameters' dtype just before it computes, and the next one beside it; a backward gathers it again, sums its gradient
in a whole fp32 tensor and reduce-scatters that once the unit's last parameter has got its own.

Flat tensors give up their storage between uses: parameters are views of them and stay the same objects, which graphs may hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import Parameter
from torch.nn.modules.module import register_module_module_registration_hook

from rcm_megatron.dual import Dual, primal_of


@dataclass(eq=False)
class Place:
    """A parameter in a flat tensor, and which of its elements this rank's piece holds."""

    parameter: Parameter
    offset: int
    """Of its first element in the flat tensor."""
    start: int
    stop: int
    """[start, stop) of the flattened parameter; empty where another rank has it all."""
    in_piece: slice
    """Where they are in the piece."""
    main: Tensor | None = None
    """These elements of the piece, one object for good: the optimizer knows its state by it."""
    gradient: Tensor | None = None
    """Of these elements, reduced."""

    def set_weight(self, value: Tensor) -> None:
        """Keep this rank's part of the parameter's value, rounded as the whole would be."""
        self.main.copy_(value.reshape(-1)[self.start : self.stop].to(self.parameter.dtype))


class Flat:
    """Parameters of one dtype, end to end, over the ranks of a group."""

    def __init__(self, parameters: Sequence[Parameter], *, group: ProcessGroup) -> None:
        self.group, (first, *_) = group, parameters
        sizes = [parameter.numel() for parameter in parameters]
        offsets = list(accumulate(sizes, initial=0))
        self.piece_size = -(-offsets.pop() // group.size())
        self.places = [self._place(*pair) for pair in zip(parameters, offsets, strict=True)]
        self.whole = torch.zeros(self.piece_size * group.size(), dtype=first.dtype, device=first.device)
        """Of the parameters' dtype; has storage while it is gathered."""
        for place in self.places:
            view = self._view(self.whole, place)
            view.copy_(place.parameter.detach())
            place.parameter.data = view
        begin = group.rank() * self.piece_size
        self.main = self.whole[begin : begin + self.piece_size].to(torch.float32, copy=True)
        """fp32 ``[piece_size]``: the weight."""
        self.gradient = torch.zeros_like(self.main)
        """fp32 ``[piece_size]``: what :meth:`finish_reduction` has added up."""
        self.whole_gradient = torch.empty_like(self.whole, dtype=torch.float32)
        """Has storage within a backward."""
        for tensor in (self.whole, self.whole_gradient):
            tensor.untyped_storage().resize_(0)
        for place in self.places:
            place.parameter.place = place
            place.main, place.gradient = self.main[place.in_piece], self.gradient[place.in_piece]
        self.show_pieces()

    def _place(self, parameter: Parameter, offset: int) -> Place:
        shift = self.group.rank() * self.piece_size - offset
        start = min(max(0, shift), parameter.numel())
        stop = max(start, min(parameter.numel(), shift + self.piece_size))
        return Place(
            parameter, offset, start, stop, slice(start - shift, stop - shift) if stop > start else slice(0, 0)
        )

    @staticmethod
    def _view(flat: Tensor, place: Place) -> Tensor:
        return flat[place.offset : place.offset + place.parameter.numel()].view(place.parameter.shape)

    @property
    def held(self) -> list[Place]:
        """Those of which this rank has something."""
        return [place for place in self.places if place.start < place.stop]

    def show_pieces(self) -> None:
        """``main_grad`` of each parameter is this rank's piece of it, ``[stop - start]``."""
        for place in self.places:
            place.parameter.main_grad = place.gradient

    def start_gathering(self) -> tuple[dist.Work, Tensor]:
        """Fill `whole` from the ranks' pieces; it may be read after the wait, and what is sent lives as long."""
        _give_storage(self.whole)
        piece = self.main.to(self.whole.dtype)
        return dist.all_gather_into_tensor(self.whole, piece, group=self.group, async_op=True), piece

    def begin_gradients(self) -> None:
        """``main_grad`` of each parameter is a whole one, zero."""
        _give_storage(self.whole_gradient)
        self.whole_gradient.zero_()
        for place in self.places:
            place.parameter.main_grad = self._view(self.whole_gradient, place)

    def start_reduction(self) -> tuple[dist.Work, Tensor]:
        """Send the whole gradient off; what :meth:`finish_reduction` takes."""
        self.show_pieces()
        received = torch.empty_like(self.gradient)
        return dist.reduce_scatter_tensor(received, self.whole_gradient, group=self.group, async_op=True), received

    def finish_reduction(self, work: dist.Work, received: Tensor) -> None:
        """Add this rank's piece of the mean over the group."""
        work.wait()
        self.whole_gradient.untyped_storage().resize_(0)
        self.gradient.add_(received, alpha=1 / self.group.size())

    def gathered_gradient(self) -> Iterator[tuple[Parameter, Tensor]]:
        """(parameter, its whole reduced gradient); a collective."""
        whole = torch.empty(self.whole.shape, dtype=torch.float32, device=self.whole.device)
        dist.all_gather_into_tensor(whole, self.gradient, group=self.group)
        return ((place.parameter, self._view(whole, place)) for place in self.places)


def _give_storage(tensor: Tensor) -> None:
    tensor.untyped_storage().resize_(tensor.numel() * tensor.element_size())


class Unit:
    """Parameters that are gathered together: a flat tensor of each dtype, and of what all pipeline stages hold.

    Stages cut the latter alike, whatever else they hold, so that their pieces can be summed over the stages.
    """

    def __init__(self, parameters: Sequence[Parameter], *, group: ProcessGroup) -> None:
        def kind(parameter: Parameter) -> tuple[bool, str]:
            return getattr(parameter, "pipeline_parallel", False), str(parameter.dtype)

        kinds = groupby(sorted(parameters, key=kind), key=kind)
        self.flats = [Flat(list(of_kind), group=group) for _, of_kind in kinds]
        self.parameters = [place.parameter for flat in self.flats for place in flat.places]
        self._gathering: list[tuple[dist.Work, Tensor]] | None = None
        self._reducing: list[tuple[dist.Work, Tensor]] = []
        self._is_whole = self.has_gradients = False
        self.lacking = 0
        """How many parameters have no gradient yet in this backward."""

    def start_gathering(self) -> None:
        """Go on; nothing where that has happened."""
        if not self._is_whole and self._gathering is None:
            self._gathering = [flat.start_gathering() for flat in self.flats]

    def gather(self) -> None:
        """The parameters have their values after this."""
        self.start_gathering()
        for work, _ in self._gathering or ():
            work.wait()
        self._gathering, self._is_whole = None, True

    def free(self) -> None:
        """Drop the parameters' values."""
        if self._gathering is not None:
            self.gather()
        for flat in self.flats:
            flat.whole.untyped_storage().resize_(0)
        self._is_whole = False

    def begin_gradients(self) -> None:
        """Its backward comes; nothing where that is known."""
        if not self.has_gradients:
            self.has_gradients, self.lacking = True, len(self.parameters)
            for flat in self.flats:
                flat.begin_gradients()

    def start_reduction(self) -> None:
        self.has_gradients = False
        self._reducing = [flat.start_reduction() for flat in self.flats]

    def finish_reduction(self) -> None:
        for flat, sent in zip(self.flats, self._reducing, strict=False):
            flat.finish_reduction(*sent)
        self._reducing = []


class CutBlocks:
    """Within it, blocks of networks are cut as they are built, so no rank ever holds all of a network: `units` has each block's."""

    def __init__(self, *, group: ProcessGroup) -> None:
        self.group, self.units = group, {}

    def __enter__(self) -> CutBlocks:
        self._hook = register_module_module_registration_hook(self._cut)
        return self

    def __exit__(self, *_) -> None:
        self._hook.remove()

    def _cut(self, holder: nn.Module, _name: str, block: nn.Module) -> None:
        if isinstance(holder, nn.ModuleDict):
            self.units[block] = Unit(list(block.parameters()), group=self.group)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


class ShardedDataParallel(_BaseDataParallel):
    """A pipeline chunk in pieces, in the place of Megatron's DDP: its passes, schedules and gradient sums find what they ask for.

    All ranks of the group must run the same passes. Gradients are reduced after each micro-batch's backward: there is no `no_sync`.

    Args:
        config: Megatron's, of the network.
        module: the chunk. What is whole of it is cut here.
        cut: what was cut while it was built.
    """

    def __init__(self, config: TransformerConfig, module: nn.Module, *, cut: CutBlocks) -> None:
        super().__init__(config, module)
        # finalize_model_grads asks for it
        self.ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        blocks = list(module.blocks.values())
        inside = {parameter for block in blocks for parameter in block.parameters()}
        outside = [parameter for parameter in module.parameters() if parameter not in inside]
        self._outside = Unit(outside, group=cut.group)
        self._blocks = [cut.units.get(block) or Unit(list(block.parameters()), group=cut.group) for block in blocks]
        self.units = [self._outside, *self._blocks]
        self._reducing: Unit | None = None
        self._hook(blocks)

    def _hook(self, blocks: Sequence[nn.Module]) -> None:
        self.module.register_forward_pre_hook(self._begin_forward)
        self.module.register_forward_hook(self._end_forward)
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._begin_block, index))
            block.register_forward_hook(partial(self._end_block, index))
        for unit in self.units:
            for parameter in unit.parameters:
                parameter.grad_added_to_main_grad = False
                parameter.register_post_accumulate_grad_hook(partial(self._add_gradient, unit))

    # ---- a forward

    def _begin_forward(self, *_) -> None:
        self._outside.start_gathering()
        self._start_gathering_block(0)
        self._outside.gather()

    def _end_forward(self, _module: nn.Module, _inputs: tuple, output: Tensor | Dual) -> None:
        self._outside.free()
        if torch.is_grad_enabled() and primal_of(output).requires_grad:
            primal_of(output).register_hook(self._begin_backward)

    def _begin_block(self, index: int, *_) -> None:
        """Before a block's forward, its recomputation, or its backward."""
        unit = self._blocks[index]
        unit.gather()
        self._start_gathering_block(index - 1 if _in_backward() else index + 1)
        if _in_backward():
            unit.begin_gradients()

    def _end_block(self, index: int, _module: nn.Module, _inputs: tuple, output: Tensor | Dual) -> None:
        """After its forward. What was computed again within a backward is differentiated next."""
        if _in_backward():
            return
        self._blocks[index].free()
        if torch.is_grad_enabled() and primal_of(output).requires_grad:
            primal_of(output).register_hook(partial(self._begin_block, index))

    def _start_gathering_block(self, index: int) -> None:
        if 0 <= index < len(self._blocks):
            self._blocks[index].start_gathering()

    # ---- a backward

    def _begin_backward(self, _gradient: Tensor) -> None:
        self._outside.start_gathering()
        self._start_gathering_block(len(self._blocks) - 1)
        self._outside.gather()
        self._outside.begin_gradients()
        torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    def _add_gradient(self, unit: Unit, parameter: Parameter) -> None:
        """Kernels that add to ``main_grad`` by themselves say so."""
        if not parameter.grad_added_to_main_grad:
            parameter.main_grad.add_(parameter.grad)
        parameter.grad = None
        unit.lacking -= 1
        # What is outside of the blocks may be used at several places.
        if not unit.lacking and unit is not self._outside:
            self._reduce(unit)

    def _reduce(self, unit: Unit) -> None:
        """Gradients of one unit travel while that of the next computes."""
        unit.free()
        self._finish_reduction()
        unit.start_reduction()
        self._reducing = unit

    def _finish_reduction(self) -> None:
        if self._reducing is not None:
            self._reducing.finish_reduction()
            self._reducing = None

    def _end_backward(self) -> None:
        """Also of blocks of which some parameter had no gradient."""
        for unit in (*self._blocks, self._outside):
            if unit.has_gradients:
                self._reduce(unit)
        self._finish_reduction()

    # ---- what stands in the place of Megatron's buffers

    @property
    def flats(self) -> list[Flat]:
        """In an order that all ranks of the group share."""
        return [flat for unit in self.units for flat in unit.flats]

    def zero_grad_buffer(self) -> None:
        """Before the first backward of a step."""
        for flat in self.flats:
            flat.gradient.zero_()

    def scale_gradients(self, scaling_factor: float) -> None:
        """Of the reduced gradients."""
        for flat in self.flats:
            flat.gradient.mul_(scaling_factor)

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """They were reduced in their backward."""

    def start_param_sync(self, *_, **__) -> None:
        """The pieces are the weights."""

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """All parameters have their values inside, on all ranks of the group: for looking at them."""
        for unit in self.units:
            unit.gather()
        try:
            yield
        finally:
            for unit in self.units:
                unit.free()
