"""Verifying a dataset folder: every checksum, every member, and the statistics that they give.

Shapes: C channels, T latent frames, H, W, L text positions, D text width.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from rcm_megatron.data.manifest import MANIFEST_NAME, Manifest, Record, read_manifest
from rcm_megatron.data.samples import decode_tensor
from rcm_megatron.data.scan import KINDS, PROMPT, find_shards, scan_shard
from rcm_megatron.data.shards import ShardReader, file_sha256
from rcm_megatron.datasets.statistics import Statistics

_THREADS = 4
_AHEAD = 32
OUTLIER_DEVIATIONS = 8.0
"""Robust standard deviations (1.4826 times the median distance from the median) from the median."""
_SAME = 1e-5


@dataclass(frozen=True, kw_only=True)
class SampleFacts:
    """What one sample holds."""

    shard: str
    key: str
    row: int
    shapes: tuple[tuple[int, ...], ...]
    """Of its tensors, in the order of KINDS, an embedding's without its length."""
    mean: float
    std: float
    """Of the latent."""
    text_length: int
    prompt: str


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """The result. `problems` name shard and key; outliers are no damage."""

    manifest: Manifest
    problems: tuple[str, ...]
    outliers: tuple[str, ...]
    statistics: Statistics
    samples: tuple[SampleFacts, ...]
    num_checksums: int


def inspect_dataset(folder: str | os.PathLike[str], *, progress: Callable[[Iterator], Iterable] = iter) -> Inspection:
    """Read everything. `progress` wraps the iteration over samples, as tqdm does."""
    manifest = read_manifest(folder)
    problems = [*manifest.problems, *_shard_problems(manifest)]
    statistics, samples = Statistics(), []
    for found in progress(_read_samples(manifest)):
        if isinstance(found, str):
            problems.append(found)
            continue
        facts, latent, embed_LD = found
        samples.append(facts)
        if samples[0].shapes[0] == facts.shapes[0]:
            statistics.add(latent, embed_LD)
    problems += _odd_shapes(samples)
    if not problems:
        problems += _changed_statistics(manifest, statistics)
    return Inspection(
        manifest=manifest,
        problems=tuple(problems),
        outliers=tuple(_outliers(samples)),
        statistics=statistics,
        samples=tuple(samples),
        num_checksums=sum(shard.sha256 is not None for shard in manifest.shards),
    )


def _shard_problems(manifest: Manifest) -> Iterator[str]:
    known = {shard.name for shard in manifest.shards}
    for path in find_shards(manifest.folder):
        if path.name not in known:
            yield f"shard {path.name}: not in {MANIFEST_NAME}; delete it, or the manifest to have it built again"
    with ThreadPoolExecutor(_THREADS) as threads:
        yield from filter(None, threads.map(lambda shard: _shard_problem(manifest.folder, shard), manifest.shards))


def _shard_problem(folder: Path, shard) -> str | None:
    try:
        size = (folder / shard.name).stat().st_size
        if size != shard.size:
            return f"shard {shard.name}: got {size} bytes, need {shard.size}; restore it"
        if shard.sha256 is not None and file_sha256(folder / shard.name) != shard.sha256:
            return f"shard {shard.name}: its SHA-256 is not that of the manifest; restore it"
        if shard.sha256 is None and scan_shard(folder / shard.name).content != shard.content:
            return f"shard {shard.name}: other content than when {MANIFEST_NAME} was written; restore it, or delete the manifest"
    except OSError as error:
        return f"shard {shard.name}: {error}"
    return None


def _read_samples(manifest: Manifest) -> Iterator[tuple[SampleFacts, np.ndarray, np.ndarray] | str]:
    """(facts, latent, embedding) of each sample, or what is wrong with it; some are read ahead."""
    reader, rows = ShardReader(manifest.folder), iter(range(len(manifest)))
    with ThreadPoolExecutor(_THREADS) as threads:

        def submit(some: Iterator[int]) -> list:
            return [threads.submit(_read_sample, reader, manifest.record(row), row) for row in some]

        pending = submit(islice(rows, _AHEAD))
        while pending:
            yield pending.pop(0).result()
            pending += submit(islice(rows, 1))


def _read_sample(reader: ShardReader, record: Record, row: int) -> tuple[SampleFacts, np.ndarray, np.ndarray] | str:
    arrays, prompt, name = {}, "", ""
    try:
        for kind, member in enumerate(record.members):
            if member is None:
                continue
            name = member.name
            data = reader.read(record.shard, offset=member.offset, size=member.size, shard_size=record.shard_size)
            if kind == PROMPT:
                prompt = data.decode("utf-8-sig")
                continue
            arrays[KINDS[kind]] = array = decode_tensor(data, member.format)
            bad = array.size - int(np.isfinite(array).sum())
            if bad or not array.size:
                raise ValueError(f"{bad} of {array.size} values are NaN or Inf" if bad else "it has no values")
    except (OSError, ValueError) as error:
        return f"shard {record.shard}, key {record.key}, member {name}: {error}"
    latent, embed = (arrays[name].reshape(arrays[name].shape[-dims:]) for name, dims in (("latent", 4), ("embed", 2)))
    facts = SampleFacts(
        shard=record.shard,
        key=record.key,
        row=row,
        shapes=tuple(array.shape[1:] if name == "embed" else array.shape for name, array in arrays.items()),
        mean=float(latent.mean(dtype=np.float64)),
        std=float(latent.std(dtype=np.float64)),
        text_length=len(embed),
        prompt=prompt,
    )
    return facts, latent, embed


def _odd_shapes(samples: Sequence[SampleFacts]) -> Iterator[str]:
    """Samples whose shapes are not those of most."""
    if samples:
        common, _ = Counter(facts.shapes for facts in samples).most_common(1)[0]
        for facts in samples:
            if facts.shapes != common:
                yield f"shard {facts.shard}, key {facts.key}: got shapes {facts.shapes}, need {common} as in most samples"


def _changed_statistics(manifest: Manifest, statistics: Statistics) -> Iterator[str]:
    noted = manifest.description.get("statistics")
    found = statistics.summary()
    for name in ("latent_mean", "latent_std") if noted else ():
        if not np.allclose(noted[name], found[name], rtol=_SAME, atol=_SAME):
            yield f"{MANIFEST_NAME}: {name} says {noted[name]}, the samples give {found[name]}"


def _outliers(samples: Sequence[SampleFacts]) -> Iterator[str]:
    for name in ("mean", "std"):
        values = np.array([getattr(facts, name) for facts in samples])
        middle = np.median(values) if len(values) else 0.0
        spread = 1.4826 * np.median(np.abs(values - middle)) if len(values) else 0.0
        for facts, value in zip(samples, values, strict=True):
            if abs(value - middle) > OUTLIER_DEVIATIONS * spread > 0:
                yield (
                    f"shard {facts.shard}, key {facts.key}: latent {name} {value:.3g}, median {middle:.3g} "
                    f"({facts.prompt:.60})"
                )
