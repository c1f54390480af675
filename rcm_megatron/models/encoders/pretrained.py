"""Loading the encoders' weights through diffusers and transformers: local safetensors only, every weight accounted for."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rcm_megatron.models.encoders.base import EncoderError


def load_pretrained(cls: type, folder: Path, **options: Any) -> nn.Module:
    """`cls.from_pretrained` of a local folder, for inference.

    EncoderError for files that cannot be read, and for a missing, left-over or misshaped weight: both libraries only warn
    of those and go on with random numbers.
    """
    local = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    try:
        model, info = cls.from_pretrained(folder, **local, **options)
    except Exception as error:  # OSError, ValueError, RuntimeError, SafetensorError …: each library has its own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise EncoderError(f"{folder} cannot be loaded as {cls.__name__}: {reason}; copy the folder again") from error
    wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if wrong:
        found = "; ".join(f"{len(keys)} {kind}, e.g. {keys[0]}" for kind, keys in wrong.items())
        raise EncoderError(f"{folder} does not hold the weights of its config.json ({found}); copy the folder again")
    return model.eval().requires_grad_(False)


def free_memory(device: torch.device) -> None:
    """Give the memory of dropped modules back to the system, for others to allocate."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def folder_problems(folder: Path, *, stem: str, expected: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a folder of `<stem>.safetensors` (or its index and shards) and config.json, without loading it.

    `expected`: keys of config.json and their values.
    """
    if not folder.is_dir():
        yield f"{folder} is no folder"
        return
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        yield f"{folder}/config.json cannot be read ({error})"
        return
    for key, value in expected.items():
        if config.get(key) != value:
            yield f"{folder}/config.json: got {key}={config.get(key)!r}, need {value!r}"
    yield from _weight_problems(folder, stem)


def _weight_problems(folder: Path, stem: str) -> Iterator[str]:
    index = folder / f"{stem}.safetensors.index.json"
    names = [f"{stem}.safetensors"]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError) as error:
            yield f"{index} cannot be read ({error})"
            return
    yield from (f"{folder}/{name} is missing" for name in names if not (folder / name).is_file())
