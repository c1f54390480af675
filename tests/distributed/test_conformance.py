"""The golden files on every layout: the deep one (105 tokens: padding everywhere) whole, the small one in part."""

import pytest

from rcm_megatron.conformance.golden import BOUNDS
from tests.distributed.conformance import FILES, LAYOUTS, assert_conforms, conformance_errors, stored_quantities
from tests.distributed.harness import run_ranks

PART = ["scm", "scm_semicontinuous", "dmd", "critic"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_deep_file(layout):
    ranks, parallel = LAYOUTS[layout]
    stored = stored_quantities(FILES["deep"])
    assert stored.keys() == set(BOUNDS) | {"network"}
    assert_conforms(run_ranks(conformance_errors, ranks, str(FILES["deep"]), parallel), stored=stored)


@pytest.mark.parametrize("layout", ["tp2_ring2", "ring2_ulysses2"])
def test_small_file(layout):
    ranks, parallel = LAYOUTS[layout]
    reports = run_ranks(conformance_errors, ranks, str(FILES["small"]), parallel, 2, PART)
    assert_conforms(reports, stored=stored_quantities(FILES["small"], PART))
