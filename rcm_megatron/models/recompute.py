"""What the plain pass of a block keeps for its backward pass, and what it computes again. (Dual passes: rcm_megatron.dual.)

What self-attention puts out is kept as a whole (rcm_megatron.parallel.kept_attention), under every policy but ``full``, and of dual
passes too: their recomputation runs no attention.

``selective`` runs PyTorch's checkpoint under a pair of dispatch modes: one notes the outputs of chosen operations in the forward, the other
gives them back in the recomputation. PyTorch's own pair (create_selective_checkpoint_contexts) does this for operations that return new
tensors; a tensor-parallel linear ends in a reduce-scatter into a given buffer, and keeping its matmul instead would cost tp times as much.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.checkpoint import checkpoint

from rcm_megatron.dual import Dual, recomputed
from rcm_megatron.parallel.kept_attention import KeptAttention

_COLLECTIVES = ("c10d::_reduce_scatter_base_", "c10d::allreduce_")
"""Kept by what they wrote into their first argument, a tensor or a list. Others run again: all-gathers, messages of ring and Ulysses."""


def run_block(block: Callable[..., Tensor | Dual], *inputs: Tensor | Dual, policy: str) -> Tensor | Dual:
    """``block(*inputs)``; ``policy`` as in MemoryConfig.recompute. A Dual is recomputed whatever it says: its tangent leaves no graph."""
    if not torch.is_grad_enabled():
        return block(*inputs)
    if policy == "full":
        return recomputed(block, *inputs)
    if policy == "attention" or any(isinstance(value, Dual) for value in inputs):
        return recomputed(block, *inputs, contexts=KeptAttention().contexts)
    if policy == "none":
        return block(*inputs)
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=_keep_and_replay)


def is_kept(operation: OpOverload) -> bool:
    """Whether ``selective`` keeps the outputs of ``operation``: a linear's matmul, or cross-attention of a fused backend.

    Batched matmuls are the reference attention's scores, quadratic in tokens: never kept. Transformer Engine's GEMMs are no operators of
    torch: they run again.
    """
    name = operation._schema.name
    return name in ("aten::mm", "aten::addmm") or "flash_att" in name or "cudnn_attention" in name


@dataclass(eq=False)
class _Kept:
    """What one call returned or, a collective, wrote: a tensor or several, and their versions."""

    result: Any
    versions: list[int]
    only_reduced: bool = False
    """A reduce-scatter read it, which is kept itself: only the shape remains. Given back as NaN, lest anything else reads it."""

    @staticmethod
    def of(result: Any) -> "_Kept":
        detached = tree_map_only(Tensor, Tensor.detach, result)
        return _Kept(detached, _versions(detached))

    def forget_values(self) -> None:
        self.result, self.only_reduced = self.result.new_full((), torch.nan).expand(self.result.shape), True

    def give_back(self) -> Any:
        if self.only_reduced:
            return self.result.contiguous()
        if _versions(self.result) != self.versions:
            raise RuntimeError("a block changed in place what selective recomputation keeps of it")
        return self.result


def _versions(result: Any) -> list[int]:
    return [value._version for value in tree_iter(result) if isinstance(value, Tensor)]


_Tape = defaultdict[OpOverload, list[_Kept]]


def _keep_and_replay() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a block's forward and of its recomputation."""
    tape, attention = defaultdict(list), KeptAttention()
    around_forward, around_recomputation = attention.contexts()
    return _both(around_forward, _Keep(tape, attention)), _both(around_recomputation, _Replay(tape))


@contextmanager
def _both(outer: AbstractContextManager, inner: AbstractContextManager) -> Iterator[None]:
    with outer, inner:
        yield


class _Keep(TorchDispatchMode):
    def __init__(self, tape: _Tape, attention: KeptAttention) -> None:
        super().__init__()
        self._tape, self._attention, self._matmuls = tape, attention, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returned = func(*args, **(kwargs or {}))
        if self._attention.is_computing:
            return returned
        if is_kept(func):
            self._tape[func].append(_Kept.of(returned))
            if isinstance(returned, Tensor):
                self._matmuls[returned.untyped_storage()._cdata] = self._tape[func][-1]
        elif func._schema.name in _COLLECTIVES:
            self._tape[func].append(_Kept.of(args[0]))
            if isinstance(args[0], Tensor):  # reduce-scatter: (output, input)
                summed = self._matmuls.get(args[1].untyped_storage()._cdata)
                if summed is not None:
                    summed.forget_values()
        return returned


class _Replay(TorchDispatchMode):
    def __init__(self, tape: _Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if is_kept(func):
            return self._tape[func].pop(0).give_back()
        if func._schema.name in _COLLECTIVES:
            written = self._tape[func].pop(0).give_back()
            for target, value in zip(tree_iter(args[0]), tree_iter(written), strict=True):
                target.copy_(value)
            return args[0], _finished_work()
        return func(*args, **(kwargs or {}))


def _finished_work() -> torch.ScriptObject:
    """The handle of a collective that has ended, as its operator returns it. (The one of the forward may hold the inputs.)"""
    future = torch.futures.Future()
    future.set_result(None)
    return _create_work_from_future(future).boxed()
