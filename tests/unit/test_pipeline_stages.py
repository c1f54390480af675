"""Which piece of the network each chunk of each pipeline rank holds."""

import pytest

from rcm_megatron.config import ParallelConfig
from rcm_megatron.parallel.pipeline_stages import PipelineStage, stages_of_rank

LAYERS = 9
LAYOUTS = {
    "one": ParallelConfig(),
    "pp2": ParallelConfig(pp=2),
    "pp4": ParallelConfig(pp=4),
    "pp2_vpp2": ParallelConfig(pp=2, vpp=2),
    "pp4_vpp2": ParallelConfig(pp=4, vpp=2),
    "uneven": ParallelConfig(pp=2, vpp=2, chunk_layers=(1, 4, 3, 1)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_pieces_of_all_ranks_are_the_network_in_order(name):
    parallel = LAYOUTS[name]
    ranks = [stages_of_rank(parallel, LAYERS, pp_rank=rank) for rank in range(parallel.pp)]
    assert all(len(chunks) == parallel.vpp for chunks in ranks)
    for rank, chunks in enumerate(ranks):
        assert [stage.index for stage in chunks] == [c * parallel.pp + rank for c in range(parallel.vpp)]
    stages = sorted((stage for chunks in ranks for stage in chunks), key=lambda stage: stage.index)
    assert [layer for stage in stages for layer in stage.layers] == list(range(LAYERS))
    assert all(stage.count == len(stages) == parallel.num_chunks for stage in stages)
    assert [stage.is_first for stage in stages] == [True] + [False] * (len(stages) - 1)
    assert [stage.is_last for stage in stages] == [False] * (len(stages) - 1) + [True]
    assert ranks[0][0].is_first and ranks[-1][-1].is_last, (
        "patches on the first rank's first chunk, loss on the last's last"
    )


def test_uneven_pieces_are_those_of_the_configuration():
    first, second = (stages_of_rank(LAYOUTS["uneven"], LAYERS, pp_rank=rank) for rank in range(2))
    assert [stage.layers for stage in first] == [range(0, 1), range(5, 8)]
    assert [stage.layers for stage in second] == [range(1, 5), range(8, 9)]


def test_a_stage_is_the_whole_network_by_default():
    stage = PipelineStage(range(3))
    assert stage.is_first and stage.is_last and (stage.index, stage.count) == (0, 1)
