"""The same run of 20 steps through pipelines; resumed from layout to layout; the embedders that every stage holds a copy of."""

import math
from collections import Counter

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint
from torch.distributed.checkpoint import FileSystemReader

from tests.distributed.faults import EMBEDDERS, SPLIT
from tests.distributed.harness import run_ranks
from tests.distributed.run_checks import (
    CHANGE_BOUND,
    LOSS_BOUND,
    Runs,
    assert_same_change,
    assert_same_change_of_each,
    assert_same_curves,
)
from tests.distributed.tiny_run import STEPS, model_config
from tests.helpers import assert_close

MODEL = {"num_layers": 4, "freq_dim": 512}
"""Embedders twice as large as a block: the distributed optimizer's pieces of stages of 1 and 3 blocks would cut them at other places."""
LAYOUTS = {
    "one": (1, []),
    "pp2": (2, ["parallel.pp=2"]),
    "pp2_vpp2": (2, ["parallel.pp=2", "parallel.vpp=2"]),
    "pp2_dp2": (4, ["parallel.pp=2", "parallel.chunk_layers=[1, 3]", "trainer.micro_batch_size=1"]),
    "ring2_pp2_vpp2": (4, ["parallel.ring=2", "parallel.pp=2", "parallel.vpp=2"]),
    "tp2_ring2": (4, ["parallel.tp=2", "parallel.ring=2"]),
    "tp2_ring2_pp2": (8, ["parallel.tp=2", "parallel.ring=2", "parallel.pp=2"]),
}
RUN_ALL_STEPS = ["pp2_vpp2", "pp2_dp2", "ring2_pp2_vpp2", "tp2_ring2_pp2"]
EMBEDDER_BOUND = 1e-4
"""Of the change of each parameter of the embedders; 1e-5 measured at most, of any parameter."""
CHAIN = (("pp2", 4), ("tp2_ring2", 8), ("pp2_vpp2", 12), ("tp2_ring2", 16), ("pp2_dp2", STEPS))
"""One run, resumed on another layout after each of these iterations."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("tiny"), LAYOUTS, fault="digests_of_embedders", **MODEL)


@pytest.mark.parametrize("layout", RUN_ALL_STEPS)
def test_layout_gives_the_same_run(runs, layout):
    expected, lines = runs.undisturbed("one")
    got, their_lines = runs.undisturbed(layout)
    assert_same_curves(lines, their_lines, rel=LOSS_BOUND)
    assert_same_change(runs.initial, expected, got)
    assert_same_change_of_each(runs.initial, expected, got, prefixes=EMBEDDERS, bound=EMBEDDER_BOUND)


@pytest.mark.parametrize("layout", RUN_ALL_STEPS)
def test_embedders_are_the_same_bits_on_all_stages_after_every_step(runs, layout):
    """On all chunks of all ranks, tensor- and data-parallel ones too, and what is split over tp on all ranks of a slice; a stage that kept
    its own gradient would drift off."""
    results, _ = runs.undisturbed(layout)
    histories = [noted["digests"] for _, _, noted in results]
    chunks, tp = (2 if "vpp" in layout else 1), (2 if "tp2" in layout else 1)
    seen = set()
    for moment in zip(*histories, strict=True):
        whole = {digests[0] for rank in moment for digests in rank}
        slices = [{digests[1] for rank in moment[first::tp] for digests in rank} for first in range(tp)]
        assert all(len(rank) == chunks for rank in moment), moment
        assert len(whole) == 1 and [len(own) for own in slices] == [1] * tp, f"replicas differ: {moment}"
        seen |= set(moment[0])
    assert len(histories[0]) == 2 * STEPS and len(seen) > STEPS, "the embedders were trained"


def test_a_run_resumed_from_layout_to_layout_is_the_same_run(runs):
    """Saved under a pipeline, resumed under tensor and context parallelism, and back, twice."""
    expected, lines = runs.undisturbed("one")
    for layout, end in CHAIN:
        got, their_lines = runs.start(layout, "chain", f"trainer.stop_after={end}")
        assert got[0][0]["iteration"] == end
    assert_same_curves(lines, their_lines, rel=LOSS_BOUND)
    assert_same_change(runs.initial, expected, got)


def stored_tensors(folder):
    """{key: (size, boxes of its stored pieces)} of the run's last checkpoint, and the number of pieces on disk."""
    metadata = FileSystemReader(folder / "checkpoints" / f"iter_{STEPS:07d}").read_metadata()
    tensors = {
        key: (tuple(entry.size), [(tuple(piece.offsets), tuple(piece.sizes)) for piece in entry.chunks])
        for key, entry in metadata.state_dict_metadata.items()
        if hasattr(entry, "chunks")
    }
    return tensors, len(metadata.storage_data) - sum(
        not hasattr(e, "chunks") for e in metadata.state_dict_metadata.values()
    )


@pytest.mark.parametrize("layout", RUN_ALL_STEPS)
def test_a_checkpoint_holds_every_element_once(runs, layout):
    """The keys of one rank's checkpoint, cut into pieces that do not overlap: one copy of the embedders."""
    runs.undisturbed("one"), runs.undisturbed(layout)
    expected, _ = stored_tensors(runs.folder / "one")
    stored, on_disk = stored_tensors(runs.folder / layout)
    assert stored.keys() == expected.keys()
    kinds = Counter(
        key.split(".")[1] for key in stored if key.startswith("student.") and key.split(".", 2)[2].startswith(EMBEDDERS)
    )
    assert kinds.keys() == {"model", "main", "exp_avg", "exp_avg_sq", "ema"} and len(set(kinds.values())) == 1
    for key, (size, pieces) in stored.items():
        assert size == expected[key][0], key
        assert len({offsets for offsets, _ in pieces}) == len(pieces), f"{key}: two pieces at one place"
        assert sum(math.prod(sizes) for _, sizes in pieces) == math.prod(size), f"{key}: {pieces} of {size}"
    assert on_disk == sum(len(pieces) for _, pieces in stored.values())


def checkpointed_tensors(folder):
    """Every tensor of the run's last checkpoint, whole."""
    reader = FileSystemReader(folder / "checkpoints" / f"iter_{STEPS:07d}")
    entries = {k: e for k, e in reader.read_metadata().state_dict_metadata.items() if hasattr(e, "chunks")}
    tensors = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in entries.items()}
    torch_checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


@pytest.mark.parametrize("layout", RUN_ALL_STEPS)
def test_a_checkpoint_holds_the_state_of_one_rank(runs, layout):
    """Weights and their average as changes since the start; Adam's moments as they are."""
    runs.undisturbed("one"), runs.undisturbed(layout)
    stored = checkpointed_tensors(runs.folder / layout)
    for key, expected in checkpointed_tensors(runs.folder / "one").items():
        _, kind, name = key.split(".", 2)
        start = 0.0 if kind.startswith("exp_avg") else runs.initial[name]
        rel = 1e-5 if kind.startswith("exp_avg") else CHANGE_BOUND
        assert_close(key, expected - start, stored[key] - start, rel=rel)


def replicas(parallel):
    """(key, place, replica id) of every tensor that this rank would store."""
    from rcm_megatron.platform.megatron import prepare_megatron

    prepare_megatron()
    from rcm_megatron.config import LatentConfig, ParallelConfig
    from rcm_megatron.networks.build import build_chunks
    from rcm_megatron.parallel.groups import initialize_parallel

    parallel = ParallelConfig(**parallel)
    groups, latent = initialize_parallel(parallel), LatentConfig(channels=1, frames=4, height=16, width=16)
    chunks = build_chunks(model_config(**MODEL), latent, parallel, groups=groups, params_dtype=torch.float32)
    tensors = [tensor for chunk in chunks for tensor in chunk.sharded_state_dict().values()]
    return [(tensor.key, tensor.global_offset, tuple(tensor.replica_id)) for tensor in tensors]


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (4, {"pp": 2, "vpp": 2}),
        (4, {"tp": 2, "pp": 2, "chunk_layers": (1, 3)}),
        (4, {"pp": 4}),
        (8, {"tp": 2, "ring": 2, "pp": 2}),
    ],
    ids=["pp2_vpp2_dp2", "tp2_pp2", "pp4", "tp2_ring2_pp2"],
)
def test_one_replica_of_each_tensor_is_the_main_one(ranks, parallel):
    """Megatron writes the replica whose id is all zero; others must differ from it and from each other."""
    places = {}
    for held in run_ranks(replicas, ranks, parallel):
        for key, place, replica in held:
            places.setdefault((key, place), []).append(replica)
    for (key, place), found in places.items():
        assert len(set(found)) == len(found), f"{key} at {place}: {sorted(found)}"
        assert sum(not any(replica) for replica in found) == 1, f"{key} at {place}: {sorted(found)}"
        if key.startswith(EMBEDDERS):
            split = parallel.get("tp", 1) if key.startswith(SPLIT) else 1
            assert len(found) * split == ranks * parallel.get("vpp", 1), f"{key}: a copy on every chunk"
