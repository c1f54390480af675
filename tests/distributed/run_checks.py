"""Tiny runs on several layouts, each done once, and what two of them must have in common."""

import shutil

import pytest
import torch

from tests.distributed.harness import run_ranks
from tests.distributed.tiny_run import STEPS, flat_change, initial_weights, records, train, write_tiny_run

LOSS_BOUND, CHANGE_BOUND = 1e-5, 1e-4  # measured 4e-7 and 2e-6 (of one parameter 1.3e-5)


class Runs:
    """The undisturbed run of each layout, done when first asked for. `layouts`: {name: (processes, overrides)}."""

    def __init__(self, folder, layouts, *, fault=None, **changes):
        self.folder, self.layouts, self.fault, self.done = folder, layouts, fault, {}
        self.config = write_tiny_run(folder, **changes)
        self.initial = initial_weights(**changes)

    def start(self, layout, name, *extra, fault=None):
        """Train into folder `name`; (rank results, records)."""
        ranks, parallel = self.layouts[layout]
        overrides = [*parallel, f"output_dir={self.folder / name}", *extra]
        results = run_ranks(train, ranks, str(self.config), overrides, fault or self.fault)
        return results, records(self.folder / name)

    def undisturbed(self, layout):
        if layout not in self.done:
            self.done[layout] = self.start(layout, layout)
        return self.done[layout]

    def copy_until_step_10(self, layout, name):
        """A folder as it was when the run had just saved its checkpoint of step 10."""
        self.undisturbed(layout)
        shutil.copytree(self.folder / layout, self.folder / name)
        shutil.rmtree(self.folder / name / "checkpoints" / f"iter_{STEPS:07d}")


def assert_same_curves(expected, got, *, rel):
    """The same losses, norms and counters in every iteration; times of the machine are not in it, nor what previews look like, which a
    run may leave out."""
    assert [r["iteration"] for r in got] == list(range(len(expected)))
    expected, got = (
        [{key: value for key, value in record.items() if not key.startswith("preview/")} for record in records]
        for records in (expected, got)
    )
    for want, have in zip(expected, got, strict=True):
        assert want.keys() == have.keys(), want["iteration"]
        for key, value in want.items():
            close = value == have[key] if not isinstance(value, float) else have[key] == pytest.approx(value, rel=rel)
            assert close, f"iteration {want['iteration']}: {key} = {have[key]}, need {value} to {rel:.0e}"


def assert_same_change(initial, expected, got, *, networks=("student", "fake_score")):
    """‖Δw − Δw_ref‖ / ‖Δw_ref‖ of each network since `initial`, on the ranks that hold whole weights (the first does)."""
    for network in networks:
        want, have = (flat_change(results[0][1][network], initial) for results in (expected, got))
        error = float((have - want).norm() / want.norm())
        assert error <= CHANGE_BOUND, f"{network}: the weights' change is off by {error:.2e}"


def assert_same_change_of_each(initial, expected, got, *, prefixes, bound, networks=("student", "fake_score")):
    """The same of each parameter whose name begins with one of `prefixes`."""
    for network in networks:
        names = [name for name in initial if name.startswith(prefixes)]
        assert names, prefixes
        for name in names:
            want, have = ((results[0][1][network][name] - initial[name]).double() for results in (expected, got))
            error = float((have - want).norm() / want.norm())
            assert error <= bound and bool(torch.isfinite(have).all()), f"{network}: {name} is off by {error:.2e}"
