"""File to file: what `python -m rcm_megatron convert` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from rcm_megatron import __version__
from rcm_megatron.checkpoint.formats.base import Format, WriteOptions
from rcm_megatron.checkpoint.lora.merge import merged
from rcm_megatron.checkpoint.lora.read import open_lora, parse_lora
from rcm_megatron.checkpoint.model_card import Companions, folder_texts
from rcm_megatron.checkpoint.models import write_named
from rcm_megatron.checkpoint.recognise import differences
from rcm_megatron.checkpoint.second_time import with_second_time
from rcm_megatron.checkpoint.sources import CheckpointSource, LazyTensor, open_checkpoint
from rcm_megatron.checkpoint.translate import (
    checked_entries,
    translate,
    widened,
)
from rcm_megatron.checkpoint.values import say_once
from rcm_megatron.checkpoint.writers import check_target
from rcm_megatron.config import ModelConfig
from rcm_megatron.config.roles import low_noise_weights
from rcm_megatron.dtypes import DTYPES
from rcm_megatron.errors import CheckpointError, nearest
from rcm_megatron.registries import FORMATS
from rcm_megatron.requests import ConvertRequest

Verify = Callable[[CheckpointSource, ModelConfig, torch.dtype | None], Callable[[Path], None]]
"""(source, its network, dtype of the target or None) -> a function that raises CheckpointError for a target that differs."""


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
    if request.second_time:
        source, model_config = _with_second_time(source, model_config, form)
    form.naming_of(model_config)
    checked_entries(source, model_config)
    source = _with_loras(request, source, model_config, wide=dtype is not None)
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


def _with_second_time(
    source: CheckpointSource, model_config: ModelConfig, form: Format
) -> tuple[CheckpointSource, ModelConfig]:
    """Raises CheckpointError for a network that has one, and for a format that has no place for it."""
    if model_config.second_time:
        raise CheckpointError(
            f"{source.where}: got --second-time, but it is of two times already; leave the option out"
        )
    model_config = replace(model_config, second_time=True)
    form.naming_of(model_config)
    return with_second_time(source, model_config), model_config


def _with_loras(
    request: ConvertRequest, source: CheckpointSource, model_config: ModelConfig, *, wide: bool
) -> CheckpointSource:
    """The source with the LoRA files that are to be merged into it, which are checked here."""
    if not request.loras:
        return source
    loras = [(open_lora(path, model_config), path, scale) for path, scale in map(parse_lora, request.loras)]
    for lora, path, scale in loras:
        say_once(f"{path}: {lora.summary}, merged at scale {scale:g}")
    facts = {f"LoRA {i}": f"{Path(path).resolve()} at {scale:g}" for i, (_, path, scale) in enumerate(loras, 1)}
    source = merged(source, model_config, [(lora, scale) for lora, _, scale in loras], wide=wide)
    return replace(source, facts={**source.facts, **facts})


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
