"""Dual numbers for Megatron hidden states: a primal and its tangent travelling as one tensor.

Shape legend: S tokens, B batch, D features. A ``Dual`` stacks both along the batch dimension, ``[S, 2B, ...]`` with the primal
rows first, so one GEMM, one collective and one pipeline message serve both (docs/ARCHITECTURE.md, "The dual forward").
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

BATCH_DIM = 1


@dataclass(frozen=True, eq=False)
class Dual:
    """A primal and its tangent.

    ``stacked`` is ``[S, 2B, ...]`` without a graph. ``graph`` is the primal ``[S, B, ...]`` as autograd sees it, when gradient
    flows through it; the tangent is stop-gradient by definition (sCM, arXiv 2410.11081, Eq. 6), and this class is where it is.
    Raises ValueError for an odd batch.
    """

    stacked: Tensor
    graph: Tensor | None = None

    def __post_init__(self) -> None:
        if self.stacked.shape[BATCH_DIM] % 2:
            raise ValueError(f"a Dual stacks primal and tangent rows: got an odd batch in {tuple(self.stacked.shape)}")

    @staticmethod
    def pack(primal: Tensor, tangent: Tensor) -> "Dual":
        """Stack ``primal`` and ``tangent`` (equal shapes, ``[S, B, ...]``); the primal keeps its graph. Raises ValueError for others."""
        if primal.shape != tangent.shape:
            raise ValueError(f"primal {tuple(primal.shape)} and tangent {tuple(tangent.shape)} must have one shape")
        stacked = torch.cat([primal.detach(), tangent.detach()], dim=BATCH_DIM)
        return Dual(stacked, primal if primal.requires_grad else None)

    @property
    def batch(self) -> int:
        return self.stacked.shape[BATCH_DIM] // 2

    @property
    def primal(self) -> Tensor:
        return self.graph if self.graph is not None else self.stacked.narrow(BATCH_DIM, 0, self.batch)

    @property
    def tangent(self) -> Tensor:
        return self.stacked.narrow(BATCH_DIM, self.batch, self.batch)

    def linear(self, function: Callable[[Tensor], Tensor]) -> "Dual":
        """Apply a linear map (no bias) to both halves at once."""
        return Dual(function(self.stacked))


def primal_of(value: "Tensor | Dual") -> Tensor:
    return value.primal if isinstance(value, Dual) else value


def shape_of(value: "Tensor | Dual") -> torch.Size:
    """The shape of a tensor, or of a dual's stack: twice the batch."""
    return value.stacked.shape if isinstance(value, Dual) else value.shape


def map_linear(function: Callable[[Tensor], Tensor], value: "Tensor | Dual") -> "Tensor | Dual":
    """Apply a linear, bias-free function to a tensor or to both halves of a dual."""
    return value.linear(function) if isinstance(value, Dual) else function(value)


def add_bias(value: "Tensor | Dual", bias: Tensor | None) -> "Tensor | Dual":
    """Add ``bias`` to a tensor or, in place, to the primal half alone: the tangent of a constant is zero."""
    if bias is None:
        return value
    if isinstance(value, Dual):
        value.stacked.narrow(BATCH_DIM, 0, value.batch).add_(bias)
        return Dual(value.stacked)
    return value + bias


def with_graphs_added(a: "Tensor | Dual", b: "Tensor | Dual") -> "Tensor | Dual":
    """a + b outside of `recomputed`: of duals the sum of the stacks, and of the primals as autograd sees them."""
    if not isinstance(a, Dual):
        return a + b
    has_graph = a.graph is not None or b.graph is not None
    return Dual(a.stacked + b.stacked, a.primal + b.primal if has_graph else None)


def as_message(value: "Tensor | Dual") -> Tensor:
    """What a pipeline stage sends: the hidden state, or the whole stack of a dual; its gradient goes to the primal half."""
    if not isinstance(value, Dual):
        return value
    return value.stacked if value.graph is None else _Stack.apply(value.graph, value.stacked)


def from_message(message: Tensor, *, dual: bool) -> "Tensor | Dual":
    """What the next stage works on. The gradient of a dual's message has a zero tangent half."""
    if not dual:
        return message
    batch = message.shape[BATCH_DIM] // 2
    return Dual(message.detach(), message.narrow(BATCH_DIM, 0, batch) if torch.is_grad_enabled() else None)


class _Stack(torch.autograd.Function):
    """The stack of a dual as a function of its primal."""

    @staticmethod
    def forward(ctx, primal, stacked):
        return stacked.detach()

    @staticmethod
    def backward(ctx, grad_stacked):
        return grad_stacked.narrow(BATCH_DIM, 0, grad_stacked.shape[BATCH_DIM] // 2), None


Contexts = tuple[AbstractContextManager, AbstractContextManager]
"""Of the forward and of the recomputation."""


def no_contexts() -> Contexts:
    return nullcontext(), nullcontext()


def recomputed(
    function: Callable, *inputs: "Tensor | Dual", contexts: Callable[[], Contexts] = no_contexts
) -> "Tensor | Dual":
    """Run ``function`` without a graph and recompute it, on the primals alone, in the backward, both inside of their ``contexts``.

    The forward runs on the inputs as given: with a Dual among them the result is a Dual. The backward re-runs ``function`` on the
    saved primals with gradient, so a tangent costs no activation memory and no backward. Everything that carries gradient must be
    an explicit input; parameters get theirs from the recomputation. ``function`` must be deterministic.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    anchor = torch.empty((), requires_grad=True, device=primal_of(inputs[0]).device)
    result = _Recompute.apply(function, inputs, contexts(), anchor, *(primal_of(value) for value in inputs))
    if isinstance(result, tuple):
        primal, stacked = result
        return Dual(stacked, primal)
    return result


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, inputs, contexts, anchor, *primals):
        around, ctx.around_recomputation = contexts
        ctx.function = function
        ctx.save_for_backward(*primals)
        with around:
            output = function(*inputs)
        if not isinstance(output, Dual):
            return output
        # A clone, not a view: the next block saves this primal, and a view would keep the whole stack alive with it.
        primal = output.primal.clone()
        ctx.mark_non_differentiable(output.stacked)
        return primal, output.stacked

    @staticmethod
    def backward(ctx, grad_primal, _grad_stacked=None):
        primals = [p.detach().requires_grad_(p.requires_grad) for p in ctx.saved_tensors]
        with torch.enable_grad(), ctx.around_recomputation:
            output = ctx.function(*primals)
        # a frozen part whose inputs carry no gradient has nothing to give
        if output.requires_grad:
            torch.autograd.backward(output, grad_primal)
        return None, None, None, None, *(p.grad for p in primals)
