"""Which file of a path is a network's weights: in a Hugging Face cache, a pipeline, a release, beside variants and adapters."""

from __future__ import annotations

import re
from pathlib import Path

from rcm_megatron.checkpoint.values import say_once
from rcm_megatron.errors import CheckpointError

PICKLE_SUFFIXES = (".pt", ".pth")
_TRANSFORMERS = ("transformer", "transformer_2", "high_noise_model", "low_noise_model")
"""Folders of the networks in diffusers' pipelines, and of the two experts in the Wan2.2 release; the first of two is for high noise."""
_STEMS = ("diffusion_pytorch_model", "model")
"""Names of the weights of diffusers and the Wan release, and of this program."""
_INDEX = re.compile(r".+\.safetensors\.index(\.[^.]+)?\.json")
"""Of shards; diffusers and transformers put a variant before `.json`, older files before `.safetensors`."""
_SHARD = re.compile(r".+-\d{5}-of-(\d{5})\.safetensors")


def is_index(path: Path) -> bool:
    """Whether a file lists shards."""
    return _INDEX.fullmatch(path.name) is not None


def snapshot(path: Path) -> Path:
    """`path`, or its only snapshot where it is a repository in a Hugging Face cache. Raises CheckpointError where it has several."""
    if path.name == "snapshots" and (path.parent / "blobs").is_dir():
        path = path.parent
    if not (path / "snapshots").is_dir() or not any((path / name).is_dir() for name in ("refs", "blobs")):
        return path
    found = sorted(folder for folder in (path / "snapshots").iterdir() if folder.is_dir())
    if len(found) == 1:
        return found[0]
    main = path / "refs" / "main"
    current = f"; refs/main is {main.read_text().strip()}" if main.is_file() else ""
    raise CheckpointError(
        f"{path} is a repository in a Hugging Face cache with {len(found)} snapshots{current}; pass one of them: "
        f"{', '.join(str(folder) for folder in found) or 'none is there, download it again'}"
    )


def transformer_folder(path: Path, subfolder: str | None) -> Path:
    """The folder of the transformer inside a diffusers pipeline or the Wan2.2 release, or `path` itself.

    Raises CheckpointError for two experts without a choice, and for one that is not there.
    """
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


def weights_file(folder: Path) -> Path:
    """The file, or the index of shards, that a folder's weights are read from; what else is there is left alone, and said.

    The canonical one before a variant (`.fp16.`), a variant before other names. CheckpointError where several are as good.
    """
    # `._x`: macOS' shadows of files
    visible = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    found = [
        file
        for file in visible
        if is_index(file) or (file.suffix == ".safetensors" and not _SHARD.fullmatch(file.name))
    ]
    found = found or [file for file in visible if file.suffix in PICKLE_SUFFIXES]
    best = next((tier for tier in _tiers(found) if tier), [])
    if len(best) != 1:
        raise CheckpointError(f"{folder}: need one set of weights, got {_names(best) or 'none'}; {_fix(best, visible)}")
    if others := [file for file in found if file != best[0]]:
        say_once(f"{folder}: read {best[0].name}, left alone {_names(others)}")
    if not best[0].is_file():
        raise CheckpointError(f"{best[0]} is a link to nowhere; download it again")
    return best[0]


def refuse_shard(path: Path) -> None:
    """CheckpointError for one of several shards, which holds a part of a network."""
    match = _SHARD.fullmatch(path.name)
    if match is not None and int(match[1]) > 1:
        raise CheckpointError(
            f"{path} is one of {int(match[1])} shards; pass their folder, or their .safetensors.index.json"
        )


def _tiers(found: list[Path]) -> list[list[Path]]:
    """The files in the order in which they are preferred."""
    canonical = [[file for file in found if file.name == stem + end] for stem in _STEMS for end in _CANONICAL_ENDS]
    variants = [file for file in found if file.name.startswith(tuple(f"{stem}." for stem in _STEMS))]
    return [*canonical, [file for file in variants if is_index(file)], variants, found]


_CANONICAL_ENDS = (".safetensors.index.json", ".safetensors")


def _names(files: list[Path]) -> list[str]:
    return [file.name for file in files]


def _fix(best: list[Path], visible: list[Path]) -> str:
    if best:
        return f"pass one of them, as {best[0]}"
    if any(_SHARD.fullmatch(file.name) for file in visible):
        return "these are shards without their index: add the .safetensors.index.json"
    return "pass a folder of .safetensors, .pt, .pth or torch_dist"
