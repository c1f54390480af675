"""Building a dataset on many ranks in small units of work: killed at any moment and started again, it gives the same bytes.

Samples [0, N) are cut into shards, and shards into units of consecutive samples. Both follow from the plan, never from the ranks: what
a network computes for a sample depends, in its last bits, on what shares the batch. A unit is done when its `.json` stands in
`<folder>.partial/work`; its samples wait in a tar beside it until the first rank joins the units of a whole shard. `<folder>` appears
under its name with its manifest, when everything is there. All ranks see one file system.
"""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from torch.nn import functional

from rcm_megatron.data.manifest import MANIFEST_NAME, DatasetError, Manifest, build_manifest, load_manifest
from rcm_megatron.data.shards import SHARD_NAME, ShardWriter, TensorFormat, encode_tensor
from rcm_megatron.datasets.statistics import Statistics
from rcm_megatron.files import write_atomically

NEGATIVE_EMBED_NAME = "negative_embed.pt"
SKIPPED_NAME = "skipped.jsonl"
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Unit:
    """Samples that are made together, by one model replica."""

    number: int
    shard: int
    indices: range


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """What is to be built. Shard k holds the samples [k * samples_per_shard, (k + 1) * samples_per_shard) that were not skipped.

    Raises DatasetError for counts below 1.
    """

    num_samples: int
    samples_per_shard: int
    unit_size: int
    member_format: TensorFormat
    recipe: Mapping[str, object]
    """Everything else that the bytes follow from; a build goes on only where it is the same."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "samples_per_shard", "unit_size"):
            if getattr(self, name) < 1:
                raise DatasetError(f"got {name}={getattr(self, name)}, need at least 1")

    def units(self) -> list[Unit]:
        """All units, in the order of their samples."""
        found: list[Unit] = []
        for shard, start in enumerate(range(0, self.num_samples, self.samples_per_shard)):
            end = min(start + self.samples_per_shard, self.num_samples)
            for first in range(start, end, self.unit_size):
                found.append(Unit(len(found), shard, range(first, min(first + self.unit_size, end))))
        return found

    def description(self) -> dict[str, object]:
        """As JSON gives it back."""
        sizes = {name: getattr(self, name) for name in ("num_samples", "samples_per_shard", "unit_size")}
        return json.loads(json.dumps(sizes | {"member_format": self.member_format, "recipe": dict(self.recipe)}))


@dataclass(frozen=True, kw_only=True)
class BuiltSample:
    """One sample as it is stored."""

    index: int
    latent_CTHW: Tensor
    embed_LD: Tensor
    prompt: str
    image: Mapping[str, Tensor] = field(default_factory=dict)
    """Further members of image-to-video datasets, as `ShardWriter.add` takes them."""


class DatasetBuild:
    """One build. `prepare`, `join_shards` and `finish` are the first rank's; the rest is any rank's, for its own units."""

    def __init__(self, folder: str | os.PathLike[str], plan: BuildPlan) -> None:
        self.folder, self.plan = Path(folder), plan
        self.partial = self.folder.with_name(self.folder.name + ".partial")
        work = self.partial / "work"
        self._note, self._units, self._texts, self._joined = (
            work / name for name in ("build.json", "units", "texts", "joined")
        )
        self._work = work
        self._open: dict[int, list[Unit]] = defaultdict(list)
        """Units of the shards that are not joined yet."""
        for unit in plan.units():
            self._open[unit.shard].append(unit)

    def prepare(self) -> list[Unit]:
        """The units that are left; none if the dataset is complete, now or before. DatasetError if the folder holds anything else."""
        if (self.folder / MANIFEST_NAME).exists():
            self._check(load_manifest(self.folder, on_error="raise").description, self.folder)
            return []
        if self.folder.exists() and any(self.folder.iterdir()):
            raise DatasetError(f"{self.folder} holds files, but no {MANIFEST_NAME}; choose another folder, or empty it")
        if (self.partial / MANIFEST_NAME).exists():  # killed within `finish`
            self._check(load_manifest(self.partial, on_error="raise").description, self.partial)
            self._publish()
            return []
        for folder in (self._units, self._texts, self._joined):
            folder.mkdir(parents=True, exist_ok=True)
        if self._note.exists():
            self._check(json.loads(self._note.read_text()), self.partial)
        else:
            write_atomically(self._note, json.dumps({"build": self.plan.description()}).encode())
        for leftover in self.partial.rglob(".*.tmp"):
            leftover.unlink()
        self.join_shards()
        done = self._done()
        left = [unit for units in self._open.values() for unit in units if unit.number not in done]
        if not left:  # killed between the last unit and the manifest
            self.finish()
        return left

    @property
    def negative(self) -> Path:
        """Where the unconditional branch's embedding is, or will be."""
        return self.partial / NEGATIVE_EMBED_NAME

    def put_text(self, unit: Unit, embed_BLD: Tensor) -> None:
        """Keep the embeddings of a unit's captions until it is made: text encoder and network need not fit side by side."""
        write_atomically(self._text(unit), encode_tensor(_trimmed(embed_BLD), "pt"))

    def has_text(self, unit: Unit) -> bool:
        """Whether a former start, or another rank, has encoded its captions."""
        return self._text(unit).exists()

    def text(self, unit: Unit) -> Tensor:
        """The embeddings [B, at most L, D] of a unit; waits for the rank that makes them."""
        return torch.load(wait_for(self._text(unit)), weights_only=True)

    def put_negative(self, embed_LD: Tensor) -> None:
        """Store the unconditional branch's embedding with the dataset, for `data.negative_embedding`."""
        self.put_file(NEGATIVE_EMBED_NAME, encode_tensor(embed_LD, "pt"))

    def put_file(self, name: str, data: bytes) -> None:
        """Add a file beside the shards."""
        write_atomically(self.partial / name, data)

    def write(self, unit: Unit, samples: Sequence[BuiltSample], skipped: Mapping[int, str] | None = None) -> None:
        """Keep a finished unit. `skipped`: why samples of it are missing, by index."""
        statistics = Statistics()
        self._tar(unit).unlink(missing_ok=True)  # of a rank that died before it wrote the .json
        with ShardWriter(
            self._units,
            samples_per_shard=len(unit.indices),
            member_format=self.plan.member_format,
            first_shard=unit.number,
        ) as writer:
            for sample in samples:
                statistics.add(sample.latent_CTHW, sample.embed_LD)
                writer.add(
                    f"{sample.index:09d}",
                    latent_CTHW=sample.latent_CTHW,
                    embed_LD=sample.embed_LD,
                    prompt=sample.prompt,
                    **sample.image,
                )
        reasons = {f"{index:09d}": reason for index, reason in (skipped or {}).items()}
        write_atomically(self._json(unit), _facts(statistics, reasons))
        self._text(unit).unlink(missing_ok=True)

    def join_shards(self) -> int:
        """Join the units of every shard that is whole; returns how many samples are done, skipped ones among them."""
        done = self._done()
        for shard, units in list(self._open.items()):
            if (self._joined / f"{shard}.json").exists() or all(unit.number in done for unit in units):
                self._join(shard, units)
                del self._open[shard]
        left = [unit for units in self._open.values() for unit in units if unit.number not in done]
        return self.plan.num_samples - sum(len(unit.indices) for unit in left)

    def finish(self) -> Manifest:
        """Write the manifest and give the folder its name. All shards are joined. Raises DatasetError where no sample is left."""
        statistics, skipped = Statistics(), {}
        for path in sorted(self._joined.iterdir(), key=lambda path: int(path.stem)):
            part, reasons = _read_facts(path)
            statistics, skipped = statistics.merged(part), skipped | reasons
        if not statistics.num_samples:
            first = "; ".join(list(skipped.values())[:3])
            raise DatasetError(f"{self.partial}: all {len(skipped)} samples were skipped; the first: {first}")
        lines = [json.dumps({"key": key, "reason": reason}, ensure_ascii=False) for key, reason in skipped.items()]
        write_atomically(self.partial / SKIPPED_NAME, "".join(f"{line}\n" for line in lines).encode())
        description = {
            "build": self.plan.description(),
            "num_skipped": len(skipped),
            "statistics": statistics.summary(),
        }
        build_manifest(self.partial, on_error="raise", checksums=True, description=description).save()
        self._publish()
        return load_manifest(self.folder, on_error="raise")

    def _publish(self) -> None:
        shutil.rmtree(self._work, ignore_errors=True)
        self.partial.rename(self.folder)

    def _join(self, shard: int, units: list[Unit]) -> None:
        """Into place, then noted, then the parts are deleted: whichever of the three a kill prevents is done again."""
        note = self._joined / f"{shard}.json"
        if not note.exists():
            statistics, skipped, parts = Statistics(), {}, []
            for unit in units:
                part, reasons = _read_facts(self._json(unit))
                statistics, skipped = statistics.merged(part), skipped | reasons
                parts += [self._tar(unit)] if part.num_samples else []
            if parts:
                _join_tars(self.partial / SHARD_NAME.format(shard), parts)
            write_atomically(note, _facts(statistics, skipped))
        for unit in units:
            self._tar(unit).unlink(missing_ok=True)
            self._json(unit).unlink(missing_ok=True)

    def _done(self) -> set[int]:
        """Numbers of the done units of shards that are not joined."""
        return {int(name.removesuffix(".json")) for name in os.listdir(self._units) if name.endswith(".json")}

    def _check(self, description: Mapping[str, object], where: Path) -> None:
        found, need = dict(description.get("build", {})), self.plan.description()
        found |= found.pop("recipe", {})
        need |= need.pop("recipe")
        differing = [key for key in need if found.get(key) != need[key]]
        if differing:
            got, need = ({key: each.get(key) for key in differing} for each in (found, need))
            raise DatasetError(f"{where} is another build: got {got}, need {need}; choose another folder, or delete it")

    def _tar(self, unit: Unit) -> Path:
        return self._units / SHARD_NAME.format(unit.number)

    def _json(self, unit: Unit) -> Path:
        return self._units / f"{unit.number}.json"

    def _text(self, unit: Unit) -> Path:
        return self._texts / f"{unit.number}.pt"


def wait_for(path: Path) -> Path:
    """The path, once it exists. Without a limit: the launcher ends this rank when the one that makes it dies."""
    while not path.exists():
        time.sleep(_POLL_SECONDS)
    return path


def stored(embed_LD: Tensor, dtype: torch.dtype, *, length: int | None = None) -> Tensor:
    """An embedding as a sample holds it: up to its last position that is not zero, or with zeros up to `length`."""
    embed_LD = _trimmed(embed_LD.detach().cpu().to(dtype)[None])[0]
    return embed_LD if length is None else functional.pad(embed_LD, (0, 0, 0, length - len(embed_LD)))


def _trimmed(embed_BLD: Tensor) -> Tensor:
    used = embed_BLD.ne(0).any(dim=0).any(dim=-1).nonzero()
    return embed_BLD[:, : int(used[-1]) + 1 if len(used) else 1]


def _facts(statistics: Statistics, skipped: Mapping[str, str]) -> bytes:
    return json.dumps({"statistics": statistics.as_dict(), "skipped": dict(skipped)}).encode()


def _read_facts(path: Path) -> tuple[Statistics, dict[str, str]]:
    facts = json.loads(path.read_text())
    return Statistics.from_dict(facts["statistics"]), facts["skipped"]


def _join_tars(target: Path, parts: Sequence[Path]) -> None:
    def write(file: BinaryIO) -> None:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as whole:
            for path in parts:
                with tarfile.open(path, "r:") as part:
                    for member in part:
                        whole.addfile(member, part.extractfile(member))

    write_atomically(target, write)
