"""Layouts that the tests run on: every legal one of a few processes, and a selection that covers every pair of their factors.

No torch here: pytest asks for the layouts while it collects.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import combinations, product

HEADS, MOST_PROCESSES = 4, 8
DEGREES = {"tp": (1, 2, 4), "ring": (1, 2, 4), "ulysses": (1, 2, 4), "pp": (1, 2, 4), "vpp": (1, 2), "dp": (1, 2)}
"""Context parallelism of degree 4 is ring=4, ulysses=4, or ring=2 with ulysses=2."""
MOST_CONTEXT = 4
SAMPLES, MICRO_BATCH = 8, 2
"""Global batch, and samples of a micro-batch where the interleaved schedule does not ask for more micro-batches."""


@dataclass(frozen=True, order=True, kw_only=True)
class Layout:
    """Degrees of parallelism."""

    tp: int = 1
    ring: int = 1
    ulysses: int = 1
    pp: int = 1
    vpp: int = 1
    dp: int = 1

    @property
    def processes(self) -> int:
        return self.tp * self.ring * self.ulysses * self.pp * self.dp

    @property
    def parallel(self) -> dict[str, int]:
        """Fields of ParallelConfig; data parallelism is what remains of the processes."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "dp"}

    @property
    def name(self) -> str:
        """For example tp2_pp2; `one` for a single process."""
        return "_".join(f"{f.name}{getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) > 1) or "one"

    @property
    def num_layers(self) -> int:
        """Of the network that runs on it: uneven stages, and as few blocks as that takes."""
        return self.pp * self.vpp + 1

    @property
    def micro_batch_size(self) -> int:
        """MICRO_BATCH, or 1 where the interleaved schedule wants more micro-batches than that leaves a rank."""
        uneven_rounds = self.vpp > 1 and SAMPLES // (MICRO_BATCH * self.dp) % self.pp
        return 1 if uneven_rounds else MICRO_BATCH

    @property
    def is_legal(self) -> bool:
        """Whether a network of HEADS heads runs on it, on at most MOST_PROCESSES processes."""
        return (
            self.processes <= MOST_PROCESSES
            and self.ring * self.ulysses <= MOST_CONTEXT
            and HEADS % (self.tp * self.ulysses) == 0
            and (self.vpp == 1 or self.pp > 1)
        )

    @property
    def context(self) -> str:
        """How its context is parallel: none, ring, ulysses or both."""
        kinds = [name for name in ("ring", "ulysses") if getattr(self, name) > 1]
        return "both" if len(kinds) == 2 else "".join(kinds) or "none"

    @property
    def pairs(self) -> frozenset:
        """What it covers: each two of its factors' values together."""
        factors = {name: getattr(self, name) for name in ("tp", "context", "pp", "vpp", "dp")}
        return frozenset(combinations((factors | {"cp": self.ring * self.ulysses}).items(), 2))


def all_combinations() -> Iterator[Layout]:
    """Every combination of DEGREES, legal or not."""
    for values in product(*DEGREES.values()):
        yield Layout(**dict(zip(DEGREES, values, strict=True)))


ALL = tuple(sorted((layout for layout in all_combinations() if layout.is_legal), key=lambda x: (x.processes, x)))
"""Every legal layout, those of few processes first."""

NAMED = (
    Layout(pp=2),
    Layout(pp=4),
    Layout(pp=2, vpp=2),
    Layout(tp=2, pp=2),
    Layout(pp=2, dp=2),
    Layout(tp=2, ring=2, pp=2),
)
"""The pipelines that must conform to the golden files as well."""


def pairs_of(layouts: Iterable[Layout]) -> set:
    return set().union(*(layout.pairs for layout in layouts))


def covering(layouts: Sequence[Layout], *, always: Sequence[Layout]) -> tuple[Layout, ...]:
    """A small part of `layouts` with all their pairs of factors, `always` among them.

    Greedy: the layout with most pairs that are still missing, at equal counts the one of fewest processes, then the first; at the end
    those go whose pairs the others have, large ones first.
    """
    chosen, missing = list(always), pairs_of(layouts) - pairs_of(always)
    while missing:
        best = min(layouts, key=lambda layout: (-len(layout.pairs & missing), layout.processes, layout))
        chosen.append(best)
        missing -= best.pairs
    for layout in sorted(chosen[len(always) :], key=lambda x: (-x.processes, x)):
        others = [other for other in chosen if other != layout]
        if layout.pairs <= pairs_of(others):
            chosen = others
    return tuple(sorted(chosen, key=lambda x: (x.processes, x)))


SELECTED = covering(ALL, always=NAMED)
"""What CI runs; `pytest --all-layouts` runs ALL."""
