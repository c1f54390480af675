"""Every legal layout with its cheapest memory policies that fit: how fast it is, how full, and why others are not taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from rcm_megatron.config import ParallelConfig, RunConfig
from rcm_megatron.planner.candidates import POLICIES, Policies, layouts_of
from rcm_megatron.planner.cost import Cost, Schedule, cost_of
from rcm_megatron.planner.hardware import Hardware
from rcm_megatron.planner.memory import GIB, Peak, peak_of
from rcm_megatron.planner.shapes import Inventories, Shapes


@dataclass(frozen=True)
class Option:
    """A layout with policies."""

    run: RunConfig
    policies: Policies
    peak: Peak
    cost: Cost | None
    """None: it does not fit."""

    @property
    def fits(self) -> bool:
        return self.cost is not None


@dataclass(frozen=True)
class Search:
    """All of them."""

    fitting: list[Option]
    """The fastest first; one of each layout."""
    refused: list[Option]
    """The emptiest first; of each layout the policies with which it is emptiest."""


def search(
    run: RunConfig,
    world_size: int,
    inventories: Inventories,
    hardware: Hardware,
    *,
    allowed: Callable[[ParallelConfig], bool] = lambda _: True,
) -> Search:
    """Among all layouts, or those that are ``allowed``. Formulas alone: nothing is simulated."""
    schedule = Schedule.of(run)
    best = [
        _best_of(laid_out, world_size, inventories, hardware, schedule)
        for laid_out in layouts_of(run, world_size, gpus_per_node=hardware.gpus_per_node)
        if allowed(laid_out.parallel)
    ]
    fitting = sorted((option for option in best if option.fits), key=lambda option: option.cost.step)
    refused = sorted((option for option in best if not option.fits), key=lambda option: option.peak.total)
    return Search(fitting, refused)


def _best_of(
    laid_out: RunConfig, world_size: int, inventories: Inventories, hardware: Hardware, schedule: Schedule
) -> Option:
    """Of one layout the policies with which it is the fastest that fits, or the emptiest."""
    options = list(_options(laid_out, world_size, inventories, hardware, schedule))
    if fits := [option for option in options if option.fits]:
        return min(fits, key=lambda option: option.cost.step)
    return min(options, key=lambda option: option.peak.total)


def _options(
    laid_out: RunConfig, world_size: int, inventories: Inventories, hardware: Hardware, schedule: Schedule
) -> Iterator[Option]:
    """Of trained networks whole, and in pieces, what may be the fastest, or is the emptiest."""
    # on one rank of dp*cp nothing is in pieces
    shards = Shapes(laid_out, world_size).shards
    possible = [policy for policy in POLICIES if policy.trained_weights == "resident" or shards > 1]

    def option(policy: Policies) -> Option:
        shapes = Shapes(policy.applied_to(laid_out), world_size)
        peak = peak_of(shapes, inventories)
        fits = peak.total <= hardware.usable_gib * GIB
        return Option(shapes.run, policy, peak, cost_of(shapes, inventories, hardware, schedule) if fits else None)

    for _, of_kind in groupby(possible, key=lambda policy: policy.trained_weights):
        for _, policies in groupby(of_kind, key=lambda policy: policy.recompute):
            found, is_free = _first_that_fits(map(option, policies))
            yield found
            # what recomputes more is slower, and saves nothing that this needs
            if is_free:
                break


def _first_that_fits(options: Iterable[Option]) -> tuple[Option, bool]:
    """From cheap to dear the first that fits, else the emptiest; whether it is the cheapest of all."""
    emptiest = None
    for number, option in enumerate(options):
        if option.fits:
            return option, number == 0
        if emptiest is None or option.peak.total < emptiest.peak.total:
            emptiest = option
    return emptiest, False


def smallest_world(
    run: RunConfig, world_size: int, inventories: Inventories, hardware: Hardware, *, doublings: int = 4
) -> tuple[int, Option] | None:
    """The next number of GPUs, doubled and doubled, on which something fits, and what; None: not within ``doublings``."""
    for k in range(1, doublings + 1):
        more = world_size * 2**k
        found = search(run, more, inventories, hardware)
        if found.fitting:
            return more, found.fitting[0]
    return None
