"""The networks of a run by role."""

from collections.abc import Iterator, Mapping

from torch import nn

from rcm_megatron.models.tokens import TokenLayout


class Networks(Mapping[str, list[nn.Module]]):
    """Role -> this rank's pipeline chunks, in the order in which they were built; roles that no stage uses are absent.

    All of them see the tokens of one ``layout``. Their blocks, widths and heads are their own.
    """

    def __init__(self, *, layout: TokenLayout, **roles: list[nn.Module] | None) -> None:
        self.layout = layout
        self._roles = {role: chunks for role, chunks in roles.items() if chunks is not None}

    def replace(self, **roles: list[nn.Module]) -> "Networks":
        """A copy with other networks for some roles."""
        return Networks(layout=self.layout, **{**self._roles, **roles})

    def __getitem__(self, role: str) -> list[nn.Module]:
        return self._roles[role]

    def __iter__(self) -> Iterator[str]:
        return iter(self._roles)

    def __len__(self) -> int:
        return len(self._roles)
