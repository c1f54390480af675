"""The golden files on every layout: the deep one (105 tokens: padding everywhere) whole, the small one in part."""

import pytest

from tests.distributed.conformance import FILES, assert_conforms, conformance_errors
from tests.distributed.harness import run_ranks
from tools.golden import BOUNDS

LAYOUTS = {
    "tp2": (2, {"tp": 2}),
    "tp4": (4, {"tp": 4}),
    "ring2": (2, {"ring": 2}),
    "ulysses2": (2, {"ulysses": 2}),
    "ulysses4": (4, {"ulysses": 4}),
    "ring2_ulysses2": (4, {"ring": 2, "ulysses": 2}),
    "tp2_ring2": (4, {"tp": 2, "ring": 2}),
    "dp2": (2, {}),
}
PART = ["scm", "scm_semicontinuous", "dmd", "critic"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_deep_file(layout):
    ranks, parallel = LAYOUTS[layout]
    assert_conforms(run_ranks(conformance_errors, ranks, str(FILES["deep"]), parallel, timeout=280), cases=set(BOUNDS))


@pytest.mark.parametrize("layout", ["tp2_ring2", "ring2_ulysses2"])
def test_small_file(layout):
    ranks, parallel = LAYOUTS[layout]
    assert_conforms(run_ranks(conformance_errors, ranks, str(FILES["small"]), parallel, 2, PART), cases=set(PART))
