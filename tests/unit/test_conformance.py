"""Both golden files on one process, and proof that the check can fail."""

from dataclasses import replace

import pytest
import torch

from rcm_megatron.conformance.golden import BOUNDS, load_golden, relative_error
from tests.distributed.conformance import FILES, assert_conforms, conformance_errors, stored_quantities
from tests.distributed.harness import run_ranks


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_every_case_on_one_process(name, micro_batch_size):
    stored = stored_quantities(FILES[name])
    assert stored.keys() == set(BOUNDS) | {"network"}
    assert_conforms(run_ranks(conformance_errors, 1, str(FILES[name]), {}, micro_batch_size), stored=stored)


def errors_of_a_perturbed_network(path, network, parameter, factor, case):
    """The check on a network of which one weight matrix was scaled by `factor`."""
    from rcm_megatron.conformance import replay as conformance

    def perturbed(path):
        golden = load_golden(path)
        weights = {name: dict(tensors) for name, tensors in golden.weights.items()}
        weights[network][parameter] = weights[network][parameter] * factor
        return replace(golden, weights=weights)

    conformance.load_golden = perturbed
    report = conformance.conform(path, conformance.ParallelConfig(), micro_batch_size=2, cases=[case])
    return {key: [(e.name, e.error, e.bound) for e in errors] for key, errors in report.items()}


@pytest.mark.parametrize(
    ("network", "case", "kind"),
    [
        ("student", "scm", "grad/"),
        ("teacher", "scm", "out/"),
        ("fake_score", "dmd", "grad/"),
        ("fake_score", "critic", "grad/"),
    ],
)
def test_a_weight_scaled_by_a_thousandth_fails(network, case, kind):
    """One matrix of one network 0.1 % off. (The teacher's moves scm's gradients by less than their bound, and its output by four.)"""
    args = (str(FILES["small"]), network, "blocks.1.ffn.0.weight", 1.001, case)
    (report,) = run_ranks(errors_of_a_perturbed_network, 1, *args)
    failed = {name for name, error, bound in report[case] if not error <= bound}
    assert any(name.startswith(kind) for name in failed), report[case]
    net_failed = [name for name, error, bound in report["network"] if not error <= bound]
    assert net_failed == (["net/v", "net/t_v"] if network == "student" else [])


def exit_status(path, argv):
    """Exit status of the command line, and what it printed."""
    import contextlib
    import io

    from rcm_megatron.cli.main import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = main(["conformance", path, *argv])
    return status, printed.getvalue()


def exit_status_with_tighter_bounds(path, argv):
    from rcm_megatron.conformance import golden

    golden.BOUNDS["scm"] = replace(golden.BOUNDS["scm"], gradients=1e-12)
    return exit_status(path, argv)


def test_the_command_line_prints_a_line_per_case_and_exits_by_the_bounds():
    argv = ["--case", "scm", "micro_batch_size=2"]
    ((status, printed),) = run_ranks(exit_status, 1, str(FILES["small"]), argv)
    assert status == 0 and "FAILED" not in printed
    assert [line.split()[0] for line in printed.splitlines()] == ["network", "scm"]
    ((status, printed),) = run_ranks(exit_status_with_tighter_bounds, 1, str(FILES["small"]), argv)
    assert status == 1 and "FAILED" in printed and ">1e-12" in printed


def test_a_nan_fails():
    error = relative_error(torch.tensor([float("nan"), 1.0]), torch.ones(2))
    with pytest.raises(AssertionError, match="loss=nan > 1e-08"):
        assert_conforms([{"scm": [("loss", error, 1e-8)]}], stored={"scm": {"loss"}})


def test_a_stored_quantity_that_no_rank_compares_fails():
    """Outputs of losses are on the last stage only, gradients on the first."""
    first, last = [("loss", 0.0, 1e-8), ("grad/a", 0.0, 1e-5)], [("loss", 0.0, 1e-8), ("out/dF", 0.0, 1e-5)]
    stored = {"scm": {"loss", "grad/a", "out/dF"}}
    assert_conforms([{"scm": first}, {"scm": last}], stored=stored)
    with pytest.raises(AssertionError, match=r"case scm: \['out/dF'\] were compared on no rank"):
        assert_conforms([{"scm": first}, {"scm": first}], stored=stored)
    with pytest.raises(AssertionError, match="rank 1, case scm: no loss"):
        assert_conforms([{"scm": first}, {"scm": last[1:]}], stored=stored)
