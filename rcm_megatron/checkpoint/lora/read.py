"""What a LoRA file changes: every key of it belongs to a parameter of the network, or the file is refused by name."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rcm_megatron.checkpoint.lora.naming import namings_of
from rcm_megatron.checkpoint.lora.scale import AdapterSettings, read_settings
from rcm_megatron.checkpoint.sources import CheckpointSource, open_tensors
from rcm_megatron.config import ModelConfig
from rcm_megatron.errors import CheckpointError, name_keys

_PARTS = {
    "down": r"\.(?:lora_A|lora_down|lora\.down)(?:\.[A-Za-z]\w*)?\.weight",
    "up": r"\.(?:lora_B|lora_up|lora\.up)(?:\.[A-Za-z]\w*)?\.weight",
    "up_bias": r"\.(?:lora_B|lora_up|lora\.up)(?:\.[A-Za-z]\w*)?\.bias",
    "alpha": r"\.alpha",
    "diff": r"\.diff",
    "diff_b": r"\.diff_b",
    "diff_m": r"\.diff_m",
}
_OTHER_METHODS = (
    ".dora_scale",
    ".lora_magnitude_vector",
    "hada_w",
    "lokr_w",
    ".lora_mid.",
    ".set_weight",
    ".oft_",
    ".boft_",
)
"""Of DoRA, LoHa, LoKr, Tucker's decomposition, whole weights."""
_LOW_RANK, _BARE = {"down", "up", "alpha"}, "bare"
_LEAF = {"diff": "weight", "diff_b": "bias", "diff_m": _BARE, "up_bias": "bias"}

Place = tuple[str, int]
"""(internal parameter, which of the external tensors that it is made of)."""


@dataclass(frozen=True)
class Target:
    """A parameter as the formats outside have it."""

    place: Place
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Change:
    """What is added to one external tensor: ``delta()``, in its shape and fp32 (fp64 of fp64 factors)."""

    delta: Callable[[], Tensor]
    rank: int | None = None
    """None: no product of two factors."""


@dataclass(frozen=True)
class LoraFile:
    """All changes of one file, read when they are asked for."""

    where: str
    changes: Mapping[Place, list[Change]]

    @property
    def summary(self) -> str:
        """How many modules, of what ranks."""
        changes = [change for listed in self.changes.values() for change in listed]
        ranks = sorted({change.rank for change in changes if change.rank is not None})
        low, other = sum(change.rank is not None for change in changes), sum(change.rank is None for change in changes)
        span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else ""
        return ", ".join(
            filter(None, [f"{low} linears of {span}" if low else "", f"{other} differences" if other else ""])
        )


def open_lora(path: str | Path, model: ModelConfig) -> LoraFile:
    """A LoRA of a network in any naming; alphas, adapter settings in the header or beside the file are heeded.

    Raises CheckpointError, before a tensor is read, for a file with keys of nobody, halves of a pair, other shapes or other methods.
    """
    path = Path(path)
    source = open_tensors(path)
    parsed, root, targets = _parse(source, model)
    settings = read_settings(source, path, root)
    changes: dict[Place, list[Change]] = defaultdict(list)
    problems = ""
    for module, parts in parsed.items():
        found, problem = _changes_of(source, module, parts, targets[module], settings)
        problems += problem
        for place, change in found:
            changes[place].append(change)
    if problems:
        raise CheckpointError(f"{source.where} does not fit the network:{problems}{_FIX}")
    if not changes:
        raise CheckpointError(
            f"{source.where} holds no LoRA; need keys such as 'transformer.blocks.0.attn1.to_q.lora_A.weight'"
        )
    return LoraFile(source.where, changes)


_FIX = "\n  fix: take the LoRA that was made for a network of this size"


def module_targets(model: ModelConfig) -> dict[str, dict[str, Target]]:
    """What files call a module, in any naming -> leaf (weight, bias, bare) -> the parameter."""
    table: dict[str, dict[str, Target]] = defaultdict(dict)
    for naming in namings_of(model):
        for internal, entry in naming.entries(model).items():
            for index, name in enumerate(entry.external):
                target = Target((internal, index), entry.external_shape)
                module, _, leaf = name.rpartition(".")
                if leaf in ("weight", "bias"):
                    table[naming.spelling(module)][leaf] = target
                else:
                    table[naming.spelling(module)][_BARE] = table[naming.spelling(name)]["weight"] = target
    return table


def _parse(
    source: CheckpointSource, model: ModelConfig
) -> tuple[dict[str, dict[str, str]], str, dict[str, dict[str, Target]]]:
    """Module -> part -> key, what stands before all modules, and the modules' parameters."""
    table = module_targets(model)
    found: dict[str, dict[str, str]] = defaultdict(dict)
    roots, unknown = defaultdict(list), []
    for key in source:
        part, name = _part_of(key)
        place = None if part is None else _split_root(name, table)
        if place is None:
            unknown.append(key)
            continue
        root, module = place
        roots[root].append(key)
        if part in found[module]:
            raise CheckpointError(
                f"{source.where}: {found[module][part]!r} and {key!r} are the same change; keep one of them"
            )
        found[module][part] = key
    _refuse_unknown(source, unknown, table)
    if len(roots) > 1:
        raise CheckpointError(
            f"{source.where} holds LoRAs of several networks, {', '.join(map(repr, roots))}; save one alone"
        )
    return found, next(iter(roots), ""), table


def _part_of(key: str) -> tuple[str | None, str]:
    for part, pattern in _PARTS.items():
        if match := re.fullmatch(rf"(.*){pattern}", key):
            return part, match[1]
    return None, key


def _split_root(name: str, table: Mapping[str, object]) -> tuple[str, str] | None:
    """What stands before the longest end of a name that is a module."""
    parts = name.split(".")
    for start in range(len(parts)):
        if (module := ".".join(parts[start:])) in table:
            return ".".join(parts[:start]), module
    return None


def _refuse_unknown(source: CheckpointSource, unknown: list[str], table: Mapping[str, object]) -> None:
    if not unknown:
        return
    other = [key for key in unknown if any(method in key for method in _OTHER_METHODS)]
    if other:
        raise CheckpointError(
            f"{source.where} is no plain LoRA:{name_keys('of another method', other, ())}\n  fix: merge it with its own program"
        )
    blocks = {key for key in unknown if _number(key) is not None}
    most = max((_number(name) or 0 for name in table), default=0)
    fix = "take the LoRA that was made for this network"
    if blocks and all((_number(key) or 0) > most for key in blocks):
        fix = f"it changes block {max(_number(key) or 0 for key in blocks)}, the last one here is {most}: {fix}"
    raise CheckpointError(
        f"{source.where} has keys of nothing in the network:{name_keys('unknown', unknown, ())}\n  fix: {fix}"
    )


def _number(name: str) -> int | None:
    match = re.search(r"blocks[._](\d+)[._]", name)
    return int(match[1]) if match else None


def _changes_of(
    source: CheckpointSource,
    module: str,
    parts: Mapping[str, str],
    targets: Mapping[str, Target],
    settings: AdapterSettings,
) -> tuple[list[tuple[Place, Change]], str]:
    """What a module's keys change, and what is wrong with them."""
    found, problems = [], ""
    if _LOW_RANK & parts.keys():
        problem = _low_rank_problem(source, module, parts, targets)
        problems += problem
        if not problem:
            found.append((targets["weight"].place, _low_rank(source, module, parts, targets["weight"], settings)))
    for part in parts.keys() - _LOW_RANK:
        target, key = targets.get(_LEAF[part]), parts[part]
        if target is None or math.prod(source.shape(key)) != math.prod(target.shape):
            need = "none, for there is no such parameter" if target is None else list(target.shape)
            problems += f"\n  {key!r}: got shape {list(source.shape(key))}, need {need}"
        elif part == "up_bias" and "down" not in parts:
            problems += f"\n  {key!r}: got a bias without factors, need them"
        else:
            scale = settings.scale(module, source.shape(parts["down"])[0]) if part == "up_bias" else 1.0
            found.append((target.place, Change(_difference(source, key, target.shape, scale))))
    return found, problems


def _low_rank_problem(
    source: CheckpointSource, module: str, parts: Mapping[str, str], targets: Mapping[str, Target]
) -> str:
    if absent := [part for part in ("down", "up") if part not in parts]:
        return f"\n  {module!r}: got {sorted(parts)}, need both factors; {' and '.join(absent)} missing"
    if "weight" not in targets or len(targets["weight"].shape) < 2:
        return f"\n  {module!r}: got a low-rank change of what is no linear"
    down, up, need = source.shape(parts["down"]), source.shape(parts["up"]), targets["weight"].shape
    got = (up[0], math.prod(down[1:]))
    if len(down) < 2 or len(up) < 2 or math.prod(up[1:]) != down[0]:
        return f"\n  {module!r}: got A {list(down)} and B {list(up)}, need [r, in] and [out, r]"
    if got != (need[0], math.prod(need[1:])):
        return f"\n  {module!r}: got a change of [{got[0]}, {got[1]}], need [{need[0]}, {math.prod(need[1:])}]"
    if "alpha" in parts and math.prod(source.shape(parts["alpha"])) != 1:
        return f"\n  {parts['alpha']!r}: got shape {list(source.shape(parts['alpha']))}, need one number"
    return ""


def _low_rank(
    source: CheckpointSource, module: str, parts: Mapping[str, str], target: Target, settings: AdapterSettings
) -> Change:
    rank = source.shape(parts["down"])[0]

    def delta() -> Tensor:
        alpha = float(source.read(parts["alpha"]).reshape(())) if "alpha" in parts else None
        scale = settings.scale(module, rank) if alpha is None else alpha / rank
        down, up = (_wide(source.read(parts[part])).flatten(1) for part in ("down", "up"))
        return (scale * (up @ down)).reshape(target.shape)

    return Change(delta, rank)


def _difference(source: CheckpointSource, key: str, shape: tuple[int, ...], scale: float) -> Callable[[], Tensor]:
    return lambda: scale * _wide(source.read(key)).reshape(shape)


def _wide(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()


def sum_of(changes: Iterable[tuple[float, Change]], like: Tensor) -> Tensor:
    """``like`` with the scaled changes, in fp32 or wider."""
    total = _wide(like)
    for scale, change in changes:
        total = total + scale * change.delta()
    return total


def parse_lora(text: str) -> tuple[str, float]:
    """``FILE`` or ``FILE:SCALE``. Raises CheckpointError for a scale that is no finite number."""
    path, colon, scale = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        value = float(scale)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise CheckpointError(
            f"--lora {text}: got the scale {scale!r}; need FILE or FILE:SCALE with a number, e.g. lora.safetensors:0.8"
        )
    return path, value
