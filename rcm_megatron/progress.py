"""Progress bars: how often they are drawn."""

import sys


def bar_interval() -> float:
    """Seconds between two lines of a progress bar: a log is no terminal."""
    return 1.0 if sys.stderr.isatty() else 30.0
