"""Updates that were refused because gradients or losses were not finite: how many in a row, and which checkpoints are from before.

Weights that have blown up are finite numbers; that they are bad shows in the gradients after them. A checkpoint is known to be good when
every network has made an update since, so none is written while updates are refused, and those that hold the last update before the row
are set aside when the run gives up.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from rcm_megatron.errors import UserError

DIVERGED = 88
"""Exit status of a run whose updates are refused in a row: starting it again as it is gives the same."""


class Diverged(UserError):
    """The weights have blown up; the newest checkpoint is from before."""

    status = DIVERGED
    on_all_ranks = True


@dataclass
class Refusals:
    """Updates refused in a row, of each network and of all; a checkpoint holds it."""

    in_a_row: int = 0
    of_role: dict[str, int] = field(default_factory=dict)
    last_update: dict[str, int] = field(default_factory=dict)
    """Role -> iteration of its newest update."""

    def note(self, role: str, iteration: int, *, updated: bool) -> None:
        """What came of ``iteration``, which was to train ``role``."""
        self.in_a_row = 0 if updated else self.in_a_row + 1
        self.of_role[role] = 0 if updated else self.of_role.get(role, 0) + 1
        if updated:
            self.last_update[role] = iteration

    @property
    def calm(self) -> bool:
        """No network's newest update was refused."""
        return not any(self.of_role.values())

    @property
    def most(self) -> int:
        """The longest row, of one network or of all together."""
        return max(self.in_a_row, *self.of_role.values(), 0)

    @property
    def good_until(self) -> int | None:
        """Checkpoints after at most so many iterations hold none of the updates that the row may come from; None: no update does."""
        last = [self.last_update[role] for role, count in self.of_role.items() if count and role in self.last_update]
        return min(last, default=None)

    def plain(self) -> dict[str, dict[str, int]]:
        """For a checkpoint: which updates it holds. A row begins anew after a resume."""
        return {"last_update": asdict(self)["last_update"]}

    def message(self, iteration: int, *, newest: str | None) -> str:
        """One line: what happened, what is left, what to change."""
        roles = " and ".join(role for role, count in self.of_role.items() if count)
        left = f"the newest checkpoint from before is {newest}" if newest else "no checkpoint is from before"
        return (
            f"DIVERGED: the last {self.most} updates up to iteration {iteration - 1} ({roles}) were refused: their gradients or losses "
            f"are NaN or infinite; {left}; fix: lower the learning rate (networks.ROLE.optimizer.lr, or lr of the stage) or clip "
            "(networks.ROLE.optimizer.clip_grad), and start again; trainer.max_refused_updates=null goes on for ever"
        )
