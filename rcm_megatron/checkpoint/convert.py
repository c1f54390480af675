"""Weights between files and models: load a (tensor-parallel) model, gather it back, export it, convert file to file.

`python -m rcm_megatron convert` calls `convert`; training calls `load_into`, `gather_full` and `write_checkpoint`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from tqdm import tqdm

from rcm_megatron import __version__
from rcm_megatron.checkpoint.formats.base import Format, WriteOptions
from rcm_megatron.checkpoint.model_card import Companions, folder_texts
from rcm_megatron.checkpoint.recognise import differences
from rcm_megatron.checkpoint.sources import CheckpointSource, LazyTensor, open_checkpoint
from rcm_megatron.checkpoint.translate import (
    Source,
    check_divides,
    checked_entries,
    from_internal,
    naming_of,
    read_internal,
    translate,
    widened,
)
from rcm_megatron.checkpoint.values import say_once
from rcm_megatron.checkpoint.writers import check_target
from rcm_megatron.config import ModelConfig
from rcm_megatron.config.roles import low_noise_weights
from rcm_megatron.dtypes import DTYPES
from rcm_megatron.errors import CheckpointError, name_keys, nearest
from rcm_megatron.families.key_map import Entry
from rcm_megatron.registries import FORMATS
from rcm_megatron.requests import ConvertRequest

Verify = Callable[[CheckpointSource, ModelConfig, torch.dtype | None], Callable[[Path], None]]
"""(source, its network, dtype of the target or None) -> a function that raises CheckpointError for a target that differs."""


def load_into(
    model: nn.Module | Sequence[nn.Module],
    source: Source,
    *,
    model_config: ModelConfig,
    tp_rank: int = 0,
    tp_size: int = 1,
    partial: bool = False,
) -> None:
    """Fill every parameter of a built model, each rank reading its own slice, cast to the parameter's dtype.

    The model is untouched unless everything fits. An optimizer with fp32 copies must then `reload_model_params`.

    Args:
        model: one module or this rank's pipeline chunks, with internal parameter names (wrappers' `module.` is removed); split
            parameters carry `partition_dim`.
        source: an open checkpoint of any format, or a mapping in its naming.
        partial: the model is a pipeline stage; parameters of the others are left out.
    """
    source, entries = checked_entries(source, model_config)
    parameters = local_parameters(model)
    faults = name_keys("in the model, unknown to the key map", set(parameters) - set(entries), entries)
    if not partial:
        faults += name_keys("in the file, absent from the model", set(entries) - set(parameters), parameters)
    for name in parameters.keys() & entries.keys():
        need = _local_shape(entries[name], partition_dim(parameters[name]), tp_size)
        if tuple(parameters[name].shape) != need:
            got = list(parameters[name].shape)
            faults += f"\n  {name!r}: the model has shape {got}, the file gives {list(need)} on each of {tp_size} ranks"
    if faults:
        raise CheckpointError(f"{source.where} does not fit the built model:{faults}")
    by_chunk = [local_parameters(chunk) for chunk in ([model] if isinstance(model, nn.Module) else model)]
    with torch.no_grad():
        for name, first in parameters.items():
            value = read_internal(source, entries[name], partition_dim=partition_dim(first), rank=tp_rank, size=tp_size)
            for held in by_chunk:  # several hold the embedders
                if name in held:
                    held[name].copy_(value)


def gather_full(
    chunks: nn.Module | Sequence[nn.Module],
    *,
    tp_group: ProcessGroup | None = None,
    pp_group: ProcessGroup | None = None,
    getter: Callable[[nn.Parameter], Tensor] = lambda parameter: parameter,
) -> Iterator[tuple[str, Tensor | None]]:
    """Stream (internal name, full tensor) on the rank that is first in both groups, (name, None) on the others, stage by stage.

    A collective: all ranks of the groups must exhaust it. `getter` picks what is gathered: the parameter, or its gradient
    (`training.optimizer.gather_main_grads`). What several pieces hold is taken from the first of them.
    """
    parameters, seen = local_parameters(chunks), set()
    for owner, catalogue in enumerate(_catalogues(parameters, pp_group, getter)):
        for name, (shape, dim, dtype) in catalogue.items():
            if name in seen:
                continue
            seen.add(name)
            value = None
            if pp_group is None or pp_group.rank() == owner:
                value = _over_tensor_ranks(getter(parameters[name]).detach(), dim, tp_group)
            if owner > 0 and (tp_group is None or tp_group.rank() == 0):
                size = tp_group.size() if tp_group is not None else 1
                whole = shape if dim is None else (*shape[:dim], shape[dim] * size, *shape[dim + 1 :])
                value = _to_first_stage(value, whole, dtype, owner=owner, group=pp_group)
            yield name, value


def _catalogues(parameters: Mapping[str, nn.Parameter], pp_group: ProcessGroup | None, getter) -> list[dict]:
    """Of each stage: {name: (local shape, split dimension, dtype)} of what `getter` gives."""
    mine = {}
    for name, parameter in parameters.items():
        value = getter(parameter)
        if value is None:
            raise CheckpointError(f"{name!r}: the getter returned None; has a backward pass run?")
        mine[name] = (tuple(value.shape), partition_dim(parameter), value.dtype)
    if pp_group is None or pp_group.size() == 1:
        return [mine]
    catalogues: list = [None] * pp_group.size()
    dist.all_gather_object(catalogues, mine, group=pp_group)
    return catalogues


def write_checkpoint(
    named_tensors: Iterable[tuple[str, Tensor | None]],
    model_config: ModelConfig,
    path: str | Path,
    options: WriteOptions | None = None,
    *,
    format: str = "diffusers",
    is_writer: bool = True,
) -> None:
    """Write internal full tensors in a format. The checkpoint appears complete or not at all.

    With `gather_full`, call it on all ranks of its groups, `is_writer` on the first.
    """
    path, options = Path(path), options or WriteOptions()
    check_target(path, force=options.force)
    if not is_writer:
        for _ in named_tensors:
            pass
        return
    write_named(from_internal(named_tensors, model_config, format), model_config, path, options, format=format)


def write_named(
    tensors: Iterable[tuple[str, Tensor]], model_config: ModelConfig, path: Path, options: WriteOptions, *, format: str
) -> None:
    """Write tensors that have the names of the format already."""
    naming = naming_of(format, model_config)
    config = None if naming.write_config is None else naming.write_config(model_config)
    FORMATS[format].container.write(path, tensors, config, options)


def convert(
    request: ConvertRequest,
    *,
    verifier: Verify | None = None,
    companions: Companions | None = None,
    progress: bool = True,
) -> ModelConfig:
    """Convert any checkpoint to one of `FORMATS`.

    Of a run's role that is two networks, a format whose pipelines take two gets both, TARGET/transformer and TARGET/transformer_2; in every
    other the first is written, and a line names the second.

    Args:
        verifier: how `request.verify` is done: called before anything is written; what it returns checks the target before it appears.
        companions: called for a run's student in a format that takes them.

    Returns:
        The configuration of the converted network, of two the first's.

    Raises:
        CheckpointError: for a source that is not what the request says, and for a target that exists, cannot be written or is not verified.
        UserError: for a format that is not registered.
    """
    form, target = FORMATS[request.to], Path(request.target)
    _check_paths(request, form, target)
    source = _opened(request)
    second = _second_network(source)
    convert_to = partial(_convert, request, verifier=verifier, companions=companions, progress=progress)
    if second is not None and form.takes_companions:
        model_config = convert_to(source, target / "transformer")
        same_step = replace(request, source=str(source.folder), weights=second)
        convert_to(_opened(same_step), target / "transformer_2")
        return model_config
    model_config = convert_to(source, target)
    if second is not None:
        say_once(f"{target}: the network of the high noise alone; the other one is --weights {second}")
    return model_config


def _check_paths(request: ConvertRequest, form: Format, target: Path) -> None:
    form.container.check_path(target, format=form.name)
    if not request.force:  # now, for opening a run reads all of it; with force each network's own folder is looked at
        check_target(target, force=False)
    if Path(request.source).resolve().is_relative_to(target.resolve()):
        raise CheckpointError(f"{target} is the source or holds it; choose another target")


def _opened(request: ConvertRequest) -> CheckpointSource:
    return open_checkpoint(
        request.source,
        weights=request.weights,
        subfolder=request.subfolder,
        prefix=request.prefix,
        run_config=request.config,
    )


def _second_network(source: CheckpointSource) -> str | None:
    """What --weights calls the second network of a run's role that is two; None: it is one."""
    return None if source.run is None else low_noise_weights(source.facts["weights"], source.run.networks)


def _convert(
    request: ConvertRequest,
    source: CheckpointSource,
    target: Path,
    *,
    verifier: Verify | None,
    companions: Companions | None,
    progress: bool,
) -> ModelConfig:
    """One network. Nothing is written before source, target and memory are known to be good."""
    check_target(target, force=request.force)
    form, dtype = FORMATS[request.to], _as_dtype(request.dtype)
    model_config = source.model_config(overrides=_stated_fields(request))
    form.naming_of(model_config)
    checked_entries(source, model_config)
    check = None
    if request.verify:
        assert verifier is not None, "a request to verify needs a verifier"
        check = verifier(source, model_config, dtype)
    joined = widened(source, model_config, form.name) if dtype is None else []
    facts = _facts(source, request.source, dtype, joined)
    about = {"title": target.name, "facts": facts, "target_format": form.name}
    paths = {"path": str(target), "pipeline_folder": request.target}
    options = WriteOptions(
        dtype=dtype,
        max_shard_bytes=request.max_shard_size,
        force=request.force,
        metadata=facts,
        texts=folder_texts(model_config, **about, **paths, run=source.run, companions=companions),
        check=check,
    )
    _write_translated(source, model_config, target, options, form, progress=progress)
    if unsaid := _unsaid(form, model_config):
        say_once(f"{target}: {form.name} does not say {unsaid}")
    if joined:
        say_once(f"{target}: dtypes as they were{_widening(joined)}")
    return model_config


def _stated_fields(request: ConvertRequest) -> dict[str, Any]:
    """Settings of the network that the source does not store."""
    given = {name: getattr(request, name) for name in (*_FLAGS, "text_len")}
    return {name: value for name, value in given.items() if value is not None}


def _write_translated(
    source: CheckpointSource,
    model_config: ModelConfig,
    target: Path,
    options: WriteOptions,
    form: Format,
    *,
    progress: bool,
) -> None:
    """With a bar of the tensors that are written."""
    entries = form.naming_of(model_config).key_map.entries(model_config).values()
    title, total = f"{source.format} -> {form.name}", sum(len(entry.external) for entry in entries)
    tensors = translate(source, model_config, form.name)
    shown = tqdm(tensors, title, total=total, unit="tensor", disable=not progress)
    write_named(shown, model_config, target, options, format=form.name)


_FLAGS = {
    "num_heads": "--num-heads {}",
    "patch_size": "--patch-size {} {} {}",
    "eps": "--eps {}",
    "rope_scale": "--rope-scale {} {} {}",
}
"""What the command line takes for a source that does not say it."""


def _unsaid(form: Format, model_config: ModelConfig) -> str:
    """What a file of weights alone leaves to guess and would be guessed wrongly, and how to pass it; empty if there is nothing."""
    naming = form.naming_of(model_config)
    if naming.write_config is not None:
        return ""
    entries = naming.key_map.entries(model_config).values()
    shapes = {name: entry.external_shape for entry in entries for name in entry.external}
    source = CheckpointSource("", {name: LazyTensor(shape, None) for name, shape in shapes.items()})
    values = {name: getattr(model_config, name) for name in _FLAGS if hasattr(model_config, name)}
    values = {name: value for name, value in values.items() if _differs(source, model_config, values, without=name)}
    flags = [_FLAGS[name].format(*(value if isinstance(value, tuple) else (value,))) for name, value in values.items()]
    rest = differences(source.model_config(overrides=values), model_config)
    lost = [f"{name}={need!r}" for name, (_, need) in rest.items()]
    return "; ".join([*([f"this: read it with {' '.join(flags)}"] if flags else []), *lost])


def _differs(source: CheckpointSource, model_config: ModelConfig, values: Mapping[str, Any], *, without: str) -> bool:
    """Whether reading a file goes wrong when one value is not passed."""
    try:
        got = source.model_config(overrides={name: value for name, value in values.items() if name != without})
    except CheckpointError:
        return True
    return differences(got, model_config) != differences(source.model_config(overrides=values), model_config)


def _facts(source: CheckpointSource, path: str | Path, dtype: torch.dtype | None, joined: list[str]) -> dict[str, str]:
    """Provenance of a conversion, with what an export before it left in the source's header."""
    path = Path(path)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    before = {f"source {name}": value for name, value in source.metadata.items() if name != "format"}
    names = {dtype: name for name, dtype in DTYPES.items()}
    return {
        **source.facts,
        "source": str(path.resolve()),
        "source format": source.format,
        "source size": f"{sum(file.stat().st_size for file in files)} bytes in {len(files)} file(s)",
        **before,
        "dtype": names.get(dtype, "as in the source" + _widening(joined)),
        "rcm_megatron": __version__,
    }


def _widening(joined: list[str]) -> str:
    if not joined:
        return ""
    return f", but for {len(joined)} tensors that join parts of several, in one that holds them all: {joined[0]!r} and its like"


def _as_dtype(dtype: str | None) -> torch.dtype | None:
    if dtype is None:
        return None
    if dtype not in DTYPES:
        raise CheckpointError(f"unknown dtype {dtype!r}{nearest(dtype, DTYPES)}; need one of {list(DTYPES)}")
    return DTYPES[dtype]


def local_parameters(chunks: nn.Module | Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    """Internal name -> parameter of this rank; the `module.` of Megatron's wrappers is removed.

    Of a parameter that several chunks hold, the first chunk's.
    """
    parameters: dict[str, nn.Parameter] = {}
    for chunk in [chunks] if isinstance(chunks, nn.Module) else chunks:
        for name, parameter in chunk.named_parameters():
            while name.startswith("module."):
                name = name.removeprefix("module.")
            parameters.setdefault(name, parameter)
    return parameters


def partition_dim(parameter: nn.Parameter) -> int | None:
    """The dimension that tensor parallelism splits, or None for a replicated parameter."""
    return parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None


def _local_shape(entry: Entry, dim: int | None, size: int) -> tuple[int, ...]:
    shape = entry.internal_shape
    if dim is None:
        return shape
    check_divides(entry, dim, size)
    return (*shape[:dim], shape[dim] // size, *shape[dim + 1 :])


def _over_tensor_ranks(shard: Tensor, dim: int | None, group: ProcessGroup | None) -> Tensor | None:
    """The whole tensor on the group's first rank, None on the others."""
    if group is None or group.size() == 1:
        return shard
    if dim is None:
        return shard if group.rank() == 0 else None
    shard = shard.contiguous()
    shards = [torch.empty_like(shard) for _ in range(group.size())] if group.rank() == 0 else None
    dist.gather(shard, shards, group=group, group_dst=0)
    return torch.cat(shards, dim=dim) if shards is not None else None


def _to_first_stage(
    value: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, *, owner: int, group: ProcessGroup
) -> Tensor | None:
    """`value` of the stage `owner` on the first stage, None on the others."""
    if group.rank() == owner:
        dist.send(value.contiguous(), group=group, group_dst=0)
    if group.rank() != 0:
        return None
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else "cpu"
    received = torch.empty(shape, dtype=dtype, device=device)
    dist.recv(received, group=group, group_src=owner)
    return received
