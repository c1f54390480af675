"""The one exception of this package, and how its messages name the nearest candidate."""

import difflib
from collections.abc import Iterable

from rcm_megatron.errors import UserError


class CheckpointError(UserError, ValueError):
    """A checkpoint is missing, unreadable, or does not fit the model; the message says got, need and fix."""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """` (nearest: 'x')` when some candidate resembles `name`, otherwise an empty string."""
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f" (nearest: {matches[0]!r})" if matches else ""


def name_keys(title: str, names: Iterable[str], candidates: Iterable[str], limit: int = 5) -> str:
    """One line that lists up to `limit` names, each with its nearest candidate; empty when there is none."""
    names, candidates = sorted(names), list(candidates)
    if not names:
        return ""
    listed = ", ".join(f"{name!r}{nearest(name, candidates)}" for name in names[:limit])
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"\n  {title} ({len(names)}): {listed}{more}"
