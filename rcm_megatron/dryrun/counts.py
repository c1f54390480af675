"""Counts of what a rank does, by phase: FLOPs, launches, reads by the host, and what goes over which group and link."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._C import ScriptObject
from torch._C._distributed_c10d import ProcessGroup
from torch.distributed import get_process_group_ranks
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from rcm_megatron.parallel.groups import ParallelGroups

aten = torch.ops.aten


def _cpu_flash(q: Any, k: Any, v: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _cpu_flash_backward(do: Any, q: Any, k: Any, v: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(do.shape, q.shape, k.shape, v.shape)


FORMULAS: Mapping[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _cpu_flash,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_flash_backward,
}
"""Operator -> FLOPs of a call. PyTorch's registry has no CPU attention."""

_MESSAGE = {
    "allreduce_": 0,
    "allreduce_coalesced_": 0,
    "broadcast_": 0,
    "send": 0,
    "recv_": 0,
    "_allgather_base_": 0,
    "allgather_": 0,
    "allgather_into_tensor_coalesced_": 0,
    "_reduce_scatter_base_": 1,
    "reduce_scatter_": 1,
    "reduce_scatter_tensor_coalesced_": 1,
    "alltoall_base_": 1,
    "alltoall_": 1,
    "gather_": 0,
    "scatter_": 0,
}
"""Collective -> which of its arguments is the message; a barrier has none."""

_LAUNCH_FREE = frozenset(
    {
        "view",
        "_unsafe_view",
        "t",
        "transpose",
        "permute",
        "detach",
        "alias",
        "unbind",
        "split",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "expand",
        "as_strided",
        "narrow",
        "chunk",
        "view_as_complex",
        "view_as_real",
        "split_with_sizes",
        "lift_fresh",
        "empty",
        "empty_like",
        "new_empty",
        "empty_strided",
        "new_empty_strided",
        "_reshape_alias",
        "set_",
        "resize_",
        "is_pinned",
        "_local_scalar_dense",
        "unfold",
        "diagonal",
    }
)
"""aten operations that run no kernel."""

HOST_READS = (aten._local_scalar_dense.default, aten.equal.default)
"""Operators whose result the host waits for."""

INSIDE, BETWEEN = "inside a node", "between nodes"


@dataclass(frozen=True, order=True)
class Route:
    """Where messages go."""

    phase: str
    group: str
    """tp, cp, ring, ulysses, pp, dp, dp_cp, tp_cp, world."""
    size: int
    """Ranks of the group."""
    operation: str
    link: str


@dataclass
class Traffic:
    calls: int = 0
    message: int = 0
    """Bytes of the messages as they are given to the library."""
    sent: int = 0
    """Bytes that this rank sends, by NCCL's ring algorithms."""


class Groups:
    """Names of this rank's groups, and over which links they run."""

    def __init__(self, groups: ParallelGroups, *, gpus_per_node: int) -> None:
        self._gpus_per_node = gpus_per_node
        self._names = {torch.distributed.group.WORLD.group_name: "world"}
        for name in ("dp", "dp_cp", "tp_cp", "cp", "ring", "ulysses", "pp", "tp"):
            group = getattr(groups, name)
            if group is not None:
                self._names[group.group_name] = name
        self._ranks: dict[str, list[int]] = {}

    def name_of(self, group: ProcessGroup, operation: str) -> str:
        """With two stages Megatron receives over the default group."""
        name = self._names.get(group.group_name, group.group_name)
        return "pp" if name == "world" and operation in ("send", "recv_") else name

    def link_of(self, group: ProcessGroup, peer: int | None) -> str:
        """A collective whose ranks are on several nodes is between nodes; a message is where its other end is."""
        ranks = self._ranks.setdefault(group.group_name, get_process_group_ranks(group))
        ends = ranks if peer is None else (torch.distributed.get_rank(), ranks[peer])
        return INSIDE if len({rank // self._gpus_per_node for rank in ends}) == 1 else BETWEEN


@dataclass
class Counts:
    """Of everything since it was made; ``phase()`` names the moment."""

    phase: Callable[[], str]
    groups: Groups
    flops: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """Phase -> operation -> FLOPs: matrix products, tangents and what is computed again among them."""
    launches: Counter[str] = field(default_factory=Counter)
    """Phase -> kernels, about: an operation of PyTorch counts as one."""
    host_reads: Counter[str] = field(default_factory=Counter)
    """Phase -> numbers that the host waits for."""
    traffic: dict[Route, Traffic] = field(default_factory=lambda: defaultdict(Traffic))

    def operation(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        """One call of an operator that is no collective."""
        name = func._schema.name.removeprefix("aten::")
        if func in HOST_READS:
            self.host_reads[self.phase()] += 1
        if name in _LAUNCH_FREE or name.startswith("prim::"):
            return
        self.launches[self.phase()] += 1
        formula = FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.flops[self.phase()][name] += formula(*args, **kwargs, out_val=output)

    def launch(self, record: Any) -> None:
        """One launch of a Triton kernel."""
        from rcm_kernels.flops import flops_of

        self.launches[self.phase()] += 1
        if flops := flops_of(record):
            self.flops[self.phase()][record[0].__module__.split(".")[-2]] += flops

    def collective(self, func: Any, args: Sequence[Any]) -> None:
        """One call of an operator of c10d."""
        name = func._schema.name.removeprefix("c10d::")
        group = next(ProcessGroup.unbox(a) for a in args if isinstance(a, ScriptObject) and _is_group(a))
        size = _bytes_of(args[_MESSAGE[name]]) if name in _MESSAGE else 0
        peer = args[2] if name in ("send", "recv_") else None
        link = self.groups.link_of(group, peer)
        route = Route(self.phase(), self.groups.name_of(group, name), group.size(), name, link)
        traffic = self.traffic[route]
        traffic.calls += 1
        traffic.message += size
        traffic.sent += _sent(name, size, group.size())


def _is_group(value: ScriptObject) -> bool:
    return "ProcessGroup" in str(value._type())


def _bytes_of(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_iter(tensors) if isinstance(t, Tensor))


def _sent(name: str, size: int, ranks: int) -> int:
    if name == "recv_":
        return 0
    if name.startswith("allreduce"):
        return 2 * size * (ranks - 1) // ranks
    if any(part in name for part in ("gather", "reduce_scatter", "alltoall")):
        return size * (ranks - 1) // ranks
    return size if ranks > 1 else 0
