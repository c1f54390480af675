"""Write a checkpoint so that it appears complete or not at all: temporary sibling, fsync, rename."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from rcm_megatron.checkpoint.folders import sync_to_disk
from rcm_megatron.checkpoint.formats.base import WriteOptions
from rcm_megatron.checkpoint.torch_dist import save_with_torch, write_torch_dist
from rcm_megatron.checkpoint.values import rounded
from rcm_megatron.errors import CheckpointError
from rcm_megatron.files import save_safetensors

FILE_SUFFIXES = (".safetensors", ".pt", ".pth")
NamedTensors = Iterable[tuple[str, Tensor]]


class _Folder:
    """A folder with a config.json beside the weights."""

    def check_path(self, path: Path, *, format: str) -> None:
        if path.suffix in FILE_SUFFIXES:
            raise CheckpointError(f"{path}: {format} is a folder; leave {path.suffix} out of its name")

    def write(self, path: Path, tensors: NamedTensors, config: Mapping[str, Any] | None, options: WriteOptions) -> None:
        fill = partial(self._fill, tensors=tensors, options=options)
        write_folder(path, fill, config=config, force=options.force, texts=options.texts, check=options.check)

    def _fill(self, folder: Path, tensors: NamedTensors, options: WriteOptions) -> None:
        raise NotImplementedError


class SafetensorsFolder(_Folder):
    """`<stem>.safetensors`, or shards with an index."""

    def __init__(self, stem: str) -> None:
        self._stem = stem

    def _fill(self, folder: Path, tensors: NamedTensors, options: WriteOptions) -> None:
        sizes = {"dtype": options.dtype, "max_shard_bytes": options.max_shard_bytes}
        write_safetensors(folder, tensors, stem=self._stem, metadata=options.metadata, **sizes)


class TorchDistContainer(_Folder):
    """Megatron's torch_dist."""

    def _fill(self, folder: Path, tensors: NamedTensors, options: WriteOptions) -> None:
        sizes = {"dtype": options.dtype, "max_shard_bytes": options.max_shard_bytes}
        write_torch_dist(folder, tensors, metadata=options.metadata or {}, **sizes)


class OneFile:
    """One `.safetensors`, `.pt` or `.pth` file; there is no place for a config.json."""

    def check_path(self, path: Path, *, format: str) -> None:
        """Raises CheckpointError for a folder, or another ending."""
        if path.suffix not in FILE_SUFFIXES:
            raise CheckpointError(f"{path}: {format} is one file; end its name in .pt, .pth or .safetensors")
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder; give the path of a file")

    def write(self, path: Path, tensors: NamedTensors, config: Mapping[str, Any] | None, options: WriteOptions) -> None:
        write_file(path, tensors, options)


def check_target(path: str | Path, *, force: bool) -> Path:
    """Refuse to write over something that exists, unless `force` and it is a checkpoint."""
    path = Path(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return path
    if not force:
        raise CheckpointError(f"{path} exists; choose another target, or pass force (--force) to replace it")
    if path.is_dir() and not (path / "config.json").is_file():
        raise CheckpointError(f"{path} exists and is no checkpoint folder (no config.json): it will not be replaced")
    return path


@contextmanager
def replaced_when_done(path: Path) -> Iterator[Path]:
    """A temporary sibling path; on success it takes the place of `path`, on an error it is removed.

    Beside `files.write_atomically`, for this is a folder too, and libraries write into it by its name. Raises CheckpointError where the
    disk does not take it."""
    path = Path(os.path.abspath(path))
    token = uuid.uuid4().hex[:8]
    temporary, previous = (
        path.with_name(f".{path.name}.{kind}-{token}{path.suffix}") for kind in ("incomplete", "previous")
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if path.is_dir():
            path.rename(previous)
        temporary.rename(path)
        sync_to_disk(path.parent)
    except BaseException as error:
        _remove(temporary)
        if previous.exists() and not path.exists():
            previous.rename(path)
        if isinstance(error, OSError | SafetensorError):
            raise CheckpointError(
                f"{path}: cannot be written ({error}); nothing was left there; make room or choose another target"
            ) from error
        raise
    _remove(previous)


def write_folder(
    path: str | Path,
    fill: Callable[[Path], None],
    *,
    config: Mapping[str, Any],
    force: bool = False,
    texts: Mapping[str, str] | None = None,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """A folder with the weights that `fill` writes into it, and `config.json`.

    `texts`: further files by name, such as a README.md. `check` is given the finished folder under its temporary name; what it raises
    keeps the folder from appearing."""
    path = check_target(path, force=force)
    with replaced_when_done(path) as folder:
        folder.mkdir()
        fill(folder)
        _write_json(folder / "config.json", config)
        for name, text in (texts or {}).items():
            (folder / name).write_text(text)
            sync_to_disk(folder / name)
        sync_to_disk(folder)
        if check is not None:
            check(folder)
    return path


def write_safetensors(
    folder: Path,
    named_tensors: Iterable[tuple[str, Tensor]],
    *,
    stem: str,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    metadata: Mapping[str, str] | None,
) -> None:
    """`<stem>.safetensors`, or shards of at most `max_shard_bytes` and an index; holds one shard."""
    header, shards = _header(metadata), []
    for number, shard in enumerate(_shards(named_tensors, dtype, max_shard_bytes)):
        _save_safetensors(shard, folder / f"{number}.safetensors", header)
        shards.append({name: tensor.numel() * tensor.element_size() for name, tensor in shard.items()})
        shard.clear()  # before the next one grows: this variable would hold it all that time
    _name_shards(folder, stem, shards)


def write_file(path: Path, named_tensors: NamedTensors, options: WriteOptions) -> None:
    """One `.safetensors` (with the metadata), `.pt` or `.pth` file; it is in memory once."""
    check_target(path, force=options.force)
    with replaced_when_done(path) as temporary:
        temporary.touch()  # fail now, and not after hours of conversion, where nothing can be written
        tensors = {name: _owned(rounded(name, tensor, options.dtype)) for name, tensor in named_tensors}
        if path.suffix == ".safetensors":
            _save_safetensors(tensors, temporary, _header(options.metadata))
        else:
            save_with_torch(tensors, temporary)
            sync_to_disk(temporary)
        if options.check is not None:
            options.check(temporary)


def _shards(
    named_tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None, max_bytes: int
) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in named_tensors:
        tensor = _owned(rounded(name, tensor, dtype))
        num_bytes = tensor.numel() * tensor.element_size()
        if shard and size + num_bytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += num_bytes
    yield shard


def _name_shards(folder: Path, stem: str, shards: list[dict[str, int]]) -> None:
    """Give the numbered files their final names, which hold the number of shards, and write the index."""
    if len(shards) == 1:
        (folder / "0.safetensors").rename(folder / f"{stem}.safetensors")
        return
    weight_map = {}
    for number, shard in enumerate(shards):
        file = f"{stem}-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(num_bytes for shard in shards for num_bytes in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / f"{stem}.safetensors.index.json", index)


def _owned(tensor: Tensor) -> Tensor:
    """The tensor, contiguous, on the CPU and alone in its memory, as safetensors asks for; a copy where it is not."""
    tensor = tensor.detach()
    alone = (
        tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    )
    return tensor if alone else torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor)


def _header(metadata: Mapping[str, str] | None) -> dict[str, str]:
    return {**{key: str(value) for key, value in (metadata or {}).items()}, "format": "pt"}


def _save_safetensors(tensors: dict[str, Tensor], path: Path, header: dict[str, str]) -> None:
    save_safetensors(tensors, path, metadata=header)
    sync_to_disk(path)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
    sync_to_disk(path)


def _remove(path: Path) -> None:
    """As far as the disk allows: where it does not, another error is on its way."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)
