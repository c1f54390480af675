"""Megatron torch_dist folders without process groups: read slice by slice, written tensor by tensor.

Two kinds are read: a run's checkpoint (`checkpoint/dist.py`: `NAME.main.*`, `NAME.model.*`, `NAME.ema.*`), and weights alone,
`network.model.*` with a config.json, which `write_torch_dist` writes. Names and shapes are internal ones, whole, so both fit
any tp, pp and vpp. `.metadata` is a pickle: it is read by an unpickler that knows tensor metadata and nothing else.
"""

from __future__ import annotations

import io
import json
import math
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PosixPath
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from rcm_megatron.checkpoint.folders import sync_to_disk
from rcm_megatron.checkpoint.values import rounded
from rcm_megatron.errors import CheckpointError, nearest

METADATA_FILE, CONFIG_FILE, COMMON_FILE = ".metadata", "metadata.json", "common.pt"
_KINDS = ("model", "main")
"""Of a network's weights, the better one last: fp32 main parameters."""
_MEGATRON_CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def is_torch_dist(folder: Path) -> bool:
    """Whether a folder is a complete torch_dist checkpoint."""
    return all((folder / name).is_file() for name in (METADATA_FILE, CONFIG_FILE))


class TorchDistFolder:
    """An open torch_dist folder: its tensors by key, any slice of which can be read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metadata = read_metadata(folder)
        with _damaged(folder / METADATA_FILE):
            tensors = self._metadata.state_dict_metadata.items()
            held = {key: tensor for key, tensor in tensors if isinstance(tensor, TensorStorageMetadata)}
            self.shapes = {key: tuple(tensor.size) for key, tensor in held.items()}
            self.dtypes = {key: tensor.properties.dtype for key, tensor in held.items()}
            self._check_files()

    def choose(self, weights: str | None) -> tuple[str, str]:
        """(what is read, prefix of its keys): the one network that is there, or the one of them that `weights` names.

        Raises CheckpointError where there is none, or several and no choice.
        """
        found = self.networks()
        if not found:
            raise CheckpointError(f"{self.folder}: no network in it; keys look like {sorted(self.shapes)[:3]}")
        if weights is None and len(found) > 1:
            raise CheckpointError(
                f"{self.folder} holds several networks: {', '.join(found)}; choose one: `convert ... --weights NAME`"
            )
        if weights is not None and weights not in found:
            raise CheckpointError(
                f"{self.folder} holds no weights {weights!r}{nearest(weights, found)}; need one of {', '.join(found)}"
            )
        name = weights or next(iter(found))
        return name, found[name]

    def networks(self) -> dict[str, str]:
        """What may be asked for -> prefix of its keys: networks by role, their averages as ROLE.ema (the student's as ema)."""
        begins = {tuple(key.split(".", 2)[:2]) for key in self.shapes}
        found = {}
        for role in sorted({role for role, *_ in begins}, key=lambda role: (role != "student", role)):
            if kinds := [kind for kind in _KINDS if (role, kind) in begins]:
                found[role] = f"{role}.{kinds[-1]}."
            if (role, "ema") in begins:
                found["ema" if role == "student" else f"{role}.ema"] = f"{role}.ema."
        return found

    def read(self, key: str, index: tuple[slice, ...]) -> Tensor:
        """`tensor[index]` of a key, for slices of step 1, reading the chunks that it touches one after the other.

        Raises CheckpointError where they are damaged.
        """
        with _damaged(self.folder):
            stored = self._metadata.state_dict_metadata[key]
            bounds = [part.indices(size)[:2] for part, size in zip(index, stored.size, strict=True)]
            starts, sizes = [start for start, _ in bounds], [stop - start for start, stop in bounds]
            chunk = ChunkStorageMetadata(offsets=torch.Size(starts), sizes=torch.Size(sizes))
            items = create_read_items_for_chunk_list(key, stored, [chunk])
            covered = sum(math.prod(item.lengths) for item in items)
            if covered != math.prod(sizes):
                raise ValueError(f"its chunks hold {covered} of {math.prod(sizes)} elements of {key!r}")
            target = None
            for item in items:
                stored_chunk = self._read_chunk(item)
                if len(items) == 1 and list(stored_chunk.shape) == sizes:
                    return stored_chunk  # not copied: it may be the largest tensor of the network
                if target is None:
                    target = torch.empty(sizes, dtype=stored.properties.dtype)
                part = stored_chunk[_slices(item.storage_offsets, item.lengths)]
                target[_slices(item.dest_offsets, item.lengths)] = part
        return target

    def _read_chunk(self, item: ReadItem) -> Tensor:
        """What torch.save wrote of one chunk."""
        info = self._metadata.storage_data[item.storage_index]
        if getattr(info, "transform_descriptors", None):
            raise ValueError(f"{info.relative_path} was written through {info.transform_descriptors}; need it as it is")
        with open(self.folder / info.relative_path, "rb") as file:
            chunk = torch.load(_Part(file, info.offset, info.length), map_location="cpu", weights_only=True)
        need = self._metadata.state_dict_metadata[item.storage_index.fqn].properties.dtype
        if not isinstance(chunk, Tensor) or not is_plain(chunk) or chunk.dtype != need:
            raise ValueError(f"{info.relative_path} holds no plain tensor of {need} for {item.storage_index.fqn!r}")
        return chunk

    def _check_files(self) -> None:
        """Every chunk of every tensor lies inside a file of this folder."""
        for key, tensor in self._metadata.state_dict_metadata.items():
            for chunk in getattr(tensor, "chunks", ()):
                info = self._metadata.storage_data[MetadataIndex(key, chunk.offsets)]
                path = self.folder / info.relative_path
                if Path(info.relative_path).name != info.relative_path or not path.is_file():
                    raise CheckpointError(
                        f"{self.folder}: {key!r} is said to be in the file {info.relative_path!r}, which is not there"
                    )
                size = path.stat().st_size
                if not 0 <= info.offset <= info.offset + info.length <= size:
                    raise CheckpointError(
                        f"{path}: truncated: it has {size} bytes, and {key!r} ends at {info.offset + info.length}; copy it again"
                    )


class _Part(io.RawIOBase):
    """`length` bytes of a file from `start`, as a file; torch.load reads a storage from it straight into its memory."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        super().__init__()
        self._file, self._start, self._length = file, start, length
        self.seek(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell() - self._start

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self._length}[whence]
        return self._file.seek(self._start + base + offset) - self._start

    def readinto(self, buffer) -> int:
        left = max(self._length - self.tell(), 0)
        return self._file.readinto(memoryview(buffer)[:left])


def _slices(starts: Sequence[int], sizes: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))


def write_torch_dist(
    folder: Path,
    named_tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    metadata: Mapping[str, str],
) -> None:
    """Fill an empty folder with `network.model.*` of internal full tensors, holding one at a time; `metadata` goes into common.pt."""
    tensors, places = {}, {}
    file, name = None, ""
    try:
        for internal, tensor in named_tensors:
            tensor = rounded(internal, tensor.detach().cpu(), dtype).contiguous()
            # torch.save would write the rest of its memory as well
            if tensor.untyped_storage().nbytes() != tensor.nbytes:
                tensor = tensor.clone()
            if file is None or (file.tell() and file.tell() + tensor.nbytes > max_shard_bytes):
                file = _next_file(
                    file, folder / (name := f"__0_{len({info.relative_path for info in places.values()})}.distcp")
                )
            key, start, origin = f"network.model.{internal}", file.tell(), torch.Size([0] * tensor.ndim)
            save_with_torch(tensor, file)
            places[MetadataIndex(key, origin)] = _StorageInfo(name, start, file.tell() - start)
            properties = TensorProperties.create_from_tensor(tensor)
            tensors[key] = TensorStorageMetadata(properties, tensor.shape, [ChunkStorageMetadata(origin, tensor.shape)])
    finally:
        _next_file(file, None)
    _write(folder / METADATA_FILE, pickle.dumps(Metadata(tensors, storage_data=places)))
    save_with_torch(dict(metadata), folder / COMMON_FILE)
    sync_to_disk(folder / COMMON_FILE)
    _write(folder / CONFIG_FILE, json.dumps(_MEGATRON_CONFIG).encode())


def save_with_torch(value: Any, file: Path | BinaryIO) -> None:
    """torch.save, of which a full disk makes a RuntimeError about positions: here it is an OSError."""
    try:
        torch.save(value, file)
    except RuntimeError as error:
        raise error.__context__ if isinstance(error.__context__, OSError) else OSError(str(error)) from error


def _next_file(file, path: Path | None):
    """Close a file when it is on disk; open the next one."""
    if file is not None:
        with file:
            file.flush()
            sync_to_disk(Path(file.name))
    return None if path is None else open(path, "wb")


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    sync_to_disk(path)


@contextmanager
def _damaged(path: Path) -> Iterator[None]:
    """Whatever bad bytes make PyTorch raise, as a CheckpointError that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # damaged bytes make unpickling raise anything
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{path}: refused, it is damaged or not a torch_dist checkpoint of rcm_megatron ({type(error).__name__}: {reason})"
        ) from error


# ---- trust


def is_plain(tensor: Tensor) -> bool:
    """Not on the meta device, sparse, quantized, a subclass, or a few stored values that claim a larger shape by their strides."""
    dense = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_nested
    return dense and not (tensor.is_meta or tensor.is_quantized) and tensor.nbytes <= tensor.untyped_storage().nbytes()


def read_metadata(folder: Path) -> Metadata:
    """`.metadata`, a pickle that PyTorch would load without asking, by the restricted reader.

    Raises ValueError for a pickle of something else.
    """
    path = folder / METADATA_FILE
    with _damaged(path), open(path, "rb") as file:
        metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise ValueError(f"it holds a {type(metadata).__name__}")
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Reads the types that a torch_dist `.metadata` consists of and refuses every other."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _memory_format
        if (module, name) == ("pathlib._local", "PosixPath"):  # its name in Python 3.13, there alone
            return PosixPath
        # A name with a dot would reach through a module's imports: `metadata` has imported os.
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _METADATA_TYPES:
            return super().find_class(module, name)
        raise _foreign(f"{module}.{name}")


def _memory_format(encoding: Any, name: str) -> _MEM_FORMAT_ENCODING:
    """getattr, for the one enum in a `.metadata` alone: Python 3.11.0 to 3.11.3 pickle a member as getattr(enum, name)."""
    if encoding is not _MEM_FORMAT_ENCODING:
        raise _foreign(f"getattr of {encoding!r}")
    return _MEM_FORMAT_ENCODING[name]


def _foreign(what: str) -> pickle.UnpicklingError:
    return pickle.UnpicklingError(
        f"got {what} in .metadata; need tensor metadata only; fix: do not load this file, it is not ours"
    )


_TYPES_MODULE = "torch.distributed.checkpoint.metadata"
_METADATA_TYPES = {
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    (_TYPES_MODULE, "BytesStorageMetadata"),
    (_TYPES_MODULE, "ChunkStorageMetadata"),
    (_TYPES_MODULE, "Metadata"),
    (_TYPES_MODULE, "MetadataIndex"),
    (_TYPES_MODULE, "StorageMeta"),
    (_TYPES_MODULE, "TensorProperties"),
    (_TYPES_MODULE, "TensorStorageMetadata"),
    (_TYPES_MODULE, "_MEM_FORMAT_ENCODING"),
}
