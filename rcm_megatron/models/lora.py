"""LoRA (arXiv 2106.09685) on the linears of a network, and networks that share one base.

y = W x + (alpha / r) B A x, without bias, so a dual's tangent goes through as through W. A fused projection (q, k, v) has an A for each of
its parts, as the files of other programs have, and the rows of B lie as those of W: interleaved per head, cut by tensor parallelism alike.

Shapes: A ``[parts r, in]``, B ``[out, r]``; x_SBI input, a_SBR its low-rank image, R = parts r.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    all_gather_last_dim_from_tensor_parallel_region,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from rcm_megatron.dual import Dual, map_linear
from rcm_megatron.models.dit import DiffusionTransformer
from rcm_megatron.models.dual_ops import add
from rcm_megatron.models.layers import GatheredLinear, ReplicatedLinear, mark_tensor_parallel

ADAPTER = "lora"
"""The adapter's name within its linear."""


@dataclass(frozen=True, kw_only=True)
class AdapterSize:
    """Of one linear."""

    rank: int
    scale: float
    parts: int
    """External linears that it is made of."""
    head_dim: int


class Adapter(nn.Module):
    """A and B of one linear; ``between`` and ``after`` are the communication between the two, and at the end."""

    def __init__(
        self,
        linear: nn.Module,
        size: AdapterSize,
        *,
        between: Callable[[Tensor], Tensor] = lambda a_SBR: a_SBR,
        after: Callable[[Tensor], Tensor] = lambda y_SBO: y_SBO,
    ) -> None:
        super().__init__()
        out_features, in_features = linear.weight.shape
        options = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        self.size, self._between, self._after = size, between, after
        self.A = nn.Parameter(torch.empty(size.parts * size.rank, in_features, **options))
        self.B = nn.Parameter(torch.zeros(out_features, size.rank, **options))

    def forward(self, x_SBI: Tensor) -> Tensor:
        a_SBR = self._between(nn.functional.linear(x_SBI, self.A))
        if self.size.parts == 1:
            y_SBO = nn.functional.linear(a_SBR, self.B)
        else:
            a_SBPR = a_SBR.unflatten(-1, (self.size.parts, -1))
            y_SBO = torch.einsum("sbpr,npdr->sbnpd", a_SBPR, self._by_head(self.B)).flatten(2)
        return self._after(self.size.scale * y_SBO)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """What it adds to the linear's weight on this rank, in its shape."""
        if self.size.parts == 1:
            return self.size.scale * (self.B @ self.A)
        a_PRI = self.A.unflatten(0, (self.size.parts, -1))
        return self.size.scale * torch.einsum("npdr,pri->npdi", self._by_head(self.B), a_PRI).flatten(0, 2)

    def _by_head(self, b: Tensor) -> Tensor:
        return b.unflatten(0, (-1, self.size.parts, self.size.head_dim))


# ---- where the factors lie on tensor-parallel ranks


def _column(linear: ColumnParallelLinear, size: AdapterSize, group: ProcessGroup) -> Adapter:
    """B is cut as W. A is whole; on token shards its gradient is partial."""
    sequence_parallel = linear.sequence_parallel

    def between(a_SBR: Tensor) -> Tensor:
        if sequence_parallel:
            return gather_from_sequence_parallel_region(a_SBR, tensor_parallel_output_grad=True, group=group)
        return copy_to_tensor_model_parallel_region(a_SBR, group=group) if group.size() > 1 else a_SBR

    adapter = Adapter(linear, size, between=between)
    mark_tensor_parallel(adapter.B, dim=0)
    adapter.A.sequence_parallel = sequence_parallel
    return adapter


def _row(linear: RowParallelLinear, size: AdapterSize, group: ProcessGroup) -> Adapter:
    """A is cut as W. B is whole and works on token shards: its gradient is partial."""
    sequence_parallel = linear.sequence_parallel

    def between(a_SBR: Tensor) -> Tensor:
        if sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(a_SBR, group=group)
        return reduce_from_tensor_model_parallel_region(a_SBR, group=group) if group.size() > 1 else a_SBR

    adapter = Adapter(linear, size, between=between)
    mark_tensor_parallel(adapter.A, dim=1)
    adapter.B.sequence_parallel = sequence_parallel
    return adapter


def _gathered(linear: GatheredLinear, size: AdapterSize, group: ProcessGroup) -> Adapter:
    """B is cut as W, what it gives is gathered; A is whole, with a gradient that is partial over the features of B."""
    split = group.size() > 1
    after = (lambda y: all_gather_last_dim_from_tensor_parallel_region(y, group=group)) if split else (lambda y: y)
    adapter = Adapter(linear, size, after=after)
    mark_tensor_parallel(adapter.B, dim=0)
    adapter.A.sequence_parallel = True
    return adapter


def _replicated(linear: ReplicatedLinear, size: AdapterSize, group: ProcessGroup) -> Adapter:
    adapter = Adapter(linear, size)
    for parameter in adapter.parameters():
        parameter.sequence_parallel = linear.weight.sequence_parallel
    return adapter


_KINDS = (
    (GatheredLinear, _gathered),
    (ReplicatedLinear, _replicated),
    (ColumnParallelLinear, _column),
    (RowParallelLinear, _row),
)
"""Kind of linear -> its adapter. Transformer Engine's are found by the names of their classes' bases: `_kind_of`."""


def _kind_of(linear: nn.Module) -> Callable[..., Adapter] | None:
    for kind, make in _KINDS:
        if isinstance(linear, kind):
            return make
    names = {"TEColumnParallelLinear": _column, "TERowParallelLinear": _row}
    return next((names[base.__name__] for base in type(linear).__mro__ if base.__name__ in names), None)


def is_linear(module: nn.Module) -> bool:
    """Whether an adapter may be put on a module."""
    return _kind_of(module) is not None


class _Adapted:
    """A linear and its adapter. Mixed into the linear's own class, so that whoever asks a linear for its weight or bias finds it."""

    def forward(self, x: Tensor | Dual, *rest, **named):
        found, adapter = super().forward(x, *rest, **named), self._modules[ADAPTER]
        if isinstance(found, tuple):
            return (found[0] + adapter(x), *found[1:])
        return add(found, map_linear(adapter, x))


_CLASSES: dict[type, type] = {}


def _adapted_class(linear: type) -> type:
    if linear not in _CLASSES:
        _CLASSES[linear] = type(f"Adapted{linear.__name__}", (_Adapted, linear), {})
    return _CLASSES[linear]


# ---- a second network over the same weights


def view_of(network: DiffusionTransformer) -> DiffusionTransformer:
    """Another tree of modules over the same parameters: it sees what becomes of them, sharded weights included, and may get adapters."""
    view = _view(network)
    view.config = copy.copy(network.config)
    view._received = None
    return view


def _view(module: nn.Module) -> nn.Module:
    # copy.copy would call the constructor of a class that FSDP2 made
    view = object.__new__(type(module))
    view.__dict__.update(module.__dict__)
    view.__dict__["_modules"] = {name: child and _view(child) for name, child in module._modules.items()}
    return view


def add_adapters(
    network: DiffusionTransformer, sizes: Callable[[str], AdapterSize | None], group: ProcessGroup
) -> None:
    """Put an adapter on every linear of a view for whose internal name ``sizes`` gives one; A is not set, B is zero."""
    assert not network.adapted, "a network has one LoRA"
    for name, linear in list(network.named_modules()):
        size = sizes(name) if is_linear(linear) else None
        if size is None:
            continue
        adapter = _kind_of(linear)(linear, size, group)
        for parameter in adapter.parameters():
            if getattr(linear.weight, "pipeline_parallel", False):
                parameter.pipeline_parallel = parameter.shared_embedding = True
        linear.__class__ = _adapted_class(type(linear))
        linear._modules[ADAPTER] = adapter
    network.adapted = True


def adapters_of(network: nn.Module) -> Iterator[tuple[str, nn.Module, Adapter]]:
    """(internal name of the linear, the linear, its adapter) of a network."""
    for name, module in network.named_modules():
        if isinstance(module, _Adapted):
            yield name, module, module._modules[ADAPTER]


@torch.no_grad()
def merge_adapters(chunks: Sequence[DiffusionTransformer]) -> None:
    """Whole networks again: W + (alpha / r) B A in the place of W, for everyone who shares it. Every rank changes its own slices."""
    for chunk in chunks:
        for _, linear, adapter in list(adapters_of(chunk)):
            linear.weight.add_(adapter.delta().to(linear.weight.dtype))
            del linear._modules[ADAPTER]
            linear.__class__ = type(linear).__mro__[2]
        chunk.adapted = False
