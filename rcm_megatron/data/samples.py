"""From the bytes of a shard's members to a checked sample, and from a global sample index to that sample.

Members of a sample: `<key>.latent`, `<key>.embed` and `<key>.prompt`, as rcm_megatron.data.shards says, and for image-to-video networks
two more, made of the video's first frame (`.pt`, `.npy` or `.safetensors`, any floating-point type):

- `<key>.image_latent`: [C, T, H, W], the VAE's normalised latent of a video of the sample's length that begins with the frame and goes
  on grey, zeros of pixels in [-1, 1] (`rcm_megatron.models.encoders.image_latent`). Without the mask, which follows from its shape.
- `<key>.image_embed`: [L, D], CLIP's features of the frame (`CLIPImageEncoder`; [257, 1280]), where the network has an image_dim.

Wan2.2 TI2V and Cosmos Video2World need neither: what they are given is the first frames of `<key>.latent`.

Shapes: C channels, T latent frames, H, W, L text positions (always the model's text_len), D text width.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Literal

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from rcm_megatron.data.manifest import Manifest, Record
from rcm_megatron.data.scan import EMBED, IMAGE_EMBED, IMAGE_LATENT, KINDS, LATENT, PROMPT
from rcm_megatron.data.shards import ShardReader, TensorFormat
from rcm_megatron.errors import UserError

logger = logging.getLogger(__name__)

OnError = Literal["skip", "raise"]
_MOST_REPLACEMENTS = 1000
_IMAGE_FIELDS = {IMAGE_LATENT: "image_latent_CTHW", IMAGE_EMBED: "image_embed_LD"}


class SampleError(UserError, RuntimeError):
    """A sample that cannot be used; the message names shard, key and member."""


@dataclass(frozen=True, kw_only=True)
class LoadedSample:
    """One decoded sample: fp32 arrays, checked finite and of the wanted shapes."""

    latent_CTHW: np.ndarray
    embed_LD: np.ndarray
    """As stored, without the zeros that fill it up to text_len."""
    prompt: str
    image_latent_CTHW: np.ndarray | None = None
    image_embed_LD: np.ndarray | None = None
    index: int
    """Global sample index: counts up over the whole run, epochs included."""
    row: int
    """Row of the manifest that it came from."""
    replaced: bool
    """Whether it stands in for an unusable sample."""


def decode_tensor(data: bytes, member_format: TensorFormat) -> np.ndarray:
    """A member's bytes as an fp32 array; ValueError says what is wrong with them. Never runs code from a pickle."""
    try:
        tensor = _parse(data, member_format)
    except (
        Exception
    ) as error:  # each parser has its own zoo: UnpicklingError, RuntimeError, EOFError, SafetensorError …
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot be read as .{member_format}: {reason}") from error
    if isinstance(tensor, Tensor):
        tensor = _to_numpy(tensor)
    if not isinstance(tensor, np.ndarray) or tensor.dtype.kind != "f":
        got = tensor.dtype if isinstance(tensor, np.ndarray) else type(tensor).__name__
        raise ValueError(f"got {got}, need one floating-point tensor")
    return tensor.astype(np.float32, copy=False)


def _parse(data: bytes, member_format: TensorFormat) -> object:
    if member_format == "pt":
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if member_format == "npy":
        return np.load(io.BytesIO(data), allow_pickle=False)
    tensors = safetensors.torch.load(data)
    if len(tensors) != 1:
        raise ValueError(f"it holds {len(tensors)} tensors {sorted(tensors)[:4]}, need exactly one")
    return next(iter(tensors.values()))


def _to_numpy(tensor: Tensor) -> np.ndarray:
    """A NumPy array of the tensor, in fp32 if it is bf16.

    The bits are shifted in NumPy: a torch cast would start an OpenMP pool in each of the loader's threads.
    """
    if tensor.dtype != torch.bfloat16:
        return tensor.detach().numpy()
    bits = tensor.detach().contiguous().view(torch.int16).numpy().view(np.uint16)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _check_finite(array: np.ndarray) -> np.ndarray:
    finite = np.isfinite(array)
    if not finite.all():
        raise ValueError(f"{array.size - int(finite.sum())} of {array.size} values are NaN or Inf")
    return array


def fit_latent(latent: np.ndarray, shape_CTHW: Sequence[int]) -> np.ndarray:
    """The latent as [C, T, H, W]; a longer video is cut to its first T frames, as the official code does.

    ValueError on any other difference of shape, or on a value that is not finite.
    """
    channels, frames, height, width = shape_CTHW
    got = latent.shape
    if latent.ndim == 5 and got[0] == 1:
        latent = latent[0]
    if (
        latent.ndim != 4
        or (latent.shape[0], *latent.shape[2:]) != (channels, height, width)
        or latent.shape[1] < frames
    ):
        raise ValueError(f"got shape {tuple(got)}, need {tuple(shape_CTHW)} in [C, T, H, W] (or more frames)")
    return _check_finite(np.ascontiguousarray(latent[:, :frames]))


def fit_embedding(embed: np.ndarray, *, text_len: int, text_dim: int) -> np.ndarray:
    """The embedding as [at most L, D]. Rows past text_len may only be padding (zeros): a prompt is never cut short.

    Raises ValueError for other shapes, and for a longer prompt.
    """
    got = embed.shape
    if embed.ndim == 3 and got[0] == 1:
        embed = embed[0]
    if embed.ndim != 2 or embed.shape[0] < 1 or embed.shape[1] != text_dim:
        raise ValueError(f"got shape {tuple(got)}, need [1 to text_len={text_len}, text_dim={text_dim}]")
    if embed[text_len:].any():
        used = int(np.flatnonzero(embed.any(axis=1))[-1]) + 1
        raise ValueError(
            f"the prompt fills {used} rows, text_len={text_len} is the most; shorten it or raise model.text_len"
        )
    return _check_finite(np.ascontiguousarray(embed[:text_len]))


def fit_image_embedding(embed: np.ndarray, shape_LD: Sequence[int]) -> np.ndarray:
    """Features of an image as [L, D]. ValueError for any other shape, or for a value that is not finite."""
    got = embed.shape
    if embed.ndim == 3 and got[0] == 1:
        embed = embed[0]
    if embed.shape != tuple(shape_LD):
        raise ValueError(f"got shape {tuple(got)}, need {tuple(shape_LD)} in [L, D]")
    return _check_finite(np.ascontiguousarray(embed))


def load_caption_embedding(path: str | os.PathLike[str], *, text_len: int, text_dim: int) -> Tensor:
    """Embedding [L, D], fp32, of the unconditional branch of classifier-free guidance, filled up with zeros to text_len.

    The file is a lone [l, D] or [1, l, D] tensor: `.pt` (as NVlabs' `umT5_wan_negative_emb.pt`), `.npy` or `.safetensors`.
    Raises SampleError for what does not fit or cannot be read, ValueError for another ending.
    """
    path = Path(path)
    member_format = path.suffix.removeprefix(".").replace("pth", "pt")
    if member_format not in ("pt", "npy", "safetensors"):
        raise ValueError(f"negative embedding {path} must be a .pt, .npy or .safetensors file")
    try:
        stored = fit_embedding(decode_tensor(path.read_bytes(), member_format), text_len=text_len, text_dim=text_dim)
    except ValueError as error:
        raise SampleError(f"negative embedding {path}: {error}") from error
    embed_LD = torch.zeros(text_len, text_dim)
    embed_LD[: len(stored)] = torch.from_numpy(stored)
    return embed_LD


class SampleSource:
    """Global sample index -> decoded sample, the same on every rank and layout; safe to call from several threads.

    Index g is position g % N of the permutation of epoch g // N. With on_error="skip", an unusable sample gives its place to
    the next usable one of the same epoch's order (which then comes twice, with noise of its own, for noise follows g).
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        seed: int,
        latent_shape: Sequence[int],
        text_len: int,
        text_dim: int,
        on_error: OnError,
        image_latent_shape: Sequence[int] | None = None,
        image_embed_shape: Sequence[int] | None = None,
    ) -> None:
        """`image_latent_shape`, `image_embed_shape`: for networks that are given them; DatasetError if the dataset has none."""
        if on_error not in ("skip", "raise"):
            raise ValueError(f"on_error={on_error!r} is unknown; use 'skip' or 'raise'")
        if len(latent_shape) != 4:
            raise ValueError(f"latent_shape={tuple(latent_shape)} must be [C, T, H, W]")
        images = {IMAGE_LATENT: (image_latent_shape, fit_latent), IMAGE_EMBED: (image_embed_shape, fit_image_embedding)}
        self._images = {kind: (tuple(shape), fit) for kind, (shape, fit) in images.items() if shape is not None}
        for kind in self._images:
            manifest.check_has(kind)
        self.manifest = manifest
        self.latent_shape = tuple(latent_shape)
        self.seed = seed
        self.shapes = {"latent_CTHW": self.latent_shape, "embed_LD": (text_len, text_dim)}
        """Of the arrays of a sample, by the name of its field; a text may be shorter."""
        self.shapes |= {_IMAGE_FIELDS[kind]: shape for kind, (shape, _) in self._images.items()}
        self._text_len = text_len
        self._text_dim = text_dim
        self._on_error = on_error
        self._reader = ShardReader(manifest.folder)
        self._orders: dict[int, np.ndarray] = {}
        self._lock = Lock()
        self._unusable: set[int] = set()

    def __getitem__(self, index: int) -> LoadedSample:
        """The sample at global index `index`. SampleError with on_error="raise", or if no replacement is in sight."""
        epoch, position = divmod(index, len(self.manifest))
        order = self._order(epoch)
        tries = min(len(order), _MOST_REPLACEMENTS)
        for skipped in range(tries):
            row = int(order[(position + skipped) % len(order)])
            if row in self._unusable:
                continue
            try:
                fields = self.load(self.manifest.record(row))
            except SampleError as error:
                if self._on_error == "raise":
                    raise
                self._unusable.add(row)
                logger.warning("skipped a sample: %s", error)
                continue
            return LoadedSample(**fields, index=index, row=row, replaced=skipped > 0)
        raise SampleError(
            f"none of the {tries} samples from global index {index} on can be used (dataset {self.manifest.folder}); "
            "the warnings above name them"
        )

    def _order(self, epoch: int) -> np.ndarray:
        with self._lock:
            if epoch not in self._orders:
                for old in [e for e in self._orders if abs(e - epoch) > 1]:
                    del self._orders[old]
                self._orders[epoch] = self.manifest.order(epoch=epoch, seed=self.seed)
            return self._orders[epoch]

    def load(self, record: Record) -> dict[str, np.ndarray | str]:
        """The fields of a LoadedSample that are read. SampleError if one cannot be."""
        kind, fields = LATENT, {}
        try:
            fields["latent_CTHW"] = fit_latent(self._tensor(record, LATENT), self.latent_shape)
            kind = EMBED
            embed = self._tensor(record, EMBED)
            fields["embed_LD"] = fit_embedding(embed, text_len=self._text_len, text_dim=self._text_dim)
            kind = PROMPT
            fields["prompt"] = self._bytes(record, PROMPT).decode("utf-8-sig")
            for kind, (shape, fit) in self._images.items():
                fields[_IMAGE_FIELDS[kind]] = fit(self._tensor(record, kind), shape)
        except (OSError, ValueError) as error:
            member = record.members[kind]
            name = f"{record.key}.{KINDS[kind]}.*" if member is None else member.name
            raise SampleError(f"shard {record.shard}, key {record.key}, member {name}: {error}") from error
        return fields

    def _bytes(self, record: Record, kind: int) -> bytes:
        member = record.members[kind]
        if member is None:
            raise ValueError("it is not in the shard, and this network is given it; build the sample again with it")
        return self._reader.read(record.shard, offset=member.offset, size=member.size, shard_size=record.shard_size)

    def _tensor(self, record: Record, kind: int) -> np.ndarray:
        return decode_tensor(self._bytes(record, kind), record.members[kind].format)
