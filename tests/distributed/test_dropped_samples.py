"""A sample with a NaN behind the loader is dropped alone: gradients are those of the batch without it, on every layout."""

import pytest
import torch

from rcm_megatron.config import ParallelConfig
from tests.distributed import test_parity
from tests.distributed.harness import run_ranks
from tests.distributed.test_parity import MICRO_BATCH, MODEL, SAMPLES, assert_equal_quantities, rows_of

BAD = (2, 5)
"""Of the global batch: of two micro-batches that hold a good one too, and of both data-parallel ranks."""
KINDS = {
    "scm, latent": "scm",
    "scm, text": "scm",
    "scm, teacher": "scm",
    "dcm, latent": "dcm",
    "flow, latent": "flow",
    "dmd, text": "dmd",
    "dmd, teacher": "dmd",
    "scm_and_dmd, text": "scm_and_dmd",
    "fake_score, text": "fake_score",
}
"""What is measured: the objective, and where the NaN is."""
CORE = ("scm, latent", "scm, teacher", "dmd, text", "fake_score, text")


def poisoned(samples, groups, where):
    """NaN or Inf in one number of each bad sample: of the latent on the rank that holds its first token, of the text on all."""
    for place, row in enumerate(rows_of(groups, samples.at_a_time)):
        if row in BAD and where == "latent" and groups.token_shard == 0:
            samples.x0_SBP[0, place, 1] = float("nan")
        if row in BAD and where == "text":
            samples.text_LBD[1, place, 3] = float("inf")
    return samples


def measure(parallel, kinds):
    """{kind: losses of each sample, which were masked, raw gradients} of a batch with two bad samples."""
    networks = test_parity.build(ParallelConfig(**parallel), torch.float32, num_layers=MODEL.num_layers)
    return {kind: quantities_of(networks, kind) for kind in kinds}


def quantities_of(networks, kind):
    from rcm_megatron.objectives.work import Work

    objective, where = kind.split(", ")
    clean, teacher, result_of = test_parity.samples_of, Work.teacher, Work._result
    masked = {}

    def nan_from_teacher(work, xt, t):
        v, groups = teacher(work, xt, t), work.layout.groups
        for place, row in enumerate(rows_of(groups, work.samples.at_a_time)):
            if row in BAD and groups.token_shard == 0:
                v[0, place, 0] = float("nan")
        return v

    def noted(work, *args):
        result = result_of(work, *args)
        of_all = test_parity.whole_batch(work.layout.groups, result.nan_B, MICRO_BATCH)
        masked[f"masked by {work.objective.name}"] = of_all
        return result

    test_parity.samples_of = lambda *args: poisoned(clean(*args), networks.layout.groups, where)
    Work.teacher, Work._result = (nan_from_teacher if where == "teacher" else teacher), noted
    try:
        return test_parity.quantities_of(networks, objective, MICRO_BATCH) | masked
    finally:
        test_parity.samples_of, Work.teacher, Work._result = clean, teacher, result_of


def without_the_bad():
    """{objective: raw gradients} of the good samples alone, in micro-batches of one; nothing in them is dropped."""
    networks, found = test_parity.build(ParallelConfig(), torch.float32, num_layers=MODEL.num_layers), {}
    good = [row for row in range(SAMPLES) if row not in BAD]
    test_parity.rows_of = lambda groups, micro_batch_size: good
    for objective in dict.fromkeys(KINDS.values()):
        quantities = test_parity.quantities_of(networks, objective, 1)
        found[objective] = {name: value for name, value in quantities.items() if name.startswith(("gradient", "loss"))}
    return found


@pytest.fixture(scope="module")
def one_rank():
    return run_ranks(measure, 1, {}, tuple(KINDS))[0]


def test_gradients_are_those_of_the_other_samples(one_rank):
    """As parts of the mean over the whole batch, in which a dropped sample counts 0."""
    (good,) = run_ranks(without_the_bad, 1)
    share = (SAMPLES - len(BAD)) / SAMPLES
    for kind, objective in KINDS.items():
        for name, value in one_rank[kind].items():
            if name.startswith("masked"):
                assert value.nonzero()[:, 0].tolist() == list(BAD), f"{kind}: {name}"
        scaled = {k: v if k.startswith("loss") else share * v for k, v in good[objective].items()}
        ours = {k: v for k, v in one_rank[kind].items() if k in scaled}
        ours |= {name: value.index_fill(0, torch.tensor(BAD), 0.0) for name, value in ours.items() if "loss" in name}
        assert ours.keys() == scaled.keys()
        assert_equal_quantities({kind: scaled}, [{kind: ours}])


@pytest.mark.parametrize(
    ("ranks", "parallel"), [(4, {"tp": 2}), (2, {"pp": 2}), (4, {"ring": 2})], ids=["tp2_dp2", "pp2", "ring2_dp2"]
)
def test_layout(one_rank, ranks, parallel):
    assert_equal_quantities(one_rank, run_ranks(measure, ranks, parallel, CORE))
