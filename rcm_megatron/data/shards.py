"""WebDataset tar shards of latents: writing them, and reading members by byte offset.

The format is that of the dataset published with NVlabs' rCM: per sample `<key>.latent.pt` (a [C, T, H, W] tensor),
`<key>.embed.pt` (a [L, D] text embedding, zeros after the prompt) and `<key>.prompt.txt` (UTF-8). In place of `.pt` a member
may be `.npy`, or `.safetensors` with one tensor. What image members are is said in rcm_megatron.data.samples.

Shapes: C channels, T latent frames, H, W, L text positions, D text width.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections import OrderedDict
from pathlib import Path
from threading import Lock
from typing import Literal, Self

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

TensorFormat = Literal["pt", "npy", "safetensors"]
TENSOR_FORMATS: tuple[TensorFormat, ...] = ("pt", "npy", "safetensors")
PROMPT_SUFFIX = "prompt.txt"
SHARD_NAME = "shard_{:06d}.tar"

_SAFETENSORS_KEY = "tensor"
_MAX_OPEN_SHARDS = 64


def encode_tensor(tensor: Tensor, member_format: TensorFormat) -> bytes:
    """The tensor as the bytes of a member file; the same tensor always gives the same bytes.

    Raises ValueError for a format that is unknown, or that has no such dtype.
    """
    # torch.save would store a view's whole base
    tensor = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    if member_format == "safetensors":
        return safetensors.torch.save({_SAFETENSORS_KEY: tensor})
    buffer = io.BytesIO()
    if member_format == "pt":
        torch.save(tensor, buffer)
    elif member_format == "npy":
        if tensor.dtype == torch.bfloat16:
            raise ValueError("got a bfloat16 tensor for a .npy member, which has no such type; use .pt or .safetensors")
        np.save(buffer, tensor.numpy(), allow_pickle=False)
    else:
        raise ValueError(f"member_format={member_format!r} is unknown; use one of {TENSOR_FORMATS}")
    return buffer.getvalue()


class ShardWriter:
    """Writes samples into `shard_000000.tar`, … with `samples_per_shard` in each, byte for byte the same on every run.

    A shard appears under its name only when it is complete (written beside it, synced, renamed). Use it in a `with` block:
    leaving by an exception drops the unfinished shard. `member_format` is that of both tensors.
    Raises ValueError for an unknown format, and for no sample in a shard.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        samples_per_shard: int = 256,
        member_format: TensorFormat = "pt",
        first_shard: int = 0,
    ) -> None:
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard={samples_per_shard} must be at least 1")
        if member_format not in TENSOR_FORMATS:
            raise ValueError(f"member_format={member_format!r} is unknown; use one of {TENSOR_FORMATS}")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.samples_per_shard = samples_per_shard
        self.member_format = member_format
        self.num_samples = 0
        self._next_shard = first_shard
        self._in_shard = 0
        self._tar: tarfile.TarFile | None = None
        self._target: Path | None = None
        self._keys: set[str] = set()

    def add(
        self,
        key: str,
        *,
        latent_CTHW: Tensor,
        embed_LD: Tensor,
        prompt: str,
        image_latent_CTHW: Tensor | None = None,
        image_embed_LD: Tensor | None = None,
    ) -> None:
        """Append one sample. `key` must be new, without "." (it ends a WebDataset key) or "/", and at most 80 characters.

        Raises ValueError for another, and FileExistsError for a shard that is there.
        """
        if not key or "." in key or "/" in key or len(key) > 80 or key in self._keys:
            raise ValueError(f"key {key!r} must be new, without '.' or '/', and 1 to 80 characters long")
        tensors = {"latent": latent_CTHW, "embed": embed_LD}
        tensors |= {"image_latent": image_latent_CTHW, "image_embed": image_embed_LD}
        members = {
            f"{key}.{kind}.{self.member_format}": encode_tensor(tensor, self.member_format)
            for kind, tensor in tensors.items()
            if tensor is not None
        }
        members[f"{key}.{PROMPT_SUFFIX}"] = prompt.encode("utf-8")
        tar = self._tar or self._open_shard()
        for name, data in members.items():
            # its defaults (mtime, uid and gid 0, no owner names) are what makes it repeatable
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
        self._keys.add(key)
        self.num_samples += 1
        self._in_shard += 1
        if self._in_shard == self.samples_per_shard:
            self._publish_shard()

    def close(self) -> None:
        """Publish the last, possibly shorter, shard."""
        if self._tar is not None:
            self._publish_shard()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *_: object) -> None:
        if exception_type is None:
            self.close()
        elif self._tar is not None:
            self._tar.close()
            self._temporary().unlink()
            self._tar = None

    def _temporary(self) -> Path:
        return self._target.with_name(f".{self._target.name}.{os.getpid()}.tmp")

    def _open_shard(self) -> tarfile.TarFile:
        self._target = self.folder / SHARD_NAME.format(self._next_shard)
        if self._target.exists():
            raise FileExistsError(f"{self._target} exists; write into an empty folder, or pass another first_shard")
        self._tar = tarfile.open(self._temporary(), "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        return self._tar

    def _publish_shard(self) -> None:
        """As `files.write_atomically` does it, which cannot wait for samples that are added one by one."""
        self._tar.close()
        with open(self._temporary(), "rb") as file:
            os.fsync(file.fileno())
        self._temporary().rename(self._target)
        self._tar = None
        self._in_shard = 0
        self._next_shard += 1


class ShardReader:
    """Reads byte ranges of the shards of one folder; safe to call from several threads."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._open: OrderedDict[str, io.FileIO] = OrderedDict()
        self._lock = Lock()

    def read(self, shard: str, *, offset: int, size: int, shard_size: int) -> bytes:
        """`size` bytes of `shard` from `offset`.

        Raises OSError if the shard cannot be read, is no longer `shard_size` bytes long, or ends within the range.
        """
        try:
            return self._read(shard, offset, size, shard_size)
        except OSError:  # network file systems lose handles now and then: once more, with a fresh one
            with self._lock:
                self._open.pop(shard, None)
            return self._read(shard, offset, size, shard_size)

    def _read(self, shard: str, offset: int, size: int, shard_size: int) -> bytes:
        # our reference keeps the descriptor open, even if another thread evicts it
        file = self._file(shard, shard_size)
        pieces, missing = [], size
        while missing:
            piece = os.pread(file.fileno(), missing, offset + size - missing)
            if not piece:
                raise OSError(f"{shard} ends within bytes {offset} to {offset + size}; it is truncated")
            pieces.append(piece)
            missing -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _file(self, shard: str, shard_size: int) -> io.FileIO:
        with self._lock:
            file = self._open.get(shard)
            if file is not None:
                self._open.move_to_end(shard)
                return file
            file = io.FileIO(self.folder / shard, "r")
            actual = os.fstat(file.fileno()).st_size
            if actual != shard_size:
                raise OSError(
                    f"{shard} is {actual} bytes, its manifest says {shard_size}; restore the shard or build the manifest again"
                )
            self._open[shard] = file
            if len(self._open) > _MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
            return file


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a whole file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
