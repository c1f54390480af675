"""Process groups of one run, passed as arguments to everything that communicates."""

from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import ProcessGroup

from rcm_megatron.config import ParallelConfig


@dataclass(frozen=True, eq=False)
class ParallelGroups:
    """The process groups of this rank. A context-parallel rank is ``ring_rank * ulysses + ulysses_rank``.

    ``tp_cp`` are the ranks that hold the token shards of one sample, tensor-parallel rank fastest; ``dp_cp`` the ranks over which
    gradients are averaged.
    """

    tp: ProcessGroup
    cp: ProcessGroup
    ring: ProcessGroup | None
    ulysses: ProcessGroup | None
    pp: ProcessGroup
    dp: ProcessGroup
    dp_cp: ProcessGroup
    tp_cp: ProcessGroup

    @property
    def tp_size(self) -> int:
        return self.tp.size()

    @property
    def tp_rank(self) -> int:
        return self.tp.rank()

    @property
    def cp_size(self) -> int:
        return self.cp.size()

    @property
    def cp_rank(self) -> int:
        return self.cp.rank()

    @property
    def dp_size(self) -> int:
        return self.dp.size()

    @property
    def dp_rank(self) -> int:
        return self.dp.rank()

    @property
    def pp_size(self) -> int:
        return self.pp.size()

    @property
    def pp_rank(self) -> int:
        return self.pp.rank()

    @property
    def token_shards(self) -> int:
        """Number of contiguous shards into which the tokens of a sample are cut: tp * cp."""
        return self.tp_size * self.cp_size

    @property
    def token_shard(self) -> int:
        """Index of this rank's token shard."""
        return self.cp_rank * self.tp_size + self.tp_rank


def initialize_parallel(parallel: ParallelConfig) -> ParallelGroups:
    """Create Megatron's process groups for ``parallel`` over the initialized default group and collect this rank's.

    Raises ValueError where the processes do not divide.
    """
    world = dist.get_world_size()
    if world % parallel.model_parallel_size:
        raise ValueError(
            f"{world} processes cannot hold tp*cp*pp = {parallel.model_parallel_size} of parallel.*; "
            f"start a multiple of {parallel.model_parallel_size} processes or lower tp, ring, ulysses or pp"
        )
    hybrid = parallel.ring > 1 and parallel.ulysses > 1
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        hierarchical_context_parallel_sizes=[parallel.ulysses, parallel.ring] if hybrid else None,
        create_gloo_process_groups=False,
    )
    cp = parallel_state.get_context_parallel_group()
    if hybrid:
        ulysses, ring = parallel_state.get_hierarchical_context_parallel_groups()
    else:
        ulysses = cp if parallel.ulysses > 1 else None
        ring = cp if parallel.ring > 1 else None
    return ParallelGroups(
        tp=parallel_state.get_tensor_model_parallel_group(),
        cp=cp,
        ring=ring,
        ulysses=ulysses,
        pp=parallel_state.get_pipeline_model_parallel_group(),
        dp=parallel_state.get_data_parallel_group(),
        dp_cp=parallel_state.get_data_parallel_group(with_context_parallel=True),
        tp_cp=parallel_state.get_tensor_and_context_parallel_group(),
    )
