"""Which piece of the network a model chunk holds."""

from dataclasses import dataclass

from rcm_megatron.config import ParallelConfig


@dataclass(frozen=True)
class PipelineStage:
    """One of the ``count`` pieces into which the network's blocks are cut; ``index`` counts them in the network's order."""

    layers: range
    index: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Embeds the patches."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Projects to patches."""
        return self.index == self.count - 1


def stages_of_rank(parallel: ParallelConfig, num_layers: int, *, pp_rank: int) -> list[PipelineStage]:
    """The pieces of pipeline rank ``pp_rank``, one for each model chunk: chunk c holds piece c * pp + pp_rank."""
    ranges = parallel.layer_ranges(num_layers)
    return [PipelineStage(ranges[index], index, len(ranges)) for index in range(pp_rank, len(ranges), parallel.pp)]
