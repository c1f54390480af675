"""The low-rank part of the difference of two networks, tensor by tensor: `python -m rcm_megatron extract-lora`."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from rcm_megatron import __version__
from rcm_megatron.checkpoint.lora.naming import LoraNaming, naming_to_write
from rcm_megatron.checkpoint.lora.write import check_lora_path, write_lora
from rcm_megatron.checkpoint.recognise import differences
from rcm_megatron.checkpoint.sources import CheckpointSource, open_checkpoint
from rcm_megatron.checkpoint.translate import checked_entries, entries_for
from rcm_megatron.config import ModelConfig
from rcm_megatron.dtypes import DTYPES
from rcm_megatron.errors import CheckpointError
from rcm_megatron.families.key_map import Entry
from rcm_megatron.files import write_atomically
from rcm_megatron.platform.device import has_gpu, this_device
from rcm_megatron.requests import ExtractLoraRequest

log = logging.getLogger(__name__)

LEFT_OUT_BOUND = 1e-3
"""‖D‖/‖W‖ of what no LoRA holds above which a warning is due: a convention of this program, no bound on samples."""


@dataclass(frozen=True)
class Layer:
    """What is kept of one tensor's difference."""

    name: str
    rank: int
    """0: nothing, the naming does not hold it, or nothing differs."""
    energy: float
    """Σ of the kept squared singular values over ‖D‖²; 1 where nothing differs."""
    difference: float
    """‖D‖ (Frobenius)."""
    weight: float
    """‖W‖ of the teacher."""


def extract_lora(request: ExtractLoraRequest, *, progress: bool = True) -> list[Layer]:
    """Write B = U_r √S_r, A = √S_r V_rᵀ of D = W_student − W_teacher in fp32, D taken before any rounding. Returns what was kept.

    One tensor of each network is in memory at a time, beside the factors. The decomposition runs on CUDA where there is one.

    Raises:
        CheckpointError: for networks that are not alike, a rank below 1, an energy outside (0, 1], a target that exists.
    """
    _check(request)
    teacher, student = (open_checkpoint(path) for path in (request.teacher, request.student))
    overrides = {} if request.num_heads is None else {"num_heads": request.num_heads}
    model = _same_network(teacher, student, overrides)
    naming = naming_to_write(request.naming, model)
    if request.differences and not naming.takes_differences:
        raise CheckpointError(
            f"--differences: {naming.reader} take(s) none in the naming {naming.name}; need --naming native"
        )
    factors, rest, layers = {}, {}, []
    readers = [_Parts(source, model, naming) for source in (teacher, student)]
    places = list(readers[0].places())
    for internal, index, name, entry in tqdm(places, "extract", unit="tensor", disable=not progress):
        weight, changed = (reader.read(internal, index) for reader in readers)
        difference = changed - weight
        down, up, layer = _decomposed(name, difference, weight, request, held=naming.holds(internal, entry))
        if layer.rank:
            factors[(internal, index)] = (down, up)
        elif request.differences and layer.difference:
            rest[_difference_key(naming, name)] = difference
        layers.append(layer)
    if not factors:
        raise CheckpointError(
            f"{request.student}: no linear differs from {request.teacher}; need the student that was trained of it"
        )
    _report(layers, request, saved=request.differences)
    facts = {"teacher": str(Path(request.teacher).resolve()), "student": str(Path(request.student).resolve())}
    facts |= {"rank": str(request.rank), "energy": f"{_total(layers):.6f}", "rcm_megatron": __version__}
    write_lora(
        request.output,
        factors,
        model,
        naming,
        dtype=DTYPES[request.dtype],
        metadata=facts,
        force=request.force,
        differences=rest,
    )
    return layers


def _check(request: ExtractLoraRequest) -> None:
    check_lora_path(request.output, force=request.force)
    if request.rank < 1:
        raise CheckpointError(f"--rank {request.rank}: need 1 or more, e.g. 64")
    if request.energy is not None and not 0 < request.energy <= 1:
        raise CheckpointError(f"--energy {request.energy}: need a share above 0 and at most 1, e.g. 0.95")


def _same_network(teacher: CheckpointSource, student: CheckpointSource, overrides: Mapping[str, int]) -> ModelConfig:
    first, second = (source.model_config(overrides=overrides) for source in (teacher, student))
    if first.family != second.family or (different := differences(second, first)):
        said = (
            "another family"
            if first.family != second.family
            else ", ".join(f"{n}={a!r} against {b!r}" for n, (a, b) in different.items())
        )
        raise CheckpointError(
            f"{student.where} and {teacher.where} are two architectures: {said}; need two networks of one"
        )
    for source in (teacher, student):
        checked_entries(source, first)
    return first


class _Parts:
    """The tensors of a checkpoint as another format has them."""

    def __init__(self, source: CheckpointSource, model: ModelConfig, naming: LoraNaming) -> None:
        self._source, self._own, self._entries = source, entries_for(source.format, model), naming.entries(model)

    def places(self) -> Iterator[tuple[str, int, str, Entry]]:
        """(internal parameter, which part, its name in the format, its entry)."""
        for internal, entry in self._entries.items():
            yield from ((internal, index, name, entry) for index, name in enumerate(entry.external))

    def read(self, internal: str, index: int) -> Tensor:
        """One part, in fp32."""
        own, entry = self._own[internal], self._entries[internal]
        if own.fused:
            return self._source.read(own.external[index]).float()
        parts = entry.split(self._source.read(own.external[0]).reshape(own.internal_shape))
        return next(islice(parts, index, None)).float()


def _decomposed(
    name: str, difference: Tensor, weight: Tensor, request: ExtractLoraRequest, *, held: bool
) -> tuple[Tensor | None, Tensor | None, Layer]:
    """A, B and what they keep."""
    norm, of_weight = float(difference.double().norm()), float(weight.double().norm())
    if not held or norm == 0:
        return None, None, Layer(name, 0, 0.0 if norm else 1.0, norm, of_weight)
    matrix = difference.flatten(1).to(this_device() if has_gpu() else "cpu")
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    energies = s.double().square().cumsum(0) / s.double().square().sum()
    rank = min(request.rank, len(s))
    if request.energy is not None:
        rank = min(rank, int((energies < request.energy * (1 - 1e-12)).sum()) + 1)
    root = s[:rank].sqrt()
    down, up = root[:, None] * v[:rank], u[:, :rank] * root
    return down.cpu(), up.cpu(), Layer(name, rank, float(energies[rank - 1]), norm, of_weight)


def _difference_key(naming: LoraNaming, name: str) -> str:
    module, _, leaf = name.rpartition(".")
    if leaf in ("weight", "bias"):
        return naming.key(module) + (".diff" if leaf == "weight" else ".diff_b")
    return naming.key(name) + ".diff"


def _total(layers: list[Layer]) -> float:
    """Kept share of the squared difference of all linears that the file holds."""
    held = [layer for layer in layers if layer.rank]
    return sum(x.energy * x.difference**2 for x in held) / sum(x.difference**2 for x in held)


def _report(layers: list[Layer], request: ExtractLoraRequest, *, saved: bool) -> None:
    """To the log, and as JSON where it is asked for."""
    held, left = [x for x in layers if x.rank], [x for x in layers if not x.rank and x.difference]
    worst = min(held, key=lambda layer: layer.energy)
    log.info("%d linears, ranks %d to %d", len(held), min(x.rank for x in held), max(x.rank for x in held))
    log.info(
        "kept %.2f %% of their squared difference; least of %s: %.2f %%",
        100 * _total(layers),
        worst.name,
        100 * worst.energy,
    )
    if left:
        norm = sum(x.difference**2 for x in left) ** 0.5
        share = norm / sum(x.weight**2 for x in left) ** 0.5
        level = logging.WARNING if share > LEFT_OUT_BOUND and not saved else logging.INFO
        fate = "written as .diff" if saved else "left out"
        log.log(
            level,
            "%d tensors that no low rank holds (norms, modulation, biases ...) %s: |D| = %.3g, |D|/|W| = %.2g",
            len(left),
            fate,
            norm,
            share,
        )
        for layer in sorted(left, key=lambda layer: -layer.difference)[:5]:
            log.log(
                level,
                "  %s: |D| = %.3g, |D|/|W| = %.2g",
                layer.name,
                layer.difference,
                layer.difference / max(layer.weight, 1e-30),
            )
    if request.report is not None:
        content = {"energy": _total(layers), "layers": [asdict(layer) for layer in layers]}
        write_atomically(request.report, (json.dumps(content, indent=1) + "\n").encode())
