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

from rcm_megatron.checkpoint import configs, key_map_cosmos
from rcm_megatron.checkpoint.errors import CheckpointError, name_keys, nearest
from rcm_megatron.checkpoint.folders import find_latest
from rcm_megatron.checkpoint.torch_dist import METADATA_FILE, TorchDistFolder, is_plain, is_torch_dist
from rcm_megatron.config import ConfigError, RunConfig, load_config

_NETWORK_PREFIXES = {"student": "net.", "ema": "net_ema.", "fake_score": "net_fake_score.", "teacher": "net_teacher."}
"""Weights that may be asked for -> what their keys begin with in a file of NVIDIA's that holds several networks."""
_PICKLE_SUFFIXES = (".pt", ".pth")
_TRANSFORMERS = ("transformer", "transformer_2", "high_noise_model", "low_noise_model")
"""Folders of the networks in diffusers' pipelines, and of the two experts in the Wan2.2 release; the first of two is for high noise."""
_CONFIG_READERS = {
    "diffusers": configs.model_config_from_diffusers,
    "wan": configs.model_config_from_wan,
    "nvlabs": configs.model_config_from_wan,
    "internal": configs.model_config_from_internal,
}
_SHAPE_READERS = {
    "wan": configs.model_config_from_shapes,
    "nvlabs": configs.model_config_from_shapes,
    "nvidia": key_map_cosmos.model_config_from_shapes,
}
"""Format -> ModelConfig's fields from shapes, where weights come without a config.json."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file: its shape, and `read(index)` for any tuple of slices."""

    shape: tuple[int, ...]
    read: Callable[[tuple[slice, ...]], Tensor]


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
        """The whole tensor, or rows `start:stop` of dimension `dim`; only those are read from the file."""
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
        return value

    def with_prefix(self, prefix: str) -> CheckpointSource:
        """The part whose keys begin with `prefix`, which is removed."""
        tensors = {name[len(prefix) :]: t for name, t in self.tensors.items() if name.startswith(prefix)}
        if not tensors:
            raise CheckpointError(
                f"{self.where}: no key begins with {prefix!r}; keys look like {next(iter(self), None)!r}"
            )
        return replace(self, where=f"{self.where} [{prefix}]", tensors=tensors)

    @property
    def format(self) -> str:
        """`diffusers`, `wan`, `nvlabs`, `nvidia` or `internal`, told from the keys and the patch embedding's shape."""
        if any(name.startswith(("condition_embedder.", "transformer_blocks.")) for name in self.tensors):
            return "diffusers"
        if key_map_cosmos.NVIDIA_MARKS & self.tensors.keys():
            return "nvidia"
        if {"text_embedding.linear_1.weight", "time_embedding.norm_weight"} & self.tensors.keys():
            return "internal"
        if (
            any(name.startswith("text_embedding.") for name in self.tensors)
            and "patch_embedding.weight" in self.tensors
        ):
            return "wan" if len(self.shape("patch_embedding.weight")) == 5 else "nvlabs"
        raise CheckpointError(
            f"{self.where}: not a Wan or Cosmos-Predict2 network; keys look like {sorted(self.tensors)[:3]}; need the "
            "naming of diffusers, the Wan release, NVlabs/rcm, NVIDIA's Cosmos-Predict2 or rcm_megatron"
        )

    def model_fields(self, *, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Keyword arguments for ModelConfig: from config.json, else from the shapes.

        `overrides` may set what no tensor shows (text_len, rope_max_seq_len), without config.json any field, and `rope_scale` of
        CosmosConfig. Raises CheckpointError, which names this source.
        """
        try:
            return self._model_fields(overrides)
        except CheckpointError as error:
            raise CheckpointError(f"{self.where}: {error}") from None

    def _model_fields(self, overrides: Mapping[str, Any] | None) -> dict[str, Any]:
        form, overrides = self.format, dict(overrides or {})
        known = (*configs.FIELDS, "rope_scale") if form == "nvidia" else configs.FIELDS
        for name in overrides:
            if name not in known:
                raise CheckpointError(f"unknown model field {name!r}{nearest(name, known)}")
        if self.config is not None and form in _CONFIG_READERS:
            seen = (self.shapes(),) if form in ("wan", "nvlabs") else ()
            fields = _CONFIG_READERS[form](self.config, *seen)
            fixed = [n for n in overrides if n not in configs.FREE_FIELDS and overrides[n] != fields[n]]
            if fixed:
                raise CheckpointError(
                    f"config.json says {fixed[0]}={fields[fixed[0]]!r}; drop the override (--{fixed[0].replace('_', '-')})"
                )
            return {**fields, **overrides}
        if form not in _SHAPE_READERS:
            raise CheckpointError("no config.json beside the weights; pass the folder that holds both")
        return _SHAPE_READERS[form](self.shapes(), overrides=overrides)


def source_from_tensors(tensors: Mapping[str, Tensor], *, where: str = "tensors in memory") -> CheckpointSource:
    """A source over tensors that are already there (a state dict, a set of gradients)."""
    lazy = {name: LazyTensor(tuple(tensor.shape), tensor.__getitem__) for name, tensor in tensors.items()}
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
        prefix: use only keys that begin with it; default: what all keys share, as `net.`.
        run_config: the run's YAML, for one of its checkpoints that lies elsewhere than below its config.yaml.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    checkpoint = _find_torch_dist(path)
    if checkpoint is not None:
        return _open_torch_dist(checkpoint, weights, run_config)
    dcp = _dcp_folder(path)
    source = _open_dcp(dcp) if dcp is not None else _open_weights(_transformer_folder(path, subfolder))
    if prefix is not None:
        return source.with_prefix(prefix)
    return _choose_network(source, weights)


def _choose_network(source: CheckpointSource, weights: str | None) -> CheckpointSource:
    """The network that `weights` names, or the only one; its keys' common prefix is removed."""
    found = {
        name: prefix for name, prefix in _NETWORK_PREFIXES.items() if any(key.startswith(prefix) for key in source)
    }
    if weights is None and len(found) > 1:
        raise CheckpointError(
            f"{source.where} holds several networks: {', '.join(found)}; choose one: `convert ... --weights NAME`"
        )
    if weights is None and not (found and all(key.startswith(tuple(found.values())) for key in source)):
        return source
    name = weights or next(iter(found))
    if name not in found:
        raise CheckpointError(
            f"{source.where} does not hold {name!r}, but {', '.join(found) or 'one network without a name'}; drop --weights or choose one "
            "of them"
        )
    return replace(source.with_prefix(found[name]), facts={"weights": name})


def _transformer_folder(path: Path, subfolder: str | None) -> Path:
    """The folder of the transformer inside a diffusers pipeline or the Wan2.2 release, or `path` itself."""
    if (path / "config.json").is_file() and subfolder is None:
        return path
    found = [name for name in _TRANSFORMERS if (path / name / "config.json").is_file()]
    if subfolder is not None:
        if not (path / subfolder).is_dir():
            raise CheckpointError(f"{path} has no folder {subfolder!r}; it has {found or 'no transformer'}")
        return path / subfolder
    if len(found) > 1:
        raise CheckpointError(
            f"{path} holds two experts: {found[0]} (high noise) and {found[1]} (low noise); choose one with --subfolder"
        )
    return path / found[0] if found else path


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
    return replace(source, config=configs.internal_config(model), facts=facts, run=run)


def _lazy(opened: TorchDistFolder) -> CheckpointSource:
    tensors = {key: LazyTensor(shape, partial(opened.read, key)) for key, shape in opened.shapes.items()}
    return CheckpointSource(str(opened.folder), tensors)


def _dcp_folder(path: Path) -> Path | None:
    """Where PyTorch's distributed checkpoint without Megatron's metadata.json is: NVlabs/rcm trains to `iter_N/model` in this format."""
    folders = (folder for folder in (path, path / "model") if (folder / METADATA_FILE).is_file())
    return next((folder for folder in folders if not is_torch_dist(folder)), None)


def _open_dcp(folder: Path) -> CheckpointSource:
    source = _lazy(TorchDistFolder(folder))
    return replace(source, tensors={k: v for k, v in source.tensors.items() if not key_map_cosmos.is_no_weight(k)})


def _open_weights(path: Path) -> CheckpointSource:
    return _open_folder(path) if path.is_dir() else _open_file(path)


def _open_folder(folder: Path) -> CheckpointSource:
    config = _read_json(folder / "config.json") if (folder / "config.json").is_file() else None
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        return replace(_open_index(indices[0]), config=config, folder=folder)
    files = sorted(folder.glob("*.safetensors")) or sorted(f for f in folder.iterdir() if f.suffix in _PICKLE_SUFFIXES)
    if len(indices) > 1 or len(files) != 1:
        names = [file.name for file in (indices or files)]
        fix = "pass one file, or add the index" if names else "pass a folder of .safetensors, .pt, .pth or torch_dist"
        raise CheckpointError(f"{folder}: need one set of weights, got {names or 'none'}; {fix}")
    return replace(_open_file(files[0]), config=config, folder=folder)


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
        listed = {key for key, file in weight_map.items() if file == name}
        problems = name_keys(f"listed in the index but not in {name}", listed - set(shard), shard)
        problems += name_keys(f"in {name} but not listed for it", set(shard) - listed, listed)
        if problems:
            raise CheckpointError(f"{index_path} does not match its files:{problems}")
        tensors |= shard.tensors
        metadata = shard.metadata
    return CheckpointSource(str(index_path.parent), tensors, metadata=metadata)


def _open_file(path: Path) -> CheckpointSource:
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix in _PICKLE_SUFFIXES:
        return _open_pickle(path)
    raise CheckpointError(f"{path}: need a folder, or a file that ends in .safetensors, .pt or .pth")


def _open_safetensors(path: Path) -> CheckpointSource:
    try:
        with safe_open(str(path), framework="pt", device="cpu") as handle:
            shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118 (no mapping)
            metadata = handle.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: truncated or not a safetensors file ({error}); download or write it again"
        ) from error
    tensors = {
        name: LazyTensor(shape, partial(_read_safetensors, path, name))
        for name, shape in shapes.items()
        if not key_map_cosmos.is_no_weight(name)
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
    content = {name: value for name, value in content.items() if not key_map_cosmos.is_no_weight(str(name))}
    for name, value in content.items():
        if not isinstance(value, Tensor):
            fix = "; fix: save that dict alone" if isinstance(value, dict) else ""
            raise CheckpointError(f"{path}: {name!r} is a {type(value).__name__}; need a flat dict of tensors{fix}")
        if not is_plain(value):
            raise CheckpointError(
                f"{path}: refused, {name!r} is no plain tensor; need one with all of its values in the file"
            )
    return source_from_tensors(content, where=str(path))


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
