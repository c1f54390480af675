"""Stacked bars, one a name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

Bar = Mapping[str, float]


def stack(panel: Axes, names: Sequence[str], bars: Sequence[Bar], colours: Mapping[str, str], title: str) -> None:
    """Draw a horizontal bar for each name, its parts stacked in the order of ``colours``, and write its length behind it."""
    ends = [0.0] * len(bars)
    for key, colour in colours.items():
        widths = [bar.get(key, 0.0) for bar in bars]
        if any(widths):
            panel.barh(names, widths, left=ends, color=colour, label=key, height=0.7)
            ends = [end + width for end, width in zip(ends, widths, strict=True)]
    for place, end in enumerate(ends):
        panel.text(end, place, f" {end:,.0f}" if end >= 1000 else f" {end:.3g}", va="center", fontsize=8)
    panel.set_title(title, fontsize=10)
    panel.margins(x=0.16)
    if any(ends):
        panel.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4)
