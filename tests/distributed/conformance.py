"""The golden files for the tests: where they are, the check as a function of a rank, and its assertion."""

from tests.helpers import GOLDEN

FILES = {"small": GOLDEN / "nvlabs_rcm_small.safetensors", "deep": GOLDEN / "nvlabs_rcm_deep.safetensors"}
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
"""Name -> (processes, parallel degrees): what golden files and gradients are compared on."""


def conformance_errors(path, parallel, micro_batch_size=1, cases=None):
    """{case: [(name, error, bound)]} of one rank; `parallel` holds tp, ring, ulysses."""
    from tools.conformance import ParallelConfig, conform

    report = conform(path, ParallelConfig(**parallel), micro_batch_size=micro_batch_size, cases=cases)
    return {case: [(e.name, e.error, e.bound) for e in errors] for case, errors in report.items()}


def assert_conforms(reports, *, cases):
    """Every quantity of every case within its bound on every rank; losses on all ranks, gradients on some."""
    for rank, report in enumerate(reports):
        assert report.keys() - {"network"} == cases, f"rank {rank} ran {sorted(report)}"
        for case, errors in report.items():
            failed = [f"{name}={error:.2e} > {bound:.0e}" for name, error, bound in errors if not error <= bound]
            assert not failed, f"rank {rank}, case {case}: {', '.join(failed)}"
    for case in cases:
        assert any(name.startswith("grad/") for report in reports for name, *_ in report[case]), f"{case}: no gradients"
