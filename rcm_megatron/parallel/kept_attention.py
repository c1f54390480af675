"""What self-attention put out, kept where a block is computed again: the recomputation then runs no attention, and no ring.

The backward of attention needs its output and log-sum-exp, of all keys together, and nothing else that only attention can tell. So they
are kept as one result, whatever it was merged of: blocks of a ring, or a dual pass, whose primal is this result.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

from torch import Tensor

Result = tuple[Tensor, Tensor]
"""o [s, b, n, d] and lse [b, n, s]."""


class KeptAttention:
    """Of one run of a block; `contexts` go round its forward and its recomputation. A backward may run in a thread of its own."""

    def __init__(self) -> None:
        self._results: list[Result] = []
        self._replays = False
        self.is_computing = False
        """Whether attention is at work on what is kept of it as a whole: then nobody else needs to keep its parts."""

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """(Of the forward, of the recomputation); as `context_fn` of torch's checkpoint."""
        return self._current(replays=False), self._current(replays=True)

    @contextmanager
    def _current(self, *, replays: bool) -> Iterator[None]:
        self._replays, token = replays, _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)

    def computed(self, compute: Callable[[], Result]) -> Result:
        if self._replays:
            return self._results.pop(0)
        self.is_computing = True
        try:
            result = compute()
        finally:
            self.is_computing = False
        self.keep(result)
        return result

    def keep(self, result: Result) -> None:
        """What a dual pass has computed."""
        o, lse = result
        self._results.append((o.detach(), lse.detach()))


_CURRENT: ContextVar[KeptAttention | None] = ContextVar("kept_attention", default=None)


def kept_or(compute: Callable[[], Result]) -> Result:
    """``compute()``, or what it gave in the forward of which this is the recomputation."""
    kept = _CURRENT.get()
    return compute() if kept is None else kept.computed(compute)


def keep(o: Tensor, lse: Tensor) -> None:
    """Of a dual pass: the primal, for the recomputation, which runs on the primal alone."""
    kept = _CURRENT.get()
    if kept is not None:
        kept.keep((o, lse))
