"""External formats <-> internal parameters, in both directions, with every key used exactly once.

All functions stream: one internal parameter and one external tensor of it are in memory at a time. No dtype changes.
Keys, shapes and the file's configuration are checked before the first tensor is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from rcm_megatron.checkpoint.recognise import check_same_network
from rcm_megatron.checkpoint.sources import CheckpointSource, source_from_tensors
from rcm_megatron.errors import CheckpointError, name_keys, nearest
from rcm_megatron.families.family import Naming
from rcm_megatron.families.fields import check_heads
from rcm_megatron.families.key_map import Entry
from rcm_megatron.registries import FORMATS

if TYPE_CHECKING:
    from rcm_megatron.config import ModelConfig

Source = CheckpointSource | Mapping[str, Tensor]
NamedTensors = Iterable[tuple[str, Tensor]] | Mapping[str, Tensor]


def internal_shapes(model_config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Full (unsharded) shape of every internal parameter, in the order in which the network runs."""
    return {name: entry.internal_shape for name, entry in entries_for("internal", model_config).items()}


def naming_of(format: str, model_config: ModelConfig) -> Naming:
    """The names of a network in a format. Raises CheckpointError for a format that does not know its family."""
    check_heads(model_config.hidden_size, model_config.num_heads)
    return FORMATS[format].naming_of(model_config)


def entries_for(format: str, model_config: ModelConfig) -> dict[str, Entry]:
    """Internal name -> Entry of a format's key map."""
    return naming_of(format, model_config).key_map.entries(model_config)


def as_source(source: Source) -> CheckpointSource:
    return source if isinstance(source, CheckpointSource) else source_from_tensors(source)


def checked_entries(
    source: Source, model_config: ModelConfig, format: str | None = None
) -> tuple[CheckpointSource, dict[str, Entry]]:
    """The source and its entries, after checking that its keys are exactly those of the map, with the right shapes.

    Raises CheckpointError, which names those that are not.
    """
    source = as_source(source)
    naming = naming_of(format or source.format, model_config)
    entries = naming.key_map.entries(model_config)
    if source.is_described:
        check_same_network(source.model_config(), model_config, where=source.where)
    shapes = {name: entry.external_shape for entry in entries.values() for name in entry.external}
    held = {name for name in source if not name.endswith(naming.no_weights)}
    problems = name_keys("missing", set(shapes) - held, held - set(shapes))
    problems += name_keys("unknown", held - set(shapes), set(shapes) - held or shapes)
    for name in shapes.keys() & source.keys():
        if source.shape(name) != shapes[name]:
            problems += f"\n  {name!r}: got shape {list(source.shape(name))}, need {list(shapes[name])}"
    if problems:
        raise CheckpointError(f"{source.where} does not fit the model:{problems}")
    return source, entries


def to_internal(source: Source, model_config: ModelConfig, format: str | None = None) -> Iterator[tuple[str, Tensor]]:
    """Stream (internal name, full tensor) for every parameter of the model; `format` default: told from the keys."""
    source, entries = checked_entries(source, model_config, format)
    return ((name, read_internal(source, entry)) for name, entry in entries.items())


def translate(source: CheckpointSource, model_config: ModelConfig, format: str) -> Iterator[tuple[str, Tensor]]:
    """Stream (name in `format`, tensor), each tensor in its own dtype; what `format` joins, in the narrowest that holds all parts."""
    source, entries = checked_entries(source, model_config)
    key_map = naming_of(format, model_config).key_map
    targets, prefix = key_map.entries(model_config), key_map.prefix
    return (
        (prefix + name, part)
        for internal, entry in entries.items()
        for name, part in _translate(source, entry, targets[internal])
    )


def _translate(source: CheckpointSource, entry: Entry, target: Entry) -> Iterator[tuple[str, Tensor]]:
    dtypes = []

    def parts() -> Iterator[Tensor]:
        for name in entry.external:
            part = source.read(name)
            dtypes.append(part.dtype)
            yield part

    together = entry.join(parts())
    alike = len(entry.external) == len(target.external)
    for index, (name, part) in enumerate(zip(target.external, target.split(together), strict=True)):
        yield name, part.to(dtypes[index]) if alike else part


def widened(source: CheckpointSource, model_config: ModelConfig, format: str) -> list[str]:
    """Names of the tensors in `format` that join parts of several dtypes."""
    targets = entries_for(format, model_config)
    return [
        targets[internal].external[0]
        for internal, entry in entries_for(source.format, model_config).items()
        if not targets[internal].fused and len({source.tensors[name].dtype for name in entry.external}) > 1
    ]


def read_internal(
    source: CheckpointSource, entry: Entry, *, partition_dim: int | None = None, rank: int = 0, size: int = 1
) -> Tensor:
    """One internal parameter, or part `rank` of `size` along `partition_dim`, reading no more than that of the file."""
    if partition_dim is None or size == 1:
        return entry.join(source.read(name) for name in entry.external)
    check_divides(entry, partition_dim, size)
    rows = entry.external_shape[partition_dim]
    start, stop = rank * rows // size, (rank + 1) * rows // size
    parts = (source.read(name, dim=partition_dim, start=start, stop=stop) for name in entry.external)
    return entry.join(parts) if entry.fused else next(parts)


def check_divides(entry: Entry, partition_dim: int, size: int) -> None:
    """Tensor parallelism cuts whole heads of a fused projection, and equal parts of everything else.

    Raises CheckpointError where that cannot be.
    """
    heads = entry.external_shape[0] // entry.head_dim
    amount, unit = (heads, "heads") if entry.fused else (entry.internal_shape[partition_dim], "elements")
    if amount % size or (entry.fused and partition_dim != 0):
        raise CheckpointError(
            f"{entry.internal!r}: {amount} {unit} of dimension {partition_dim} do not divide over {size} tensor-parallel "
            "ranks; set parallel.tp to a divisor"
        )


def from_internal(
    named_tensors: NamedTensors, model_config: ModelConfig, format: str, *, partial: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Stream (external name, tensor) from internal full tensors in any order.

    A name that is unknown, repeated or misshaped is an error at once; one that never came is an error at the end,
    unless `partial` (a chosen set of gradients).
    """
    key_map = naming_of(format, model_config).key_map
    pairs = named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors
    return _split_all(pairs, key_map.entries(model_config), prefix=key_map.prefix, partial=partial)


def _split_all(
    pairs: Iterable[tuple[str, Tensor]], pending: dict[str, Entry], *, prefix: str, partial: bool
) -> Iterator[tuple[str, Tensor]]:
    known = frozenset(pending)
    for name, tensor in pairs:
        if name not in pending:
            fault = "came twice" if name in known else f"is not a parameter of the model{nearest(name, known)}"
            raise CheckpointError(f"internal parameter {name!r} {fault}")
        entry = pending.pop(name)
        if tuple(tensor.shape) != entry.internal_shape:
            raise CheckpointError(f"{name!r}: got shape {list(tensor.shape)}, need {list(entry.internal_shape)}")
        for external, part in zip(entry.external, entry.split(tensor), strict=True):
            yield prefix + external, part
    if pending and not partial:
        raise CheckpointError(f"the model gave too few parameters:{name_keys('missing', pending, ())}")
