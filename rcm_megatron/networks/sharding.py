"""Weights that do not train, each rank holding its part of every block: PyTorch's FSDP2, which needs no gradient of them."""

from collections.abc import Sequence

from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

from rcm_megatron.models.dit import DiffusionTransformer
from rcm_megatron.parallel.sharded import ShardedDataParallel
from rcm_megatron.platform.device import this_device


def shard_weights(
    chunks: Sequence[DiffusionTransformer], *, group: ProcessGroup, offload: bool = False
) -> list[DiffusionTransformer]:
    """Leave on each rank of ``group`` its part of every frozen parameter; a forward gathers them block by block.

    The embedders and the head are gathered for the whole of a chunk's forward. On CUDA the next block is gathered on a stream of its own
    while this one computes. ``offload``: the parts wait in pinned host memory. All ranks of the group must run the same passes.
    """
    if group.size() == 1 and not offload:
        return list(chunks)
    mesh = DeviceMesh.from_group(group, this_device().type)
    policy = CPUOffloadPolicy(pin_memory=this_device().type == "cuda") if offload else OffloadPolicy()
    for chunk in chunks:
        marks = [dict(parameter.__dict__) for parameter in chunk.parameters()]
        for module in (*chunk.blocks.values(), chunk):
            fully_shard(module, mesh=mesh, reshard_after_forward=True, offload_policy=policy)
        # what the layers say of a parameter (its gradient is partial, stages share it) a LoRA on it must know
        for parameter, said in zip(chunk.parameters(), marks, strict=True):
            parameter.__dict__.update(said)
    return list(chunks)


def is_gathered(chunks: Sequence[nn.Module]) -> bool:
    """Whether passes gather the network's weights from other ranks, which must run the same ones then."""
    return isinstance(chunks[0], FSDPModule | ShardedDataParallel)
