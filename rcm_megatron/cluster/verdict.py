"""From the ranks' reports to the names of bad nodes, and one table."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rcm_megatron.cluster.report import Report, megatron_problem

CLOCK_SKEW = 1.0
"""Seconds that a node's clock may be off from rank 0's, beyond what the measurement leaves open."""


@dataclass
class Findings:
    """What the pre-flight knows, of all ranks or as many as have answered."""

    nodes: list[str]
    """The node of each rank, as far as it is known: "rank N" otherwise."""
    reports: dict[int, Report] = field(default_factory=dict)
    clocks: dict[str, tuple[float, float]] = field(default_factory=dict)
    """{node: (seconds ahead of rank 0, uncertainty)}."""
    bandwidths: dict[int, dict[str, float]] = field(default_factory=dict)
    """{rank: what `bandwidth.measure` gave}."""
    problems: list[tuple[str, str]] = field(default_factory=list)
    """(node, what is wrong), found while the ranks talked."""

    def named_problems(self, *, slow: float) -> list[tuple[str, str]]:
        """(node, what is wrong), each once. `slow`: the fraction of the nodes' median below which a bandwidth is a fault."""
        found = [*self.problems, *self._local(), *self._unequal(), *self._clock_skews(), *self._slow(slow)]
        return list(dict.fromkeys(found))

    def _local(self) -> Iterator[tuple[str, str]]:
        for report in self.reports.values():
            yield from ((report.node, problem) for problem in report.problems)
            wrong = megatron_problem(report.versions)
            if wrong is not None:
                yield report.node, wrong

    def _unequal(self) -> Iterator[tuple[str, str]]:
        names = dict.fromkeys(name for report in self.reports.values() for name in report.versions)
        for name in names:
            values = [(report.node, report.versions.get(name, "unknown")) for report in self.reports.values()]
            yield from _minority(name, values)
        yield from _minority("device", [(report.node, report.device) for report in self.reports.values()])

    def _clock_skews(self) -> Iterator[tuple[str, str]]:
        for node, (ahead, uncertainty) in self.clocks.items():
            if abs(ahead) - uncertainty > CLOCK_SKEW:
                yield (
                    node,
                    f"clock is {abs(ahead):.1f} s {'ahead' if ahead > 0 else 'behind'}; need it within {CLOCK_SKEW:g} s",
                )

    def _slow(self, fraction: float) -> Iterator[tuple[str, str]]:
        for kind, place in (("node", "inside the node"), ("pair", "to its neighbours")):
            of_node = self.bandwidth_of_nodes(kind)
            middle = statistics.median(of_node.values()) if of_node else 0.0
            for node, value in of_node.items():
                if value < fraction * middle:
                    yield node, f"all-reduce {place} is slow: {value:.2f} GB/s, the nodes' median is {middle:.2f}"

    def bandwidth_of_nodes(self, kind: str) -> dict[str, float]:
        """GB/s of each node that has a figure of this kind, by its slowest rank."""
        found: dict[str, float] = {}
        for rank, values in self.bandwidths.items():
            if kind in values:
                node = self.nodes[rank]
                found[node] = min(values[kind], found.get(node, values[kind]))
        return found

    def table(self, problems: Iterable[tuple[str, str]]) -> str:
        """One line a node, then what all ranks reach together, then the problems by node."""
        bad = {node for node, _ in problems}
        inside, pairs = self.bandwidth_of_nodes("node"), self.bandwidth_of_nodes("pair")
        rows = [
            ("node", "ranks", "devices", "free GPU GiB", "free disk GiB", "clock ms", "GB/s inside", "GB/s across", "")
        ]
        for node in dict.fromkeys(self.nodes):
            reports = [report for report in self.reports.values() if report.node == node]
            memory = [report.free_memory_gib for report in reports if report.free_memory_gib is not None]
            clock = self.clocks.get(node)
            rows.append(
                (
                    node,
                    f"{len(reports)} of {self.nodes.count(node)}",
                    reports[0].device if reports else "-",
                    f"{min(memory):.1f}" if memory else "-",
                    f"{min(report.free_disk_gib for report in reports):.1f}" if reports else "-",
                    f"{1e3 * clock[0]:+.0f} ± {1e3 * clock[1]:.0f}" if clock else "-",
                    f"{inside[node]:.2f}" if node in inside else "-",
                    f"{pairs[node]:.2f}" if node in pairs else "-",
                    "BAD" if node in bad else "ok",
                )
            )
        together = [values["all"] for values in self.bandwidths.values() if "all" in values]
        lines = [*_aligned(rows), f"all ranks: {min(together):.2f} GB/s" if together else "all ranks: not measured"]
        return "\n".join([*lines, *(f"{node}: {problem}" for node, problem in problems)])


def _minority(name: str, values: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """The nodes that differ from the most common value; from the first node's where two are as common."""
    common = Counter(value for _, value in values).most_common(1)
    for node, value in values:
        if value != common[0][0]:
            others = next(other for other, theirs in values if theirs == common[0][0])
            yield node, f"{name} {value}, but {common[0][0]} on {others}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def nodes_of_ranks(reports: Mapping[int, Report], *, world_size: int, listed: Sequence[str]) -> list[str]:
    """The node of each rank: its own word, or its place in `listed` (the job's nodes, as many ranks on each), or "rank N"."""
    each = world_size // len(listed) if listed and world_size % len(listed) == 0 else 0
    places = [listed[rank // each] if each else f"rank {rank}" for rank in range(world_size)]
    return [reports[rank].node if rank in reports else places[rank] for rank in range(world_size)]
