"""What a user can cause: one base class, which the command line turns into a message and a status; and how messages name what is near."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message says what was got, what is needed and what to change."""

    status = 1
    """Of the process that it ends: 1 for files and requests, 2 for a configuration."""
    on_all_ranks = False
    """Whether every rank finds the same, so that one speaks for all; else each says which it is."""


class InputError(UserError, ValueError):
    """A request that cannot be met: an unknown word, a step count, no caption; the message says got, need and fix."""


class CheckpointError(UserError, ValueError):
    """A checkpoint is missing, unreadable, or does not fit the model; the message says got, need and fix."""


class InstallationError(UserError):
    """A library is not of a version that the program knows."""


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
