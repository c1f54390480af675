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
    "pp2": (2, {"pp": 2}),
    "pp2_uneven": (2, {"pp": 2, "chunk_layers": (1, 3)}),
    "pp4": (4, {"pp": 4}),
    "pp2_vpp2": (2, {"pp": 2, "vpp": 2}),
    "tp2_pp2": (4, {"tp": 2, "pp": 2}),
    "pp2_dp2": (4, {"pp": 2}),
    "tp2_ring2_pp2": (8, {"tp": 2, "ring": 2, "pp": 2}),
}
"""Name -> (processes, parallel degrees): what the golden files are compared on."""


def conformance_errors(path, parallel, micro_batch_size=1, cases=None):
    """{case: [(name, error, bound)]} of one rank; `parallel` holds fields of ParallelConfig."""
    from rcm_megatron.conformance.replay import ParallelConfig, conform

    report = conform(path, ParallelConfig(**parallel), micro_batch_size=micro_batch_size, cases=cases)
    return {case: [(e.name, e.error, e.bound) for e in errors] for case, errors in report.items()}


def stored_quantities(path, cases=None):
    """{case: names of all that the file holds of it}: the loss, outputs, the gradients and their norm."""
    from rcm_megatron.conformance.golden import load_golden

    names = {}
    for case in load_golden(path).cases:
        outputs, gradients = (
            {f"{kind}/{name}" for name in d} for kind, d in (("out", case.outputs), ("grad", case.gradients))
        )
        assert outputs and gradients, f"{path}: {case.name} holds no outputs or no gradients"
        names[case.name] = {"loss", "grad_norm"} | outputs | gradients
    return {name: names[name] for name in cases or names} | {"network": {"net/v", "net/t_v"}}


def assert_conforms(reports, *, stored):
    """Every quantity of every case within its bound on every rank; losses compared on all ranks, the rest of `stored` on some."""
    for rank, report in enumerate(reports):
        assert report.keys() == stored.keys(), f"rank {rank} ran {sorted(report)}"
        for case, errors in report.items():
            failed = [f"{name}={error:.2e} > {bound:.0e}" for name, error, bound in errors if not error <= bound]
            assert not failed, f"rank {rank}, case {case}: {', '.join(failed)}"
            assert "loss" not in stored[case] or errors[0][0] == "loss", f"rank {rank}, case {case}: no loss"
    for case, names in stored.items():
        absent = names - {name for report in reports for name, *_ in report[case]}
        assert not absent, f"case {case}: {sorted(absent)} were compared on no rank"
