"""Where in a file's keys a network stands: below the wrappers of ComfyUI, trainers, DDP, FSDP, torch.compile, or beside others.

A root is what the keys of a network begin with. It is found from the names of the network's own parameters, so any nesting of
wrappers is one, whatever they are called.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TypeVar

from rcm_megatron.checkpoint.values import say_once
from rcm_megatron.errors import CheckpointError, name_keys

T = TypeVar("T")

_INSIDE = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_fpw_module", "_forward_module"}
"""What torch.compile, activation checkpointing, FSDP and Lightning put inside names."""
_ROLES = {
    "net": "student",
    "net_ema": "ema",
    "net_fake_score": "fake_score",
    "net_teacher": "teacher",
    "generator": "student",
    "generator_ema": "ema",
    "critic": "fake_score",
    "fake_score": "fake_score",
    "real_score": "teacher",
    "student": "student",
    "teacher": "teacher",
    "ema": "ema",
}
"""Part of a root -> the network that stands below it: NVIDIA's files, and those of CausVid, Self-Forcing and their kin."""
_OWN_PREFIXES = ("net.", "net_ema.", "net_fake_score.", "net_teacher.")
"""Roots of files of NVIDIA's, which are no wrappers: nothing is said about them."""
_COMPANIONS = {
    "VAE": "vae first_stage_model",
    "text encoder": "text_encoder text_encoders text_encoder_2 cond_stage_model conditioner t5 umt5",
    "image encoder": "clip clip_vision image_encoder",
    "training state": "optimizer optimizers optimizer_states optim lr_scheduler lr_schedulers scheduler grad_scaler loops callbacks",
}
_COMPANION_OF = {part: kind for kind, parts in _COMPANIONS.items() for part in parts.split()}
"""First part of a key -> what it belongs to: all that a file of several models, or of a trainer, holds beside the network."""


def without_inner_wrappers(tensors: Mapping[str, T], *, where: str) -> dict[str, T]:
    """Keys without the parts that wrappers put inside them. CheckpointError where two keys become one."""
    plain: dict[str, T] = {}
    removed = set()
    for name, tensor in tensors.items():
        parts = name.split(".")
        kept = ".".join(part for part in parts if part not in _INSIDE)
        removed.update(part for part in parts if part in _INSIDE)
        if kept in plain:
            raise CheckpointError(
                f"{where}: two keys are {kept!r} without {', '.join(sorted(removed))}; save one network alone"
            )
        plain[kept] = tensor
    if removed:
        say_once(f"{where}: {', '.join(sorted(removed))} left out of the keys")
    return plain


def find_roots(names: Iterable[str], known: Collection[str]) -> list[str]:
    """What the keys of each network begin with. `known`: names of networks' parameters, a block's number written as `#`.

    The text encoder of a file of several models may share a name with a network: what has less than half as many as the largest is none.
    """
    votes = Counter(root for name in names if (root := _root(name.split("."), known)) is not None)
    most = max(votes.values(), default=0)
    return [root for root, count in votes.items() if 2 * count >= most]


def _root(parts: Sequence[str], known: Collection[str]) -> str | None:
    """What stands before the longest end of a key that is a parameter's name."""
    for start in range(len(parts)):
        end = list(parts[start:])
        if len(end) > 2 and end[1].isdigit():
            end[1] = "#"
        if ".".join(end) in known:
            return "".join(f"{part}." for part in parts[:start])
    return None


def choose_root(
    names: Collection[str], known: Collection[str], weights: str | None, *, where: str
) -> tuple[str, str | None, list[str]]:
    """(root, role, names) of the network that `weights` names, or of the only one; role None where its root names none.

    What the file holds beside networks is left out and said, if it is known what it is; CheckpointError names it where it is not.
    """
    roots = find_roots(names, known)
    found = {_role(root) or root: root for root in roots}
    if len(found) < len(roots):
        found = {root: root for root in roots}
    if weights is None and len(found) > 1:
        fix = "--weights NAME" if set(found) <= set(_ROLES.values()) else "--prefix BEGINNING"
        raise CheckpointError(f"{where} holds several networks: {', '.join(found)}; choose one: `convert ... {fix}`")
    if weights is not None and weights not in found:
        held = ", ".join(name for name in found if name in _ROLES.values()) or "one network without a name"
        raise CheckpointError(f"{where} does not hold {weights!r}, but {held}; drop --weights or choose one of them")
    if not found:
        return "", None, list(names)
    chosen = found[weights or next(iter(found))]
    owners = {name: max((root for root in roots if name.startswith(root)), key=len, default=None) for name in names}
    own = [name for name, owner in owners.items() if owner == chosen and not (chosen == "" and _companion(name))]
    _report_others(names, owners, chosen, where=where)
    return chosen, _role(chosen), own


def _report_others(names: Iterable[str], owners: Mapping[str, str | None], root: str, *, where: str) -> None:
    others = [name for name in names if owners[name] in (None, "")]
    kinds = Counter(kind for name in others if (kind := _companion(name)) is not None)
    unknown = [name for name in others if owners[name] is None and _companion(name) is None]
    if unknown:
        raise CheckpointError(
            f"{where}: the network's keys begin with {root!r}:{name_keys('unknown beside them', unknown, ())}\n  fix: save the network "
            f"alone, or read it alone: `convert ... --prefix {root}`"
        )
    left = (
        "; left out: " + ", ".join(f"{kind} ({count} keys)" for kind, count in sorted(kinds.items())) if kinds else ""
    )
    if left or root not in ("", *_OWN_PREFIXES):
        say_once(f"{where}: read the keys that begin with {root!r}{left}")


def _companion(name: str) -> str | None:
    return next((_COMPANION_OF[part] for part in name.split(".")[:2] if part in _COMPANION_OF), None)


def _role(root: str) -> str | None:
    """The network that a root names, by its last part that names one."""
    return next((_ROLES[part] for part in reversed(root.split(".")) if part in _ROLES), None)
