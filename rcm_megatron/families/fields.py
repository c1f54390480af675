"""Reading a network's settings from files of others: what the readers of all families share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rcm_megatron.errors import CheckpointError, nearest
from rcm_megatron.families.family import Fields, Shapes

Columns = Mapping[str, tuple[str, Any]]
"""Our field -> (their field, its default)."""


def translated(config: Mapping[str, Any], columns: Columns) -> Fields:
    """Our fields of a `config.json`."""
    return {ours: config.get(theirs, default) for ours, (theirs, default) in columns.items()}


def require(config: Mapping[str, Any], field: str, need: Any, why: str) -> None:
    """Raises CheckpointError where a field that may be left out says something else than `need`."""
    got = config.get(field, need)
    got = tuple(got) if isinstance(got, list) else got
    if got != need:
        raise CheckpointError(f"config.json: {field}={got!r}; need {need!r}: {why}")


def require_class(config: Mapping[str, Any], need: str) -> None:
    """Raises CheckpointError where diffusers would build another class than the one whose keys the weights have."""
    got = config.get("_class_name", need)
    if got != need:
        raise CheckpointError(f"config.json: _class_name={got!r}; need {need!r}, whose keys the weights have")


def shape_of(shapes: Shapes, name: str, what: str) -> tuple[int, ...]:
    """Raises CheckpointError for a key that is not there; it gives the nearest."""
    if name not in shapes:
        raise CheckpointError(f"missing key {name!r}{nearest(name, shapes)}: not {what}")
    return shapes[name]


def check_heads(hidden_size: int, num_heads: int) -> None:
    """Raises CheckpointError for heads that do not divide the hidden size."""
    if num_heads < 1 or hidden_size % num_heads:
        raise CheckpointError(f"hidden_size={hidden_size} must divide by num_heads={num_heads}")


def checked(fields: Fields) -> Fields:
    """The fields, with tuples for lists. Raises CheckpointError for sizes that belong to no network."""
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    check_heads(fields["hidden_size"], fields["num_heads"])
    if fields["in_channels"] != fields["out_channels"]:
        raise CheckpointError(
            f"in_channels={fields['in_channels']} must equal out_channels={fields['out_channels']}: both are the latent's"
        )
    return fields
