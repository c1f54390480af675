"""Networks of a run that train a LoRA, and the one base of all that begin alike."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from rcm_megatron.checkpoint.translate import entries_for
from rcm_megatron.config import ConfigError, RunConfig
from rcm_megatron.models.dit import DiffusionTransformer
from rcm_megatron.models.lora import AdapterSize, adapters_of, add_adapters, view_of
from rcm_megatron.networks.weights import seeded_uniform

BuildBase = Callable[[str], list[DiffusionTransformer]]
"""A role -> this rank's chunks of what it begins as, frozen, weights set."""


class Bases:
    """Builds each base once. Roles whose weights stay as they were and begin alike (`RunConfig.base_of`) are views of one."""

    def __init__(self, run: RunConfig, build: BuildBase) -> None:
        self._run, self._build, self._built = run, build, {}

    def network(self, role: str) -> list[DiffusionTransformer]:
        """This rank's chunks of a role: a view of its base, with its own adapters where it trains a LoRA."""
        base = self._run.base_of(role)
        if base not in self._built:
            self._built[base] = self._build(base)
        views = [view_of(chunk) for chunk in self._built[base]]
        if self._run.networks[role].lora is not None:
            adapt(views, self._run, role)
        return views


def adapt(views: Sequence[DiffusionTransformer], run: RunConfig, role: str) -> None:
    """Put the LoRA of a role on views of its base, as training begins: A uniform in ±1/√in, by (seed, role, name) alone; B zero."""
    settings, model = run.networks[role].lora, run.model_of(role)
    # where q, k and v are apart
    entries = entries_for("diffusers", model)

    def size(name: str) -> AdapterSize | None:
        if not settings.takes(name):
            return None
        parts = len(entries[f"{name}.weight"].external)
        return AdapterSize(rank=settings.rank, scale=settings.scale, parts=parts, head_dim=model.head_dim)

    for view in views:
        group = view.layout.groups.tp
        add_adapters(view, size, group)
        for name, _, adapter in adapters_of(view):
            shape = entries[f"{name}.weight"].internal_shape
            whole = seeded_uniform(f"{run.seed}/{role}/{name}", (adapter.A.shape[0], shape[1]), fan_in=shape[1])
            width = adapter.A.shape[1]
            start = group.rank() * width if width < shape[1] else 0
            with torch.no_grad():
                adapter.A.copy_(whole[:, start : start + width])


def check_targets(run: RunConfig) -> None:
    """Raises ConfigError for a target that is the beginning of no linear of its network; before any weight is read."""
    for role in run.roles:
        lora, model = run.networks[role].lora, run.model_of(role)
        entries = {} if lora is None else entries_for("internal", model)
        linears = [
            name.removesuffix(".weight")
            for name, e in entries.items()
            if name.endswith(".weight") and len(e.internal_shape) == 2
        ]
        for target in () if lora is None else lora.targets:
            if not any(replace(lora, targets=(target,)).takes(name) for name in linears):
                known = ", ".join(sorted({name.split(".", 2)[2] for name in linears if name.startswith("blocks.")}))
                raise ConfigError(
                    f"networks.{role}.lora.targets: got {target!r}, the beginning of no linear; need one of the network's, or of a block's "
                    f"{known}; fix: take it out"
                )


def as_trained(run: RunConfig, role: str, chunks: list[DiffusionTransformer]) -> list[DiffusionTransformer]:
    """Frozen chunks of a role's base, whose weights are set, as training has them: with its LoRA, if it has one."""
    if run.networks[role].lora is None:
        return chunks
    views = [view_of(chunk) for chunk in chunks]
    adapt(views, run, role)
    return [view.requires_grad_(False) for view in views]
