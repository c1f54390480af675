"""Open a checkpoint of any format without reading its tensors: safetensors (one file, or shards and index), .pt, .pth, torch_dist, DCP.

Nothing is ever unpickled into code: `.pt` files go through `torch.load(weights_only=True)`, memory-mapped where the
file allows. Every defect of a file is a CheckpointError that names the file.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rcm_megatron.checkpoint.files import (
    PICKLE_SUFFIXES,
    is_index,
    refuse_shard,
    snapshot,
    transformer_folder,
    weights_file,
)
from rcm_megatron.checkpoint.folders import find_latest
from rcm_megatron.checkpoint.recognise import describing, is_no_weight, parameter_names, read_model, recognise
from rcm_megatron.checkpoint.torch_dist import METADATA_FILE, TorchDistFolder, is_plain, is_torch_dist
from rcm_megatron.checkpoint.values import DTYPES_IN_HEADERS, dequantised
from rcm_megatron.checkpoint.wrappers import choose_root, without_inner_wrappers
from rcm_megatron.config import ConfigError, ModelConfig, RunConfig, load_config
from rcm_megatron.errors import CheckpointError, name_keys
from rcm_megatron.finite import find_nonfinite
from rcm_megatron.registries import FORMATS

_SETTINGS = (bool, int, float, str, bytes, type(None))
"""What a trainer saves beside tensors, such as its step."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file: its shape, `read(index)` for any tuple of slices, and its dtype where that is known without reading."""

    shape: tuple[int, ...]
    read: Callable[[tuple[slice, ...]], Tensor]
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class CheckpointSource(Mapping[str, Tensor]):
    """A read-only mapping key -> tensor that reads a tensor, or a slice of one, each time it is asked for."""

    where: str
    tensors: Mapping[str, LazyTensor]
    config: Mapping[str, Any] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None
    """That holds config.json and weights."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Provenance for a model card: which weights of which step."""
    run: RunConfig | None = None
    """The run that trained it."""

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def read(self, name: str, *, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """The whole tensor, or rows `start:stop` of dimension `dim`; only those are read from the file.

        Raises CheckpointError for what cannot be read, and for values that are no finite floating-point numbers.
        """
        tensor = self.tensors[name]
        index = [slice(None)] * len(tensor.shape)
        if dim is not None:
            index[dim] = slice(start, stop)
        try:
            value = tensor.read(tuple(index))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.where}: cannot read {name!r}: {error}") from error
        if not value.is_floating_point():
            raise CheckpointError(f"{self.where}: {name!r} holds {value.dtype}; need floating-point weights")
        if (bad := find_nonfinite(value)) is not None:
            raise CheckpointError(
                f"{self.where}: {name!r} holds {bad}; need finite weights: take an earlier checkpoint"
            )
        return value

    def with_prefix(self, prefix: str) -> CheckpointSource:
        """The part whose keys begin with `prefix`, which is removed. Raises CheckpointError where none does."""
        tensors = {name[len(prefix) :]: t for name, t in self.tensors.items() if name.startswith(prefix)}
        if not tensors:
            raise CheckpointError(
                f"{self.where}: no key begins with {prefix!r}; keys look like {next(iter(self), None)!r}"
            )
        return replace(self, where=f"{self.where} [{prefix}]", tensors=tensors)

    @property
    def format(self) -> str:
        """The name of its format, told from the keys and shapes. Raises CheckpointError for a network of nobody."""
        try:
            return recognise(self.shapes())[0].name
        except CheckpointError as error:
            raise CheckpointError(f"{self.where}: {error}") from None

    @property
    def is_described(self) -> bool:
        """Whether a config.json says what network this is."""
        return describing(self.config, self.shapes()) is not None

    def model_config(self, *, overrides: Mapping[str, Any] | None = None) -> ModelConfig:
        """The network: from config.json, else from the shapes.

        `overrides` may set what no tensor shows (text_len, rope_max_seq_len), and without config.json any field. Raises CheckpointError,
        which names this source.
        """
        try:
            return read_model(self.config, self.shapes(), overrides or {})
        except CheckpointError as error:
            raise CheckpointError(f"{self.where}: {error}") from None


def source_from_tensors(tensors: Mapping[str, Tensor], *, where: str = "tensors in memory") -> CheckpointSource:
    """A source over tensors that are already there (a state dict, a set of gradients)."""
    lazy = {name: LazyTensor(tuple(t.shape), t.__getitem__, t.dtype) for name, t in tensors.items()}
    return CheckpointSource(where, lazy)


def open_checkpoint(
    path: str | Path,
    *,
    weights: str | None = None,
    subfolder: str | None = None,
    prefix: str | None = None,
    run_config: str | Path | None = None,
) -> CheckpointSource:
    """Open a file or folder; of a run's folder, the newest complete checkpoint (then call it on all ranks of a process group).

    Args:
        weights: `student`, `ema`, `fake_score` or `teacher`, where there are several networks.
        subfolder: of a diffusers pipeline, the transformer to read; default: `transformer`, if it is the only one.
        prefix: use only keys that begin with it; default: what stands before the network's keys, as `net.` or `model.diffusion_model.`.
        run_config: the run's YAML, for one of its checkpoints that lies elsewhere than below its config.yaml.

    Raises:
        CheckpointError: for a file that is missing, damaged or hostile, and where it takes another argument to know which network is meant.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    path = snapshot(path)
    checkpoint = _find_torch_dist(path)
    if checkpoint is not None:
        return _open_torch_dist(checkpoint, weights, run_config)
    dcp = _dcp_folder(path)
    source = _open_dcp(dcp) if dcp is not None else _open_weights(transformer_folder(path, subfolder))
    source = replace(source, tensors=without_inner_wrappers(source.tensors, where=source.where))
    if prefix is not None:
        source = source.with_prefix(prefix)
    return _choose_network(source, weights)


def open_tensors(path: str | Path) -> CheckpointSource:
    """The tensors of a file or folder whatever they are, wrappers inside of their names left out.

    Raises CheckpointError for a file that is missing, damaged or hostile."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    source = _open_weights(snapshot(path))
    return replace(source, tensors=without_inner_wrappers(source.tensors, where=source.where))


def _choose_network(source: CheckpointSource, weights: str | None) -> CheckpointSource:
    """The network that `weights` names, or the only one: its keys without what stands before all of them, its values without scales."""
    root, role, names = choose_root(source.tensors, parameter_names(), weights, where=source.where)
    tensors = {name[len(root) :]: source.tensors[name] for name in names}
    return replace(
        source,
        where=f"{source.where} [{root}]" if root else source.where,
        tensors=dequantised(tensors, where=source.where),
        facts={"weights": role} if role else {},
    )


def _find_torch_dist(path: Path) -> Path | None:
    """A torch_dist checkpoint: `path` itself, or the newest complete one in it or in its `checkpoints`."""
    if is_torch_dist(path):
        return path
    for root in (path, path / "checkpoints"):
        if any(root.glob("iter_*")):
            latest = find_latest(root)
            if latest is None:
                raise CheckpointError(f"{root} holds no complete checkpoint")
            return latest
    return None


def _open_torch_dist(folder: Path, weights: str | None, run_config: str | Path | None) -> CheckpointSource:
    opened = TorchDistFolder(folder)
    name, prefix = opened.choose(weights)
    source = replace(_lazy(opened).with_prefix(prefix), folder=folder)
    if (folder / "config.json").is_file():
        return replace(source, config=_read_json(folder / "config.json"))
    yaml_path = Path(run_config) if run_config else folder.parent.parent / "config.yaml"
    try:
        run = load_config(yaml_path)
    except (ConfigError, OSError) as error:
        raise CheckpointError(
            f"{folder} is a run's checkpoint and does not say what network it holds; need the run's config.yaml; got {yaml_path}: {error}; "
            "fix: pass it with --config"
        ) from error
    facts = {"run": run.name, "weights": name, "step": folder.name.split("_")[1].lstrip("0") or "0"}
    model = run.model_of(prefix.split(".")[0])
    config = FORMATS["internal"].naming_of(model).write_config(model)
    return replace(source, config=config, facts=facts, run=run)


def _lazy(opened: TorchDistFolder) -> CheckpointSource:
    tensors = {
        key: LazyTensor(shape, partial(opened.read, key), opened.dtypes[key]) for key, shape in opened.shapes.items()
    }
    return CheckpointSource(str(opened.folder), tensors)


def _dcp_folder(path: Path) -> Path | None:
    """Where PyTorch's distributed checkpoint without Megatron's metadata.json is: NVlabs/rcm trains to `iter_N/model` in this format."""
    folders = (folder for folder in (path, path / "model") if (folder / METADATA_FILE).is_file())
    return next((folder for folder in folders if not is_torch_dist(folder)), None)


def _open_dcp(folder: Path) -> CheckpointSource:
    source = _lazy(TorchDistFolder(folder))
    return replace(source, tensors={k: v for k, v in source.tensors.items() if not is_no_weight(k)})


def _open_weights(path: Path) -> CheckpointSource:
    """A file, or those of a folder, with the config.json beside them: the same network, however it is named."""
    file = weights_file(path) if path.is_dir() else path
    source = _open_index(file) if is_index(file) else _open_file(file)
    config = file.parent / "config.json"
    return replace(source, config=_read_json(config) if config.is_file() else None, folder=file.parent)


def _open_index(index_path: Path) -> CheckpointSource:
    weight_map = _read_json(index_path).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not all(isinstance(file, str) for file in weight_map.values())
        or not weight_map
    ):
        raise CheckpointError(f"{index_path}: no 'weight_map' from keys to file names in it")
    tensors: dict[str, LazyTensor] = {}
    metadata: Mapping[str, str] = {}
    for name in sorted(set(weight_map.values())):
        shard_path = index_path.parent / name
        if Path(name).name != name or not shard_path.is_file():
            raise CheckpointError(f"{index_path.name} names the file {name!r}, which is not in {index_path.parent}")
        shard = _open_safetensors(shard_path)
        listed = {key for key, file in weight_map.items() if file == name and not is_no_weight(key)}
        problems = name_keys(f"listed in the index but not in {name}", listed - set(shard), shard)
        problems += name_keys(f"in {name} but not listed for it", set(shard) - listed, listed)
        if problems:
            raise CheckpointError(f"{index_path} does not match its files:{problems}")
        tensors |= shard.tensors
        metadata = shard.metadata
    return CheckpointSource(str(index_path.parent), tensors, metadata=metadata)


def _open_file(path: Path) -> CheckpointSource:
    refuse_shard(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix in PICKLE_SUFFIXES:
        return _open_pickle(path)
    raise CheckpointError(f"{path}: need a folder, or a file that ends in .safetensors, .pt or .pth")


def _open_safetensors(path: Path) -> CheckpointSource:
    try:
        with safe_open(str(path), framework="pt", device="cpu") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
            about = {
                name: (tuple(part.get_shape()), DTYPES_IN_HEADERS.get(part.get_dtype()))
                for name, part in slices.items()
            }
            metadata = handle.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: truncated or not a safetensors file ({error}); download or write it again"
        ) from error
    tensors = {
        name: LazyTensor(shape, partial(_read_safetensors, path, name), dtype)
        for name, (shape, dtype) in about.items()
        if not is_no_weight(name)
    }
    return CheckpointSource(str(path), tensors, metadata=metadata)


def _read_safetensors(path: Path, name: str, index: tuple[slice, ...]) -> Tensor:
    """Through a mapping of its own: the pages of a tensor leave this process with it, and not with the last tensor of the file."""
    with safe_open(str(path), framework="pt", device="cpu") as handle:
        return handle.get_slice(name)[index]


def _open_pickle(path: Path) -> CheckpointSource:
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            _require_stored(path)
        # Transformer Engine's `_extra_state`: bytes that stay bytes
        with torch.serialization.safe_globals([io.BytesIO]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, it is damaged or holds objects other than tensors, which could run code ({_first_line(error)}); "
            "convert it to safetensors where you trust it"
        ) from error
    except Exception as error:  # damaged bytes make unpickling raise anything
        raise CheckpointError(f"{path}: truncated or not a PyTorch file ({_first_line(error)})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}; need a dict of tensors")
    content = {name: value for name, value in _flat(content) if not is_no_weight(name)}
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {name!r} is a {type(value).__name__}; need tensors, in dicts or in none")
        if not is_plain(value):
            raise CheckpointError(
                f"{path}: refused, {name!r} is no plain tensor; need one with all of its values in the file"
            )
    return source_from_tensors(content, where=str(path))


def _flat(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of dicts and lists in dicts, as a trainer saves them, keys joined by dots; settings are none."""
    for name, value in content.items():
        if isinstance(value, dict | list | tuple):
            yield from _flat(value if isinstance(value, dict) else dict(enumerate(value)), f"{prefix}{name}.")
        elif not isinstance(value, _SETTINGS):
            yield f"{prefix}{name}", value


def _require_stored(path: Path) -> None:
    """PyTorch stores the records of its files as they are: compressed ones would be unpacked to any size."""
    with zipfile.ZipFile(path) as archive:
        packed = next((info for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None:
        raise CheckpointError(f"{path}: refused, {packed.filename!r} in it is compressed, which torch.save does not do")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: need a JSON object, got {type(content).__name__}")
    return content
